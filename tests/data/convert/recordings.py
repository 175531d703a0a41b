"""Small recordings for the tests of converters, and one way to convert them."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from data.convert.convert import convert, open_source
from data.convert.episode_writer import ImageEncoding
from data.convert.mapping import read_entries
from tests.data.convert.test_formats import FORMATS, read

PNG = ImageEncoding("png")
BASE = ["image_1=rgb", "state=state", "action=action", "prompt=text:go", "fps=10"]


def jpeg(image: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "jpeg", **{"quality": 90, **options})
    return buffer.getvalue()


def pictures(count: int, height: int = 24, width: int = 32) -> np.ndarray:
    coarse = np.random.default_rng(0).integers(0, 256, (count, height // 8, width // 8, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def run(path: Path, output_dir: Path, *items: str, name: str = "hdf5", encoding: ImageEncoding = PNG) -> pa.Table:
    source = open_source(name, path, read_entries(None, [*BASE, *items]))
    convert(source, output_dir, encoding=encoding)
    return read(output_dir)


def column(table: pa.Table, name: str) -> np.ndarray:
    return np.array(table[name].to_pylist())


def copy(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(FORMATS / name, tmp_path / name))
