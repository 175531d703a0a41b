"""What drives an episode: the protocol of policies, and the two controls that a trained policy is compared with.

Imports no model, so that simulator processes start at once; the trained policy is
`inference.closed_loop.rollout.ModelPolicy`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import gymnasium
import numpy as np

from inference.closed_loop.episode import Observation, Plan, PlanRequest
from inference.closed_loop.execution import ExecutionSettings
from utils.config_utils import InferenceConfig

if TYPE_CHECKING:
    from model.context import ActionPrefix


ONE_ACTION = ExecutionSettings.from_config(InferenceConfig(execution="synchronous"), horizon=1)  # at once, one by one


class Policy(Protocol):
    """Anything that plans actions; one instance drives one episode at a time."""

    max_seq_len: int  # frames of history that `plan` wants; 0: it does not look
    execution: ExecutionSettings  # what becomes of its plans

    def reset(self, env: gymnasium.Env, seed: int) -> None:
        """Start an episode that was reset with `seed`."""

    def plan(self, history: Sequence[Observation], prompt: str, prefix: ActionPrefix | None = None) -> np.ndarray:
        """Actions (T, A), T at least `execution.horizon`, from the last frames (oldest first) and the instruction.

        `prefix` is what the chunk has to continue, for strategies that need it.
        """


def plan_of(policy: Policy, request: PlanRequest) -> Plan:
    """A policy's plan, with the uncertainty that the policy has of its last one, where it has any."""
    actions = policy.plan(request.history, request.prompt, request.prefix)
    return Plan(actions, getattr(policy, "uncertainty", math.nan))


def local_planner(policy: Policy, env: gymnasium.Env, seed: int) -> Callable[[PlanRequest], Plan]:
    """A function that asks a policy of this process for the plans of an episode that was reset with `seed`."""
    policy.reset(env, seed)
    return lambda request: plan_of(policy, request)


class ReplayPolicy:
    """Plays demonstrations back without looking: the floor that any policy must beat.

    The episode's seed chooses the demonstration (seed modulo their number). When the demonstration is over, its last
    action is repeated, so that the control has as much time as a policy has.

    Args:
        demonstrations: actions of one episode each, (steps, A), physical units.
    """

    max_seq_len = 0
    execution = ONE_ACTION

    def __init__(self, demonstrations: Sequence[np.ndarray]) -> None:
        if not demonstrations:
            raise ValueError("no demonstration to replay")
        self.demonstrations = list(demonstrations)
        self._actions, self._step = self.demonstrations[0], 0

    def reset(self, env: gymnasium.Env, seed: int) -> None:
        self._actions, self._step = self.demonstrations[seed % len(self.demonstrations)], 0

    def plan(self, history: Sequence[Observation], prompt: str, prefix: ActionPrefix | None = None) -> np.ndarray:
        step = min(self._step, len(self._actions) - 1)
        self._step += 1
        return self._actions[step : step + 1]

    def described(self, seed: int) -> dict[str, Any]:
        """The control of the episode with this seed, as plain values for `control_from`."""
        return {"control": "replay", "action": self.demonstrations[seed % len(self.demonstrations)]}


class ExpertPolicy:
    """The environment's own scripted expert: the ceiling of what its demonstrations can teach."""

    max_seq_len = 0
    execution = ONE_ACTION

    def reset(self, env: gymnasium.Env, seed: int) -> None:
        self._env = env.unwrapped

    def plan(self, history: Sequence[Observation], prompt: str, prefix: ActionPrefix | None = None) -> np.ndarray:
        return np.asarray(self._env.expert_action())[None]

    def described(self, seed: int) -> dict[str, Any]:
        """The control, as plain values for `control_from`."""
        return {"control": "expert"}


Control = ReplayPolicy | ExpertPolicy


def control_from(described: dict[str, Any]) -> Control:
    """The policy of one episode, from what `described` gave for it."""
    return ExpertPolicy() if described["control"] == "expert" else ReplayPolicy([described["action"]])
