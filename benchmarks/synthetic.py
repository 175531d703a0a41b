"""Parquet datasets of any size for benchmarks: realistic images and numbers, made quickly."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

EPISODE_STEPS = 100


def jpeg_frames(count: int, size: int, seed: int = 0) -> list[bytes]:
    """Encoded JPEG frames of size x size pixels with the detail of a camera picture (as record_demos.py encodes it)."""
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(count):
        coarse = rng.integers(0, 256, (size // 14, size // 14, 3), dtype=np.uint8)
        pixels = np.array(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)).astype(np.int16)
        pixels += rng.normal(0, 4, pixels.shape).astype(np.int16)
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=95)
        frames.append(buffer.getvalue())
    return frames


def write_dataset(path: Path, rows: int, frames: list[bytes], *, dims: int = 7, unique: bool = False) -> None:
    """One Parquet file of `rows` steps that cycle through `frames`, in episodes of EPISODE_STEPS.

    Args:
        path: file to write.
        rows: time steps, a multiple of EPISODE_STEPS.
        frames: encoded images.
        dims: width of state and action.
        unique: append the row number to every frame (JPEG readers stop before it), so that no two are equal and
            nothing can be stored once for all.
    """
    writer = None
    for table in _tables(rows, frames, dims, unique):
        writer = writer or pq.ParquetWriter(path, table.schema, compression="none", use_dictionary=["prompt"])
        writer.write_table(table)
    assert writer is not None
    writer.close()


def _tables(rows: int, frames: list[bytes], dims: int, unique: bool) -> Iterator[pa.Table]:
    rng = np.random.default_rng(1)
    for begin in range(0, rows, EPISODE_STEPS):
        steps = range(begin, begin + EPISODE_STEPS)
        images = [frames[i % len(frames)] + (i.to_bytes(8, "little") if unique else b"") for i in steps]
        numbers = rng.normal(size=(2, EPISODE_STEPS * dims)).astype(np.float32)
        last = np.arange(EPISODE_STEPS) == EPISODE_STEPS - 1
        yield pa.table(
            {
                "image_1": pa.array(images, pa.binary()),
                "state": pa.FixedSizeListArray.from_arrays(pa.array(numbers[0]), dims),
                "action": pa.FixedSizeListArray.from_arrays(pa.array(numbers[1]), dims),
                "is_first": np.arange(EPISODE_STEPS) == 0,
                "is_last": last,
                "is_terminal": last,
                "prompt": ["pick up the red block"] * EPISODE_STEPS,
            }
        )
