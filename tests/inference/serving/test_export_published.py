"""Policies handed back to LeRobot and openpi: what went in comes out, and what cannot be said there is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from inference.published import published_checkpoint
from inference.serving.export_published import export_published
from scripts import export_policy, import_policy
from tests.pi_fixtures import KINDS, folder
from utils.checkpoint import CheckpointError, load_checkpoint

both = pytest.mark.parametrize("kind", KINDS)
EXPERT_TABLE = "paligemma_with_expert.gemma_expert.lm_head.weight"


def checkpoint_of(kind: str, part: str = "policy") -> dict[str, Any]:
    settings = {"tokenizer_name_or_path": str(folder(kind) / "tokenizer"), "vision_num_attention_heads": 2}
    return published_checkpoint(folder(kind) / part, **settings)


@both
def test_lerobots_folder_comes_back(kind: str, tmp_path: Path) -> None:
    out = export_published(checkpoint_of(kind), tmp_path / "out", "lerobot")
    originals = sorted(path for path in (folder(kind) / "policy").iterdir())
    assert [path.name for path in sorted(out.iterdir())] == [path.name for path in originals]
    for path in originals:
        if path.suffix == ".json":
            assert json.loads((out / path.name).read_text()) == json.loads(path.read_text()), path.name
            continue
        wanted, found = load_file(path), load_file(out / path.name)
        assert wanted.keys() == found.keys()
        for name, value in wanted.items():
            if name != f"model.{EXPERT_TABLE}":  # which nothing reads
                assert value.dtype == found[name].dtype and torch.equal(value, found[name]), name


@both
def test_openpis_folder_comes_back(kind: str, tmp_path: Path) -> None:
    out, original = export_published(checkpoint_of(kind, "openpi"), tmp_path / "out", "openpi"), folder(kind) / "openpi"
    assert json.loads((out / "config.json").read_text()) == json.loads((original / "config.json").read_text())
    wanted, found = load_file(original / "model.safetensors"), load_file(out / "model.safetensors")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items() if name != EXPERT_TABLE)
    with safe_open(original / "model.safetensors", "pt") as a, safe_open(out / "model.safetensors", "pt") as b:
        assert a.metadata() == b.metadata()
    stats = json.loads((out / "assets/policy/norm_stats.json").read_text())
    assert stats == json.loads((original / "assets/tiny/norm_stats.json").read_text())


@both
def test_the_scripts_do_both(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    checkpoint = tmp_path / "base.pth.tar"
    arguments = ["--policy_dir", folder(kind) / "policy", "--output", checkpoint, "--variant", kind]
    arguments += ["--tokenizer_name_or_path", folder(kind) / "tokenizer", "--vision_num_attention_heads", 2]
    monkeypatch.setattr("sys.argv", ["import_policy.py", *map(str, arguments)])
    import_policy.main()
    assert f"prompts of {kind}" in capsys.readouterr().out
    assert load_checkpoint(checkpoint)["cameras"][0] == "base_0_rgb"
    for layout in ("lerobot", "openpi"):
        out = tmp_path / layout
        arguments = ["--checkpoint_path", checkpoint, "--output_dir", out, "--format", layout]
        monkeypatch.setattr("sys.argv", ["export_policy.py", *map(str, arguments)])
        export_policy.main()
        assert "model.safetensors" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*["export_policy.py", *map(str, arguments)], "--metrics", "x.json"])
    with pytest.raises(SystemExit):
        export_policy.main()
    assert "--metrics go into the model card of --format policy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "change", "setting"),
    [
        ("data", {"image_fit": "stretch"}, "data.image_fit stretch"),
        ("data", {"normalization_arithmetic": "own", "normalization_eps": None}, "data.normalization_arithmetic own"),
        ("data", {"prompt_format": "paligemma"}, "data.prompt_format paligemma"),
        ("data", {"max_seq_len": 2}, "data.max_seq_len 2"),
    ],
)
def test_what_the_libraries_do_not_know_is_refused(
    section: str, change: dict[str, Any], setting: str, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of("pi0")
    checkpoint["config"][section] |= change
    with pytest.raises(CheckpointError, match=re.escape(f"this policy has {setting}, with which pi0 acts otherwise")):
        export_published(checkpoint, tmp_path / "out", "lerobot")
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="exists; give a new folder"):
        export_published(checkpoint, tmp_path / "there", "lerobot")
