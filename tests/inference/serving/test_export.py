"""Exported folders: identical actions, and nothing is loaded that was changed or could run code."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import yaml

from inference.policy_files import read_manifest
from inference.predictor import VLAPredictor
from inference.serving.export import export_policy
from tests.helpers import write_episodes
from tests.inference.checkpoints import train_tiny
from utils.checkpoint import CheckpointError, load_checkpoint

STATE = [0.1, -0.2, 0.3, 0.4]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_paligemma_dir):
    folder = tmp_path_factory.mktemp("run")
    return train_tiny(folder, tiny_paligemma_dir, [write_episodes(folder / "demos.parquet", [6, 5])])


@pytest.fixture
def exported(checkpoint, tmp_path):
    return export_policy(load_checkpoint(checkpoint), tmp_path / "policy")


def actions(predictor):
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    return predictor.predict(image, prompt="open it", state=STATE, seed=5)


def test_identical_actions(checkpoint, exported):
    ours = actions(VLAPredictor.from_checkpoint(checkpoint))
    assert np.array_equal(actions(VLAPredictor.from_pretrained(exported)), ours)
    assert np.array_equal(actions(VLAPredictor.from_checkpoint(exported)), ours), "wherever a checkpoint is taken"


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_adapters_and_quantized_weights_are_exported_with_their_base(tmp_path, tiny_paligemma_dir, quantization):
    demos = write_episodes(tmp_path / "demos.parquet", [6, 5])
    vlm = {"lora": {"rank": 2, "vision": True}, "quantization": quantization}
    adapted = train_tiny(tmp_path, tiny_paligemma_dir, [demos], vlm=vlm)
    exported = export_policy(load_checkpoint(adapted), tmp_path / "policy")
    ours = actions(VLAPredictor.from_checkpoint(adapted))
    assert np.array_equal(actions(VLAPredictor.from_pretrained(exported)), ours)


def test_the_averaged_weights_are_shared(tmp_path, tiny_paligemma_dir):
    demos = write_episodes(tmp_path / "demos.parquet", [6, 5])
    averaged = train_tiny(tmp_path, tiny_paligemma_dir, [demos], steps=3, training={"ema_decay": 0.5})
    exported = export_policy(load_checkpoint(averaged), tmp_path / "policy")
    ours = actions(VLAPredictor.from_checkpoint(averaged))
    assert np.array_equal(actions(VLAPredictor.from_pretrained(exported)), ours)
    raw = load_checkpoint(averaged)
    del raw["ema"]
    other = export_policy(raw, tmp_path / "raw")
    assert not np.array_equal(actions(VLAPredictor.from_pretrained(other)), ours)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.yaml", "statistics.json", "backbone_config.json", "tokenizer/tokenizer.json"]
)
def test_a_changed_file_is_refused(exported, name):
    content = bytearray((exported / name).read_bytes())
    content[-2] ^= 1
    (exported / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: changed since it was exported"):
        VLAPredictor.from_pretrained(exported)


def test_pickles_are_refused_even_when_the_digests_agree(exported):
    (exported / "model.safetensors").write_bytes(pickle.dumps({"a": print}))
    manifest = json.loads((exported / "policy.json").read_text())
    import hashlib

    manifest["sha256"]["model.safetensors"] = hashlib.sha256((exported / "model.safetensors").read_bytes()).hexdigest()
    (exported / "policy.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="can't be read"):
        VLAPredictor.from_pretrained(exported)
    (exported / "extra.pkl").write_bytes(b"")
    with pytest.raises(CheckpointError, match="holds extra.pkl, a kind of file that may run code"):
        VLAPredictor.from_pretrained(exported)


def test_adapters_without_their_base_are_merged_first(checkpoint, tmp_path):
    content = load_checkpoint(checkpoint)
    content["base"] = {"name_or_path": "weight/paligemma", "fingerprint": "0", "included": False}
    with pytest.raises(CheckpointError, match="adapters without the weights of weight/paligemma; merge them first"):
        export_policy(content, tmp_path / "policy")
    assert not (tmp_path / "policy").exists()


def break_manifest(exported, **changes):
    manifest = json.loads((exported / "policy.json").read_text()) | changes
    (exported / "policy.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "policy.json").unlink(), "no policy.json in it"),
        (lambda folder: (folder / "policy.json").write_text("["), "not readable"),
        (lambda folder: break_manifest(folder, format="other"), "not of this program"),
        (lambda folder: (folder / "statistics.json").unlink(), "statistics.json is missing"),
        (lambda folder: break_manifest(folder, sha256={"../x": "0"}), r"\.\./x is missing"),
        (lambda folder: break_manifest(folder, sha256={}), "changed since it was exported"),
        (lambda folder: (folder / "tokenizer" / "added.json").write_text("{}"), "added.json is not listed"),
    ],
)
def test_damaged_folders_are_named(exported, harm, message):
    harm(exported)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(exported)


def test_a_hub_id_that_does_not_exist(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="nobody/nothing: no such folder, nor such a policy on the hub"):
        VLAPredictor.from_pretrained("nobody/nothing")


def test_the_card_carries_the_metrics(checkpoint, tmp_path):
    task = {"successes": 17, "episodes": 20, "wilson_95": [0.64, 0.95]}
    rollouts = {"settings": {"env": "metaworld", "control": "policy", "seed": 10000}, "tasks": {"open": task}}
    (tmp_path / "rollouts.json").write_text(json.dumps(rollouts))
    offline = {"predictors": {"policy": {"overall": {"mse": 0.25, "mae": 0.5}}}}
    (tmp_path / "metrics.json").write_text(json.dumps(offline))
    folder = tmp_path / "policy"
    command = [
        sys.executable,
        "scripts/export_policy.py",
        "--checkpoint_path",
        str(checkpoint),
        "--output_dir",
        str(folder),
    ]
    metrics = [str(tmp_path / name) for name in ("rollouts.json", "metrics.json")]
    subprocess.run([*command, "--metrics", *metrics], check=True, capture_output=True)
    card = (folder / "README.md").read_text()
    assert "| open | 17/20 | 64% to 95% |" in card and "| policy | 0.25 | 0.5 |" in card
    header = yaml.safe_load(card.split("---")[1])
    assert header["pipeline_tag"] == "robotics"
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and "exists and is not an empty folder" in again.stderr
    (tmp_path / "metrics.json").write_text("{}")
    other = subprocess.run(
        [*command[:-1], str(tmp_path / "p2"), "--metrics", metrics[1]], capture_output=True, text=True
    )
    assert other.returncode == 1 and "holds neither 'tasks' nor 'predictors'" in other.stderr


def test_push_dry_run_lists_and_checks(exported):
    command = [
        sys.executable,
        "scripts/push_to_hub.py",
        "--folder",
        str(exported),
        "--repo_id",
        "me/policy",
        "--dry_run",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "model.safetensors" in done.stdout and "would send" in done.stdout and "to me/policy" in done.stdout
    bad = subprocess.run([*command[:4], "--repo_id", "a/b/c", "--dry_run"], capture_output=True, text=True)
    assert bad.returncode == 1 and "error:" in bad.stderr
    (exported / "config.yaml").write_text("x: 1\n")
    changed = subprocess.run(command, capture_output=True, text=True)
    assert changed.returncode == 1 and "changed since it was exported" in changed.stderr
