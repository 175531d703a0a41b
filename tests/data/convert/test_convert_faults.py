"""Recordings that are damaged or do not fit are refused by file and key."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

import data.convert.readers.base as base
from data.convert.convert import convert, open_source
from data.convert.episode_writer import EpisodeFileWriter, Steps
from data.convert.mapping import read_entries
from tests.data.convert.recordings import PNG, copy, jpeg, pictures, run
from tests.data.convert.test_formats import FORMATS
from utils.parquet_utils import DataError


def fails(folder: Path, path: Path, tmp_path: Path, message: str, mapping: str = "map", *items: str) -> None:
    with pytest.raises(DataError, match=message):
        source = open_source(None, path, read_entries(None, [str(folder / f"{mapping}.yaml"), *items]))
        convert(source, tmp_path / "out", encoding=PNG)
    assert not list((tmp_path / "out").glob(".*.tmp"))
    shutil.rmtree(tmp_path / "out", ignore_errors=True)


def shard(folder: Path) -> Path:
    return folder / "tiny_pick/1.0.0/tiny_pick-train.tfrecord-00001-of-00002"


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (3, r"tfrecord-00001-of-00002: the header of record 0 is damaged \(checksum\)"),
        (5000, r"tfrecord-00001-of-00002: record 0 is damaged \(its checksum does not fit\); fetch that file again"),
        (-2, r"tfrecord-00001-of-00002: record 0 is damaged"),
    ],
)
def test_a_flipped_bit_in_a_shard(tmp_path, where, message):
    folder = copy("rlds", tmp_path)
    data = bytearray(shard(folder).read_bytes())
    data[where] ^= 1
    shard(folder).write_bytes(data)
    fails(folder, folder, tmp_path, message, "map_train")


def test_shards_that_are_cut_short_or_missing(tmp_path):
    folder = copy("rlds", tmp_path)
    whole = shard(folder).read_bytes()
    shard(folder).write_bytes(whole[:-100])
    fails(folder, folder, tmp_path, r"00001-of-00002: record 0 has [\d,]+ bytes, of which .*cut short", "map_train")
    shard(folder).write_bytes(whole[:6])
    fails(folder, folder, tmp_path, "ends within the header of record 0", "map_train")
    shard(folder).write_bytes(b"")
    fails(folder, folder, tmp_path, "holds 0 records, dataset_info.json says 1", "map_train")
    shard(folder).unlink()
    fails(folder, folder, tmp_path, "shard 1 of 2 of split 'train' is missing", "map_train")
    fails(folder, folder, tmp_path, "no split 'test' .*found: train, val", "map_val", "split=test")
    entries = {k: v for k, v in read_entries(None, [str(folder / "map_val.yaml")]).items() if k != "split"}
    with pytest.raises(DataError, match=r"has the splits train, val; say which in the mapping"):
        open_source(None, folder, entries)
    (folder / "tiny_pick/1.0.0/features.json").write_text("{")
    fails(folder, folder / "tiny_pick/1.0.0", tmp_path, "features.json: not valid JSON", "map_val")


def test_a_last_action_of_zeros_is_told(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("data.convert.columns._told", set())
    entries = read_entries(None, [str(FORMATS / "rlds" / "map_train.yaml")])
    convert(open_source(None, FORMATS / "rlds", entries), tmp_path / "sound")
    assert "all zero" not in caplog.text
    zero = entries | {"action": {"from": "steps/action", "scale": 0}}
    convert(open_source(None, FORMATS / "rlds", zero), tmp_path / "zero")
    assert "record 0: the last step's action is all zero" in caplog.text and "drop_last: 1" in caplog.text
    caplog.clear()
    convert(open_source(None, FORMATS / "rlds", zero | {"drop_last": 1}), tmp_path / "dropped")
    assert "all zero" not in caplog.text


def test_episodes_of_other_shapes(tmp_path):
    folder = copy("robomimic_hdf5", tmp_path)
    with h5py.File(folder / "image.hdf5", "a") as file:
        del file["data/demo_2/actions"]
        file["data/demo_2/actions"] = np.zeros((9, 8))
    message = r"image.hdf5 data/demo_2: state has 9 values and action 8, in the first episode they have 9 and 7"
    fails(folder, folder, tmp_path, message)
    with h5py.File(folder / "image.hdf5", "a") as file:
        del file["data/demo_2/actions"]
        file["data/demo_2/actions"] = np.zeros((5, 7))
    fails(folder, folder, tmp_path, r"data/demo_2: steps differ \(obs/agentview_image 9, .*actions 5")
    with h5py.File(folder / "image.hdf5", "a") as file:
        for key in ("obs/agentview_image", "obs/robot0_eye_in_hand_image"):
            del file[f"data/demo_0/{key}"]
            file[f"data/demo_0/{key}"] = np.zeros((0, 8, 8, 3), np.uint8)
    fails(folder, folder, tmp_path, r"data/demo_0: steps differ \(obs/agentview_image 0")


def test_an_episode_without_frames(recording, tmp_path):
    with h5py.File(recording, "a") as file:
        for key in ("rgb", "state", "action"):
            shape = file[key].shape[1:]
            del file[key]
            file[key] = np.zeros((0, *shape), np.uint8 if key == "rgb" else float)
    with pytest.raises(DataError, match=r"open_the_drawer_demo.hdf5: holds no steps; remove it or record it again"):
        run(recording, tmp_path / "out")


def test_a_file_that_another_process_writes(recording, tmp_path):
    code = f"import h5py, sys; f = h5py.File({str(recording)!r}, 'a'); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"open\n"
        with pytest.raises(DataError, match="drawer_demo.hdf5: another process has it open for writing; close it"):
            run(recording, tmp_path / "out")
        writer.stdin.close()
    run(recording, tmp_path / "out")


def test_links_to_other_files(recording, tmp_path):
    with h5py.File(recording, "a") as file:
        file["elsewhere"] = h5py.ExternalLink("/etc/secret.h5", "state")
    with pytest.raises(DataError, match=r"'elsewhere' is not read: a link to another file \(/etc/secret.h5\)"):
        run(recording, tmp_path / "out", "state=elsewhere")


@pytest.mark.parametrize("prompt", ["b'pick the cube'", 'b"it"', "<memory at 0x7f12ab>", "[b'x']", "np.bytes_(b'x')"])
def test_prompts_that_are_the_text_of_an_object(tmp_path, prompt):
    columns = dict(cameras=["image_1"], state_dim=2, per_action_dim=2, metadata={}, source="x", extra=())
    steps = Steps({"image_1": [jpeg(pictures(1)[0])]}, np.zeros((1, 2)), np.zeros((1, 2)), [prompt])
    with (
        pytest.raises(DataError, match=r"x episode 3 frame 0: the instruction is .*Python shows of an object"),
        EpisodeFileWriter(tmp_path / "a.parquet", **columns) as writer,
    ):
        writer.write_episode(3, None, [steps])
    for sound in ("bring it", "[slowly] go", "<b> key"):
        with EpisodeFileWriter(tmp_path / "b.parquet", **columns) as writer:
            writer.write_episode(0, None, [Steps(steps.images, steps.state, steps.action, [sound])])


@pytest.mark.parametrize("name", ["/etc/passwd", "../up/.zgroup", "data/../../x", "C:\\x"])
def test_archives_with_names_that_lead_out(tmp_path, name):
    folder = copy("zarr", tmp_path)
    with zipfile.ZipFile(folder / "umi_tiny.zarr.zip", "a") as archive:
        archive.writestr(name, b"x")
    message = r"umi_tiny.zarr.zip: holds the name .*, which leads out of it; nothing is read from it"
    fails(folder, folder / "umi_tiny.zarr.zip", tmp_path, message, "map_zip")


def test_damaged_zarr(tmp_path):
    folder = copy("zarr", tmp_path)
    root = folder / "pusht_tiny.zarr"
    chunk = root / "data/state/0.0"
    data = chunk.read_bytes()
    chunk.write_bytes(data[:20])
    fails(folder, root, tmp_path, "data/state is damaged in steps 0 to 11", "map_dir")
    chunk.write_bytes(data)
    metadata = json.loads((root / "data/state/.zarray").read_text())
    (root / "data/state/.zarray").write_text(json.dumps({**metadata, "shape": [20, 5]}))
    fails(folder, root, tmp_path, "episode 1: data/state has 20 steps, meta/episode_ends says 21 or more", "map_dir")
    (root / "data/state/.zarray").write_text(json.dumps({**metadata, "filters": [{"id": "pickle"}], "dtype": "|O"}))
    fails(folder, root, tmp_path, "pusht_tiny.zarr: ", "map_dir")
    (root / "data/state/.zarray").write_text(json.dumps(metadata))
    fails(folder, root, tmp_path, "no array 'meta/ends'", "map_dir", "ends=meta/ends")
    fails(folder, folder / "map_dir.yaml", tmp_path, "not a readable zip", "map_dir")


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(base.importlib, "import_module", missing)
    with pytest.raises(DataError, match=r"x: .*needs the package of 'rosbags'; run: pip install -r requirements-conv"):
        base.optional_module("rosbags", Path("x"))
