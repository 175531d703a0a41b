"""Executing a policy on a robot: a thread plans while the control loop executes, and neither waits for the other.

    with RealTimeController(policy, prompt="open the window", control_hz=20) as controller:
        controller.start(observe())
        while not done:                     # 20 times a second
            send(controller.act(observe()))

The controller measures how long each plan takes. With the strategies that join chunks
(`inference.closed_loop.execution`), a new chunk continues the old one for that many control steps. Every `start` begins
a new episode. When planning fails, the next `act` raises the planner's error. A control loop may catch it and go on,
for the `act` after that asks for another plan.
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

from inference.closed_loop.episode import Observation, Plan, PlanRequest
from inference.closed_loop.policies import Policy, plan_of
from model.context import ActionPrefix

logger = logging.getLogger(__name__)
REMEMBERED_LATENCIES = 10  # the next plan is expected to take as long as the slowest of these (arXiv 2506.07339)


class UnderrunError(RuntimeError):
    """No plan covers the current control step."""


class RealTimeController:
    """Episodes on a robot, one after another.

    Call every method from the control loop's thread. Only `policy.plan` runs in another thread.

    Args:
        policy: makes the plans; its `execution` settings say how they are executed. Nothing else may use the policy
            while the controller runs.
        prompt: the instruction.
        control_hz: how often per second the control loop calls `act`. Latency is counted in these control steps.
        hold: gets the last action (None before the first one) and returns an action that keeps the robot still. It is
            used at control steps that no plan covers. Without it, `act` raises UnderrunError there.
        clock: returns seconds and never runs backwards.

    Attributes:
        latencies: how many seconds each of the last plans took, from its observation to its actions. They are kept
            from one episode to the next.
        underruns: how many control steps of this episode no plan covered.
        uncertainty: of the last plan, NaN where it has none.

    Raises:
        ValueError: control_hz is not positive; or execution is synchronous, in which the robot stands still while the
            policy plans, and `hold` is missing.
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
        self.underruns, self.uncertainty = 0, math.nan
        self._hold, self._clock = hold, clock
        self._execution = policy.execution.start()
        self._history: deque[Observation] = deque(maxlen=policy.max_seq_len)
        self._last_action: np.ndarray | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="planner")
        self._plan: Future[tuple[Plan, float]] | None = None

    @property
    def delay(self) -> int:
        """How many control steps the next plan will probably take: as many as the slowest of the last, rounded up."""
        return math.ceil(max(self.latencies) * self.control_hz) if self.latencies else self._execution.delay

    def start(self, observation: Observation) -> None:
        """Begin an episode: make its first plan and wait for it. The robot must stand still meanwhile.

        Of an earlier episode, only the measured latencies are kept. A plan of it that is still being made is waited for
        and discarded.

        Raises:
            Exception: an error of `policy.plan`; call `start` again.
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
            observation: what the robot sees now. Plans are made from this and the observations before.

        Returns:
            float32 (A,), physical units.

        Raises:
            UnderrunError: no plan covers this step and `hold` is None.
            RuntimeError: `start` was not called, or failed.
            Exception: an error that `policy.plan` raised in its thread. The control step counts all the same. The next
                `act` asks for another plan, and executes what is left of the last one.
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
        """If a plan is being made, wait for it, at most `timeout` seconds, and use it from the next `act` on."""
        if self._plan is not None:
            self._plan.exception(timeout)  # waits; the plan's own error is raised below
            self._receive()

    def close(self) -> None:
        """Wait for the plan that is being made, then end the planning thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> RealTimeController:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _request(self) -> None:
        self._execution.delay = self.delay
        history = tuple(self._history)
        self._plan = self._thread.submit(self._timed_plan, history, self._execution.request(), self._clock())

    def _timed_plan(
        self, history: tuple[Observation, ...], prefix: ActionPrefix | None, started: float
    ) -> tuple[Plan, float]:
        plan = plan_of(self.policy, PlanRequest(history, self.prompt, prefix))
        return plan, self._clock() - started

    def _receive(self) -> None:
        plan, self._plan = self._plan, None
        if plan.exception() is not None:
            self._execution.abandon()
        (action_TA, self.uncertainty), seconds = plan.result()
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
