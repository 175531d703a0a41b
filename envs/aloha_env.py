"""ALOHA in simulation (gym-aloha 0.1.5): two ViperX arms of seven joints each, at 50 Hz.

The package's model files are loaded with plain MuJoCo. Its own environment draws three pictures of 480 x 640 at every
step, asked for or not; here the same scene, start, success and seeds cost only the pictures that are looked at.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import gymnasium
import numpy as np

from envs.aloha_expert import AlohaExpert
from envs.aloha_tasks import TASKS
from envs.base import RobotEnv, images_on_request, observation_space
from envs.cameras import chosen_cameras, image_options
from envs.mujoco_rendering import OffscreenRenderer, import_mujoco
from envs.options import check_switch, check_whole
from envs.simulator import suggest

ACTION_DIM = STATE_DIM = 14  # of each arm, left first: six joints in radians, the gripper from 0 (shut) to 1 (open)
CONTROL_HZ = 50.0
START_ARM = (0, -0.96, 1.16, 0, -0.3, 0, 0.02239, -0.02239)  # joints in radians, fingers in metres
GRIPPER_M = (0.01844, 0.058)  # a finger's place where the gripper counts as shut, as open
CAMERAS = {"image_1": "top"}
SUCCESS = 4  # the reward of a success
ARM_FINGERS = {arm: f"vx300s_{arm}/10_{arm}_gripper_finger" for arm in ("left", "right")}
SOCKET = tuple(f"socket-{side}" for side in range(1, 5))
# Ranges of x, y, z in metres from which gym-aloha draws each object, in the order of its random numbers
PLACES = {
    "transfer_cube": (((0.0, 0.4, 0.05), (0.2, 0.6, 0.05)),),
    "insertion": (((0.1, 0.4, 0.05), (0.2, 0.6, 0.05)), ((-0.2, 0.4, 0.05), (-0.1, 0.6, 0.05))),
}


class AlohaEnv(RobotEnv):
    """One of ALOHA's two simulated tasks.

    Actions are absolute: targets of the joints in radians, and openings of the grippers. They are clipped to what the
    actuators take, not to the [-1, 1] that gym-aloha declares and its own tasks leave.
    """

    noise_unit = (0.1,) * ACTION_DIM  # radians, and a tenth of the gripper's opening

    def __init__(
        self,
        task: str,
        *,
        cameras: Any = None,
        image_size: int = 96,
        max_episode_steps: int = 300,
        hold_steps: int = 1,
        terminate_on_success: bool = True,
        **images: Any,
    ) -> None:
        """Loads the simulation.

        Args:
            task: a key of `envs.aloha_tasks.TASKS`.
            cameras: as many as wanted of top, angle, front_close, left_wrist, right_wrist, left_pillar, right_pillar,
                "image_1=top,wrist=left_wrist", see `envs.simulator.named_cameras`; None: top as image_1.
            image_size: height and width of the images in pixels.
            max_episode_steps: 300, as gym-aloha has it; LeRobot evaluates with 400.
            hold_steps: success counts when its condition has held for so many steps in a row. 1 is success as
                published (ACT, LeRobot): the other gripper touches the lifted cube, though the first may still hold it.
            terminate_on_success: `step` reports ``terminated`` when the task is done.
            images: `image_1="top"`, an addition to `cameras`, or None to leave an image out.

        Raises:
            ValueError: an unknown task, camera or option, or a number that cannot be.
            ModuleNotFoundError: gym-aloha is not installed.
            RuntimeError: off-screen rendering is impossible.
        """
        if task not in TASKS:
            raise ValueError(f"unknown aloha task {task!r}; {suggest(task, TASKS)}")
        for name, value in (
            ("image_size", image_size),
            ("max_episode_steps", max_episode_steps),
            ("hold_steps", hold_steps),
        ):
            check_whole(name, value, 1)
        if hold_steps > max_episode_steps:
            raise ValueError(
                f"hold_steps is {hold_steps}, but an episode ends after max_episode_steps {max_episode_steps}"
            )
        check_switch("terminate_on_success", terminate_on_success)
        self._camera_of = chosen_cameras(
            cameras, image_options("aloha", images, AlohaEnv.__init__.__kwdefaults__), CAMERAS
        )
        self._mujoco = import_mujoco()
        self._model = self._mujoco.MjModel.from_xml_path(str(_assets() / f"bimanual_viperx_{task}.xml"))
        self._data = self._mujoco.MjData(self._model)
        self._renderer = OffscreenRenderer(self._model, image_size)
        names = self._renderer.camera_names()
        for name in self._camera_of.values():
            if name not in names:
                raise ValueError(f"aloha has no camera {name!r}; {suggest(name, names)}")

        self.task = task
        self.instruction, *others = TASKS[task]
        self.paraphrases = tuple(others)
        self.state_dim, self.per_action_dim, self.control_hz = STATE_DIM, ACTION_DIM, CONTROL_HZ
        self.max_episode_steps, self.hold_steps, self.image_size = max_episode_steps, hold_steps, image_size
        self._terminate_on_success = terminate_on_success
        self._substeps = round(1 / CONTROL_HZ / self._model.opt.timestep)
        self._expert: AlohaExpert | None = None
        self._command = np.zeros(ACTION_DIM)
        self._n_steps = self._held = 0
        self._images_on_request = False

        limits = self._model.actuator_ctrlrange.copy()
        low, high = (np.concatenate([limits[:6, i], [i], limits[8:14, i], [i]]) for i in range(2))
        self.action_space = gymnasium.spaces.Box(low.astype(np.float32), high.astype(np.float32))
        self.observation_space = observation_space(self._camera_of, image_size, STATE_DIM)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Starts an episode; the objects lie where gym-aloha puts them for the same seed.

        Args:
            seed: non-negative; None draws one from the environment's own generator.
            options: ``images_on_request``, see `envs.base`.
        """
        self._images_on_request = images_on_request(options)
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        model, data = self._model, self._data
        self._mujoco.mj_resetData(model, data)
        data.qpos[:16] = data.ctrl[:] = START_ARM * 2
        draw = np.random.RandomState(seed)  # gym-aloha's generator, so that its seeds give its scenes
        poses = [[*draw.uniform(*place), 1, 0, 0, 0] for place in PLACES[self.task]]
        data.qpos[16:] = np.concatenate(poses)
        self._mujoco.mj_forward(model, data)
        self._command = self._joints()
        self.restart_expert()
        self._n_steps = self._held = 0
        return self._observe(), {"success": False, "seed": seed}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Executes one action for 1/50 s.

        Args:
            action: float (14,): see `ACTION_DIM`; clipped to `action_space`.

        Returns:
            Observation; gym-aloha's reward, 0 to 4; terminated; truncated; ``{"success": bool}``.

        Raises:
            ValueError: the action has another shape or is not finite.
            RuntimeError: `reset` has not been called.
        """
        action = self.checked_action(action, np.float64)
        if self._expert is None:
            raise RuntimeError(f"{self.task}: step before reset; call reset(seed=...) first")
        self._command = np.clip(action, self.action_space.low, self.action_space.high)
        for arm in range(2):
            joints, opening = self._command[7 * arm : 7 * arm + 6], self._command[7 * arm + 6]
            finger = GRIPPER_M[0] + opening * (GRIPPER_M[1] - GRIPPER_M[0])
            self._data.ctrl[8 * arm : 8 * arm + 8] = [*joints, finger, -finger]
        self._mujoco.mj_step(self._model, self._data, self._substeps)
        self._mujoco.mj_forward(self._model, self._data)  # kinematics and contacts of the state that was reached
        self._n_steps += 1
        self._expert.advance()
        reward = self._reward()
        self._held = self._held + 1 if reward == SUCCESS else 0
        success = self._held >= self.hold_steps
        terminated = success and self._terminate_on_success
        truncated = self._n_steps >= self.max_episode_steps
        return self._observe(), float(reward), terminated, truncated, {"success": success}

    def expert_action(self) -> np.ndarray:
        """The scripted expert's, see `envs.aloha_expert`: float32 (14,)."""
        if self._expert is None:
            raise RuntimeError(f"{self.task}: expert_action before reset; call reset(seed=...) first")
        action = self._expert.action(self._command)
        return np.clip(action, self.action_space.low, self.action_space.high).astype(np.float32)

    def restart_expert(self) -> None:
        """From the approach, or with what the grippers have lifted from there on."""
        self._expert = AlohaExpert(self._mujoco, self._model, self._data, self.task, self._reward())

    def hold_action(self, previous: np.ndarray | None) -> np.ndarray:
        """The last targets again; at the start the present joints, since actions are absolute."""
        held = self._joints() if previous is None else previous
        return np.clip(held, self.action_space.low, self.action_space.high).astype(np.float32)

    def images(self) -> dict[str, np.ndarray]:
        return {key: self._renderer.render(self._data, name) for key, name in self._camera_of.items()}

    def settings(self) -> dict[str, Any]:
        return {
            **self._camera_of,
            "image_size": self.image_size,
            "max_episode_steps": self.max_episode_steps,
            "hold_steps": self.hold_steps,
            "control_hz": self.control_hz,
            "mujoco": self._mujoco.__version__,
        }

    def close(self) -> None:
        self._renderer.close()

    def _observe(self) -> dict[str, np.ndarray]:
        images = {} if self._images_on_request else self.images()
        return {**images, "state": self._joints().astype(np.float32)}

    def _joints(self) -> np.ndarray:
        """float64 (14,): the joints as the state and the actions have them."""
        arms = (self._data.qpos[:8], self._data.qpos[8:16])
        return np.concatenate([[*arm[:6], (arm[6] - GRIPPER_M[0]) / (GRIPPER_M[1] - GRIPPER_M[0])] for arm in arms])

    def _reward(self) -> int:
        """gym-aloha's: how far the task has come, 4 where it is done."""
        name = self._mujoco.mj_id2name
        geom = self._mujoco.mjtObj.mjOBJ_GEOM
        pairs = [(name(self._model, geom, c.geom1), name(self._model, geom, c.geom2)) for c in self._data.contact]
        touching = {frozenset(pair) for pair in pairs}

        def touch(things: tuple[str, ...], other: str) -> bool:
            return any(frozenset((thing, other)) in touching for thing in things)

        left, right = ARM_FINGERS["left"], ARM_FINGERS["right"]
        if self.task == "transfer_cube":
            lifted = not touch(("red_box",), "table")
            if touch(("red_box",), left):
                return 4 if lifted else 3
            return (2 if lifted else 1) if touch(("red_box",), right) else 0
        if touch(("red_peg",), "pin"):
            return 4
        lifted = not touch(("red_peg", *SOCKET), "table")
        if touch(SOCKET, "red_peg") and lifted:
            return 3
        held = touch(("red_peg",), right) and touch(SOCKET, left)
        return (2 if lifted else 1) if held else 0


def _assets() -> Any:
    from pathlib import Path

    spec = importlib.util.find_spec("gym_aloha")
    if spec is None:
        raise ModuleNotFoundError("No module named 'gym_aloha'", name="gym_aloha")
    return Path(spec.submodule_search_locations[0]) / "assets"
