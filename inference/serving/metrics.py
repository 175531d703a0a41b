"""What the policy server counts and times, for Prometheus, and how much of what clients cause it to log."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from inference.serving.recording import Recorder

RECENT = 1024  # answers that the latency percentiles are taken over
PERCENTILES = (50, 95, 99)
LOG_LINES, LOG_SECONDS = 20, 10.0  # warnings that clients may cause in so many seconds; the rest is counted


class ServerMetrics:
    """Counters of one server; `waiting` tells the length of its queue, `recorder` what it keeps of its requests."""

    def __init__(self, waiting: Callable[[], int], recorder: Recorder | None = None) -> None:
        self.registry = CollectorRegistry()
        self.num_clients = 0
        self.recent: deque[float] = deque(maxlen=RECENT)
        self._requests = Counter("vla_requests", "Requests by outcome", ["outcome"], registry=self.registry)
        self._suspected = Counter(
            "vla_suspected_mistakes",
            "What clients send that differs from the training data, once a connection and kind",
            ["kind"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "vla_request_seconds", "Time from message to reply", registry=self.registry, buckets=_BUCKETS
        )
        self._batch = Histogram(
            "vla_batch_size", "Requests predicted in one pass", registry=self.registry, buckets=(1, 2, 4, 8, 16, 32)
        )
        Gauge("vla_clients", "Connected clients", registry=self.registry).set_function(lambda: self.num_clients)
        Gauge("vla_queue", "Requests that wait for the model", registry=self.registry).set_function(waiting)
        if recorder is not None:
            for name, text, number in (
                ("vla_recorded_steps", "Steps of recorded episodes that are files", lambda: recorder.written),
                ("vla_recording_lost_steps", "Steps that were not recorded", lambda: recorder.lost),
                ("vla_recording_trouble", "1 while recording fails", lambda: recorder.trouble is not None),
            ):
                Gauge(name, text, registry=self.registry).set_function(number)
        percentiles = Gauge(
            "vla_request_seconds_recent", f"Percentiles of the last {RECENT}", ["percentile"], registry=self.registry
        )
        for percent in PERCENTILES:
            percentiles.labels(str(percent)).set_function(lambda percent=percent: self.percentile(percent))

    @contextlib.contextmanager
    def client(self) -> Iterator[None]:
        """Count a client while it is connected."""
        self.num_clients += 1
        try:
            yield
        finally:
            self.num_clients -= 1

    def answered(self, seconds: float, batch_size: int) -> None:
        """A request got its actions."""
        self._requests.labels("ok").inc()
        self._seconds.observe(seconds)
        self._batch.observe(batch_size)
        self.recent.append(seconds)

    def suspected(self, kinds: Iterable[str]) -> None:
        """A client's observations differ from the training data in these kinds (`inference/monitor.py`)."""
        for kind in kinds:
            self._suspected.labels(kind).inc()

    def refused(self, reason: str) -> None:
        """A request, or a client, was turned away."""
        self._requests.labels(reason).inc()

    def percentile(self, percent: float) -> float:
        """Seconds, over the last answers; NaN before the first."""
        return float(np.percentile(self.recent, percent)) if self.recent else float("nan")

    def render(self) -> str:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry).decode()


class LimitedLog:
    """Warnings that clients cause: so many in a period, then one line that counts the rest."""

    def __init__(self, logger: logging.Logger) -> None:
        self.logger = logger
        self._lock = threading.Lock()
        self._until, self._written, self._left_out = 0.0, 0, 0

    def warning(self, message: str, *values: object, exc_info: BaseException | None = None) -> None:
        """Log, unless the period's lines are used up."""
        with self._lock:
            now = time.monotonic()
            left_out = 0
            if now >= self._until:
                self._until, self._written = now + LOG_SECONDS, 0
                left_out, self._left_out = self._left_out, 0
            self._written += 1
            if self._written > LOG_LINES:
                self._left_out += 1
                return
        if left_out:
            self.logger.warning("%d more warnings about clients were left out", left_out)
        self.logger.warning(message, *values, exc_info=exc_info)


_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
