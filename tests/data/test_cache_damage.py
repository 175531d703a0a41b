"""The episode cache and the way from the workers: no changed bit becomes a value, and damage is mended and named."""

from __future__ import annotations

import os
import random
import shutil

import numpy as np
import pytest

from data.episode_store import EpisodeStore
from data.shared_memory import ImageBlock, PackedBatch
from tests.helpers import write_episodes
from utils.parquet_utils import DataError

PARTS = ["state.npy", "action.npy", "prompt_index.npy", "episode_starts.npy", "frame_checksums.npy", "meta.json"]
WIDTHS = {"state_dim": 4, "per_action_dim": 4, "cameras": ("image_1", "image_2")}


@pytest.fixture
def files(tmp_path):
    first = write_episodes(tmp_path / "a.parquet", [6, 5], cameras=("image_1",))
    return [first, write_episodes(tmp_path / "b.parquet", [4], cameras=("image_1", "image_2"))]


def open_store(tmp_path, files):
    return EpisodeStore(files, **WIDTHS, cache_dir=tmp_path / "cache")


def content(store):
    frames = [bytes(f) if (f := store.image(c, r)) is not None else None for c in WIDTHS["cameras"] for r in range(15)]
    numbers = [store.state.tolist(), store.action.tolist(), store.episode_starts.tolist()]
    return [*numbers, [store.prompt(row) for row in range(15)], frames]


def flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize("name", [*PARTS, "images.arrow"])
def test_a_flipped_bit_anywhere_is_mended(tmp_path, files, caplog, name):
    wanted = content(open_store(tmp_path, files))
    rng, warned = random.Random(name), 0
    for _ in range(25):
        caplog.clear()
        store = open_store(tmp_path, files)
        flip(store.folder / name, rng)
        assert content(open_store(tmp_path, files)) == wanted
        warned += "is damaged" in caplog.text and "it is built again" in caplog.text
    assert warned >= (15 if name == "images.arrow" else 25), "padding may change without a word, and nothing else"


@pytest.mark.parametrize("name", [*PARTS, "images.arrow"])
@pytest.mark.parametrize("how", ["cut", "gone", "empty", "a folder"])
def test_parts_that_are_not_whole(tmp_path, files, caplog, name, how):
    store = open_store(tmp_path, files)
    wanted = content(store)
    path = store.folder / name
    size = path.stat().st_size
    path.unlink()
    if how == "cut":
        path.write_bytes(bytes(size // 2))
    elif how == "empty":
        path.touch()
    elif how == "a folder":
        path.mkdir()
    assert content(open_store(tmp_path, files)) == wanted
    if not (name == "meta.json" and how in ("gone", "a folder")):  # then there is no cache, and it is just built
        assert f"episode cache: {store.folder} is damaged" in caplog.text


def test_a_frame_that_changes_while_it_is_used(tmp_path, files, caplog):
    store = open_store(tmp_path, files)
    wanted = content(open_store(tmp_path, files))
    frame = store._images["image_1"][3]
    arrow = store.folder / "images.arrow"
    at = arrow.read_bytes().index(bytes(frame))
    with arrow.open("r+b") as file:  # in place, so that the mapped pages change
        file.seek(at + 10)
        file.write(bytes([frame[10] ^ 1]))
    assert content(store) == wanted
    assert "image_1 of row 3 is not as it was written): it is built again" in caplog.text


def test_a_cache_whose_source_has_changed_is_not_rebuilt_under_its_name(tmp_path, files):
    store = open_store(tmp_path, files)
    flip(store.folder / "images.arrow", random.Random(1))
    os.utime(files[0], (1, 1))
    with pytest.raises(DataError, match=r"episode cache: .* is damaged, and the files .* have changed since"):
        store._open(damage="a test's")


def test_a_cache_that_stays_damaged_is_named(tmp_path, files, monkeypatch):
    open_store(tmp_path, files)
    monkeypatch.setattr("data.episode_store.meta_checksum", lambda meta: object())
    with pytest.raises((DataError, TypeError), match="damaged again after it was built anew|not JSON serializable"):
        open_store(tmp_path, files)


def test_two_stores_find_the_same_damage(tmp_path, files):
    first, second = open_store(tmp_path, files), open_store(tmp_path, files)
    wanted = content(open_store(tmp_path, files))
    first._open(damage="a test's")
    built = first.folder.stat().st_ino
    second._open(damage="a test's")
    assert first.folder.stat().st_ino == built, "what the first has built anew stays"
    assert content(first) == content(second) == wanted
    shutil.rmtree(first.folder)
    first._open(damage="a test's")
    assert content(first) == wanted


@pytest.mark.parametrize("part", ["another frame", "state"])
def test_what_a_worker_hands_over_is_checked(part, monkeypatch):
    monkeypatch.setattr("data.shared_memory.get_worker_info", lambda: type("Worker", (), {"id": 0}))
    block = ImageBlock((1, 2, 1, 224, 224, 3))
    block.images[:] = np.random.default_rng(0).integers(0, 256, block.images.shape, dtype=np.uint8)
    arrays = {"state": np.zeros((2, 4), np.float32), "raw_prompt_text": ["a", "b"]}
    packed = PackedBatch(arrays, ["image_1"], block)
    assert packed.unpack(None)["image_1"].shape == (2, 1, 3, 224, 224)
    if part == "state":
        arrays["state"].reshape(-1).view(np.uint8)[-1] ^= 4
    else:
        block.images[0, 1] = np.random.default_rng(1).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    with pytest.raises(DataError, match="a batch changed on its way from a loader worker"):
        packed.unpack(None)
