"""Policies of strangers: no code of theirs, no size that their bytes do not bear out, no value that was not trained."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from benchmarks.memory import peak_mb
from inference.policy_files import read_manifest
from inference.predictor import VLAPredictor
from inference.serving.export import export_policy
from inference.serving.model_card import model_card
from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

POLICIES = Path("tests/fixtures/policies")


@pytest.fixture
def content():
    checkpoint = load_checkpoint(POLICIES / "flow.pth.tar", for_inference=True)
    return {key: value for key, value in checkpoint.items() if key != "format"}


@pytest.fixture
def exported(tmp_path):
    return Path(shutil.copytree(POLICIES / "flow_export", tmp_path / "policy"))


def signed(folder, *others):
    """The folder with digests of what is in it now, as an attacker would make them."""
    manifest = json.loads((folder / "policy.json").read_text())
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "policy.json"]
    manifest["sha256"] = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    (folder / "policy.json").write_text(json.dumps(manifest))
    return folder


def file_of(value):
    return torch.frombuffer(bytearray(value), dtype=torch.uint8)


def test_code_beside_a_tokenizer_never_runs(content, exported, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *a: "y")  # what a user may answer to a library's question
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n".encode()
    config = json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}).encode()
    for files in ({"evil.py": code}, {"tokenizer_config.json": config}):
        given = {name: file_of(text) for name, text in files.items()}
        changed = {**content, "tokenizer_files": {**content["tokenizer_files"], **given}}
        save_checkpoint(changed, tmp_path / "c.pth.tar")
        with pytest.raises(CheckpointError, match="evil.py|auto_map"):
            VLAPredictor.from_checkpoint(tmp_path / "c.pth.tar", device="cpu")
    (exported / "tokenizer" / "tokenizer_config.json").write_bytes(config)
    (exported / "tokenizer" / "evil.py").write_bytes(code)
    with pytest.raises(
        CheckpointError, match="tokenizer/evil.py is missing, lies elsewhere, or is no file of a policy"
    ):
        VLAPredictor.from_checkpoint(signed(exported), device="cpu")
    (exported / "tokenizer" / "evil.py").unlink()
    with pytest.raises(CheckpointError, match="'auto_map', which names code that a library would run"):
        VLAPredictor.from_checkpoint(signed(exported), device="cpu")
    assert not (tmp_path / "ran").exists()


def changed_config(content, **head):
    config = json.loads(json.dumps(content["config"]))
    config["model"]["action_head_config"] |= head
    return {**content, "config": config}


@pytest.mark.parametrize(
    "head",
    [
        {"hidden_dim": 400_000, "num_heads": 8},
        {"num_layers": 10**9},
        {"horizon": 10**7, "action_dim": None},
        {"type": "discrete", "num_action_bins": 10**8},
    ],
)
def test_a_model_larger_than_its_weights_is_never_built(content, tmp_path, head):
    save_checkpoint(changed_config(content, **head), tmp_path / "c.pth.tar")
    started, before = time.monotonic(), peak_mb()
    with pytest.raises(
        CheckpointError, match="several times larger than the weights|another architecture|no model can"
    ):
        VLAPredictor.from_checkpoint(tmp_path / "c.pth.tar", device="cpu")
    assert time.monotonic() - started < 10 and peak_mb() - before < 700


def test_backbones_that_are_not_described_as_they_should_be(content, tmp_path):
    for odd in ({}, {"model_type": "../x"}, {**content["backbone_config"], "text_config": {"hidden_size": "a"}}):
        save_checkpoint({**content, "backbone_config": odd}, tmp_path / "c.pth.tar")
        with pytest.raises(CheckpointError, match="no model can be built|another architecture|several times"):
            VLAPredictor.from_checkpoint(tmp_path / "c.pth.tar", device="cpu")


def test_weights_that_are_not_finite_are_refused(content, exported, tmp_path):
    name = next(key for key in content["model"] if key.startswith("action_head"))
    weights = {**content["model"], name: torch.full_like(content["model"][name], float("nan"))}
    changed = {key: value for key, value in content.items() if key != "ema"} | {"model": weights}
    save_checkpoint(changed, tmp_path / "c.pth.tar")
    with pytest.raises(CheckpointError, match=f"weight {name} holds values that are not finite"):
        VLAPredictor.from_checkpoint(tmp_path / "c.pth.tar", device="cpu")
    weights = load_file(exported / "model.safetensors")
    weights[name] = torch.full_like(weights[name], float("inf"))
    save_file(weights, exported / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"weight {name} holds values that are not finite"):
        VLAPredictor.from_checkpoint(signed(exported), device="cpu")


@pytest.mark.parametrize("kind", ["link", "tokenizer", "stray", "deep", "bomb"])
def test_folders_that_point_elsewhere_or_explode(exported, tmp_path, kind):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "tokenizer.json").write_text("{}")
    message = "lies elsewhere"
    if kind == "link":
        (exported / "statistics.json").unlink()
        os.symlink(tmp_path / "secret" / "tokenizer.json", exported / "statistics.json")
    elif kind == "tokenizer":
        shutil.rmtree(exported / "tokenizer")
        os.symlink(tmp_path / "secret", exported / "tokenizer")
        manifest = json.loads((exported / "policy.json").read_text())
        manifest["sha256"] = {k: v for k, v in manifest["sha256"].items() if "tokenizer" not in k}
        manifest["sha256"]["tokenizer/tokenizer.json"] = hashlib.sha256(b"{}").hexdigest()
        (exported / "policy.json").write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match=message):
            read_manifest(exported)
        return
    elif kind == "stray":
        (exported / "setup.py").write_text("x")
        message = "setup.py is missing, lies elsewhere, or is no file of a policy"
    elif kind == "deep":
        (exported / "backbone_config.json").write_text("[" * 100_000)
        message = "not valid JSON"
    else:
        (exported / "config.yaml").write_text("a: &a [x, x]\nb: &b [*a, *b]\n")
        message = "64 deep"
    with pytest.raises(CheckpointError, match=message):
        VLAPredictor.from_checkpoint(signed(exported), device="cpu")


def test_a_snapshot_of_the_hubs_cache_is_links(exported, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0f", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for path in [p for p in exported.rglob("*") if p.is_file()]:
        link = snapshot / path.relative_to(exported)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blobs / hashlib.sha256(str(path).encode()).hexdigest())
        os.symlink(os.path.relpath(blobs / hashlib.sha256(str(path).encode()).hexdigest(), link.parent), link)
    assert read_manifest(snapshot)["format"]


def test_an_export_to_a_full_disk_leaves_nothing(content, tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        with pytest.raises(CheckpointError, match="policy: not written .*; nothing is left of it: make room"):
            export_policy(content, tmp_path / "policy")
        assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_model_card_holds_no_markup_of_others(content, tmp_path):
    evil = "<script>alert(1)</script>[x](javascript:y)"
    config = json.loads(json.dumps(content["config"]))
    config["training"]["experiment_name"] = evil.replace("/", "-").replace(":", "-")
    task = {"successes": 1, "episodes": 2, "wilson_95": [0.1, 0.9]}
    settings = {"env": f"{evil}\n# heading", "control": "policy", "seed": 0}
    (tmp_path / "rollouts.json").write_text(json.dumps({"settings": settings, "tasks": {f"a | b {evil}": task}}))
    card = model_card({**content, "config": config}, [tmp_path / "rollouts.json"])
    assert "<script" not in card and "[x](" not in card and "\n# heading" not in card and "a \\| b" in card
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "robotics"
    (tmp_path / "rollouts.json").write_text(json.dumps({"tasks": {"a": 3}}))
    with pytest.raises(ValueError, match="tasks are not as main_eval.py writes them"):
        model_card(content, [tmp_path / "rollouts.json"])
