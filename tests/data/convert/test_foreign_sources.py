"""Folders of others: nothing is read outside of them, nothing larger than it is, and every fault is named."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from data.convert.foreign_sources import fill_template, video_container
from data.convert.hdf5 import convert_hdf5
from data.convert.lerobot import convert_lerobot
from data.convert.video import VideoReader
from utils.parquet_utils import DataError

FIXTURES = Path("tests/fixtures")
SECRET = b"top secret bytes"


@pytest.fixture
def dataset(tmp_path):
    return Path(shutil.copytree(FIXTURES / "lerobot_v21_image", tmp_path / "data"))


def change_info(dataset, **changes):
    path = dataset / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def camera_of(dataset):
    features = json.loads((dataset / "meta" / "info.json").read_text())["features"]
    return next(key for key, feature in features.items() if feature["dtype"] in ("image", "video"))


def convert(dataset, output, **options):
    started = time.monotonic()
    try:
        return convert_lerobot(dataset, output, [f"{camera_of(dataset)}=image_1"], **options)
    finally:
        assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    "template",
    [
        "../private/episode_{episode_index:06d}.parquet",
        "/etc/passwd",
        "data/../../private/episode_{episode_index:06d}.parquet",
        "{episode_index:0999999999d}",
        "{episode_index:09999999999d}",
        "{episode_index.__class__}",
        "{episode_index!r}",
        "{0}",
        "{other}",
        "{",
        7,
    ],
)
def test_path_templates(dataset, tmp_path, template):
    shutil.copytree(dataset / "data" / "chunk-000", tmp_path / "private")
    change_info(dataset, data_path=template)
    with pytest.raises(DataError, match="outside of that folder|has the field|no template|wanted a text"):
        convert(dataset, tmp_path / "out")


def test_links_out_of_the_folder_are_followed_when_asked(dataset, tmp_path):
    file = sorted((dataset / "data").rglob("*.parquet"))[0]
    shutil.move(file, tmp_path / "elsewhere.parquet")
    os.symlink(tmp_path / "elsewhere.parquet", file)
    with pytest.raises(DataError, match="leads to a file outside of that folder; give --follow_links if you trust it"):
        convert(dataset, tmp_path / "out")
    assert convert(dataset, tmp_path / "out", follow_links=True).episodes


@pytest.mark.parametrize(
    "changes",
    [
        {"chunks_size": 0},
        {"chunks_size": "a"},
        {"fps": 0},
        {"fps": "10"},
        {"fps": float("nan")},
        {"features": []},
        {"features": {"a": []}},
        {"features": {"a": {"dtype": "float32"}}},
        {"features": {"a": {"dtype": "float32", "shape": ["x"]}}},
    ],
)
def test_metadata_of_other_types(dataset, tmp_path, changes):
    camera = camera_of(dataset)
    change_info(dataset, **changes)
    with pytest.raises(DataError, match="info.json|meta"):
        convert_lerobot(dataset, tmp_path / "out", [f"{camera}=image_1"])


def test_random_changes_to_metadata_are_named_or_harmless(tmp_path):
    rng = random.Random(0)
    odd = [None, True, -1, 2**70, 1e308, "", "..", "\x1b[2J", [], {}, [[]], "{", {"a": 1}]
    for number in range(60):
        dataset = Path(shutil.copytree(FIXTURES / "lerobot_v21_image", tmp_path / f"d{number}"))
        camera = camera_of(dataset)
        path = dataset / "meta" / rng.choice(["info.json", "episodes.jsonl", "tasks.jsonl"])
        if rng.random() < 0.3:
            data = bytearray(path.read_bytes())
            data[rng.randrange(len(data))] = rng.randrange(256)
            path.write_bytes(data)
        else:
            lines = [json.loads(line) for line in path.read_text().splitlines()] if path.suffix == ".jsonl" else None
            content = lines[0] if lines else json.loads(path.read_text())
            content[rng.choice(list(content))] = rng.choice(odd)
            path.write_text("\n".join(map(json.dumps, lines)) if lines else json.dumps(content))
        try:
            convert_lerobot(dataset, tmp_path / f"out{number}", [f"{camera}=image_1"])
        except DataError as error:
            assert "\x1b" not in str(error)
        shutil.rmtree(dataset)


def test_only_plain_fields_are_filled_in():
    values = {"episode_index": 7, "video_key": "a.b"}
    assert fill_template("v/{video_key}/e_{episode_index:06d}.mp4", "x", values) == "v/a.b/e_000007.mp4"
    assert fill_template("{{}}{episode_index}", "x", values) == "{}7"


# --- HDF5


def episode(path, frames=None, state=None, action=None, **attributes):
    with h5py.File(path, "w") as file:
        file["action"] = np.zeros((4, 2), np.float32) if action is None else action
        file["observations/qpos"] = np.zeros((4, 3), np.float32) if state is None else state
        file["observations/images/top"] = np.zeros((4, 8, 8, 3), np.uint8) if frames is None else frames
        file.attrs.update(attributes)
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "hdf5").mkdir()
    (tmp_path / "secret").write_bytes(SECRET * 1000)
    return tmp_path / "hdf5"


def convert_episodes(folder, **options):
    started = time.monotonic()
    try:
        return convert_hdf5(folder, folder.parent / "out", ["top=image_1"], prompt="a", fps=10, **options)
    finally:
        assert time.monotonic() - started < 20


def test_links_to_other_files_are_refused(folder):
    episode(folder.parent / "other.hdf5", state=np.ones((4, 3), np.float32))
    path = episode(folder / "episode_0.hdf5")
    with h5py.File(path, "a") as file:
        del file["observations/qpos"]
        file["observations/qpos"] = h5py.ExternalLink(str(folder.parent / "other.hdf5"), "observations/qpos")
    with pytest.raises(DataError, match="qpos is a link to another file .*other.hdf5.*, which is not followed"):
        convert_episodes(folder)


@pytest.mark.parametrize("key", ["observations/qpos", "observations/images/top"])
def test_values_in_other_files_are_refused(folder, key):
    path = episode(folder / "episode_0.hdf5")
    shape, dtype = ((4, 3), "<f4") if key.endswith("qpos") else ((4, 8, 8, 3), "u1")
    with h5py.File(path, "a") as file:
        del file[key]
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        file.create_dataset(key, shape, dtype, external=[(str(folder.parent / "secret"), 0, size)])
    with pytest.raises(DataError, match=f"the values of {key} lie in another file, which is not read"):
        convert_episodes(folder)


def test_virtual_datasets_are_refused(folder):
    other = episode(folder.parent / "other.hdf5")
    path = episode(folder / "episode_0.hdf5")
    layout = h5py.VirtualLayout((4, 3), "<f4")
    layout[:] = h5py.VirtualSource(str(other), "observations/qpos", (4, 3))
    with h5py.File(path, "a") as file:
        del file["observations/qpos"]
        file.create_virtual_dataset("observations/qpos", layout)
    with pytest.raises(DataError, match="lie in another file"):
        convert_episodes(folder)


def test_links_in_circles_are_named(folder):
    path = episode(folder / "episode_0.hdf5")
    with h5py.File(path, "a") as file:
        del file["observations/qpos"]
        file["observations/qpos"] = h5py.SoftLink("/observations/qpos")
    with pytest.raises(DataError, match="episode_0.hdf5"):
        convert_episodes(folder)


@pytest.mark.parametrize(
    ("key", "shape", "dtype"),
    [
        ("observations/qpos", (4, 2_000_000_000), "<f4"),
        ("observations/images/top", (4, 80_000, 80_000, 3), "u1"),
        ("observations/qpos", (10**12, 3), "<f4"),
    ],
)
def test_declared_sizes_are_compared_with_stored_bytes(folder, key, shape, dtype):
    path = episode(folder / "episode_0.hdf5")
    with h5py.File(path, "a") as file:
        del file[key]
        file.create_dataset(key, shape, dtype, chunks=tuple(min(size, 64) for size in shape))
    with pytest.raises(DataError, match="bytes of it are stored|take more than"):
        convert_episodes(folder)


def test_linked_episodes(folder):
    episode(folder.parent / "episode_0.hdf5")
    os.symlink(folder.parent / "episode_0.hdf5", folder / "episode_0.hdf5")
    with pytest.raises(DataError, match="give --follow_links"):
        convert_episodes(folder)
    assert convert_episodes(folder, follow_links=True).rows == 4


def test_nothing_secret_comes_out(folder):
    episode(folder / "episode_0.hdf5")
    assert convert_episodes(folder).rows == 4
    table = pq.read_table(next((folder.parent / "out").glob("*.parquet")))
    assert SECRET not in str(table.to_pydict()).encode()


# --- video


@pytest.mark.parametrize(
    "content",
    [
        b"ffconcat version 1.0\nfile other.mp4\n",
        b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:1/a.ts\n",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\n",
        b"<?xml version='1.0'?><MPD></MPD>",
        b"",
    ],
)
def test_playlists_dressed_as_videos(tmp_path, content):
    video = next((FIXTURES / "lerobot_v30_video").rglob("*.mp4"))
    shutil.copy(video, tmp_path / "other.mp4")
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(DataError, match="a.mp4: not a readable video file"):
        VideoReader(tmp_path / "a.mp4")
    assert video_container(tmp_path / "other.mp4") == "mov"
    reader = VideoReader(tmp_path / "other.mp4")
    assert reader.frame_at(0.0, 0.01, "x").shape[2] == 3
    reader.close()
