"""Checkpoint files: whole or not at all, and never a pickle executed."""

from __future__ import annotations

import pickle

import pytest
import torch

from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

CONTENT = {
    "step": 3,
    "config": {"data": {"state_dim": 4}},
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
