"""Data folders that somebody changed: LeRobot, HDF5 and the episode cache; see `crafted_files.py`."""

from __future__ import annotations

import json
import math
import os
import pathlib
import random
import shutil
from collections.abc import Callable
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.convert.hdf5 import convert_hdf5
from data.convert.lerobot import convert_lerobot
from data.episode_store import EpisodeStore

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "tests" / "fixtures"
LEROBOT = ("lerobot_v21_image", "lerobot_v30_image", "lerobot_v30_video")
ODD = [None, True, -1, 0, 2**70, 1e308, math.nan, "", "..", "\x1b[2J", [], {}, [[]], "{", {"a": 1}, "x" * 3000]
TEMPLATES = ["../secret/content", "{episode_index:0999999999d}", "{0}", "/etc/passwd", "data/{x}", "{episode_index!r}"]
Load = Callable[[], None]


class LeakError(AssertionError):
    """Bytes of a file outside of the folder came out, or a value that was not written."""


def written_text(folder: pathlib.Path) -> bytes:
    """All that a conversion wrote, as bytes to look through."""
    return b"".join(path.read_bytes() for path in folder.rglob("*.parquet")) if folder.is_dir() else b""


def lerobot_folder(rng: random.Random, folder: pathlib.Path, secret: pathlib.Path, marker: pathlib.Path) -> Load:
    """A LeRobot dataset with other metadata, links, or damaged files."""
    root = pathlib.Path(shutil.copytree(FIXTURES / rng.choice(LEROBOT), folder / "data"))
    info = json.loads((root / "meta" / "info.json").read_text())
    camera = next(key for key, feature in info["features"].items() if feature["dtype"] in ("image", "video"))
    files = sorted(path for path in root.rglob("*") if path.is_file())
    kind = rng.randrange(5)
    if kind == 0:
        info[rng.choice(list(info))] = rng.choice(ODD)
    elif kind == 1:
        info[rng.choice(["data_path", "video_path"])] = rng.choice(TEMPLATES)
    elif kind == 2:
        feature = info["features"][rng.choice(list(info["features"]))]
        feature[rng.choice(list(feature))] = rng.choice(ODD)
    elif kind == 3:
        chosen = rng.choice(files)
        chosen.unlink()
        os.symlink(secret, chosen)
    if kind < 3:
        (root / "meta" / "info.json").write_text(json.dumps(info))
    if kind == 4:
        chosen = rng.choice(files)
        data = bytearray(chosen.read_bytes())
        for _ in range(rng.randint(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        chosen.write_bytes(data)

    start = secret.read_bytes()[:16]

    def load() -> None:
        convert_lerobot(root, folder / "out", [f"{camera}=image_1"])
        if start in written_text(folder / "out"):
            raise LeakError("bytes of another file")

    return load


def hdf5_folder(rng: random.Random, folder: pathlib.Path, secret: pathlib.Path, marker: pathlib.Path) -> Load:
    """An ALOHA file with links, references to other files, odd types or sizes."""
    root = folder / "data"
    root.mkdir()
    arrays: dict[str, Any] = {
        "action": np.zeros((4, 2), np.float32),
        "observations/qpos": np.zeros((4, 3), np.float32),
        "observations/images/top": np.zeros((4, 8, 8, 3), np.uint8),
    }
    key = rng.choice(list(arrays))
    with h5py.File(root / "episode_0.hdf5", "w") as file:
        for name, value in arrays.items():
            file[name] = value
        del file[key]
        shape, dtype = arrays[key].shape, arrays[key].dtype
        huge = (rng.choice([4, 10**12]), *(rng.choice([1, 50_000]) for _ in shape[1:-1]), shape[-1])
        rng.choice(
            [
                lambda: file.__setitem__(key, h5py.ExternalLink(str(secret), "/a")),
                lambda: file.__setitem__(key, h5py.SoftLink(f"/{key}")),
                lambda: file.__setitem__(key, h5py.SoftLink("/nowhere")),
                lambda: file.create_dataset(key, shape, dtype, external=[(str(secret), 0, arrays[key].nbytes)]),
                lambda: file.create_dataset(key, huge, dtype, chunks=tuple(min(size, 16) for size in huge)),
                lambda: file.create_dataset(key, data=rng.choice([1.5, "text", [b"a"] * 4, np.zeros((4, 0))])),
                lambda: file.create_dataset(key, data=arrays[key].astype("<c8")),
                lambda: file.create_group(key),
            ]
        )()
        file.attrs["sim"] = rng.choice([True, [1, 2], "x"])
    path = root / "episode_0.hdf5"
    if rng.random() < 0.3:
        data = bytearray(path.read_bytes())
        for _ in range(rng.randint(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)

    start = secret.read_bytes()[:12]

    def load() -> None:
        convert_hdf5(root, folder / "out", ["top=image_1"], prompt="a", fps=10)
        states = [pq.read_table(part)["state"].to_pylist() for part in (folder / "out").glob("*.parquet")]
        if any(np.asarray(state, np.float32).tobytes().find(start) >= 0 for state in states):
            raise LeakError("bytes of another file")

    return load


def damaged_cache(rng: random.Random, folder: pathlib.Path, secret: pathlib.Path, marker: pathlib.Path) -> Load:
    """An episode cache with a bit flipped, a part cut or gone."""
    rows = 6
    table = {
        "image_1": pa.array([rng.randbytes(50) for _ in range(rows)], pa.binary()),
        "state": pa.array([[rng.random(), rng.random()] for _ in range(rows)], pa.list_(pa.float32())),
        "action": pa.array([[rng.random()] for _ in range(rows)], pa.list_(pa.float32())),
        "prompt": ["a"] * 3 + ["b"] * 3,
        **{name: [i % 3 == at for i in range(rows)] for name, at in (("is_first", 0), ("is_last", 2))},
        "is_terminal": [i % 3 == 2 for i in range(rows)],
    }
    pq.write_table(pa.table(table), folder / "a.parquet")
    options = {"state_dim": 2, "per_action_dim": 1, "cameras": ("image_1",), "cache_dir": folder / "cache"}

    def content() -> list[Any]:
        store = EpisodeStore([folder / "a.parquet"], **options)
        frames = [bytes(store.image("image_1", row)) for row in range(rows)]
        numbers = store.state.tolist(), store.action.tolist(), store.episode_starts.tolist()
        return [*numbers, frames, [store.prompt(row) for row in range(rows)]]

    wanted = content()
    store = EpisodeStore([folder / "a.parquet"], **options)
    part = rng.choice(sorted(path for path in store.folder.iterdir()))
    data = bytearray(part.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    part.write_bytes(rng.choice([data, data, data, data[: rng.randrange(len(data))], b""]))

    def load() -> None:
        if content() != wanted:
            raise LeakError("values that were not written")

    return load
