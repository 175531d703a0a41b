"""How chunks of actions become one action per control step, with predictions that take time.

A prediction is requested from the observation of one control step and arrives `latency_steps` later. What the
robot does meanwhile, and how chunks are joined, is the strategy:

    synchronous   plan, hold still until the plan arrives, execute n_action_steps of it, plan again
    naive_async   plan while the old chunk runs, and on arrival switch to the new one at the step that is now
    ensemble      plan as often as the latency allows; average all predictions for a step (Zhao et al. 2023, "ACT",
                  arXiv 2304.13705, sec. IV-B): weights exp(-ensemble_decay i), i = 0 the oldest
    rtc           naive_async whose chunks continue each other by guidance (real-time chunking, arXiv 2506.07339)
    clean_prefix  the same by conditioning on the committed steps, without guidance, for policies trained with
                  model.action_head_config.max_clean_prefix (Black et al. 2025, arXiv 2512.05964)

The timeline of the last two, horizon 8, n_action_steps 3, latency_steps 2:

    old chunk    0 1 2 3 4 5 6 7
    observation        ^            the new chunk is requested: the old one's steps 3, 4 are committed
    new chunk          0 1 2 3 4 5 6 7
    executed     . . . o o n n n    o old, n new, from the new chunk's step 2 on
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from inference.settings import check_n_action_steps
from utils.config_utils import InferenceConfig

# Simulator processes import this module: only strategies that continue chunks import torch, which takes seconds.
if TYPE_CHECKING:
    from torch import Tensor

    from model.context import ActionPrefix


@dataclass(frozen=True)
class ExecutionSettings:
    """A strategy and its numbers; `from_config` makes one from the `inference` section, where the defaults are.

    Attributes:
        horizon: actions of each plan.
        n_action_steps: how many actions are executed before the next plan is requested; more, if the plan before
            has not arrived by then.
        strategy: a key of EXECUTION_STRATEGIES.
        latency_steps: control steps between an observation and the arrival of the plan made from it.
        ensemble_decay: for `ensemble`: with 0 all predictions weigh the same, with more the older ones weigh more.
        max_guidance_weight: for `rtc`: the largest guidance weight (beta in the paper).
        guidance_steps: for `rtc`: how many steps at the start of a new chunk are guided towards the old one; None: all
            that the old one covers.
        guidance_schedule: for `rtc`: how their weights fall (`soft_mask`).
    """

    horizon: int
    n_action_steps: int
    strategy: str
    latency_steps: int
    ensemble_decay: float
    max_guidance_weight: float
    guidance_steps: int | None
    guidance_schedule: str = "exp"

    @classmethod
    def from_config(cls, config: InferenceConfig, horizon: int) -> ExecutionSettings:
        """The settings of a policy that predicts `horizon` actions.

        Raises:
            ValueError: more actions are executed than predicted, or the horizon is too short for the latency.
        """
        return cls(
            horizon,
            config.n_action_steps or horizon,
            config.execution,
            config.latency_steps,
            config.ensemble_decay,
            config.max_guidance_weight,
            config.guidance_steps,
            config.guidance_schedule,
        )

    def __post_init__(self) -> None:
        if self.strategy not in EXECUTION_STRATEGIES:
            raise ValueError(f"execution is {self.strategy!r}; give one of {', '.join(EXECUTION_STRATEGIES)}")
        check_n_action_steps(self.n_action_steps, self.horizon)
        interval, latency = EXECUTION_STRATEGIES[self.strategy].interval(self), self.latency_steps
        if self.strategy != "synchronous" and interval + latency > self.horizon:
            raise ValueError(
                f"{self.strategy} execution: a plan is made every {interval} control steps and arrives {latency} "
                f"later, so it must cover {interval + latency}, but the policy predicts a horizon of "
                f"{self.horizon}; lower n_action_steps or the latency, or train with a longer horizon"
            )

    def start(self) -> Execution:
        """A fresh execution for one episode."""
        return EXECUTION_STRATEGIES[self.strategy](self)


class Execution(ABC):
    """Executes the plans of one episode, one action for each control step.

    It knows nothing of the policy, the environment or the clock: the caller says when a plan has arrived.

    Every control step:

        execution.deliver(action_TA)            # if the requested plan has arrived
        if execution.wants_plan():
            prefix = execution.request()        # and start planning from this step's observation
        action = execution.act()                # None: nothing is planned for this step; hold still

    Attributes:
        step: control steps begun so far.
        delay: how many control steps a plan is expected to take: `settings.latency_steps`, or what the caller measured.
    """

    def __init__(self, settings: ExecutionSettings) -> None:
        self.settings = settings
        self.step, self.delay = 0, settings.latency_steps
        self._requested_at: int | None = None

    @staticmethod
    def interval(settings: ExecutionSettings) -> int:
        """Control steps in which the robot moves, from one request to the next, if plans take `latency_steps`.

        Only one plan is made at a time.
        """
        return max(settings.n_action_steps, settings.latency_steps)

    def wants_plan(self) -> bool:
        """Whether a plan should be made from this step's observation."""
        return self._requested_at is None and self._is_due()

    def request(self) -> ActionPrefix | None:
        """Remember that a plan was requested at this step.

        Returns:
            The actions that the plan has to continue (B = 1, physical units); None if it is free to begin anyhow.
        """
        assert self._requested_at is None, "one plan at a time"
        self._requested_at = self.step
        return self._prefix()

    def deliver(self, action_TA: np.ndarray) -> None:
        """Take the plan that was requested. Its row 0 is the action of the step at which it was requested.

        Raises:
            ValueError: fewer rows than the horizon, or values that are not finite.
        """
        assert self._requested_at is not None, "no plan was requested"
        requested_at, self._requested_at = self._requested_at, None
        bad = int((~np.isfinite(action_TA)).any(axis=-1).sum())
        if len(action_TA) < self.settings.horizon or bad:
            raise ValueError(
                f"the policy planned {len(action_TA)} actions, {bad} of them not finite; wanted at least "
                f"{self.settings.horizon}, all finite"
            )
        self._accept(requested_at, action_TA)

    def abandon(self) -> None:
        """Give up waiting for the requested plan, so that another one may be requested."""
        self._requested_at = None

    def act(self) -> np.ndarray | None:
        """Return the action of this control step, (A,), or None if no plan covers it; then the next step begins."""
        action = self._action()
        self.step += 1
        return action

    def _prefix(self) -> ActionPrefix | None:
        return None

    @abstractmethod
    def _is_due(self) -> bool: ...

    @abstractmethod
    def _accept(self, requested_at: int, action_TA: np.ndarray) -> None: ...

    @abstractmethod
    def _action(self) -> np.ndarray | None: ...


class Synchronous(Execution):
    """Stands still while it plans."""

    def __init__(self, settings: ExecutionSettings) -> None:
        super().__init__(settings)
        self._queue: deque[np.ndarray] = deque()

    @staticmethod
    def interval(settings: ExecutionSettings) -> int:
        return settings.n_action_steps

    def _is_due(self) -> bool:
        return not self._queue

    def _accept(self, requested_at: int, action_TA: np.ndarray) -> None:
        self._queue.extend(action_TA[: self.settings.n_action_steps])

    def _action(self) -> np.ndarray | None:
        return self._queue.popleft() if self._queue else None


class NaiveAsync(Execution):
    """Executes the newest plan at the index of the current step; chunks need not fit together."""

    def __init__(self, settings: ExecutionSettings) -> None:
        super().__init__(settings)
        self._start, self._plan_TA = 0, np.empty((0, 0), np.float32)

    def _is_due(self) -> bool:
        started = len(self._plan_TA) > 0
        return not started or self.step - self._start >= max(self.settings.n_action_steps, self.delay)

    def _accept(self, requested_at: int, action_TA: np.ndarray) -> None:
        self._start, self._plan_TA = requested_at, action_TA

    def _action(self) -> np.ndarray | None:
        index = self.step - self._start
        return self._plan_TA[index] if index < len(self._plan_TA) else None


class RealTimeChunking(NaiveAsync):
    """Chunks that continue each other: guidance by the old chunk with a soft mask."""

    clean = False

    def _prefix(self) -> ActionPrefix | None:
        import torch

        from model.context import ActionPrefix

        horizon, executed = self.settings.horizon, self.step - self._start
        rest_TA = self._plan_TA[executed:horizon]
        weight_T = self._weights(horizon, min(self.delay, len(rest_TA)), len(rest_TA))
        if not weight_T.any():
            return None
        action_TA = torch.zeros(horizon, rest_TA.shape[1])
        action_TA[: len(rest_TA)] = torch.as_tensor(rest_TA)
        return ActionPrefix(action_TA[None], weight_T[None], self.settings.max_guidance_weight, self.clean)

    def _weights(self, horizon: int, delay: int, overlap: int) -> Tensor:
        from model.action_head.guidance import soft_mask

        limit = self.settings.guidance_steps
        end = overlap if limit is None else min(overlap, max(delay, limit))
        return soft_mask(horizon, delay, end, self.settings.guidance_schedule)


class CleanPrefix(RealTimeChunking):
    """Chunks that continue each other: the committed steps are given to the policy as they are."""

    clean = True

    def _weights(self, horizon: int, delay: int, overlap: int) -> Tensor:
        import torch

        return (torch.arange(horizon) < delay).float()


class Ensemble(Execution):
    """Averages the predictions that several plans make for the same step."""

    def __init__(self, settings: ExecutionSettings) -> None:
        super().__init__(settings)
        self._plans: list[tuple[int, np.ndarray]] = []  # (step of the request, actions), oldest first
        self._last_request = 0

    @staticmethod
    def interval(settings: ExecutionSettings) -> int:
        return max(1, settings.latency_steps)

    def _is_due(self) -> bool:
        return not self._plans or self.step - self._last_request >= max(1, self.delay)

    def _accept(self, requested_at: int, action_TA: np.ndarray) -> None:
        self._last_request = requested_at
        self._plans.append((requested_at, action_TA[: self.settings.horizon]))

    def _action(self) -> np.ndarray | None:
        self._plans = [(start, plan) for start, plan in self._plans if self.step - start < len(plan)]
        if not self._plans:
            return None
        weight_P = np.exp(-self.settings.ensemble_decay * np.arange(len(self._plans)))
        action_PA = np.stack([plan[self.step - start] for start, plan in self._plans])
        return (weight_P / weight_P.sum() @ action_PA).astype(np.float32)


EXECUTION_STRATEGIES: dict[str, type[Execution]] = {
    "synchronous": Synchronous,
    "naive_async": NaiveAsync,
    "ensemble": Ensemble,
    "rtc": RealTimeChunking,
    "clean_prefix": CleanPrefix,
}
