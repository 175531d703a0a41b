"""Meta-World v3 (https://metaworld.farama.org): 50 tasks of a Sawyer arm with a gripper, at 80 Hz."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np

from envs.base import RobotEnv, images_on_request, observation_space
from envs.metaworld_tasks import PARAPHRASES, TASKS
from envs.mujoco_rendering import OffscreenRenderer, import_mujoco
from envs.options import check_switch, check_whole
from envs.simulator import named_cameras, suggest

STATE_DIM = 4  # hand x, y, z in metres; gripper opening from 0 (shut) to 1 (open)
ACTION_DIM = 4  # hand displacement x, y, z in centimetres a step; gripper effort (+ shuts)
MAX_SIMULATED_STEPS = 500  # Meta-World refuses to step further


class MetaWorldEnv(RobotEnv):
    """One Meta-World task, seen by cameras.

    Meta-World's own observation holds the positions of objects and goal. Only the scripted expert reads it;
    ``obs["state"]`` is the hand's position and the gripper's opening, so that a policy has to look.

    The default camera is "corner4": it stands where LeRobot's and Seo et al.'s (arXiv 2206.14244) evaluations
    move "corner2" to, and at 96 px it shows hand and object about twice as large as "corner2" does.
    """

    def __init__(
        self,
        task: str,
        *,
        camera: str | None = None,
        second_camera: str | None = None,
        cameras: str | Sequence[str] | Mapping[str, str] | None = None,
        image_size: int = 96,
        hide_goal: bool = False,
        max_episode_steps: int = 200,
        terminate_on_success: bool = True,
        layout_of: str | None = None,
    ) -> None:
        """Loads the simulation.

        Args:
            task: a key of ``envs.metaworld_tasks.TASKS``.
            camera: camera of ``image_1``: topview, corner, corner2, corner3, corner4, behindGripper or
                gripperPOV; None: corner4.
            second_camera: camera of ``image_2``; None for no such image.
            cameras: instead of the two any number of cameras under any names, see `envs.simulator.named_cameras`.
            image_size: height and width of the images in pixels.
            hide_goal: leave the goal markers (all sites) out of the images.
            max_episode_steps: `step` reports ``truncated`` after so many steps, at most 500. Scripted
                experts take 30 to 120.
            terminate_on_success: `step` reports ``terminated`` when the task is done. Stepping on is allowed.
            layout_of: draw the object positions from the range of this other task, which must use the same
                scene. With it, and the goal hidden, two tasks start from the same image for the same seed.

        Raises:
            ValueError: unknown task or camera, or a size, step limit, switch or layout that cannot be.
            RuntimeError: off-screen rendering is impossible.
        """
        for name in (task, layout_of):
            if name is not None and (not isinstance(name, str) or name not in TASKS):
                raise ValueError(f"unknown metaworld task {name!r}; {suggest(name, TASKS)}")
        check_whole("image_size", image_size, 1)
        check_whole("max_episode_steps", max_episode_steps, 1, MAX_SIMULATED_STEPS)
        check_switch("hide_goal", hide_goal)
        check_switch("terminate_on_success", terminate_on_success)
        self._mujoco = import_mujoco()
        self._sim = _make_simulation(task)
        if layout_of not in (None, task):
            self._sim._random_reset_space = _reset_space_of(layout_of, self._sim)
        self._renderer = OffscreenRenderer(self._sim.model, image_size, hide_sites=hide_goal)
        if cameras is None:
            images = {"image_1": camera or "corner4", "image_2": second_camera}
            self._camera_of = {key: name for key, name in images.items() if name is not None}
        elif camera is not None or second_camera is not None:
            raise ValueError("cameras and camera or second_camera both name cameras; give one of them")
        else:
            self._camera_of = named_cameras(cameras)
        for name in self._camera_of.values():
            names = self._renderer.camera_names()
            if name not in names:
                raise ValueError(f"metaworld has no camera {name!r}; {suggest(name, names)}")

        self.task = task
        self.instruction, self.paraphrases = TASKS[task].instruction, PARAPHRASES[task]
        self.state_dim = STATE_DIM
        self.per_action_dim = ACTION_DIM
        self.control_hz = 1.0 / self._sim.dt
        self.max_episode_steps = max_episode_steps
        self.camera, self.second_camera, *_ = (*self._camera_of.values(), None)
        self.cameras = None if cameras is None else ",".join(f"{key}={name}" for key, name in self._camera_of.items())
        self.image_size = image_size
        self.hide_goal = hide_goal
        self.layout_of = layout_of
        self._terminate_on_success = terminate_on_success
        self._expert: Any = None
        self._raw_observation: np.ndarray | None = None
        self._n_steps = 0
        self._images_on_request = False

        self.observation_space = observation_space(self._camera_of, image_size, STATE_DIM)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Starts an episode whose object positions are a function of the seed.

        Args:
            seed: non-negative; None draws one from the environment's own generator.
            options: ``images_on_request``, see `envs.base`.

        Returns:
            Observation, and ``{"success": False, "seed": seed}``.

        Raises:
            ValueError: another option.
        """
        self._images_on_request = images_on_request(options)
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        sim = self._sim
        # The first reset draws valid positions. It leaves some targets computed from the previous scene
        # (door-lock, handle-pull, peg-unplug-side, ...); the second, with the same positions, corrects them.
        sim.seed(seed)
        sim._freeze_rand_vec = False
        sim.reset()
        sim._freeze_rand_vec = True
        sim.reset()
        self._mujoco.mj_forward(sim.model, sim.data)
        sim._prev_obs = sim._get_curr_obs_combined_no_goal()
        self._raw_observation = sim._get_obs()
        self._expert = _make_expert(self.task)
        self._n_steps = 0
        return self._observe(), {"success": False, "seed": seed}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Executes one action for 1 / ``control_hz`` seconds.

        Args:
            action: float (4,): hand displacement x, y, z in cm, gripper effort; clipped to [-1, 1].

        Returns:
            Observation; Meta-World's reward, 0 to 10; terminated; truncated; ``{"success": bool}``, which
            says whether the task is done *now*.

        Raises:
            ValueError: the action has another shape or is not finite.
            RuntimeError: `reset` has not been called.
        """
        action = self.checked_action(action, np.float32)
        if self._raw_observation is None:
            raise RuntimeError(f"{self.task}: step before reset; call reset(seed=...) first")
        raw, reward, _, _, raw_info = self._sim.step(np.clip(action, -1.0, 1.0))
        self._raw_observation = raw
        self._n_steps += 1
        success = bool(raw_info["success"])
        terminated = success and self._terminate_on_success
        truncated = self._n_steps >= self.max_episode_steps
        return self._observe(), float(reward), terminated, truncated, {"success": success}

    def expert_action(self) -> np.ndarray:
        """Meta-World's scripted policy for this task, clipped as the simulator clips it (raw values reach 19).

        Returns:
            float32 (4,) in [-1, 1].

        Raises:
            RuntimeError: `reset` has not been called.
        """
        if self._raw_observation is None:
            raise RuntimeError(f"{self.task}: expert_action before reset; call reset(seed=...) first")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Constant.s. may be too high")  # it is clipped below
            action = self._expert.get_action(self._raw_observation)
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    def hold_action(self, previous: np.ndarray | None) -> np.ndarray:
        """No displacement, the gripper's effort as before (0 at the start)."""
        gripper = 0.0 if previous is None else previous[3]
        return np.array([0.0, 0.0, 0.0, gripper], np.float32)

    def images(self) -> dict[str, np.ndarray]:
        return {key: self._renderer.render(self._sim.data, name) for key, name in self._camera_of.items()}

    def render(self) -> np.ndarray:
        """The current image of the first camera, uint8 (image_size, image_size, 3)."""
        return self._renderer.render(self._sim.data, self.camera)

    def settings(self) -> dict[str, Any]:
        return {
            "camera": self.camera,
            "second_camera": self.second_camera,
            **({} if self.cameras is None else {"cameras": self.cameras}),
            "image_size": self.image_size,
            "hide_goal": self.hide_goal,
            "layout_of": self.layout_of,
            "max_episode_steps": self.max_episode_steps,
            "control_hz": self.control_hz,
            "mujoco": self._mujoco.__version__,
        }

    def close(self) -> None:
        self._renderer.close()
        self._sim.close()

    def _observe(self) -> dict[str, np.ndarray]:
        assert self._raw_observation is not None
        images = {} if self._images_on_request else self.images()
        return {**images, "state": self._raw_observation[:STATE_DIM].astype(np.float32)}


def _make_simulation(task: str) -> Any:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE

    sim = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-goal-observable"](seed=0)
    sim.seeded_rand_vec = True
    return sim


def _reset_space_of(task: str, sim: Any) -> Any:
    other = _make_simulation(task)
    if other.model_name != sim.model_name:
        raise ValueError(f"layout_of={task!r} has another scene: {other.model_name}, not {sim.model_name}")
    return other._random_reset_space


def _make_expert(task: str) -> Any:
    from metaworld.policies import ENV_POLICY_MAP

    return ENV_POLICY_MAP[task]()
