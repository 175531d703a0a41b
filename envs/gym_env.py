"""Any gymnasium environment with a picture, a vector of numbers as state, and continuous actions.

    --env gym --tasks gym_pusht:gym_pusht/PushT-v0 \\
        --env_options obs_type=pixels_agent_pos image_1=pixels state=agent_pos success=is_success prompt="push the T"

gymnasium's own syntax `module:ID` imports the module that registers the ID. Environments call their observations by
many names, so the options say where images, state and success are. What is proprioception is for the user to say as
well: the observation of many environments holds the pose of the object.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np

from envs.base import RobotEnv
from envs.cameras import chosen_cameras
from envs.options import check_switch, check_text, check_whole
from envs.simulator import suggest

RENDER = "render"  # as an image: what the environment's `render` returns
_RANGE = re.compile(r"(?P<path>[^\[\]]+)\[(?P<first>\d*):(?P<last>\d*)\]")
_LEAST_REWARD = re.compile(r"reward>=(?P<least>[-+.\deE]+)")
HOLDS = ("state", "zero")


class GymEnv(RobotEnv):
    """An environment that `gymnasium.make` makes, behind the interface of this repository.

    Actions go to it as they are: some environments declare a smaller space than they take.
    """

    def __init__(
        self,
        task: str,
        *,
        state: str | None = None,
        success: str = "is_success",
        prompt: str | None = None,
        paraphrases: str | tuple[str, ...] | list[str] = (),
        control_hz: float | None = None,
        max_episode_steps: int | None = None,
        clip: bool = False,
        hold: str | None = None,
        gripper: int | tuple[int, ...] = (),
        cameras: Any = None,
        **options: Any,
    ) -> None:
        """Makes the environment.

        Args:
            task: an ID that gymnasium knows, or "module:ID".
            state: where the state is in the observation, "agent_pos" or "robot.joints". "observation[0:3]" takes a part
                of it, "a+b" puts several together, and "." is an observation that is a vector itself.
            success: a key of `info`, which may be there at an episode's end alone; "terminated" (where an episode ends
                by success alone), or "reward>=NUMBER".
            prompt: the instruction.
            paraphrases: other words for it: one text, or several, "[push it, move it]" on the command line.
            control_hz: steps a second; None: the environment's `render_fps`.
            max_episode_steps: None: the environment's own limit.
            clip: clip actions to the environment's action space.
            hold: what keeps the robot still, for steps that no plan covers: "zero" where actions are displacements,
                "state" where they are the values of the state. Needed by execution with latency alone.
            gripper: which values of an action command a gripper, "6" or "[6, 13]": while the robot is held still they
                stay what they were, and what it carries does not fall.
            cameras, options: `image_1="pixels.top"` says where an image is in the observation, "." that it is the whole
                observation, "render" that it is what `render` returns; `cameras="front=pixels.top"` says the same. Any
                other option goes to the environment.

        Raises:
            ValueError: an unknown ID, an option that the environment does not take, a value of another type, or a place
                where nothing is; names what there is.
        """
        paraphrases = (paraphrases,) if isinstance(paraphrases, str) else paraphrases
        if not isinstance(paraphrases, (tuple, list)):
            raise ValueError(f"paraphrases is {paraphrases!r}; give one text, or several as [push it, move it]")
        check_text("success", success)
        for name, text in (("prompt", prompt), ("state", state), *(("paraphrases", words) for words in paraphrases)):
            if text is not None:
                check_text(name, text)
        if max_episode_steps is not None:
            check_whole("max_episode_steps", max_episode_steps, 1)
        check_switch("clip", clip)
        images = {name: value for name, value in options.items() if _names_an_image(name)}
        self._places = chosen_cameras(cameras, images, {})
        others = {name: value for name, value in options.items() if name not in images}
        self._env = _made(task, others, max_episode_steps, renders=RENDER in self._places.values())
        if not isinstance(self._env.action_space, gymnasium.spaces.Box) or len(self._env.action_space.shape) != 1:
            raise ValueError(
                f"{task}: actions are {self._env.action_space}; only vectors of real numbers are supported"
            )
        self._state_place, self._success, self._clip, self._hold = state, success, clip, hold
        self.clips_actions = clip
        if hold is not None and hold not in HOLDS:
            raise ValueError(f"hold={hold!r}; give one of {', '.join(HOLDS)}")
        self.task, self.prompt = task, prompt
        if not prompt:
            raise ValueError(f"{task}: what is the robot told? Give --env_options prompt='push the T onto its mark'")
        self.instruction, self.paraphrases = prompt, tuple(paraphrases)
        self.control_hz = _rate(self._env, control_hz, task)
        self.max_episode_steps = _step_limit(self._env, max_episode_steps, task)
        self.per_action_dim = self._env.action_space.shape[0]
        self.action_space = self._env.action_space
        self._on_request = self._says_success = False
        self._raw: Any = self._env.reset(seed=0)[0]
        observation = self._observe()
        self.state_dim = len(observation["state"])
        boxes = {key: gymnasium.spaces.Box(0, 255, image.shape, np.uint8) for key, image in self.images().items()}
        state_space = gymnasium.spaces.Box(-np.inf, np.inf, (self.state_dim,), np.float32)
        self.observation_space = gymnasium.spaces.Dict({**boxes, "state": state_space})
        if hold is None and gripper != ():
            raise ValueError(f"gripper={gripper!r} is kept while the robot is held still; give hold=zero or hold=state")
        gripper = (gripper,) if isinstance(gripper, int) else gripper
        values = range(self.per_action_dim)
        if not isinstance(gripper, (tuple, list)) or any(type(dim) is not int or dim not in values for dim in gripper):
            raise ValueError(f"gripper={gripper!r}; give numbers from 0 to {values[-1]}, the values of an action")
        self._gripper = list(gripper)
        if hold == "state" and self.state_dim != self.per_action_dim:
            raise ValueError(f"hold=state: the state has {self.state_dim} values, an action {self.per_action_dim}")
        self._raw = None  # `step` needs a `reset` of the user's

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Starts an episode. What the seed decides is the environment's affair."""
        options = dict(options or {})
        self._on_request = bool(options.pop("images_on_request", False))
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        self._raw = self._env.reset(seed=seed, options=options or None)[0]
        return self._observe(), {"success": False, "seed": seed}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """One step; `info` is the environment's, with `success`."""
        if self._raw is None:
            raise RuntimeError(f"{self.task}: step before reset; call reset(seed=...) first")
        space = self.action_space
        action = np.asarray(action, dtype=space.dtype)
        if action.shape != space.shape:
            raise ValueError(f"{self.task}: action has shape {action.shape}, must be {space.shape}")
        if not np.isfinite(action).all():
            raise ValueError(f"{self.task}: action {action.tolist()} is not finite")
        if self._clip:
            action = np.clip(action, space.low, space.high)
        self._raw, reward, terminated, truncated, info = self._env.step(action)
        success = self._succeeded(float(reward), bool(terminated), bool(terminated or truncated), info)
        return self._observe(), float(reward), bool(terminated), bool(truncated), {**info, "success": success}

    def expert_action(self) -> np.ndarray:
        """There is none: gymnasium environments bring no expert."""
        raise NotImplementedError(
            f"{self.task} has no scripted expert; record demonstrations elsewhere and convert them (docs/lerobot.md)"
        )

    def hold_action(self, previous: np.ndarray | None) -> np.ndarray:
        """As the options `hold` and `gripper` say."""
        if self._hold is None:
            raise ValueError(
                f"{self.task}: which action holds the robot still? Give --env_options hold=zero where actions are "
                "displacements, hold=state where they are the values of the state"
            )
        still = np.zeros(self.per_action_dim) if self._hold == "zero" else self._state()
        still = np.array(still, np.float32)
        if previous is not None:
            still[self._gripper] = previous[self._gripper]
        return still

    def images(self) -> dict[str, np.ndarray]:
        return {key: self._image(key, place) for key, place in self._places.items()}

    def settings(self) -> dict[str, Any]:
        return {
            **self._places,
            "state": self._state_place,
            "success": self._success,
            "clip": self._clip,
            "max_episode_steps": self.max_episode_steps,
            "control_hz": self.control_hz,
        }

    def close(self) -> None:
        self._env.close()

    def _observe(self) -> dict[str, np.ndarray]:
        return {**({} if self._on_request else self.images()), "state": self._state()}

    def _state(self) -> np.ndarray:
        places = _places_of(self._raw)
        vectors = [name for name, value in places.items() if np.ndim(value) <= 1]
        if self._state_place is None:
            raise ValueError(
                f"{self.task}: where is the state? Give --env_options state=...; there is {_list(vectors)}"
            )
        parts = []
        for name in self._state_place.split("+"):
            part = _RANGE.fullmatch(name)
            path = part["path"] if part else name
            if path not in vectors:
                raise ValueError(f"{self.task}: state={name}: no vector is there; there is {_list(vectors)}")
            values = np.atleast_1d(np.asarray(places[path], np.float32))
            first, last = (int(part[end]) if part and part[end] else None for end in ("first", "last"))
            if not values[first:last].size or (last or 0) > len(values):
                raise ValueError(f"{self.task}: state={name}: {path} has {len(values)} values")
            parts.append(values[first:last])
        return np.concatenate(parts)

    def _image(self, key: str, place: str) -> np.ndarray:
        if place == RENDER:
            image = self._env.render()
        else:
            places = _places_of(self._raw)
            pictures = [*(name for name, value in places.items() if np.ndim(value) == 3), RENDER]
            if place not in pictures:
                raise ValueError(f"{self.task}: {key}={place}: no picture is there; there is {_list(pictures)}")
            image = places[place]
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"{self.task}: {key}={place} is {image.dtype} of shape {image.shape}; wanted uint8 (H, W, 3), RGB"
            )
        return np.ascontiguousarray(image)

    def _succeeded(self, reward: float, terminated: bool, is_over: bool, info: Mapping[str, Any]) -> bool:
        least = _LEAST_REWARD.fullmatch(self._success)
        if least:
            return reward >= float(least["least"])
        if self._success == "terminated":
            return terminated
        self._says_success |= self._success in info
        if is_over and not self._says_success:
            raise ValueError(
                f"{self.task}: success={self._success}: the environment's info has no such key; it has "
                f"{_list(info)}; or give success=terminated, or success='reward>=1'"
            )
        return bool(info.get(self._success, False))


def _names_an_image(option: str) -> bool:
    return option != "image_size" and re.fullmatch(r"image(_\w+)?", option) is not None


def _made(task: str, options: dict[str, Any], max_episode_steps: int | None, renders: bool) -> gymnasium.Env:
    for name in ("id", "disable_env_checker"):  # gymnasium's own
        if name in options:
            raise ValueError(f"{task} takes no option {name!r}")
    if renders:
        options = {"render_mode": "rgb_array", **options}
    try:
        return gymnasium.make(task, max_episode_steps=max_episode_steps, disable_env_checker=True, **options)
    except gymnasium.error.Error as error:
        raise ValueError(f"gymnasium makes no {task!r}: {error}") from None
    except ModuleNotFoundError as error:
        module = task.partition(":")[0]
        if error.name not in (module, None):
            raise
        raise ValueError(f"{task}: no module {module!r}; install the package that registers the environment") from None
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if not unknown:
            raise
        own = list(GymEnv.__init__.__kwdefaults__ or ())
        near = suggest(unknown[1], [*own, "image_1", "image_2"])
        raise ValueError(f"{task} takes no option {unknown[1]!r}; {near}") from None


def _rate(env: gymnasium.Env, control_hz: float | None, task: str) -> float:
    rate = env.metadata.get("render_fps") if control_hz is None else control_hz
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
        raise ValueError(f"{task}: control_hz is {rate!r}; give the steps a second: --env_options control_hz=50")
    return float(rate)


def _step_limit(env: gymnasium.Env, max_episode_steps: int | None, task: str) -> int:
    limit = max_episode_steps or (env.spec.max_episode_steps if env.spec else None)
    if limit is None:
        raise ValueError(f"{task} never ends an episode; give --env_options max_episode_steps=300, say")
    return int(limit)


def _places_of(observation: Any) -> dict[str, Any]:
    """Every array of an observation by its dotted path; an observation that is an array itself is at "."."""
    if not isinstance(observation, Mapping):
        return {".": observation}
    places: dict[str, Any] = {}
    for key, value in observation.items():
        inner = _places_of(value)
        places |= {str(key) if path == "." else f"{key}.{path}": array for path, array in inner.items()}
    return places


def _list(names: Any) -> str:
    return ", ".join(map(str, names)) or "nothing"
