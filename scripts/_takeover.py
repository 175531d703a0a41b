"""A policy acts and the scripted expert watches: where the policy leaves its corridor, the expert finishes the episode.

The rule. At every step the expert is asked as well, and the distance between its action and the policy's is the mean
over the action's dimensions of their absolute difference, each clipped to the action space and divided by half of its
range: 0 is agreement, 2 the opposite command at full strength. The policy is outside of its corridor where the mean of
this distance over its last `corridor_steps` steps is more than `corridor` (asking by the distance of actions: Zhang and
Cho 2017, "Query-efficient imitation learning for end-to-end simulated driving"), or where `patience` steps have passed
without success. From there on the expert acts until the end (Kelly et al. 2019, "HG-DAgger", with a scripted expert
in the human's place).
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np

from scripts._attempt import Attempt

if TYPE_CHECKING:
    from inference.closed_loop.rollout import ModelPolicy


@dataclass(frozen=True)
class Corridor:
    """When the expert takes over; see the module's text.

    Attributes:
        width: largest mean distance of actions, 0 to 2.
        steps: over which it is the mean.
        patience: steps that the policy has at most; None: half of the episode's.
    """

    width: float
    steps: int
    patience: int | None

    def __post_init__(self) -> None:
        if not 0 < self.width <= 2:
            raise ValueError(f"--corridor is {self.width}, must be more than 0 and at most 2")
        for name, value in (("corridor_steps", self.steps), ("patience", self.patience)):
            if value is not None and value < 1:
                raise ValueError(f"--{name} is {value}, must be at least 1")


class WatchedEnv(gymnasium.Wrapper):
    """An environment whose expert takes over; the episode ends for the policy there, within one `step`."""

    def __init__(
        self, env: gymnasium.Env, corridor: Corridor, encode: Callable[[np.ndarray], bytes], steps_after_success: int
    ) -> None:
        """
        Args:
            env: a RobotEnv.
            corridor: the rule.
            encode: an image's bytes.
            steps_after_success: that the expert goes on.
        """
        super().__init__(env)
        self.corridor, self._encode, self._steps_after_success = corridor, encode, steps_after_success
        self.patience = corridor.patience or max(1, env.unwrapped.max_episode_steps // 2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """As the environment's, with images in every observation: they are recorded."""
        self._observation, info = self.env.reset(seed=seed)
        env = self.env.unwrapped
        images = {key: [] for key in self._observation if key != "state"}
        self.seen = Attempt(info["seed"], env.instruction, env.settings(), images, intervention=[])
        self._distances: deque[float] = deque(maxlen=self.corridor.steps)
        return self._observation, info

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """Execute the policy's action, or let the expert finish where the policy has left its corridor."""
        space = self.env.action_space
        action = np.clip(np.asarray(action, np.float32), space.low, space.high)
        expert = self.env.unwrapped.expert_action()
        self._distances.append(float((np.abs(action - expert) / ((space.high - space.low) / 2)).mean()))
        full = len(self._distances) == self.corridor.steps
        if (full and np.mean(self._distances) > self.corridor.width) or len(self.seen.actions) >= self.patience:
            return self._finish()
        result = self._act(action, by_expert=False)
        self.seen.success = bool(result[4]["success"])
        return result

    def _act(self, action: np.ndarray, *, by_expert: bool) -> tuple[dict, float, bool, bool, dict]:
        for key, encoded in self.seen.images.items():
            encoded.append(self._encode(self._observation[key]))
        self.seen.states.append(self._observation["state"])
        self.seen.actions.append(action)
        self.seen.intervention.append(by_expert)
        result = self.env.step(action)
        self._observation = result[0]
        return result

    def _finish(self) -> tuple[dict, float, bool, bool, dict]:
        left = self._steps_after_success
        self.env.unwrapped.restart_expert()
        while True:
            observation, reward, _, truncated, info = self._act(self.env.unwrapped.expert_action(), by_expert=True)
            self.seen.success |= bool(info["success"])
            left -= self.seen.success
            if truncated or left < 0:
                return observation, reward, True, truncated, {**info, "success": self.seen.success}


def watched_attempt(env: WatchedEnv, checkpoint: str, seed: int) -> Attempt:
    """Let the policy of a checkpoint act from the scene of this seed, and the expert after it where it is needed."""
    from inference.closed_loop.rollout import run_episode  # imports torch, which takes seconds and experts do without

    run_episode(env, _worker_policy(checkpoint), seed)
    return env.seen


@functools.lru_cache(maxsize=1)
def _worker_policy(checkpoint: str) -> ModelPolicy:
    import torch

    from inference.closed_loop.rollout import ModelPolicy
    from inference.predictor import VLAPredictor

    torch.set_num_threads(1)  # every process records
    return ModelPolicy(VLAPredictor.from_checkpoint(checkpoint, "cpu"))
