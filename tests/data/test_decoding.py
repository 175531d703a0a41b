"""Frames as a viewer shows them; what can't be shown right is refused, in training, at the robot and by the doctor."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import data.decoding as module
from data.convert.lerobot_export import Layout, export_lerobot
from data.decoding import decode_frame
from data.doctor.frames import BROKEN, DECODED, examine_frames
from data.episode_store import EpisodeStore
from data.loader import main as self_test
from data.processing import ObservationError, VLAImageProcessor
from tests.helpers import episode_rows, write_rows
from utils.parquet_utils import DataError

OPTIONS = {"state_dim": 4, "per_action_dim": 4, "cameras": ("image_1", "image_2")}


def picture(height: int = 24, width: int = 40) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([5 * x, 9 * y, 100 + x + y], axis=-1).astype(np.uint8)


def encode(pixels: np.ndarray, format: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def with_orientation(pixels: np.ndarray, value: int, format: str) -> bytes:
    exif = Image.Exif()
    exif[module.ORIENTATION] = value
    return encode(pixels, format, exif=exif)


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setattr(module, "_told", set())


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("value", range(1, 9))
def test_frames_are_turned_as_exif_says(format, value, told, caplog):
    shown = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud}
    shown |= {5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1)}
    shown |= {7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90}
    plain = decode_frame(encode(picture(), format), 24, 40)
    for _ in range(2):
        np.testing.assert_array_equal(
            decode_frame(with_orientation(picture(), value, format), 24, 40), shown[value](plain)
        )
    assert caplog.text.count("turned as it says") == (value > 1)
    facts, errors, _ = examine_frames([with_orientation(picture(), value, format)], [], 64)
    assert facts["status"][0] == DECODED and facts["orientation"][0] == value and not errors


def test_extraneous_bytes_are_no_damage_but_a_missing_end_is(told, caplog):
    clean = encode(picture(), quality=85)
    extraneous, padded = clean[:-2] + bytes(range(1, 9)) + clean[-2:], clean + bytes(100)
    for _ in range(2):
        for data in (extraneous, padded):
            np.testing.assert_array_equal(decode_frame(data, 24, 40), decode_frame(clean, 24, 40))
    assert caplog.text.count("extraneous bytes") == 1
    assert (examine_frames([extraneous, padded], [], 64)[0]["status"] == DECODED).all()
    processor = VLAImageProcessor(24, 40, (0.5,) * 3, (0.5,) * 3, 3)
    for data in (clean[: len(clean) // 2], extraneous[: len(clean) // 2], clean[:-2]):
        with pytest.raises(ObservationError, match="is no readable JPEG or PNG"):
            processor(data)
        assert examine_frames([data], [], 64)[0]["status"][0] == BROKEN


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_8_bits_a_value_are_refused(dtype):
    depth = (800 + 20 * picture()[..., 0].astype(int)).astype(dtype)
    processor = VLAImageProcessor(24, 40, (0.5,) * 3, (0.5,) * 3, 3)
    data = encode(depth, "PNG" if dtype is np.uint16 else "TIFF")
    for frame in (data, Image.fromarray(depth)):
        with pytest.raises(ObservationError, match="more than 8 bits a value, which would be clipped to white"):
            processor(frame)
    assert module.is_deep(examine_frames([data], [], 64)[0]["mode"][0].decode())


@pytest.mark.parametrize(
    ("camera", "value", "message"),
    [
        ("image_1", b"", r"a.parquet row 5: image_1 is empty \(0 bytes\); it is needed at every step"),
        ("image_1", None, "a.parquet row 5: image_1 is null; it is needed at every step"),
        ("image_2", b"", r"a.parquet row 5: image_2 is empty \(0 bytes\); write null where the camera is absent"),
    ],
)
def test_a_camera_that_dropped_out(tmp_path, camera, value, message):
    rows = episode_rows(8, cameras=("image_1", "image_2"))
    rows[5][camera] = value
    path = write_rows(tmp_path / "a.parquet", rows)
    with pytest.raises(DataError, match=message):
        EpisodeStore([path], cache_dir=tmp_path / "cache", **OPTIONS)
    layout = Layout(fps=10, cameras={camera: f"observation.images.{camera}"})
    with pytest.raises(DataError, match=r"a.parquet row 5: image_\d is (empty|null)"):
        export_lerobot([path], tmp_path / "out", layout)


def test_an_absent_second_camera_is_null(tmp_path):
    rows = episode_rows(4, cameras=("image_1", "image_2"))
    rows[2]["image_2"] = None
    store = EpisodeStore([write_rows(tmp_path / "a.parquet", rows)], cache_dir=tmp_path / "cache", **OPTIONS)
    assert [store.image("image_2", row) is None for row in range(4)] == [False, False, True, False]


def spoiled(name: str) -> list[dict]:
    rows = episode_rows(4)
    if name == "renamed":
        return [{("observation.state" if key == "state" else key): value for key, value in r.items()} for r in rows]
    if name == "scalar":
        return [r | {"state": r["state"][0]} for r in rows]
    if name == "lacking":
        return [{key: value for key, value in r.items() if key != "action"} for r in rows]
    rows[0]["state"] = {"null": None, "empty": []}[name]
    return rows


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("renamed", r"no column 'state' \(found: image_1, observation.state, "),
        ("lacking", r"no column 'action' \(found: "),
        ("scalar", "column 'state' is float; wanted a list"),
        ("null", "row 0: state is null; every time step needs its values"),
        ("empty", "row 0: state is an empty list; every time step needs its values"),
    ],
)
def test_the_self_test_says_what_training_says(tmp_path, monkeypatch, name, message):
    path = tmp_path / "a.parquet"
    rows = spoiled(name)
    if name == "scalar":
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        pq.write_table(pa.table(columns | {"state": pa.array(columns["state"], pa.float32())}), path)
    else:
        write_rows(path, rows)
    monkeypatch.setattr(sys, "argv", ["loader.py", "--data_path", str(path)])
    with pytest.raises(DataError, match=message):
        self_test()


def test_the_self_test_as_a_command(tmp_path):
    path = write_rows(tmp_path / "a.parquet", spoiled("renamed"))
    done = subprocess.run([sys.executable, "data/loader.py", "--data_path", path], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
