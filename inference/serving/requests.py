"""A robot's message as a sample for the model, every size in it checked before anything is spent on it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.processing import Sample, array_fault
from inference.alarm import Alarm
from inference.monitor import Monitor
from inference.predictor import VLAPredictor
from inference.serving.wire import unpack
from utils.config_utils import ConfigError, ServingConfig
from utils.encoded_images import ImageHeaderError, encoded_size
from utils.misc import derive_seed
from utils.text import printable

MAX_QUOTED = 1000  # characters of a request that an error quotes; the reply is cut to fewer
MAX_FRAMES = 256  # of a camera in one request, where the policy does not see more
MAX_UNREAD_KEYS = 16  # keys that nothing reads and a client is told of
Frame = np.ndarray | bytes


class RequestError(ValueError):
    """An observation that the policy can't use."""


@dataclass
class Request:
    """A checked request; its frames are not decoded yet.

    Attributes:
        images: per camera its frames, None where it is absent.
        state: (state_dim,), or the values of its columns by name, or None.
        reset: whether an episode begins, so that frames of earlier requests are forgotten.
        encoded_pixels: of all frames that have to be decoded.
        unread: names of keys that nothing reads, a few of them.
    """

    prompt: str
    state: np.ndarray | dict[str, np.ndarray] | None
    images: dict[str, list[Frame] | None]
    seed: int
    reset: bool
    encoded_pixels: int
    unread: list[str]


class History:
    """The frames of one connection's last requests, for a policy that sees several and a client that sends one.

    They are kept as the model takes them: `max_seq_len - 1` of its input size for each camera.
    """

    def __init__(self) -> None:
        self._kept: dict[str, list[np.ndarray]] = {}
        self._was_reset = False
        self.monitor: Monitor | None = None  # of what this connection shows the policy
        self.alarm: Alarm | None = None  # on the uncertainty of its predictions

    def completed(
        self, images: dict[str, list[np.ndarray]], reset: bool, warnings: dict[str, str]
    ) -> dict[str, list[np.ndarray]]:
        """A request's frames, per camera, after those of earlier requests.

        A request with several frames brings its own history. One with other cameras than the last, or with `reset`,
        begins a new one.
        """
        self._was_reset |= reset
        if reset or list(self._kept) != list(images):
            self._kept = {}
        if not self._kept or any(len(frames) != 1 for frames in images.values()):
            return images
        if not self._was_reset:
            warnings["history"] = (
                "this policy sees several frames, one a control step, and the request has one: those of this "
                "connection's last requests come before it; send 'reset': true with the first request of every "
                "episode, or all frames, oldest first"
            )
        return {camera: [*self._kept[camera], *frames] for camera, frames in images.items()}

    def alarmed(self, predictor: VLAPredictor, uncertainty: float, reset: bool) -> bool | None:
        """Whether this connection's alarm stands after one more prediction; None where the policy has no alarm."""
        if reset or self.alarm is None:
            self.alarm, _ = predictor.new_alarm()
        return None if self.alarm is None else self.alarm.add(uncertainty)

    def keep(self, images: dict[str, list[np.ndarray]], number: int) -> None:
        """Keep the newest frames of each camera for the next request; a number of 0 keeps none."""
        self._kept = {camera: frames[-number:] for camera, frames in images.items()} if number else {}


class RequestReader:
    """Reads requests for one policy; used by several threads.

    Attributes:
        keeps_time: whether clients are robots, so that the rate of their requests means something.
    """

    keeps_time = True

    def __init__(self, predictor: VLAPredictor, config: ServingConfig, seed: int) -> None:
        """
        Args:
            predictor: the policy.
            config: names of the keys in requests, and the limits.
            seed: of the sampling noise of requests that carry none.
        """
        self.predictor, self.config, self.seed = predictor, config, seed
        self.keys = request_keys(predictor.cameras, config)
        self.cameras = [name for name in self.keys if name not in ("state", "prompt")]
        self._numbers = itertools.count()

    def read(self, message: bytes | str) -> Request:
        """Unpack and check a message; nothing is decoded, and no pixel is touched.

        Raises:
            WireError, RequestError: with the fault and what is wanted.
        """
        if isinstance(message, str):
            raise RequestError("a text message; wanted a binary one, packed with msgpack")
        request = unpack(message)
        if not isinstance(request, dict):
            raise RequestError(f"the message holds a {type(request).__name__}; wanted a dict with {self._wanted()}")
        take = functools.partial(self._take, request)
        images = {camera: self._frames(take(camera), self.keys[camera]) for camera in self.cameras}
        first = self.cameras[0]
        if images[first] is None and (first == "image_1" or not any(images.values())):
            raise RequestError(f"{self.keys[first]!r} is missing; wanted {self._wanted()}")
        return Request(
            prompt=self._prompt(take("prompt")),
            state=self._state(take("state")),
            images=images,
            seed=self._seed(request.get("seed")),
            reset=self._reset(request.get("reset")),
            encoded_pixels=self._check_pixels(images),
            unread=self._unread(request),
        )

    def sample(
        self, request: Request, history: History, warnings: dict[str, str], wanted: Callable[[], bool]
    ) -> Sample | None:
        """Decode a request's frames and make the sample that the model takes.

        Args:
            request: as `read` gives it.
            history: of the connection.
            warnings: takes what speaks against the observation (kind -> text).
            wanted: asked before every frame whether somebody still waits for the answer.

        Returns:
            The sample; None when nobody waits any more.

        Raises:
            ObservationError: a frame that can't be decoded, or a state or prompt that the policy can't use.
        """
        processor, max_seq_len = self.predictor.image_processor, self.predictor.max_seq_len
        images: dict[str, list[np.ndarray] | None] = {}
        for camera, frames in request.images.items():
            images[camera] = None if frames is None else []
            for i, frame in enumerate(frames or []):
                if not wanted():
                    return None
                is_used = len(frames) - i <= max_seq_len and camera in self.predictor.cameras
                if is_used and (isinstance(frame, bytes) or max_seq_len > 1):
                    given, frame = frame, np.empty((processor.height, processor.width, 3), processor.pixel_type)
                    processor.decode_into(given, frame)
                images[camera].append(frame)
        read = {camera: images[camera] for camera in self.predictor.cameras if images.get(camera) is not None}
        read = history.completed(read, request.reset, warnings)
        unread = next((frames for camera, frames in images.items() if camera not in self.predictor.cameras), None)
        sample = self.predictor.observation(
            None,
            unread,
            images=read,
            prompt=request.prompt,
            state=request.state,
            warnings=warnings,
            monitor=self._monitor(history),
        )
        history.keep(read, max_seq_len - 1)
        return sample

    def _monitor(self, history: History) -> Monitor | None:
        if history.monitor is None and self.predictor.training_data is not None:
            horizon = self.predictor.horizon if self.keeps_time else None
            history.monitor = Monitor(self.predictor.training_data, horizon)
        return history.monitor

    def _take(self, request: dict[Any, Any], name: str) -> Any:
        """A request's value under the configured key, under the name that the batch contract uses, or (a camera's) in
        `images`, where ALOHA's clients have them."""
        images = request.get("images") if name in self.cameras else None
        nested = images.get(name) if isinstance(images, dict) else None
        return request.get(self.keys[name], request.get(name, nested))

    def _prompt(self, prompt: Any) -> str:
        if not isinstance(prompt, str):
            found = "missing" if prompt is None else f"a {type(prompt).__name__}"
            raise RequestError(f"{self.config.prompt_key!r} is {found}; wanted the instruction as text")
        if len(prompt) > (limit := self.config.max_prompt_chars):
            found = f"{self.config.prompt_key!r} has {len(prompt)} characters"
            raise RequestError(f"{found}; at most {limit} are taken (serving.max_prompt_chars)")
        return prompt

    def _seed(self, seed: Any) -> int:
        if seed is None:
            return derive_seed("serving", self.seed, next(self._numbers))
        if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise RequestError(f"'seed' is {_quoted(seed)}; wanted a whole number, 0 or more and below 2**63")
        return int(seed)

    def _reset(self, reset: Any) -> bool:
        if reset is None or isinstance(reset, (bool, np.bool_)):
            return bool(reset)
        raise RequestError(f"'reset' is {_quoted(reset)}; wanted true at an episode's first request, else false")

    def _frames(self, value: Any, key: str) -> list[Frame] | None:
        """The frames of one camera, told apart by type and shape alone."""
        if value is None:
            return None
        several = isinstance(value, list) or (isinstance(value, np.ndarray) and value.ndim == 4)
        number, limit = (len(value) if several else 1), max(MAX_FRAMES, self.predictor.max_seq_len)
        if not number:
            raise RequestError(f"{key!r}: 0 frames; wanted 1 to max_seq_len {self.predictor.max_seq_len}")
        if number > limit:  # before there is an object for each: a frame may have three bytes
            raise RequestError(f"{key!r}: {number} frames; at most {limit} are read, and the newest are used")
        frames = list(value) if several else [value]
        for frame in frames:
            if not isinstance(frame, (bytes, np.ndarray)):
                kind = type(frame).__name__
                raise RequestError(f"{key!r} holds a {kind}; wanted uint8 (H, W, 3), or JPEG or PNG as bytes")
            if isinstance(frame, np.ndarray) and (fault := array_fault(frame)) is not None:
                raise RequestError(f"{key!r} is {fault}")
        return frames

    def _check_pixels(self, images: dict[str, list[Frame] | None]) -> int:
        """Check every frame's size, and that of all together; returns the pixels that have to be decoded."""
        config, total, encoded = self.config, 0, 0
        for camera, frames in images.items():
            key = self.keys[camera]
            for frame in frames or []:
                if isinstance(frame, bytes):
                    width, height = _encoded_size(frame, key)
                    encoded += width * height
                else:
                    height, width = frame.shape[:2]
                total += width * height
                if width * height > config.max_image_pixels:
                    found = f"{key!r} is {height} x {width} pixels"
                    raise RequestError(
                        f"{found}; at most {config.max_image_pixels} are taken (serving.max_image_pixels)"
                    )
        if total > config.max_request_pixels:
            found = f"the frames have {total} pixels together"
            raise RequestError(f"{found}; at most {config.max_request_pixels} are taken (serving.max_request_pixels)")
        return encoded

    def _state(self, value: Any) -> np.ndarray | dict[str, np.ndarray] | None:
        if value is None:
            return None
        if isinstance(value, dict) and set(value) == set(self.predictor.state_widths):
            return {name: self._values(value[name], name, width) for name, width in self.predictor.state_widths.items()}
        return self._values(value, self.config.state_key, self.predictor.state_dim)

    def _values(self, value: Any, key: str, width: int) -> np.ndarray:
        if width == 1 and type(value) in (int, float):
            value = [value]
        if isinstance(value, list) and all(type(item) in (int, float) for item in value):
            value = np.array(value, np.float64)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf":
            found = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
            raise RequestError(f"{key!r} is {found}; wanted {width} numbers")
        return value

    def _unread(self, request: dict[Any, Any]) -> list[str]:
        known = {*self.keys, *self.keys.values(), "seed", "reset", "images"}
        unread = (key for key in request if not (isinstance(key, str) and key in known))
        nested = request.get("images")
        strangers = [key for key in nested if key not in self.cameras] if isinstance(nested, dict) else []
        unread = itertools.chain(unread, strangers)
        named = (printable(key[:MAX_QUOTED] if isinstance(key, (str, bytes)) else key, 60) for key in unread)
        return list(itertools.islice(named, MAX_UNREAD_KEYS))

    def _wanted(self) -> str:
        keys = [self.keys[name] for name in (*self.predictor.cameras, "state", "prompt")]
        return ", ".join(map(repr, keys))


def request_keys(cameras: Sequence[str], config: ServingConfig) -> dict[str, str]:
    """The keys of a policy's requests (see `ServingConfig.keys`); a policy of one camera names a second one unread.

    Raises:
        ConfigError: `serving.image_keys` names a camera that the policy does not read, or two keys are the same.
    """
    for name in config.image_keys:
        if name not in cameras:
            raise ConfigError(f"serving.image_keys: the policy has no camera {name!r}; it reads {', '.join(cameras)}")
    return config.keys((*cameras, *(["image_2"] if len(cameras) == 1 and cameras[0] != "image_2" else [])))


def _quoted(value: Any) -> str:
    """A value of a request as Python writes it, cut before that where it is long."""
    if isinstance(value, (str, bytes)):
        return repr(value[:MAX_QUOTED])
    return repr(value) if isinstance(value, (int, float, np.generic)) else f"a {type(value).__name__}"


def _encoded_size(frame: bytes, key: str) -> tuple[int, int]:
    try:
        return encoded_size(frame)
    except ImageHeaderError as error:
        raise RequestError(f"{key!r}: {len(frame)} bytes are no readable JPEG or PNG ({error})") from None
