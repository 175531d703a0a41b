"""Checkpoint files: whole or not at all, and never a pickle executed."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from utils.checkpoint import (
    CheckpointError,
    check_finite,
    evaluation_weights,
    link_checkpoint,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)
from utils.misc import DiskFullError, remove_leftovers

CONTENT = {
    "step": 3,
    "config": {"data": {"state_dim": 4}, "training": {"experiment_name": "run"}},
    "model": {"weight": torch.arange(3.0)},
    "statistics": [{}],
    "cameras": ["image_1"],
    "backbone_config": {"model_type": "paligemma"},
    "image_processor": {},
    "tokenizer_files": {"tokenizer.json": torch.zeros(2, dtype=torch.uint8)},
}


class Trap:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_round_trip_and_no_leftovers(tmp_path):
    path = tmp_path / "deep" / "c.pth.tar"
    save_checkpoint(CONTENT, path)
    loaded = load_checkpoint(path)
    assert loaded["step"] == 3 and torch.equal(loaded["model"]["weight"], torch.arange(3.0))
    assert list(path.parent.iterdir()) == [path]


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "c.pth.tar"
    save_checkpoint(CONTENT, path)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save_checkpoint({**CONTENT, "bad": lambda: None}, path)
    assert load_checkpoint(path)["step"] == 3 and list(tmp_path.iterdir()) == [path]


def test_pickled_object_is_refused_and_not_executed(tmp_path):
    path, trap = tmp_path / "c.pth.tar", tmp_path / "executed"
    torch.save({**CONTENT, "format": "paligemma-vla/1", "extra": Trap(trap)}, path)
    with pytest.raises(CheckpointError, match="holds something other than tensors and plain values, which is never"):
        load_checkpoint(path)
    assert not trap.exists()


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_truncated_file(tmp_path, keep):
    path = tmp_path / "c.pth.tar"
    save_checkpoint(CONTENT, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(CheckpointError, match="truncated"):
        load_checkpoint(path)


def test_damage_inside_the_archive(tmp_path):
    path = tmp_path / "c.pth.tar"
    save_checkpoint(CONTENT, path)
    content = bytearray(path.read_bytes())
    start = content.index(b"data.pkl") + 60
    content[start : start + 20] = b"\xff" * 20
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


def test_missing_foreign_and_newer_files(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.pth.tar")
    path = tmp_path / "c.pth.tar"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match=r"not a checkpoint of this program \(no format, step"):
        load_checkpoint(path)
    torch.save(torch.zeros(1), path)
    with pytest.raises(CheckpointError, match="not a checkpoint of this program"):
        load_checkpoint(path)
    torch.save({**CONTENT, "format": "paligemma-vla/9"}, path)
    with pytest.raises(CheckpointError, match="format 'paligemma-vla/9'; this version reads"):
        load_checkpoint(path)


def damage(path: Path, record: str) -> None:
    """Turn over one bit of a record of the archive."""
    with zipfile.ZipFile(path) as archive:
        info = next(item for item in archive.infolist() if item.filename.endswith(record))
        content = archive.read(info)
    data = bytearray(path.read_bytes())
    data[data.index(content, info.header_offset)] ^= 1
    path.write_bytes(data)


def test_inference_neither_returns_nor_reads_the_optimizer(tmp_path):
    path = tmp_path / "c.pth.tar"
    moments = {"state": {0: {"exp_avg": torch.full((1000,), 7.0)}}, "param_groups": []}
    save_checkpoint({"optimizer": moments, **CONTENT}, path)  # wherever it stands in the dict
    assert torch.equal(load_checkpoint(path)["optimizer"]["state"][0]["exp_avg"], moments["state"][0]["exp_avg"])
    damage(path, "/data/2")
    loaded = load_checkpoint(path, for_inference=True)
    assert "optimizer" not in loaded and torch.equal(loaded["model"]["weight"], torch.arange(3.0))
    with pytest.raises(CheckpointError, match="damaged .*data/2.*; use an earlier checkpoint"):
        load_checkpoint(path)
    damage(path, "/data/0")
    with pytest.raises(CheckpointError, match="damaged .*data/0"):
        load_checkpoint(path, for_inference=True)


def test_evaluation_takes_the_average_of_the_weights(caplog):
    checkpoint = {"model": {"a": 1, "frozen": 2}, "ema": {"updates": 9, "weights": {"a": 3}}}
    with caplog.at_level("INFO"):
        assert evaluation_weights(checkpoint) == {"a": 3, "frozen": 2}
    assert "their average over 9 updates (EMA)" in caplog.text


def test_what_the_disk_gives_back_is_checked_before_the_rename(tmp_path, monkeypatch):
    path = tmp_path / "c.pth.tar"
    save_checkpoint(CONTENT, path)
    monkeypatch.setattr("utils.checkpoint.flush_to_disk", lambda file: damage(file, "/data/0"))  # a failing disk
    with pytest.raises(CheckpointError, match="damaged"):
        save_checkpoint({**CONTENT, "step": 4}, path)
    assert load_checkpoint(path)["step"] == 3 and list(tmp_path.iterdir()) == [path]


BIG = {**CONTENT, "model": {"weight": torch.zeros(500_000)}}
FULL = (
    r"c.pth.tar: not written \(.*\): it needs 2,000,0\d\d bytes, [\d,]+ are free; earlier checkpoints are as they were"
)


def test_a_file_size_limit_leaves_the_previous_checkpoint(tmp_path):
    path = tmp_path / "c.pth.tar"
    save_checkpoint(CONTENT, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(DiskFullError, match=FULL):
            save_checkpoint(BIG, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert load_checkpoint(path)["step"] == 3 and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("known", [True, False], ids=["free space is known", "a quota that only the write meets"])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, known):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        path = tmp_path / "c.pth.tar"
        save_checkpoint(CONTENT, path)
        with monkeypatch.context() as patch:
            if not known:
                plenty = os.statvfs("/")
                patch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": plenty.f_blocks * 4096}))
            with pytest.raises(DiskFullError, match="No space left on device" if known else FULL):
                save_checkpoint(BIG, path)
        assert load_checkpoint(path)["step"] == 3 and list(tmp_path.iterdir()) == [path]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_disk_that_gets_full_is_told_in_advance(tmp_path, monkeypatch, caplog):
    free = iter([3_000_000, 1_500_000])
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": next(free)}))
    save_checkpoint(BIG, tmp_path / "c.pth.tar")
    assert "another checkpoint needs 2,000,002 bytes, 1,500,000 are free" in caplog.text


def write(folder: Path, name: str, step: int, written: float, experiment: str = "run") -> Path:
    config = {**CONTENT["config"], "training": {"experiment_name": experiment}}
    save_checkpoint({**CONTENT, "step": step, "config": config, "saved_at": written}, folder / name)
    return folder / name


def test_the_newest_readable_checkpoint(tmp_path, caplog):
    assert newest_checkpoint(tmp_path / "none", "run") is None
    old, new = write(tmp_path, "b.pth.tar", 5, 100.0), write(tmp_path, "a.pth.tar", 9, 200.0)
    os.utime(old)  # copied last: the time inside the file counts
    write(tmp_path, "c.pth.tar", 99, 300.0, experiment="another")
    (tmp_path / ".a.pth.tar.17.tmp").write_bytes(b"half")
    assert newest_checkpoint(tmp_path, "run") == new
    assert "c.pth.tar: belongs to the experiment 'another', not to 'run'" in caplog.text
    damage(new, "/data/0")
    caplog.clear()
    assert newest_checkpoint(tmp_path, "run") == old
    assert f"passed over {new}: damaged" in caplog.text
    old.write_bytes(old.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"no checkpoint is readable: .*a.pth.tar: damaged.*; move it aside to"):
        newest_checkpoint(tmp_path, "run")


def test_a_renamed_run_finds_its_checkpoints(tmp_path, caplog):
    """All are of one other name: the folder was renamed. Its own ones come first as soon as there are any."""
    write(tmp_path, "checkpoint_step_5.pth.tar", 5, 1.0)
    newest = write(tmp_path, "checkpoint_step_9.pth.tar", 9, 2.0)
    assert newest_checkpoint(tmp_path, "new_name") == newest and not caplog.text
    own = write(tmp_path, "checkpoint_step_7.pth.tar", 7, 3.0, experiment="new_name")
    assert newest_checkpoint(tmp_path, "new_name") == own
    write(tmp_path, "b.pth.tar", 10, 4.0, experiment="third")
    with pytest.raises(CheckpointError, match="b.pth.tar: belongs to the experiment 'third', not to 'fourth'"):
        newest_checkpoint(tmp_path, "fourth")


def test_a_clock_that_is_behind_loses_nothing(tmp_path):
    """Saved an hour "earlier" than the step before: still the newest, and never pruned for it."""
    for step, saved_at in ((3, 9000.0), (6, 9001.0), (9, 5400.0)):
        write(tmp_path, f"checkpoint_step_{step}.pth.tar", step, saved_at)
    assert newest_checkpoint(tmp_path, "run").name == "checkpoint_step_9.pth.tar"
    prune_checkpoints(tmp_path, 2, "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint_step_{n}.pth.tar" for n in (6, 9)]


def test_spared_checkpoints_stay_and_are_not_counted(tmp_path):
    old = [write(tmp_path, f"checkpoint_step_{i}.pth.tar", i, float(i)) for i in range(3)]
    for i in range(3, 6):
        write(tmp_path, f"checkpoint_step_{i}.pth.tar", i, float(i))
    prune_checkpoints(tmp_path, 1, "run", old)
    assert sorted(tmp_path.iterdir()) == [*old, tmp_path / "checkpoint_step_5.pth.tar"]


def test_pruning_keeps_the_newest_and_the_best(tmp_path, caplog):
    for i in range(4):
        write(tmp_path, f"checkpoint_step_{i}.pth.tar", i, float(i))
    write(tmp_path, "model_best.pth.tar", 0, 0.0)
    (tmp_path / "checkpoint_step_7.pth.tar").write_bytes(b"torn")
    prune_checkpoints(tmp_path, 2, "run")
    kept = {path.name.removesuffix(".pth.tar") for path in tmp_path.iterdir()}
    assert kept == {"checkpoint_step_2", "checkpoint_step_3", "checkpoint_step_7", "model_best"}
    assert "not counted by training.keep_last_k" in caplog.text


def test_a_second_name_and_its_own_life(tmp_path):
    first = write(tmp_path, "first.pth.tar", 3, 1.0)
    second = tmp_path / "second.pth.tar"
    link_checkpoint(first, second)
    write(tmp_path, "first.pth.tar", 4, 2.0)
    assert load_checkpoint(second)["step"] == 3 and load_checkpoint(first)["step"] == 4
    verify_checkpoint(second)


def test_leftovers(tmp_path):
    (tmp_path / "logs").mkdir()
    for name in (".c.pth.tar.1.tmp", "logs/.metrics.jsonl.2.tmp", "logs/metrics.jsonl"):
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": "3"}, "step is '3'; wanted a int"),
        ({"step": -1}, "step is -1; wanted 0 or more"),
        ({"config": []}, "config is a list; wanted a dict"),
        ({"model": {"a": [1]}}, "model holds something other than tensors"),
        ({"ema": {"weights": {"a": 1}}}, "ema.weights holds something other than tensors"),
        ({"cameras": ["image_1", "<script>"]}, "cameras are a list; wanted names such as image_1"),
        ({"base": {"a": 1}}, "base is a dict; it is not of this program"),
        (
            {"tokenizer_files": {"evil.py": torch.zeros(1, dtype=torch.uint8)}},
            "'evil.py' is none that a tokenizer needs",
        ),
        (
            {"backbone_config": {"auto_map": {"AutoConfig": "x.Y"}}},
            "'auto_map', which names code that a library would run",
        ),
        ({"format": "\x1b[2J"}, r"format '\\x1b\[2J'; this version reads"),
    ],
)
def test_contents_are_checked_before_anything_is_built(tmp_path, changes, message):
    path = tmp_path / "c.pth.tar"
    torch.save({**CONTENT, "format": "paligemma-vla/1", **changes}, path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_a_folder_or_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path)


def test_weights_that_are_not_finite():
    check_finite({"a": torch.zeros(2), "b": torch.zeros(0), "c": torch.ones(2, dtype=torch.int64)}, "c.pth.tar")
    for value in (float("nan"), float("inf"), -float("inf")):
        weights = {"a": torch.zeros(2), "b": torch.tensor([0.0, value], dtype=torch.bfloat16)}
        with pytest.raises(CheckpointError, match="c.pth.tar: weight b holds values that are not finite"):
            check_finite(weights, "c.pth.tar")


def test_a_clock_that_is_set_back_makes_no_checkpoint_an_old_one(tmp_path):
    write(tmp_path, "checkpoint_step_4.pth.tar", 4, 4000.0)
    later = write(tmp_path, "checkpoint_epoch_1.pth.tar", 12, 400.0)
    assert newest_checkpoint(tmp_path, "run") == later
    prune_checkpoints(tmp_path, 1, "run")
    assert list(tmp_path.iterdir()) == [later]
