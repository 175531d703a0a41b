"""Hands what a policy is shown and plans to whoever writes it, without ever making a request wait.

    PolicyServer ─► Recorder.add ─► a queue of bounded size ─► a thread ─► pipe ─► the process that writes

Where the writer can't keep up, steps are left out and their episode ends before the gap; what goes wrong is said once
in the log, once in the replies of each client, and counted in `/metrics`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

MAX_WAITING_BYTES = 128_000_000  # of frames that wait for the writer
MAX_WAITING = 4096  # steps that do
TOO_SLOW = "it can't keep up with the requests: steps are left out, and their episodes are cut there"


class Recorder:
    """The server's side of a recording.

    Attributes:
        trouble: what goes wrong at present, as a text for clients; None: nothing.
        written, lost: steps.
    """

    def __init__(self, pipe: Connection) -> None:
        """
        Args:
            pipe: takes `(key, step)` and gives reports; see `data/convert/served.py`.
        """
        self.pipe = pipe
        self.trouble: str | None = None
        self.written = self.lost = 0
        self._waiting: deque[tuple[int, dict[str, Any] | None, int]] = deque()
        self._bytes = 0
        self._gaps: set[int] = set()  # connections whose last step was left out
        self._told: set[str] = set()
        self._changed = threading.Condition()
        self._closing = False
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._send, self._listen)]
        for thread in self._threads:
            thread.start()

    def add(
        self,
        key: int,
        images: Mapping[str, np.ndarray | bytes],
        state: np.ndarray,
        prompt: str,
        plan: np.ndarray,
        seed: int,
        begins: bool,
    ) -> None:
        """Record a step, or leave it out where too much waits already; returns at once.

        Args:
            key: of the connection.
            images: the frame of each camera, as it came; it must not change any more.
            state: (state_dim,), physical units.
            prompt: the instruction.
            plan: (T, A), physical units.
            seed: of its noise.
            begins: whether an episode begins.
        """
        size = sum(len(frame) if isinstance(frame, bytes) else frame.nbytes for frame in images.values())
        with self._changed:
            if len(self._waiting) >= MAX_WAITING or self._bytes + size > MAX_WAITING_BYTES:
                self.lost += 1
                self._gaps.add(key)
                self._say("slow", TOO_SLOW)
                return
            step = {"images": dict(images), "state": state, "prompt": prompt, "plan": plan, "seed": seed}
            step |= {"seconds": time.monotonic(), "begins": begins or key in self._gaps}
            self._gaps.discard(key)
            self._waiting.append((key, step, size))
            self._bytes += size
            self._changed.notify()

    def end(self, key: int) -> None:
        """A connection's episode is over."""
        with self._changed:
            self._gaps.discard(key)
            self._waiting.append((key, None, 0))
            self._changed.notify()

    def close(self, timeout_s: float = 10.0) -> None:
        """Hand over what waits, and end the pipe."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._threads[0].join(timeout_s)
        left = sum(step is not None for _, step, _ in self._waiting)
        if left:
            logger.warning("recording: %d steps could not be written in %g s and are left out", left, timeout_s)

    def _send(self) -> None:
        """The thread that feeds the pipe, which may block."""
        while True:
            with self._changed:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if not self._waiting:
                    break
                key, step, size = self._waiting.popleft()
            try:
                self.pipe.send((key, step))
            except OSError:
                with self._changed:
                    self.lost += 1 + sum(waiting is not None for _, waiting, _ in self._waiting)
                    self._waiting.clear()
                    self._bytes = 0
                    self._say("ended", "the process that writes has ended: nothing more is recorded")
                continue
            with self._changed:
                self._bytes -= size
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.pipe.fileno())) as end:
            end.shutdown(socket.SHUT_WR)  # the writer sees the end, and its last reports still come

    def _listen(self) -> None:
        """The thread that takes reports."""
        while True:
            try:
                report = self.pipe.recv()
            except (EOFError, OSError):
                return
            with self._changed:
                self.written += report["written"]
                self.lost += report["lost"]
                if report["trouble"] is not None:
                    self._say(*report["trouble"])
                elif self.trouble is not None:
                    self.trouble = None
                    if self._told - {"slow"}:
                        logger.warning("recording: episodes are written again")
                        self._told &= {"slow"}

    def _say(self, kind: str, text: str) -> None:
        """Keep a trouble, and log it once a kind until episodes are written again."""
        self.trouble = f"recording: {text}"
        if kind not in self._told:
            self._told.add(kind)
            logger.warning("%s", self.trouble)
