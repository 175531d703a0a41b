"""Small real Parquet datasets for tests, and which simulators they need."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

PROMPTS = ("press the button", "open the window")


def png(rng: np.random.Generator, size: int = 40) -> bytes:
    """A random image, encoded without loss."""
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def episode_rows(
    length: int,
    *,
    seed: int = 0,
    state_dim: int = 4,
    action_dim: int = 4,
    cameras: tuple[str, ...] = ("image_1",),
    image_size: int = 40,
) -> list[dict[str, Any]]:
    """The rows of one episode, random but a function of `seed`."""
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(length):
        row: dict[str, Any] = {camera: png(rng, image_size) for camera in cameras}
        row |= {
            "state": rng.normal(size=state_dim).astype(np.float32).tolist(),
            "action": rng.uniform(-1, 1, size=action_dim).astype(np.float32).tolist(),
            "is_first": step == 0,
            "is_last": step == length - 1,
            "is_terminal": step == length - 1,
            "prompt": PROMPTS[seed % len(PROMPTS)],
        }
        rows.append(row)
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]], row_group_size: int = 3) -> Path:
    """Write rows with the schema of docs/data_format.md; extra columns keep the type that pyarrow infers."""
    types = {"state": pa.list_(pa.float32()), "action": pa.list_(pa.float32()), "prompt": pa.string()}
    types |= {flag: pa.bool_() for flag in ("is_first", "is_last", "is_terminal")}
    columns = {name: pa.array([row[name] for row in rows], type=types.get(name)) for name in rows[0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def write_episodes(path: Path, lengths: list[int], *, seed: int = 0, **options: Any) -> Path:
    """One Parquet file holding episodes of these lengths."""
    rows = [row for i, length in enumerate(lengths) for row in episode_rows(length, seed=seed + i, **options)]
    return write_rows(path, rows)


def write_broken(path: Path, spoil: Callable[[list[dict[str, Any]]], Any], lengths: list[int] | None = None) -> Path:
    """A file of two episodes whose rows `spoil` has changed in place."""
    rows = [row for i, length in enumerate(lengths or [5, 4]) for row in episode_rows(length, seed=i)]
    spoil(rows)
    return write_rows(path, rows)


def needs(*packages: str) -> list[pytest.MarkDecorator]:
    """Marks of tests that drive a simulator: skipped where its packages are not installed.

    scripts/run_tests.sh installs them and sets ALL_SIMULATORS, so that there such a test fails instead.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    skipped = bool(missing) and not os.environ.get("ALL_SIMULATORS")
    return [pytest.mark.sim, pytest.mark.skipif(skipped, reason=f"not installed: {', '.join(missing)}")]
