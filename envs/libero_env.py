"""LIBERO (Liu et al. 2023, arXiv 2306.03310): 130 tasks of a Panda arm with words, at 20 Hz.

The names imported here are upstream's, so an installed upstream LIBERO works too. requirements-libero.txt names a
package that carries the same files and has its assets in wheels.

BDDL files, which describe the tasks, come with it; its parser evaluates expressions in them, so they are code.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium
import numpy as np

from envs.base import RobotEnv, images_on_request, observation_space
from envs.cameras import chosen_cameras, image_options
from envs.libero_expert import PickAndPlace, Shapes
from envs.libero_tasks import STEP_LIMITS, TASKS, instructions_of, suite_of
from envs.mujoco_rendering import OffscreenRenderer, import_mujoco
from envs.options import check_switch, check_whole
from envs.simulator import suggest

STATE_DIM = 8  # gripper x, y, z in metres; its rotation as a rotation vector in radians; both fingers in metres
ACTION_DIM = 7  # of the gripper: displacement x, y, z (1 = 5 cm), rotation x, y, z (1 = 0.5 rad); -1 opens, +1 shuts
CONTROL_HZ = 20
SETTLING = np.array([0, 0, 0, 0, 0, 0, -1.0])  # the gripper opens, the rest waits until things have come to rest
CAMERAS = {"image_1": "agentview", "image_2": "robot0_eye_in_hand"}
MAX_PLACINGS = 300  # draws of a scene in which everything finds a place
LEAST_GAP_M = 0.012  # between things of the wide layout; LIBERO's own sampler takes a plate for a disc of 2.5 cm
LOOKS, LAYOUTS, INITIAL_STATES = ("fast", "shipped"), ("standard", "wide"), ("sampled", "official")
WIDE_M = {"table": (0.09, 0.12), "other": (0.05, 0.05)}  # added to each side of a movable object's region: x, y


class LiberoEnv(RobotEnv):
    """One LIBERO task, seen by cameras.

    What success is, the settling before an episode, the state and the actions are those of LeRobot's and OpenVLA's
    evaluations; the step limits are LeRobot's (OpenVLA gives libero_spatial 220). Pictures are upright and not
    mirrored; `mirror` and `look` give those that public data and checkpoints were made with.
    """

    noise_unit = (1.0,) * 6 + (0.0,)

    def __init__(
        self,
        task: str,
        *,
        cameras: Any = None,
        image_size: int = 96,
        layout: str = "standard",
        initial_states: str = "sampled",
        mirror: bool = False,
        look: str = "fast",
        settle_steps: int = 10,
        max_episode_steps: int | None = None,
        terminate_on_success: bool = True,
        **images: Any,
    ) -> None:
        """Loads the simulation; takes seconds.

        Args:
            task: a key of `envs.libero_tasks.TASKS`, "libero_goal.put_the_bowl_on_the_plate".
            cameras: as many as wanted of agentview, robot0_eye_in_hand, frontview, birdview, sideview, ...,
                "image_1=agentview,wrist=robot0_eye_in_hand", see `envs.simulator.named_cameras`; None: these two as
                image_1 and image_2.
            image_size: height and width of the images in pixels.
            layout: "standard" places objects within about a centimetre, as LIBERO does; "wide" over many centimetres,
                so that a policy has to look.
            initial_states: "official" starts from the 50 published states (seed modulo 50), "sampled" draws positions.
            mirror: mirror the pictures left to right, as LIBERO's data and the policies trained on them have them.
            look: "fast" draws no shadows and no reflections and simplifies meshes; "shipped" draws what LIBERO draws.
            settle_steps: control steps before the episode begins.
            max_episode_steps: None: LeRobot's limit of the suite, see `envs.libero_tasks.STEP_LIMITS`.
            terminate_on_success: `step` reports ``terminated`` when the task is done.
            images: `image_1="agentview"`, an addition to `cameras`, or None to leave an image out.

        Raises:
            ValueError: an unknown task, camera or option, or values that exclude each other.
            ModuleNotFoundError: LIBERO is not installed.
            RuntimeError: off-screen rendering is impossible.
        """
        if task not in TASKS:
            raise ValueError(f"unknown libero task {task!r}; {suggest(task, TASKS)}")
        for name, value, known in (
            ("look", look, LOOKS),
            ("layout", layout, LAYOUTS),
            ("initial_states", initial_states, INITIAL_STATES),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; give one of {', '.join(known)}")
        if layout == "wide" and initial_states == "official":
            raise ValueError("layout=wide and initial_states=official exclude each other: official states are standard")
        suite, name = suite_of(task)
        limit = STEP_LIMITS[suite] if max_episode_steps is None else max_episode_steps
        for option, value, least in (
            ("image_size", image_size, 1),
            ("max_episode_steps", limit, 1),
            ("settle_steps", settle_steps, 0),
        ):
            check_whole(option, value, least)
        check_switch("mirror", mirror)
        check_switch("terminate_on_success", terminate_on_success)
        self._camera_of = chosen_cameras(
            cameras, image_options("libero", images, LiberoEnv.__init__.__kwdefaults__), CAMERAS
        )
        self._mujoco = import_mujoco()
        self._control, self._retry = _make_control(suite, name)
        self._env = self._control.env
        self._origins = _fixture_origins(self._env)
        self._states = _official_states(_benchmark(suite), name) if initial_states == "official" else None
        self._shapes, self._moved = Shapes(self._env), _widen(self._env) if layout == "wide" else []
        model = self._env.sim.model._model
        self._renderer = OffscreenRenderer(
            model, image_size, hide_sites=True, hidden_geoms=(0,), plain=look == "shipped"
        )
        names = self._renderer.camera_names()
        for camera in self._camera_of.values():
            if camera not in names:
                raise ValueError(f"libero has no camera {camera!r}; {suggest(camera, names)}")

        self.task = task
        self.instruction, *others = instructions_of(task)
        self.paraphrases = tuple(others)
        self.state_dim, self.per_action_dim, self.control_hz = STATE_DIM, ACTION_DIM, float(CONTROL_HZ)
        self.max_episode_steps, self.image_size = limit, image_size
        self.layout, self.initial_states, self.mirror, self.look = layout, initial_states, mirror, look
        self.settle_steps = settle_steps
        self._terminate_on_success = terminate_on_success
        self._goals: dict[str, list[list[str]]] = {}  # by task, of the tasks that `holds` was asked for
        self._raw: dict[str, Any] | None = None
        self._expert: PickAndPlace | None = None
        self._n_steps = 0
        self._images_on_request = False
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)
        self.observation_space = observation_space(self._camera_of, image_size, STATE_DIM)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Starts an episode that is a function of the seed, to the bit, whatever happened before.

        Args:
            seed: non-negative; None draws one from the environment's own generator.
            options: ``images_on_request``, see `envs.base`.

        Raises:
            ValueError: another option.
            RuntimeError: no scene was found in which everything has a place.
        """
        self._images_on_request = images_on_request(options)
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        with _numpy_seeded(seed):
            self._raw = self._place(seed)
        # The gripper's last command outlives a reset, and is the start of its next one.
        gripper = self._env.robots[0].gripper
        gripper.current_action = np.zeros_like(gripper.current_action)
        if self._states is not None:
            self._raw = self._control.set_init_state(self._states[seed % len(self._states)])
        for _ in range(self.settle_steps):
            self._raw, *_ = self._env.step(SETTLING)
        self._expert = None
        self._n_steps = 0
        return self._observe(), {"success": False, "seed": seed}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Executes one action for 1/20 s.

        Args:
            action: float (7,): see `ACTION_DIM`; clipped to [-1, 1].

        Returns:
            Observation; 1.0 where the task is done, else 0.0; terminated; truncated; ``{"success": bool}``.

        Raises:
            ValueError: the action has another shape or is not finite.
            RuntimeError: `reset` has not been called.
        """
        action = self.checked_action(action, np.float64)
        if self._raw is None:
            raise RuntimeError(f"{self.task}: step before reset; call reset(seed=...) first")
        self._raw, *_ = self._env.step(np.clip(action, -1.0, 1.0))
        self._n_steps += 1
        if self._expert is not None:
            self._expert.advance()
        success = bool(self._control.check_success())
        terminated = success and self._terminate_on_success
        truncated = self._n_steps >= self.max_episode_steps
        return self._observe(), float(success), terminated, truncated, {"success": success}

    def expert_action(self) -> np.ndarray:
        """The scripted expert's, see `envs.libero_expert`: float32 (7,).

        Raises:
            RuntimeError: `reset` has not been called.
            NotImplementedError: the task is not to put one thing somewhere, so there is no expert for it.
        """
        if self._raw is None:
            raise RuntimeError(f"{self.task}: expert_action before reset; call reset(seed=...) first")
        if self._expert is None:
            self.restart_expert()
        return self._expert.action().astype(np.float32)

    def restart_expert(self) -> None:
        """From the approach, or with the thing in the gripper from there on. Errors as of `expert_action`."""
        self._expert = PickAndPlace(self._env, self.task)

    def holds(self, task: str) -> bool:
        """Whether the goal of a task is reached now, which may be another task of the same scene.

        Raises:
            ValueError: an unknown task, or one about things that this scene does not have.
            RuntimeError: `reset` has not been called.
        """
        if self._raw is None:
            raise RuntimeError(f"{self.task}: holds before reset; call reset(seed=...) first")
        if task not in self._goals:
            self._goals[task] = self._goal_of(task)
        return all(self._env._eval_predicate(predicate) for predicate in self._goals[task])

    def hold_action(self, previous: np.ndarray | None) -> np.ndarray:
        """No displacement, the gripper's command as before (open at the start)."""
        return np.array([0, 0, 0, 0, 0, 0, -1.0 if previous is None else previous[6]], np.float32)

    def images(self) -> dict[str, np.ndarray]:
        data = self._env.sim.data._data
        pictures = {key: self._renderer.render(data, name) for key, name in self._camera_of.items()}
        if self.mirror:
            pictures = {key: np.ascontiguousarray(picture[:, ::-1]) for key, picture in pictures.items()}
        return pictures

    def settings(self) -> dict[str, Any]:
        return {
            **self._camera_of,
            "image_size": self.image_size,
            "layout": self.layout,
            "initial_states": self.initial_states,
            "mirror": self.mirror,
            "look": self.look,
            "settle_steps": self.settle_steps,
            "max_episode_steps": self.max_episode_steps,
            "control_hz": self.control_hz,
            "mujoco": self._mujoco.__version__,
        }

    def close(self) -> None:
        self._renderer.close()
        self._control.close()

    def _goal_of(self, task: str) -> list[list[str]]:
        """The predicates of a task's goal: [["on", "bowl", "plate"], ...]."""
        from libero.libero.envs.bddl_utils import robosuite_parse_problem

        if task not in TASKS:
            raise ValueError(f"unknown libero task {task!r}; {suggest(task, TASKS)}")
        goal = robosuite_parse_problem(_bddl_file(*suite_of(task)))["goal_state"]
        missing = {name for _, *names in goal for name in names} - self._env.object_states_dict.keys()
        if missing:
            raise ValueError(f"{task} is about {', '.join(sorted(missing))}, which the scene of {self.task} lacks")
        return goal

    def _place(self, seed: int) -> dict[str, Any]:
        """A scene; the sampler gives up where things that it has placed leave no room for the next."""
        model = self._env.sim.model._model
        for _ in range(MAX_PLACINGS):
            # LIBERO adds a fixture's new place to where its shelves and drawers are, which a soft reset leaves at the
            # last one: a bowl for the drawer would fall from a metre above it.
            for body, (position, quaternion) in self._origins.items():
                model.body_pos[body], model.body_quat[body] = position, quaternion
            try:
                observation = self._env.reset()
            except self._retry:
                continue
            if not self._moved or self._shapes.apart(self._moved, self._env.fixtures_dict, LEAST_GAP_M):
                return observation
        raise RuntimeError(
            f"{self.task} seed {seed}: no room for everything in {MAX_PLACINGS} draws; take another seed"
        )

    def _observe(self) -> dict[str, np.ndarray]:
        assert self._raw is not None
        images = {} if self._images_on_request else self.images()
        rotation = rotation_vector(self._raw["robot0_eef_quat"])
        parts = [self._raw["robot0_eef_pos"], rotation, self._raw["robot0_gripper_qpos"]]
        return {**images, "state": np.concatenate(parts).astype(np.float32)}


def rotation_vector(quaternion_xyzw: np.ndarray) -> np.ndarray:
    """Axis times angle, (3,), rad, of a unit quaternion, by the angle from 0 to 2 pi that its sign names.

    The gripper points down, an angle of about pi: a vector of the angle below pi would jump to its negative whenever
    the hand turns past it. LIBERO's published demonstrations and policies have this form, as robosuite computes it.
    """
    *axis, w = np.asarray(quaternion_xyzw, np.float64)
    sine = np.linalg.norm(axis)
    return np.zeros(3) if sine < 1e-9 else np.array(axis) / sine * 2 * np.arctan2(sine, w)


def _fixture_origins(env: Any) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Body of each fixture -> position and quaternion (wxyz) in the model before anything is placed."""
    bodies = {body.get("name"): body for body in env.model.root.iter("body")}
    origins = {}
    for fixture in env.fixtures_dict.values():
        described = bodies[fixture.root_body]
        position, quaternion = (described.get(key, default) for key, default in (("pos", "0 0 0"), ("quat", "1 0 0 0")))
        origins[env.sim.model.body_name2id(fixture.root_body)] = (
            np.array(position.split(), float),
            np.array(quaternion.split(), float),
        )
    return origins


def _make_control(suite: str, name: str) -> tuple[Any, type[Exception]]:
    """LIBERO's environment without its renderer, and the exception of a scene that finds no room."""
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)  # it recommends settings of its own at every start
    try:
        from libero.libero.envs.env_wrapper import ControlEnv
    except EOFError:
        raise RuntimeError(
            "this LIBERO asks at its first import where its files shall lie, and nobody answers here; run once at a "
            "terminal: python -c 'import libero.libero'"
        ) from None
    from robosuite.utils.errors import RandomizationError

    control = ControlEnv(
        bddl_file_name=_bddl_file(suite, name),
        control_freq=CONTROL_HZ,
        use_camera_obs=False,
        has_offscreen_renderer=False,
        hard_reset=False,  # which takes seconds and decides nothing
        horizon=10**9,
        ignore_done=True,
    )
    return control, RandomizationError


def _bddl_file(suite: str, name: str) -> str:
    from libero.libero import get_libero_path

    return os.path.join(get_libero_path("bddl_files"), suite, f"{name}.bddl")


def _benchmark(suite: str) -> Any:
    from libero.libero import benchmark

    return benchmark.get_benchmark(suite)()


def _official_states(suite: Any, name: str) -> np.ndarray:
    """The published initial states, float64 (50, values).

    Args:
        suite: LIBERO's benchmark of that name.
        name: of the task.

    Raises:
        RuntimeError: upstream's package, whose states are pickles, which torch refuses to run.
    """
    index = [task.name for task in suite.tasks].index(name)
    try:
        return np.asarray(suite.get_task_init_states(index))
    except pickle.UnpicklingError:
        raise RuntimeError(
            f"initial_states is official, but this LIBERO keeps its official states as pickles (of {name}), which are "
            "never run; install the package of requirements-libero.txt, or take initial_states=sampled"
        ) from None


def _widen(env: Any) -> list[str]:
    """Let everything movable lie further from where LIBERO puts it, fixtures stay; returns what is moved."""
    moved = []
    for sampler in env.placement_initializer.samplers.values():
        if not all(thing.name in env.objects_dict for thing in sampler.mujoco_objects):
            continue
        dx, dy = WIDE_M["table" if env.workspace_name == "main_table" else "other"]
        sampler.x_ranges = [[low - dx, high + dx] for low, high in sampler.x_ranges]
        sampler.y_ranges = [[low - dy, high + dy] for low, high in sampler.y_ranges]
        moved += [thing.name for thing in sampler.mujoco_objects]
    return moved


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """robosuite draws from numpy's global generator: seed it, and leave it as it was."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)
