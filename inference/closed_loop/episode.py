"""One episode in a gymnasium environment, step by step, apart from whoever plans the actions.

An environment here gives observations `{"state": float32, and of each camera by its name uint8 (H, W, 3)}`, reports
`info["success"]`, and carries `instruction` and `control_hz`; where plans take time, also `hold_action`. It clips
actions to its `action_space` unless it has `clips_actions = False`.
Rendering is most of a simulator's work, and most frames are never looked at. An environment may therefore honour the
reset option `images_on_request`: its observations then hold no images, and `images()` renders those of the present
state.

    episode = Episode(env, settings, seed)
    while (request := episode.advance()) is not None:       # runs until a plan is wanted or the episode has ended
        episode.give(policy.plan(request.history, request.prompt, request.prefix))
    episode.result
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium
import numpy as np

from inference.alarm import Alarm
from inference.closed_loop.execution import ExecutionSettings
from inference.closed_loop.video import captioned

if TYPE_CHECKING:
    from model.context import ActionPrefix

Observation = dict[str, np.ndarray]
# What was seen, planned and done, T steps: of each camera uint8 (T, H, W, 3); "state" (T, state_dim); "action" (T, A),
# as the environment executes it; "plan" (P, horizon, A) and "plan_step" (P,), the step that each was made at.
Recording = dict[str, np.ndarray]


class Plan(NamedTuple):
    """What a policy plans: actions (T, A), and how unsure it is of them, NaN where nobody knows."""

    actions: np.ndarray
    uncertainty: float = math.nan


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is to be made from.

    Attributes:
        history: the last observations, oldest first, as many as `max_seq_len` or, near the start, as there are.
        prompt: the instruction.
        prefix: what the plan has to continue (B = 1, physical units), or None.
    """

    history: tuple[Observation, ...]
    prompt: str
    prefix: ActionPrefix | None


@dataclass(frozen=True)
class EpisodeRequest:
    """A request for a plan, and which of several episodes it comes from.

    Attributes:
        seed: of the episode.
        number: how many plans the episode has had before.
        request: what the plan is to be made from.
    """

    seed: int
    number: int
    request: PlanRequest


@dataclass
class EpisodeResult:
    """One episode.

    Attributes:
        seed: given to `env.reset`.
        success: reported at any step; the episode ends there.
        steps: environment steps taken. plans: how often a plan was asked for.
        held_steps: those of the steps that no plan covered, where the robot held still.
        total_reward: sum of rewards.
        seconds, plan_seconds: wall time, and the part of it spent waiting for plans.
        uncertainty: one number a plan, NaN where it has none. plan_steps: when each plan came, in steps taken before.
        alarm_step: the first step at which the alarm stood; None: it never did, or there is none.
        actions: what was sent, one (A,) per step.
        frames: captioned frames, one per step and the first; empty unless filmed.
        recording: see `Recording`; None unless asked for.
    """

    seed: int
    success: bool = False
    steps: int = 0
    plans: int = 0
    held_steps: int = 0
    total_reward: float = 0.0
    seconds: float = 0.0
    plan_seconds: float = 0.0
    uncertainty: list[float] = field(default_factory=list, repr=False)
    plan_steps: list[int] = field(default_factory=list, repr=False)
    alarm_step: int | None = None
    actions: list[np.ndarray] = field(default_factory=list, repr=False)
    frames: list[np.ndarray] = field(default_factory=list, repr=False)
    recording: Recording | None = field(default=None, repr=False)


class Episode:
    """An episode in progress, until success, termination or truncation.

    A plan takes `settings.latency_steps` control steps to arrive, however long it took to compute. Where no plan
    covers a step the robot holds still: `env.hold_action`.

    Args:
        env: see the module's text; it is reset. Actions are sent as planned: an environment clips them itself.
        settings: how plans are executed.
        seed: of the initial state.
        prompt: instead of the environment's instruction.
        max_seq_len: observations that a plan is made from; 0: the last state, without images.
        record: keep captioned frames of the first camera.
        label: who acts, for the captions.
        keep_steps: keep what is seen, planned and done, as `result.recording`.
        alarm: on the uncertainty of the plans, in this episode alone.
    """

    def __init__(
        self,
        env: gymnasium.Env,
        settings: ExecutionSettings,
        seed: int,
        *,
        prompt: str | None = None,
        max_seq_len: int = 1,
        record: bool = False,
        label: str = "policy",
        keep_steps: bool = False,
        alarm: Alarm | None = None,
    ) -> None:
        self.env, self.settings, self.record, self.label, self.alarm = env, settings, record, label, alarm
        self._kept: dict[str, list[Any]] | None = {} if keep_steps else None
        self._started = time.perf_counter()
        self._looks = max_seq_len > 0
        on_request = max_seq_len <= 1 and not record and not keep_steps
        observation, _ = env.reset(seed=seed, options={"images_on_request": on_request})
        self.prompt = env.unwrapped.instruction if prompt is None else prompt
        self.result = EpisodeResult(seed)
        self._history: deque[Observation] = deque([observation], maxlen=max(1, max_seq_len))
        self._execution = settings.start()
        self._under_way: tuple[int, np.ndarray] | None = None  # (step of arrival, actions)
        self._ended = False
        self._keep_frame()

    def advance(self) -> PlanRequest | None:
        """Execute control steps until a plan is wanted; None: the episode has ended.

        Raises:
            ValueError: a plan is too short or not finite, or there is no picture to film.
        """
        while not self._ended:
            self._deliver()
            if self._execution.wants_plan():
                if self._looks and self._history[-1].keys() <= {"state"}:
                    self._history[-1] |= self.env.unwrapped.images()
                self._asked = time.perf_counter()
                return PlanRequest(tuple(self._history), self.prompt, self._execution.request())
            self._step()
        self.result.seconds = time.perf_counter() - self._started
        if self._kept is not None:
            self.result.recording = {name: np.stack(values) for name, values in self._kept.items()}
        return None

    def run(self, plan: Callable[[PlanRequest], Plan | np.ndarray]) -> EpisodeResult:
        """The whole episode, each plan made by `plan`; raises what it raises, and as `advance` does."""
        while (request := self.advance()) is not None:
            self.give(plan(request))
        return self.result

    def give(self, plan: Plan | np.ndarray) -> None:
        """The plan that `advance` asked for, or its actions (T, A) alone."""
        action_TA, uncertainty = plan if isinstance(plan, Plan) else Plan(plan)
        self.result.plan_seconds += time.perf_counter() - self._asked
        self.result.plans += 1
        self.result.uncertainty.append(float(uncertainty))
        self.result.plan_steps.append(self.result.steps)
        if self.alarm is not None and self.alarm.add(uncertainty) and self.result.alarm_step is None:
            self.result.alarm_step = self.result.steps
        self._keep(plan=np.asarray(action_TA), plan_step=np.int64(self.result.steps))
        self._under_way = self._execution.step + self.settings.latency_steps, action_TA

    def _deliver(self) -> None:
        """Take in the plan under way, if it arrives at this step."""
        if self._under_way is None or self._execution.step < self._under_way[0]:
            return
        try:
            self._execution.deliver(self._under_way[1])
        except ValueError as error:
            raise ValueError(f"seed {self.result.seed} step {self.result.steps}: {error}") from None
        self._under_way = None

    def _step(self) -> None:
        result = self.result
        action = self._execution.act()
        if action is None:
            action = self.env.unwrapped.hold_action(result.actions[-1] if result.actions else None)
            result.held_steps += 1
        if self._kept is not None:
            space, clips = self.env.action_space, getattr(self.env.unwrapped, "clips_actions", True)
            executed = np.clip(action, space.low, space.high) if clips else np.asarray(action)
            self._keep(**self._history[-1], action=executed)
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._history.append(observation)
        result.actions.append(np.asarray(action))
        result.steps += 1
        result.total_reward += float(reward)
        result.success = bool(info["success"])
        self._ended = terminated or truncated or result.success
        self._keep_frame()

    def _keep(self, **values: np.ndarray) -> None:
        if self._kept is not None:
            for name, value in values.items():
                self._kept.setdefault(name, []).append(value)

    def _keep_frame(self) -> None:
        if self.record:
            result = self.result
            outcome = "  success" if result.success else "  failure" if self._ended else ""
            state = f"{self.label}  step {result.steps}{outcome}  seed {result.seed}"
            alarm = self.alarm is not None and self.alarm.on
            if result.uncertainty and not math.isnan(result.uncertainty[-1]):
                state += f"  unsure {result.uncertainty[-1]:.2g}"
            first = next((frame for name, frame in self._history[-1].items() if name != "state"), None)
            if first is None:
                raise ValueError(
                    f"seed {result.seed}: the environment shows no picture that could be filmed; choose a camera "
                    "(--env_options image_1=...), or film nothing (--num_videos 0)"
                )
            lines = self.prompt, f"alarm  {state}" if alarm else state
            frame = captioned(first, lines, good=result.success, alarm=alarm)
            result.frames.append(frame)
