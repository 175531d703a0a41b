"""diagnose_weights.py: faults that it must find, and none where there are none."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

import diagnose_weights
from model.checkpointing import state_to_save
from tests.policies import checkpoint_of, make_batch, make_policy, policy_config
from utils.checkpoint import CheckpointError, save_checkpoint
from utils.config_utils import ConfigError


@pytest.fixture
def save(tmp_path, tiny_paligemma_dir):
    """A checkpoint after a few updates, spoiled on request."""

    def checkpoint(name: str = "c", spoil=lambda policy: None, steps: int = 3, **vlm) -> str:
        config = policy_config(tiny_paligemma_dir, tmp_path, model={"vlm_config": vlm})
        policy = make_policy(config)
        optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(steps):
            policy(make_batch()).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            spoil(policy)
        path = tmp_path / f"{name}.pth.tar"
        save_checkpoint({**checkpoint_of(policy, config), **state_to_save(policy)}, path)
        return str(path)

    return checkpoint


def diagnose(tmp_path, *arguments: str) -> tuple[int, dict]:
    code = diagnose_weights.main([*arguments, "--json", str(tmp_path / "r.json")])
    return code, json.loads((tmp_path / "r.json").read_text())


def test_a_healthy_run(save, tmp_path, capsys, tiny_paligemma_dir):
    code, report = diagnose(tmp_path, "--checkpoint_path", save(freeze_vision_tower=True))
    assert code == 0 and report["faults"] == [] and report["base"] == str(tiny_paligemma_dir)
    rows = {row["module"]: row for row in report["modules"]}
    assert rows["vision tower 0"]["train"] == 0 and rows["vision tower 0"]["change"] == 0
    assert rows["language model 1"]["train"] == rows["language model 1"]["values"]
    assert 0 < rows["language model 1"]["change"] < 0.1 and rows["language model 1"]["unchanged"] < 0.5
    assert rows["action head"]["change"] is None, "a fresh head has no base"
    assert {(row["component"], row["state"]) for row in report["dtypes"]} >= {
        ("vision tower", "frozen"),
        ("language model", "trains"),
    }
    output = capsys.readouterr().out
    assert "0 findings" in output and "adapters\nnone" in output
    with Image.open(tmp_path / "c_weights.png") as image:
        assert image.width > 800 and image.height > 400


def test_nan_dead_and_untouched_weights(save, tmp_path, capsys):
    def spoil(policy):
        language = policy.backbone.backbone.language_model
        language.layers[0].mlp.up_proj.weight[0, :3] = float("nan")
        language.layers[1].mlp.up_proj.weight.zero_()
        policy.action_head.action_in.weight[0, 0] = float("inf")

    def untouched(policy):
        policy.backbone.backbone.vision_tower.requires_grad_(False)

    code, report = diagnose(tmp_path, "--checkpoint_path", save(spoil=spoil))
    assert code == 1
    text = "\n".join(report["faults"])
    assert "layers.0.mlp.up_proj.weight: 3 of" in text and "action_in.weight: 1 of" in text
    assert "layers.1.mlp.up_proj.weight: dead: it trains, and every value is 0" in text
    assert "NaN or infinite" in capsys.readouterr().out

    code, report = diagnose(tmp_path, "--checkpoint_path", save("still", steps=0))
    assert code == 0
    assert any("q_proj.weight: untouched: it trains, and equals the base" in fault for fault in report["faults"])


def test_against_another_checkpoint(save, tmp_path):
    first, second = save("first", steps=2), save("second", steps=4)
    _, report = diagnose(tmp_path, "--checkpoint_path", second, "--base", first)
    rows = {row["module"]: row for row in report["modules"]}
    assert report["base"] == first and rows["action head"]["change"] > 0
    _, report = diagnose(tmp_path, "--checkpoint_path", first, "--base", first)
    assert all(row["change"] in (0, None) for row in report["modules"])


@pytest.mark.parametrize("quantization", ["none", "4bit"])
def test_adapters(save, tmp_path, quantization):
    vlm = {"lora": {"rank": 4, "alpha": 8}, "quantization": quantization}
    _, report = diagnose(tmp_path, "--checkpoint_path", save(**vlm))
    assert not any("differs from the base" in fault for fault in report["faults"])
    rows = {row["layers"]: row for row in report["adapters"]}
    assert rows["q_proj"] == {
        "layers": "q_proj",
        "count": 2,
        "rank": 4,
        "scale": 2.0,
        "update_rms": pytest.approx(rows["q_proj"]["update_rms"]),
    }
    assert rows["q_proj"]["update_rms"] > 0
    _, report = diagnose(tmp_path, "--checkpoint_path", save("idle", steps=0, **vlm))
    assert any("untouched: its adapter's B is 0 (14 such adapters)" in fault for fault in report["faults"])


def test_a_frozen_part_that_is_not_the_base(save, tmp_path):
    def spoil(policy):
        policy.backbone.backbone.vision_tower.post_layernorm.weight[:4] += 1

    path = save(spoil=spoil, freeze_vision_tower=True)
    _, report = diagnose(tmp_path, "--checkpoint_path", path)
    assert any("frozen, but 12.5% of it differs from the base" in fault for fault in report["faults"])


def test_refusals_and_a_missing_base(save, tmp_path):
    path = save()
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        diagnose_weights.main(["--checkpoint_path", "/nothing"])
    with pytest.raises(ConfigError, match="/nothing"):
        diagnose_weights.main(["--checkpoint_path", path, "--base", "/nothing"])
