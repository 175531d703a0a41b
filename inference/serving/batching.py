"""Requests of several clients, predicted together: one model, one thread that uses it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from data.processing import Sample


class BusyError(RuntimeError):
    """More requests are waiting than the server takes."""


class PredictionError(RuntimeError):
    """The policy raised instead of predicting; the cause is what it raised."""


@dataclass
class Prediction:
    """One request's answer.

    Attributes:
        actions: float32 (T, A), physical units.
        batch_size: requests predicted in the same pass.
        queue_seconds, model_seconds: waiting before the pass, and the pass itself.
        uncertainty: how unsure the policy is, NaN where it can't say.
        alarm: whether the alarm of the stream that it belongs to stands; None: there is none.
    """

    actions: np.ndarray
    batch_size: int
    queue_seconds: float
    model_seconds: float
    uncertainty: float = math.nan
    alarm: bool | None = None


@dataclass(eq=False)
class _Request:
    sample: Sample
    seed: int
    done: asyncio.Future
    arrived: float = field(default_factory=time.perf_counter)


class RequestBatcher:
    """Predicts what is waiting, at most `max_batch` requests in a pass.

    The first request opens a window; the pass starts when it closes, or as soon as every client waits. A lone
    client therefore never waits for company. A pass that fails is repeated request by request, so that one client's
    observation is never another's error.

    Args:
        predict: samples and one seed each -> actions (B, T, A), or a pair of these and the uncertainty of each, (B,);
            called in a thread, one call at a time.
        window: seconds.
        max_batch: requests of one pass.
        max_waiting: requests that may wait; more are refused.
        clients: how many clients are connected now.
    """

    def __init__(
        self,
        predict: Callable[[Sequence[Sample], Sequence[int]], np.ndarray | tuple[np.ndarray, np.ndarray]],
        *,
        window: float,
        max_batch: int,
        max_waiting: int,
        clients: Callable[[], int],
    ) -> None:
        self.predict, self.window, self.clients = predict, window, clients
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self.waiting: deque[_Request] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy")

    async def submit(self, sample: Sample, seed: int) -> Prediction:
        """Wait for a sample's actions.

        Raises:
            BusyError: `max_waiting` requests wait already.
            PredictionError: the policy raised, or gave something else than actions for every request.
        """
        if len(self.waiting) >= self.max_waiting:
            raise BusyError(f"{len(self.waiting)} requests are waiting already; ask again later, or at a lower rate")
        request = _Request(sample, seed, asyncio.get_running_loop().create_future())
        self.waiting.append(request)
        self._arrived.set()
        try:
            return await request.done
        finally:
            if request in self.waiting:  # whoever asked gave up
                self.waiting.remove(request)

    async def run(self) -> None:
        """Predict until cancelled."""
        while True:
            await self._gather()
            requests = [self.waiting.popleft() for _ in range(min(self.max_batch, len(self.waiting)))]
            if not await self._predict(requests):
                for request in requests:  # one of them may be to blame, or their number
                    await self._predict([request])

    def close(self) -> None:
        """Start nothing more; what the thread computes just now is not waited for."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _gather(self) -> None:
        """Wait for the first request, then for the window or for everybody."""
        while not self.waiting:
            self._arrived.clear()
            await self._arrived.wait()
        closes = self.waiting[0].arrived + self.window
        while self.waiting and len(self.waiting) < min(self.max_batch, self.clients()):
            left = closes - time.perf_counter()
            if left <= 0:
                return
            self._arrived.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left)

    async def _predict(self, requests: list[_Request]) -> bool:
        """Answer requests; where a pass of several fails, False, and they are left to be tried one by one."""
        requests = [request for request in requests if not request.done.done()]  # the others gave up meanwhile
        if not requests:
            return True
        started = time.perf_counter()
        work = functools.partial(self.predict, [r.sample for r in requests], [r.seed for r in requests])
        run = asyncio.get_running_loop().run_in_executor(self._thread, work)
        await asyncio.wait([run])
        seconds = time.perf_counter() - started
        error = run.exception()
        predicted = run.result() if error is None else None
        actions, uncertainty = predicted if isinstance(predicted, tuple) else (predicted, [math.nan] * len(requests))
        if error is None and np.shape(actions)[:1] != (len(requests),):
            error = ValueError(f"actions of shape {np.shape(actions)} for {len(requests)} requests")
        if error is not None and len(requests) > 1:
            return False
        for i, request in enumerate(requests):
            if request.done.done():
                continue
            if error is not None:
                failure = PredictionError(str(error) or type(error).__name__)
                failure.__cause__ = error
                request.done.set_exception(failure)
            else:
                waited = started - request.arrived
                found = Prediction(actions[i], len(requests), waited, seconds, float(uncertainty[i]))
                request.done.set_result(found)
        return True
