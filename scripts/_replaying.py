"""Recorded steps, those who answer them (this process, a server), and how far answers lie apart. Used by replay.py."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from vla_client import PolicyClient, PolicyError

from data.comparison.distortions import AS_RECORDED, Distortion
from data.convert.rollouts import ROLLOUT
from data.decoding import decode_frame
from data.episode_store import EpisodeStore
from data.image_fit import letterbox_bytes
from data.processing import collate_fn
from data.schema import NOISE_SEED, PLAN, SEED
from inference.predictor import VLAPredictor
from utils.config_utils import ConfigError
from utils.misc import derive_seed
from utils.parquet_utils import DataError
from utils.recordings import Recording, resolve_recordings

NEUTRAL = 0.1  # share of a difference that may be left when the input that causes it is exchanged for a neutral one
BATCH = 8  # observations that this process answers together where many are tried
SENT = ("as_recorded", "pixels", "resized", "padded", "jpeg")


@dataclass(frozen=True)
class Shown:
    """What a policy is shown.

    Attributes:
        frames: of each camera, oldest first: encoded, or uint8 (H, W, 3).
        state: (state_dim,), physical units.
        seed: of the sampling noise.
    """

    frames: Mapping[str, Sequence[bytes | np.ndarray]]
    state: np.ndarray
    prompt: str
    seed: int


@dataclass(frozen=True)
class Needs:
    """What a policy reads: from a checkpoint, or from what a server says of itself."""

    cameras: Sequence[str]
    state_columns: Mapping[str, int]
    max_seq_len: int
    horizon: int
    per_action_dim: int
    n_action_steps: int
    takes_state: bool = True


class Answerer(Protocol):
    """Whoever predicts."""

    name: str

    def answer(self, shown: Shown) -> np.ndarray:
        """(horizon, per_action_dim), physical units."""


class Replay:
    """Recorded episodes as a policy may be shown them.

    Attributes:
        steps: global rows that are replayed: where something was planned, else every `n_action_steps`-th.
        spread: (per_action_dim,), standard deviation of the recorded actions, the unit of every distance.
        cameras: those of the policy that the recording has.
    """

    def __init__(self, data_path: str, needs: Needs, number: int) -> None:
        """
        Args:
            data_path: recorded episodes.
            needs: of the policy.
            number: of steps that are replayed at most, spread evenly.

        Raises:
            DataError: the files break the schema, or have other widths or cameras than the policy.
        """
        files = resolve_recordings([data_path], "--data")
        self.needs = needs
        self.store = EpisodeStore(
            files,
            state_dim=sum(needs.state_columns.values()),
            per_action_dim=needs.per_action_dim,
            cameras=needs.cameras,
            state_columns=list(needs.state_columns),
            needs_state=needs.takes_state,
            keep_cache=False,
        )
        self.cameras = [camera for camera in needs.cameras if self.store.has_camera(camera)]
        if not self.cameras:
            raise DataError(
                f"--data {data_path}: none of the policy's cameras ({', '.join(needs.cameras)}) is recorded"
            )
        self.plans, self.seeds = _planned(files, len(self.store), needs)
        planned = sorted(self.plans)
        self.has_plans = bool(planned)
        rows = planned or [
            row for row in range(len(self.store)) if self.store.locate(row)[1] % needs.n_action_steps == 0
        ]
        self.steps = [rows[i] for i in np.linspace(0, len(rows) - 1, min(number, len(rows))).round().astype(int)]
        action = np.asarray(self.store.action, np.float64)
        self.spread = np.maximum(action.std(axis=0), 1e-3 * max(1e-6, float(action.std(axis=0).max())))

    def place(self, row: int) -> str:
        """An episode and step, for people."""
        episode, step = self.store.locate(row)
        return f"episode {episode} step {step}"

    def shown(self, row: int, distortion: Distortion = AS_RECORDED) -> Shown:
        """What the policy is shown at a row after one mistake."""
        begin = row - self.store.locate(row)[1]
        late = begin if distortion.frozen else max(begin, row - distortion.images_late)
        seen = range(max(begin, late - self.needs.max_seq_len + 1), late + 1)
        frames = {}
        for camera in self.cameras:
            given = self.store.images(distortion.exchanged.get(camera, camera), seen)
            if any(frame is None for frame in given):
                continue
            frames[camera] = [self._frame(camera, frame, distortion) for frame in given]
        if distortion.frozen and self.needs.max_seq_len > 1:
            length = min(row - begin + 1, self.needs.max_seq_len)
            frames = {camera: list(given[-1:]) * length for camera, given in frames.items()}
        state = np.asarray(self.store.state[max(begin, row - distortion.state_late)], np.float32)
        state = state if distortion.state is None else distortion.state(state).astype(np.float32)
        prompt = self.store.prompts[self.store.prompt_index[row]]
        prompt = prompt if distortion.prompt is None else distortion.prompt
        return Shown(frames, state, prompt, self.seeds.get(row, derive_seed("replay", row)))

    def _frame(self, camera: str, frame: memoryview | np.ndarray, distortion: Distortion) -> bytes | np.ndarray:
        if not distortion.changes(camera):
            return frame if isinstance(frame, np.ndarray) else bytes(frame)
        return distortion.frame(camera, pixels_of(frame))

    def done(self, row: int) -> np.ndarray:
        """The recorded actions from a row on, (n, per_action_dim), as many as are executed of a plan."""
        episode, _ = self.store.locate(row)
        end = min(int(self.store.episode_starts[episode + 1]), row + self.needs.n_action_steps)
        return np.asarray(self.store.action[row:end])

    def recorded(self, row: int) -> np.ndarray:
        """What was planned at a row, else what was done from it on."""
        return self.plans[row] if self.has_plans else self.done(row)

    def distance(self, one: np.ndarray, other: np.ndarray) -> float:
        """Root mean square between the steps that two chunks share, in spreads of the recorded actions."""
        shared = min(len(one), len(other))
        return float(np.sqrt((((one[:shared] - other[:shared]) / self.spread) ** 2).mean()))


def pixels_of(frame: bytes | memoryview | np.ndarray) -> np.ndarray:
    """A recorded frame as uint8 (H, W, 3)."""
    return frame if isinstance(frame, np.ndarray) else np.asarray(decode_frame(bytes(frame), 0, 0))


def _planned(files: Sequence[Recording], rows: int, needs: Needs) -> tuple[dict[int, np.ndarray], dict[int, int]]:
    """Plans, and the seeds of their noise as far as they are known, by row; none where the files do not hold them."""
    plans: dict[int, np.ndarray] = {}
    seeds: dict[int, int] = {}
    begin = 0
    for file in files:
        try:
            parquet = pq.ParquetFile(file)
        except (TypeError, OSError):  # a LeRobot dataset, which has neither
            return {}, {}
        wanted = [name for name in (PLAN, NOISE_SEED, SEED, "is_first") if name in parquet.schema_arrow.names]
        table = parquet.read(columns=wanted).to_pydict()
        simulated = ROLLOUT.encode() in (parquet.schema_arrow.metadata or {})
        number = 0
        for i, plan in enumerate(table.get(PLAN, ())):
            number = 0 if table["is_first"][i] else number
            if plan is None:
                continue
            if len(plan) % needs.per_action_dim:
                raise DataError(
                    f"{file} row {i}: the plan has {len(plan)} values, no multiple of the policy's per_action_dim "
                    f"{needs.per_action_dim}: it was made by another policy"
                )
            plans[begin + i] = np.array(plan, np.float32).reshape(-1, needs.per_action_dim)
            if NOISE_SEED in table:
                seeds[begin + i] = table[NOISE_SEED][i]
            elif simulated and SEED in table:  # as `inference.closed_loop.rollout.ModelPolicy` draws them
                seeds[begin + i] = derive_seed("rollout", table[SEED][i], number)
            number += 1
        begin += parquet.metadata.num_rows
    return (plans, seeds) if begin == rows else ({}, {})


class InProcess:
    """A checkpoint in this process."""

    name = "this process"

    def __init__(self, predictor: VLAPredictor) -> None:
        self.predictor = predictor

    def needs(self) -> Needs:
        """What the policy reads."""
        policy = self.predictor
        steps = policy.n_action_steps or policy.horizon
        widths = dict(policy.state_widths), policy.max_seq_len, policy.horizon, policy.per_action_dim
        return Needs(list(policy.cameras), *widths, steps, policy.config.reads_state)

    def answer(self, shown: Shown) -> np.ndarray:
        return self.answers([shown])[0]

    def answers(self, many: Sequence[Shown]) -> list[np.ndarray]:
        """The plan for each, several at a time."""
        plans = []
        for i in range(0, len(many), BATCH):
            part = many[i : i + BATCH]
            samples = [
                self.predictor.observation(images=shown.frames, prompt=shown.prompt, state=shown.state, warnings={})
                for shown in part
            ]
            plans += list(self.predictor.predict_batch(collate_fn(samples), [shown.seed for shown in part]))
        return plans


class Served:
    """A policy server."""

    def __init__(self, address: str, token: str | None, sent: str = "as_recorded") -> None:
        """
        Args:
            address: `ws://host:port`.
            token: that it asks for.
            sent: how frames travel, one of SENT.

        Raises:
            ConfigError: no such address, nobody answers there, or it lets nobody in with that token.
        """
        parts = urlsplit(address if "//" in address else f"ws://{address}")
        try:
            port = parts.port
        except ValueError:
            port = None
        if parts.scheme != "ws" or not parts.hostname or port is None:
            raise ConfigError(f"--server is {address!r}; give ws://HOST:PORT, such as ws://127.0.0.1:8000")
        try:
            self.client = PolicyClient(parts.hostname, port, token)
        except PolicyError as error:
            raise ConfigError(f"--server: {error}") from None
        if not isinstance(self.client.policy, dict) or "state_columns" not in self.client.policy:
            raise ConfigError(
                f"--server {address}: it is no policy server of this program; start scripts/serve_policy.py"
            )
        self.name, self.sent, self.policy = "the server", sent, self.client.policy

    def needs(self) -> Needs:
        """What the server says that its policy reads."""
        said = self.policy
        steps = said["n_action_steps"] or said["horizon"]
        widths = said["state_columns"], said["max_seq_len"], said["horizon"], said["per_action_dim"]
        return Needs(list(said["cameras"]), *widths, steps)

    def answer(self, shown: Shown) -> np.ndarray:
        request: dict[str, Any] = {
            self.policy["cameras"][camera]: [self._as_sent(frame) for frame in frames]
            for camera, frames in shown.frames.items()
        }
        request |= {self.policy["state_key"]: shown.state, self.policy["prompt_key"]: shown.prompt, "seed": shown.seed}
        try:
            return self.client.predict(request, reset=True)
        except PolicyError as error:
            raise ConfigError(f"--server: {error}") from None

    def answers(self, many: Sequence[Shown]) -> list[np.ndarray]:
        """The plan for each."""
        return [self.answer(shown) for shown in many]

    def _as_sent(self, frame: bytes | np.ndarray) -> bytes | np.ndarray:
        if self.sent == "as_recorded":
            return frame
        pixels = pixels_of(frame)
        height, width = self.policy["image_size"]
        if self.sent == "resized":
            return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
        if self.sent == "padded":
            return letterbox_bytes(pixels, height, width)
        if self.sent == "jpeg":
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG", quality=75)
            return buffer.getvalue()
        return pixels


def cause_of(replay: Replay, row: int, process: InProcess, server: Served, tolerance: float) -> str:
    """Why a server and this process answer differently: found by exchanging one input at a time for a neutral one."""
    shown = replay.shown(row)

    def left(**changed: Any) -> float:
        """The distance that is left when both are shown something else."""
        other = replace(shown, **changed)
        return replay.distance(process.answer(other), server.answer(other))

    if replay.distance(server.answer(shown), server.answer(shown)) > tolerance:
        return "seed: the server answers the same request differently each time, so it does not use the seed"
    if server.sent != "as_recorded":
        plain = replace_sent(server, "as_recorded")
        if replay.distance(process.answer(shown), plain.answer(shown)) <= tolerance:
            return f"image bytes: with frames sent as they were recorded both agree; --send {server.sent} changes them"
    tried = []
    for camera, frames in shown.frames.items():
        plain = [np.full_like(pixels_of(frame), 128) for frame in frames]
        text = f"images of {camera}: both agree when it is plain grey; compare how each side decodes and resizes it"
        tried.append((left(frames={**shown.frames, camera: plain}), text))
    middle = np.median(np.asarray(replay.store.state), axis=0).astype(np.float32)
    text = "state: both agree when it is held; compare the statistics (data.normalization_type) and its order"
    tried += [(left(state=neutral), text) for neutral in (middle, np.zeros_like(middle))]
    tried.append((left(prompt="a"), "prompt: both agree when it is 'a'; compare tokenizers and data.prompt_max_len"))
    least, text = min(tried)
    if least <= NEUTRAL * left():
        return text
    said, policy = server.policy, process.predictor
    if said.get("fingerprint") not in (None, "", policy.fingerprint):
        return "the weights: the server serves another checkpoint"
    settings = (("num_inference_steps", policy.num_inference_steps), ("quantization", policy.quantization))
    for name, here in settings:
        if name in said and said[name] != here:
            return f"settings: {name} is {said[name]} at the server, {here} in this process"
    return (
        "no single input: it differs with each of them held; compare precision (--use_amp), library versions and "
        "device, or raise --tolerance"
    )


def replace_sent(server: Served, sent: str) -> Served:
    """The same server, with frames sent in another way."""
    other = object.__new__(Served)
    other.__dict__.update(server.__dict__)
    other.sent = sent
    return other


def settings_that_differ(process: InProcess, server: Served) -> list[str]:
    """What the server says of itself that this process's policy is not."""
    said, policy = server.policy, process.predictor
    mine: dict[str, Any] = {
        "policy": policy.config.training.experiment_name,
        "dataset": policy.dataset.name,
        "cameras": list(policy.cameras),
        "state_columns": dict(policy.state_widths),
        "image_size": [policy.image_processor.height, policy.image_processor.width],
        "max_seq_len": policy.max_seq_len,
        "horizon": policy.horizon,
        "per_action_dim": policy.per_action_dim,
        "num_inference_steps": policy.num_inference_steps,
        "quantization": policy.quantization,
        "fingerprint": policy.fingerprint,
    }
    theirs = {name: list(value) if name == "cameras" else value for name, value in said.items()}
    return [
        f"{name}: {json.dumps(theirs[name])} at the server, {json.dumps(value)} in this process"
        for name, value in mine.items()
        if name in theirs and theirs[name] != value
    ]


def explained(
    replay: Replay, answerer: InProcess | Served, tried: Sequence[Distortion], progress: Callable[[str], None]
) -> list[tuple[Distortion, np.ndarray]]:
    """Per distortion, the first being none, the distance of each step's plan from what was recorded, best first."""
    result = []
    for distortion in (AS_RECORDED, *tried):
        progress(distortion.name)
        plans = answerer.answers([replay.shown(row, distortion) for row in replay.steps])
        pairs = zip(plans, map(replay.recorded, replay.steps), strict=True)
        result.append((distortion, np.array([replay.distance(*pair) for pair in pairs])))
    return [result[0], *sorted(result[1:], key=lambda pair: pair[1].mean())]
