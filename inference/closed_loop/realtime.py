"""Executing a policy on a robot: a thread plans while the control loop executes, and neither waits for the other.

    with RealTimeController(policy, prompt="open the window", control_hz=20) as controller:
        controller.start(observe())
        while not done:                     # 20 times a second
            send(controller.act(observe()))

How long plans take is measured; chunks continue each other over that many control steps
(`inference.closed_loop.execution`). Every `start` begins an episode of its own. A plan that fails raises its error from
the `act` that finds out, and another one is made at the next: a loop that catches the error goes on.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np

from inference.closed_loop.episode import Observation
from inference.closed_loop.policies import Policy
from model.context import ActionPrefix

logger = logging.getLogger(__name__)
REMEMBERED_LATENCIES = 10  # the next plan is expected to take as long as the slowest of these (arXiv 2506.07339)


class UnderrunError(RuntimeError):
    """No plan covers the current control step."""


class RealTimeController:
    """Episodes on a robot, one after another.

    All methods are for the control loop's thread; only `policy.plan` runs in another.

    Args:
        policy: plans; its `execution` says how plans are executed. Nothing else may use it meanwhile.
        prompt: the instruction.
        control_hz: calls of `act` per second: the unit in which latency counts.
        hold: from the last action (None before the first) the one that keeps the robot still, for control steps
            that no plan covers. None: `act` raises instead.
        clock: seconds, monotonic.

    Attributes:
        latencies: seconds that the last plans took, from the observation to the finished plan, over all episodes.
        underruns: control steps of this episode so far that no plan covered.

    Raises:
        ValueError: control_hz is not positive, or synchronous execution without `hold`: it stands still to plan.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        prompt: str,
        control_hz: float,
        hold: Callable[[np.ndarray | None], np.ndarray] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if control_hz <= 0:
            raise ValueError(f"control_hz is {control_hz}; give the control loop's rate, above 0")
        if policy.execution.strategy == "synchronous" and hold is None:
            raise ValueError("synchronous execution stands still while it plans: give hold, or another strategy")
        self.policy, self.prompt, self.control_hz = policy, prompt, control_hz
        self.latencies: deque[float] = deque(maxlen=REMEMBERED_LATENCIES)
        self.underruns = 0
        self._hold, self._clock = hold, clock
        self._execution = policy.execution.start()
        self._history: deque[Observation] = deque(maxlen=policy.max_seq_len)
        self._last_action: np.ndarray | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="planner")
        self._plan: Future[tuple[np.ndarray, float]] | None = None

    @property
    def delay(self) -> int:
        """Control steps that the next plan is expected to take: the slowest of the last, rounded up."""
        return math.ceil(max(self.latencies) * self.control_hz) if self.latencies else self._execution.delay

    def start(self, observation: Observation) -> None:
        """Begin an episode: make its first plan, while the robot stands still, and wait for it.

        Nothing of an earlier episode is kept but the measured latencies: a plan still under way for it is waited for
        and thrown away.

        Raises:
            Exception: whatever `policy.plan` raises; call `start` again.
        """
        if self._plan is not None:
            futures.wait([self._plan])
            self._plan = None
        self._execution = self.policy.execution.start()
        self._last_action, self.underruns = None, 0
        self._history.clear()
        self._history.append(observation)
        self._request()
        try:
            self.wait()
        except BaseException:
            self._history.clear()
            raise

    def act(self, observation: Observation) -> np.ndarray:
        """The action of this control step; never waits for a plan.

        Args:
            observation: of now; becomes part of the history.

        Returns:
            float32 (A,), physical units.

        Raises:
            UnderrunError: no plan covers this step and `hold` is None.
            RuntimeError: `start` was not called, or failed.
            Exception: what `policy.plan` raised in its thread. The control step counts as begun; the next `act` asks
                for another plan and executes what the plans so far cover.
        """
        if not self._history:
            raise RuntimeError("act before start: call start(observation) once, while the robot stands still")
        step = self._execution.step
        if step > 0:  # the first observation was given to `start`
            self._history.append(observation)
        if self._plan is not None and self._plan.done():
            try:
                self._receive()
            except BaseException:
                self._execution.act()  # the control step passes all the same
                raise
        if self._execution.wants_plan():
            self._request()
        action = self._execution.act()
        if action is None:
            action = self._held(step)
        self._last_action = action
        return action

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the plan under way, if there is one, and take it in; `timeout` in seconds."""
        if self._plan is not None:
            self._plan.exception(timeout)  # waits; the plan's own error is raised below
            self._receive()

    def close(self) -> None:
        """End the planning thread, once its current plan is finished."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> RealTimeController:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _request(self) -> None:
        self._execution.delay = self.delay
        self._plan = self._thread.submit(self._think, tuple(self._history), self._execution.request(), self._clock())

    def _think(
        self, history: tuple[Observation, ...], prefix: ActionPrefix | None, started: float
    ) -> tuple[np.ndarray, float]:
        action_TA = self.policy.plan(history, self.prompt, prefix)
        return action_TA, self._clock() - started

    def _receive(self) -> None:
        plan, self._plan = self._plan, None
        if plan.exception() is not None:
            self._execution.abandon()
        action_TA, seconds = plan.result()
        expected = self._execution.delay
        self.latencies.append(seconds)
        self._execution.deliver(action_TA)
        taken = math.ceil(seconds * self.control_hz)
        if taken > expected and len(self.latencies) > 1:
            logger.warning("a plan took %d control steps, not %d: chunks may not fit together", taken, expected)

    def _held(self, step: int) -> np.ndarray:
        self.underruns += 1
        if self._hold is None:
            settings = self.policy.execution
            raise UnderrunError(
                f"control step {step}: no plan covers it; plans take up to {self.delay} control steps of "
                f"1 / {self.control_hz:g} s and cover {settings.horizon} (n_action_steps {settings.n_action_steps}): "
                "make predictions faster, the control rate lower or the horizon longer, or give hold"
            )
        return self._hold(self._last_action)
