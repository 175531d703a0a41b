"""Small real recordings of every format, and what a correct conversion of each gives (tests/fixtures/formats)."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
from PIL import Image

from data.convert.convert import convert, open_source
from data.convert.episode_writer import ImageEncoding
from data.convert.mapping import read_entries

FORMATS = Path(__file__).resolve().parents[2] / "fixtures" / "formats"
# folder, recording, mapping, what is expected, levels by which frames that are not lossless may differ (most, mean)
CASES = [
    ("rlds", "rlds/tiny_pick/1.0.0", "map_train", "expected_train", (0, 0)),
    ("rlds", "rlds/tiny_pick/1.0.0", "map_val", "expected_val", (0, 0)),
    ("robomimic_hdf5", "robomimic_hdf5/image.hdf5", "map", "expected", (0, 0)),
    ("libero_hdf5", "libero_hdf5", "map", "expected", (0, 0)),
    ("zarr", "zarr/pusht_tiny.zarr", "map_dir", "expected_dir", (0, 0)),
    ("zarr", "zarr/umi_tiny.zarr.zip", "map_zip", "expected_zip", (1, 1)),
    ("mcap_ros2", "mcap_ros2", "map", "expected", (0, 0)),
    ("lerobot_v20", "lerobot_v20/tiny_so100", "map", "expected", (0, 0)),
    ("groot_lerobot", "groot_lerobot/cube_to_bowl", "map", "expected", (0, 0)),
]


@pytest.mark.parametrize(("folder", "recording", "mapping", "expected", "distance"), CASES)
def test_every_value_and_frame(folder, recording, mapping, expected, distance, tmp_path):
    source = open_source(None, FORMATS / recording, read_entries(None, [str(FORMATS / folder / f"{mapping}.yaml")]))
    summary = convert(source, tmp_path / "out", encoding=ImageEncoding("png"))
    check(read(tmp_path / "out"), np.load(FORMATS / folder / f"{expected}.npz"), distance)
    metadata = pq.read_schema(next((tmp_path / "out").glob("*.parquet"))).metadata
    assert json.loads(metadata[b"fps"]) == float(np.load(FORMATS / folder / f"{expected}.npz")["fps"])
    assert summary.rows == len(read(tmp_path / "out"))


def check(table: pa.Table, expected: np.lib.npyio.NpzFile, distance: tuple[float, float]) -> None:
    """Compare a conversion with what is expected: values, order, flags, and frames."""
    lengths = expected["episode_lengths"]
    last = np.cumsum(lengths) - 1
    first = last - lengths + 1
    for name, key in (("state", "states"), ("action", "actions")):
        assert np.array_equal(np.array(table[name].to_pylist(), np.float32), expected[key])
    assert np.flatnonzero(table["is_first"]).tolist() == first.tolist()
    assert np.flatnonzero(table["is_last"]).tolist() == last.tolist()
    assert np.array_equal(np.asarray(table["is_terminal"])[last], expected["is_terminal"])
    assert table["prompt"].to_pylist() == np.repeat(expected["prompts"], lengths).tolist()
    assert table["frame_index"].to_pylist() == np.concatenate([np.arange(length) for length in lengths]).tolist()
    decode = decode_as_tensorflow if b"RLDS" in table.schema.metadata[b"source_format"] else decode_frame
    for camera in (name for name in ("image_1", "image_2") if f"{name}_steps" in expected):
        frames = [decode(frame) for frame in table[camera].to_pylist()]
        assert [step_of(frame) for frame in frames] == expected[f"{camera}_steps"].tolist()
        most, mean = (0, 0) if expected[f"{camera}_lossless"] else distance
        for wanted, rows in ((expected[f"{camera}_first"], first), (expected[f"{camera}_last"], last)):
            for frame, row in zip(wanted, rows, strict=True):
                difference = np.abs(frames[row].astype(int) - frame.astype(int))
                assert difference.max() <= most and difference.mean() <= mean
        assert all(wrong_corner(frame) is None for frame in frames)


def read(folder: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("*.parquet")))


def decode_frame(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def decode_as_tensorflow(data: bytes) -> np.ndarray:
    """A JPEG by the fast transform, as TensorFlow, which wrote what is expected of RLDS, decodes it."""
    return simplejpeg.decode_jpeg(data, "RGB", fastdct=True) if data[:2] == b"\xff\xd8" else decode_frame(data)


def step_of(frame: np.ndarray) -> int:
    """The step that is drawn into the middle of a sample's frame: six blocks, the lowest bit left, white is 1."""
    height, width = frame.shape[:2]
    block = width // 8
    rows = frame[height // 2 - 2 : height // 2 + 2]
    return sum(int(rows[:, block * (i + 1) + 2 : block * (i + 2) - 2].mean() > 127) << i for i in range(6))


def wrong_corner(frame: np.ndarray) -> str | None:
    """Which corner of a sample's frame has another colour: it is mirrored, turned, or not RGB."""
    height, width = frame.shape[:2]
    wanted = {
        (2, 2): (255, 0, 0),
        (2, width - 8): (0, 255, 0),
        (height - 8, 2): (0, 0, 255),
        (height - 8, width - 8): (128, 128, 128),
    }
    for (y, x), colour in wanted.items():
        found = frame[y : y + 6, x : x + 6].reshape(-1, 3).mean(axis=0)
        if np.abs(found - colour).max() > 45:
            return f"corner {y},{x} is {found.round()}, wanted {colour}"
    return None
