"""The interface that every simulator of this repository offers: a gymnasium environment with a few more facts.

Observation of one time step, a dict:

    image_1   uint8 (H, W, 3)        RGB, the right way up; the first camera comes first
    image_2   uint8 (H, W, 3)        only where further cameras were asked for, which may have any name
    state     float32 (state_dim,)   proprioception only; what the cameras have to find out is not in it

After ``reset(options={"images_on_request": True})`` the observations of that episode have no images, and
``images()`` renders those of the current step: most frames of an evaluation are never looked at.

An action is float32 (per_action_dim,) in the units of ``action_space``, which are the simulator's own: displacements in
one, joint angles in another. It is clipped to that space, unless `clips_actions` is False.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import gymnasium
import numpy as np


class RobotEnv(gymnasium.Env):
    """A simulated robot with one task, one instruction and a scripted expert.

    ``step`` and ``reset`` follow gymnasium; ``info["success"]`` is a bool in both. ``reset(seed=s)`` is a
    function of ``s`` alone: the same seed gives the same scene whatever happened before, another seed gives
    other object positions.
    """

    task: str  # name of the task as `make_env` takes it
    instruction: str  # what the robot is told, e.g. "press the button down from above"
    paraphrases: tuple[str, ...] = ()  # other words for the same task
    state_dim: int  # length of obs["state"]
    per_action_dim: int  # length of one action
    control_hz: float  # calls of `step` per simulated second
    max_episode_steps: int  # `step` reports `truncated` at this many steps after `reset`
    clips_actions: bool = True  # whether `step` clips actions to `action_space`
    noise_unit: float | tuple[float, ...] = 1.0  # of `--noise_scale`, in units of the action; one value, or one a dim

    @property
    def instructions(self) -> tuple[str, ...]:
        """The instruction, and behind it its paraphrases."""
        return (self.instruction, *self.paraphrases)

    def checked_action(self, action: np.ndarray, dtype: type[np.floating]) -> np.ndarray:
        """An action that `step` was given, as an array of `dtype`; not clipped.

        Raises:
            ValueError: it has another shape, or is not finite.
        """
        action = np.asarray(action, dtype=dtype)
        if action.shape != (self.per_action_dim,):
            raise ValueError(f"{self.task}: action has shape {action.shape}, must be ({self.per_action_dim},)")
        if not np.isfinite(action).all():
            raise ValueError(f"{self.task}: action {action.tolist()} is not finite")
        return action

    def expert_action(self) -> np.ndarray:
        """The scripted expert's action for the current state, already clipped to ``action_space``.

        Asking twice gives the same action. An expert with stages begins at the first question of an episode at the
        latest, and advances in `step`, whoever acts.

        Returns:
            float32 (per_action_dim,).
        """
        raise NotImplementedError

    def restart_expert(self) -> None:
        """Let the expert begin from where things are now: its stages know nothing of what others did.

        An expert that only looks at the present state has nothing to begin.
        """

    def images(self) -> dict[str, np.ndarray]:
        """The images of the current step's observation, by camera."""
        raise NotImplementedError

    def hold_action(self, previous: np.ndarray | None) -> np.ndarray:
        """The action that keeps the robot where it is, for steps that no plan covers.

        Where actions are absolute, that is the joints' present angles.

        Args:
            previous: the last action executed, float32 (per_action_dim,), whose gripper command is kept; None at
                the episode's start.

        Returns:
            float32 (per_action_dim,).
        """
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What else a recording must know to be repeated: camera names, image size, and the like.

        Returns:
            str, int, float, bool or None by name.
        """
        raise NotImplementedError


def observation_space(cameras: Iterable[str], image_size: int, state_dim: int) -> gymnasium.spaces.Dict:
    """Of observations with square images of these cameras and a state without bounds."""
    image = gymnasium.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
    state = gymnasium.spaces.Box(-np.inf, np.inf, (state_dim,), np.float32)
    return gymnasium.spaces.Dict({**dict.fromkeys(cameras, image), "state": state})


def images_on_request(options: dict[str, Any] | None) -> bool:
    """The one option of `reset`; a ValueError where another one was given."""
    if unknown := (options or {}).keys() - {"images_on_request"}:
        raise ValueError(f"unknown reset options {sorted(unknown)}; images_on_request is the only one")
    return bool((options or {}).get("images_on_request", False))
