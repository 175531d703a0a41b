"""A robot that is nothing but a blob before a pattern, seen by two cameras: episodes with mistakes planted in them.

Its state is (x, y, gripper): the blob's place, from -0.4 to 0.4 and 0.1 to 0.9, and how bright it is, 0 to 1. An action
is the state's next change, ten times as large.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIZE = 48
RATE = 20.0
Frame = Callable[[np.ndarray], "np.ndarray | bytes"]


def background(camera: int) -> np.ndarray:
    """float (SIZE, SIZE, 3): a smooth pattern of its own for each camera, neither symmetric nor grey."""
    rng = np.random.default_rng(100 + camera)
    coarse = rng.uniform(40, 200, (6, 6, 3)) * ((1.0, 0.75, 0.45) if camera == 0 else (0.5, 0.8, 1.0))
    image = Image.fromarray(coarse.astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return np.asarray(image, np.float64) + 8 * rng.standard_normal((SIZE, SIZE, 1))


BACKGROUNDS = [background(0), background(1)]


def motion(rng: np.random.Generator, steps: int) -> np.ndarray:
    """float (steps + 1, 3): smooth but lively states within their ranges."""
    noise = rng.standard_normal((steps + 9, 3))
    kernel = np.hanning(7)
    smooth = np.stack([np.convolve(noise[:, d], kernel / kernel.sum(), "valid") for d in range(3)], axis=1)
    walk = np.cumsum(smooth, axis=0)[: steps + 1] * (0.06, 0.06, 0.12)
    walk += rng.uniform(-0.2, 0.2, 3)
    return np.sin(2 * walk) * (0.4, 0.4, 0.5) + (0.0, 0.5, 0.5)


def draw(camera: int, state: np.ndarray) -> np.ndarray:
    """uint8 (SIZE, SIZE, 3)."""
    y, x = np.mgrid[:SIZE, :SIZE]
    place = (0.5 + state[0], 1 - state[1]) if camera == 0 else (state[1], 0.5 + state[0])
    near = np.exp(-(((x - place[0] * SIZE) / 7) ** 2 + ((y - place[1] * SIZE) / 7) ** 2))[..., None]
    colour = np.array([60.0, 60.0, 60.0]) + state[2] * np.array([190.0, 100.0, 20.0])
    return np.clip(BACKGROUNDS[camera] * (1 - near) + colour * near, 0, 255).astype(np.uint8)


def write_session(
    path: Path,
    episodes: int,
    *,
    seed: int,
    steps: int = 60,
    frame: Frame | None = None,
    cameras: Sequence[int] = (0, 1),
    frozen: bool = False,
    state: Callable[[np.ndarray], np.ndarray] | None = None,
    action: Callable[[np.ndarray], np.ndarray] | None = None,
    late_state: int = 0,
    late_images: int = 0,
    every: int = 1,
    prompt: str = "push the blob",
    control_hz: float | None = None,
) -> Path:
    """Write episodes as one Parquet file, with one mistake or several.

    Args:
        frame: what the first camera's pictures become.
        cameras: which camera is written as the first and the second column.
        frozen: the first camera shows one picture throughout.
        state, action: what the columns, (N, 3), become.
        late_state, late_images: by how many steps they lag behind.
        every: take each so manieth step: a slower control loop.
        control_hz: as the metadata say; None: they say nothing.
    """
    rng = np.random.default_rng(seed)
    columns: dict[str, list] = {name: [] for name in ("image_1", "image_2", "state", "action")}
    flags: dict[str, list[bool]] = {name: [] for name in ("is_first", "is_last", "is_terminal")}
    for _ in range(episodes):
        states = motion(rng, steps * every)[::every]
        moves = np.diff(states, axis=0) * 10
        states = states[:-1]
        for t in range(len(states)):
            shown = states[0 if frozen else max(0, t - late_images)]
            for column, camera in zip(("image_1", "image_2"), cameras, strict=True):
                picture = draw(camera, shown if column == "image_1" else states[max(0, t - late_images)])
                changed = frame(picture) if frame is not None and column == "image_1" else picture
                columns[column].append(changed if isinstance(changed, bytes) else encoded(changed))
        told = states[np.maximum(0, np.arange(len(states)) - late_state)]
        columns["state"] += (told if state is None else state(told.copy())).tolist()
        columns["action"] += (moves if action is None else action(moves.copy())).tolist()
        flags["is_first"] += [t == 0 for t in range(len(states))]
        flags["is_last"] += [t == len(states) - 1 for t in range(len(states))]
        flags["is_terminal"] += [False] * len(states)
    table = pa.table(
        {
            "image_1": pa.array(columns["image_1"], pa.binary()),
            "image_2": pa.array(columns["image_2"], pa.binary()),
            "state": pa.array(columns["state"], pa.list_(pa.float32())),
            "action": pa.array(columns["action"], pa.list_(pa.float32())),
            **{name: pa.array(values) for name, values in flags.items()},
            "prompt": pa.array([prompt] * len(columns["state"])),
        }
    )
    if control_hz is not None:
        table = table.replace_schema_metadata({"control_hz": json.dumps(control_hz)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def encoded(picture: np.ndarray, **options: object) -> bytes:
    """PNG, or another format by PIL's options."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, **({"format": "PNG"} | options))
    return buffer.getvalue()
