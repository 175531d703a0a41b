"""A policy as a model server of AllenAI's vla-evaluation-harness (package vla-eval, protocol version 1).

The harness runs a simulator and connects here. A message is a msgpack dict with type, payload, seq and timestamp:

    hello           answered with a hello that names what the policy has to see
    episode_start   an episode begins: what is left of the last plan is forgotten
    observation     {"images": {name: frame}, "states" or "state": numbers, "task_description": text}, answered with an
                    action {"actions": float32 (per_action_dim,)} of the same seq
    episode_end     the end of one
    error           sent in place of an action, with what was wrong

The harness asks for one action a step; a prediction is n_action_steps of them, and the next observations get the rest.
Everything else (who may connect, limits, batches of several clients) is the server's that robots use.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from inference.serving.connections import Connection
from inference.serving.requests import RequestError
from inference.serving.server import PolicyServer
from inference.serving.wire import WireError, array_of, dtype_of, pack, unpack
from utils.config_utils import ConfigError
from utils.misc import derive_seed

PROTOCOL_VERSION = 1
STATE_KEYS, PROMPT_KEY = ("states", "state"), "task_description"
MAX_NAMED = 8  # names of images that an error lists


@dataclass
class _Episode:
    """What a connection's episode has come to."""

    seed: int
    plans: int = 0
    actions: deque[np.ndarray] = field(default_factory=deque)  # of the last plan, not yet sent
    frames: dict[str, deque[Any]] = field(default_factory=dict)  # of each camera, as many as the policy sees


class HarnessServer(PolicyServer):
    """A `PolicyServer` that speaks the harness's protocol.

    Raises:
        ConfigError: the policy is to plan while the robot moves, or to join plans: the harness waits for each.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        settings = self.predictor.settings
        if settings.execution != "synchronous" or settings.latency_steps:
            raise ConfigError(
                f"inference.execution is {settings.execution} and latency_steps {settings.latency_steps}, but the "
                "harness waits for each plan and has it executed as it is; give --execution synchronous "
                "--latency_steps 0, or evaluate with main_eval.py"
            )
        self.reader.keeps_time = False  # its clients are simulators
        self._episodes: WeakKeyDictionary[Connection, _Episode] = WeakKeyDictionary()

    def _greeting(self) -> None:
        """The harness speaks first."""
        return None

    async def _answer(self, message: bytes | str, connection: Connection, gone: asyncio.Future[None]) -> bytes | str:
        seq = 0
        try:
            kind, payload, seq = _read(message)
            if kind == "hello":
                return _message("hello", self._hello(), seq)
            if kind == "episode_start":
                self._episodes[connection] = self._episode(payload)
            if kind != "observation":
                return b""
            action = await self._action(payload, connection, gone)
        except (WireError, RequestError) as error:
            action = self._refuse(str(error), "bad_request")
        if isinstance(action, str):
            return _message("error", {"error": action}, seq) if action else b""
        return _message("action", {"actions": _array(action)}, seq)

    async def _action(
        self, observation: dict[str, Any], connection: Connection, gone: asyncio.Future[None]
    ) -> np.ndarray | str:
        """The action for an observation: the next of the plan, or the first of a new one; a text says what failed."""
        episode = self._episodes.setdefault(connection, self._episode({}))
        images = self._images(observation.get("images"))
        for camera, frame in images.items():
            frames = episode.frames.setdefault(camera, deque(maxlen=self.predictor.max_seq_len))
            frames.append(frame)
        if not episode.actions:
            request = {self.reader.keys[camera]: list(episode.frames[camera]) for camera in images}
            request[self.reader.keys["prompt"]] = observation.get(PROMPT_KEY)
            request[self.reader.keys["state"]] = next(
                (observation[key] for key in STATE_KEYS if key in observation), None
            )
            request["seed"] = derive_seed("vla-eval", episode.seed, episode.plans)
            request["reset"] = not episode.plans
            reply = await super()._answer(pack(request), connection, gone)
            if isinstance(reply, str):
                return reply
            steps = self.predictor.n_action_steps or self.predictor.horizon
            episode.actions.extend(unpack(reply)["actions"][:steps])
            episode.plans += 1
        return episode.actions.popleft()

    def _episode(self, payload: dict[str, Any]) -> _Episode:
        """A new episode, its noise a function of the server's seed and of what the harness says about it."""
        facts = {key: value for key, value in payload.items() if key != "recording"}
        try:
            text = json.dumps(facts, sort_keys=True, default=str)
        except TypeError:
            raise RequestError("an episode_start with keys that are no text") from None
        return _Episode(derive_seed("vla-eval", self.reader.seed, text))

    def _hello(self) -> dict[str, Any]:
        """Who is here; `observation_params` switch on what benchmarks leave out unless a model asks for it."""
        wants = {"send_state": self.predictor.config.reads_state}
        wants["send_wrist_image"] = len(self.predictor.cameras) > 1
        return {
            "harness_version": "paligemma-vla",
            "protocol_version": PROTOCOL_VERSION,
            "model_server": type(self).__name__,
            "capabilities": {},
            "observation_params": {name: True for name, wanted in wants.items() if wanted},
        }

    def _images(self, images: Any) -> dict[str, Any]:
        """The policy's cameras, by their own names, by those of `serving`, else the images left in their order."""
        if not isinstance(images, dict) or not images:
            raise RequestError(f"an observation has no images; wanted those of {', '.join(self.predictor.cameras)}")
        named = {}
        for camera in self.predictor.cameras:
            names = [name for name in (camera, self.reader.keys[camera]) if name in images]
            named |= {camera: names[0]} if names else {}
        left = iter([name for name in images if name not in named.values()])
        found = {}
        for camera in self.predictor.cameras:
            name = named[camera] if camera in named else next(left, None)
            if name is None:
                raise RequestError(
                    f"an observation has the images {', '.join(map(str, list(images)[:MAX_NAMED]))}, and none for "
                    f"{camera}; have the benchmark send it (send_wrist_image: true), or name it with serving.image_keys"
                )
            found[camera] = images[name]
        return found


def _read(message: bytes | str) -> tuple[str, dict[str, Any], int]:
    """(type, payload, seq) of a message."""
    if isinstance(message, str):
        raise RequestError("a text message; wanted a binary one of vla-eval's protocol")
    found = unpack(message)
    known = isinstance(found, dict) and isinstance(found.get("type"), str) and isinstance(found.get("payload"), dict)
    if not known:
        raise RequestError("a message without type and payload; wanted one of vla-eval's protocol, version 1")
    seq = found.get("seq")
    return found["type"], _decoded(found["payload"]), seq if isinstance(seq, int) else 0


def _decoded(value: Any) -> Any:
    """A payload with arrays for the harness's marked dicts; frames that are PNG or JPEG stay bytes."""
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "__image__" in value and value.get("format") in ("png", "jpeg"):
        return value.get("data")
    if "__image__" in value or "__ndarray__" in value:
        return array_of(dtype_of(value.get("dtype")), value.get("shape"), value.get("data"))
    return {key: _decoded(item) for key, item in value.items()}


def _array(values: np.ndarray) -> dict[str, Any]:
    return {"__ndarray__": True, "data": values.tobytes(), "dtype": values.dtype.str, "shape": list(values.shape)}


def _message(kind: str, payload: dict[str, Any], seq: int) -> bytes:
    return pack({"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()})
