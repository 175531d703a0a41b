"""From one robot to another: the backbone always, of the action head what fits, and the log says which."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.checkpointing import state_to_save
from model.transfer import policy_from_parts
from tests.policies import make_policy, policy_config
from utils.config_utils import Config, ConfigError, config_to_dict


def checkpoint_of(config: Config) -> dict[str, Any]:
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return {"config": config_to_dict(config), "image_processor": processor, **state_to_save(make_policy(config))}


def statistics_for(config: Config) -> list[dict[str, Any]]:
    values = {"min": -2.0, "max": 2.0, "mean": 0.0, "std": 1.0, "q01": -1.9, "q99": 1.9}
    widths = {"state": config.data.state_dim, "action": config.model.action_head_config.per_action_dim}
    return [{column: {name: [v] * width for name, v in values.items()} for column, width in widths.items()}]


def head(**changes: Any) -> dict[str, Any]:
    return {"model": {"action_head_config": changes}}


@pytest.fixture
def make(tmp_path, tiny_paligemma_dir):
    return lambda **changes: policy_config(tiny_paligemma_dir, tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "widened", "new"),
    [
        (head(per_action_dim=7), ["action_in.weight (32, 4) -> (32, 7)", "action_out.weight (4, 32) -> (7, 32)"], []),
        (head(per_action_dim=3), [], ["action_in.weight", "action_out.weight"]),
        ({"data": {"state_dim": 9}}, ["state", "(32, 4) -> (32, 9)"], []),
        (head(horizon=8), ["position (4, 32) -> (8, 32)"], []),
        ({"model": {"vlm_config": {"use_aux_camera": True}}}, [], []),
        ({"data": {"action_mode": "delta"}}, [], []),
        ({"data": {"normalization_type": "quantile"}}, [], []),
    ],
)
def test_another_robot(make, caplog, changes, widened, new):
    before, config = make(), make(**changes)
    checkpoint = checkpoint_of(before)
    torch.manual_seed(1)
    with caplog.at_level("INFO"):
        policy = policy_from_parts(checkpoint, "c.pth.tar", config, statistics_for(config), "auto")
    assert policy.cameras == config.cameras and policy.statistics == statistics_for(config)
    told = caplog.text
    assert "from c.pth.tar (--init_parts auto): taken: the backbone" in told
    assert all(part in told.partition("widened: ")[2].partition("; new: ")[0] for part in widened)
    assert all(part in told.partition("; new: ")[2] for part in new)
    assert ("widened" in told) == bool(widened) and ("; new: " in told) == bool(new)
    for name, value in policy.named_parameters():
        there = checkpoint["model"].get(name)
        if there is not None and there.shape == value.shape:
            assert torch.equal(value, there), name
        elif any(name.endswith(part.split()[0]) for part in widened if "." in part or part.startswith("position")):
            assert torch.equal(value[tuple(map(slice, there.shape))], there), name


def test_the_backbone_alone(make, caplog):
    """For another head; the weights of a backbone that is adapted are taken with their adapters."""
    before = make(model={"vlm_config": {"lora": {"rank": 2}}})
    config = make(model={"vlm_config": {"lora": {"rank": 2}}, "action_head_config": {"type": "regression"}})
    checkpoint = checkpoint_of(before)
    with caplog.at_level("INFO"):
        policy = policy_from_parts(checkpoint, "c.pth.tar", config, statistics_for(config), "backbone")
    assert "; new: the action head" in caplog.text
    for name, value in policy.backbone.state_dict().items():
        assert torch.equal(value, checkpoint["model"][f"backbone.{name}"]), name
    trains = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert any(name.startswith("action_head.") for name in trains) and any(".lora_A." in name for name in trains)


def test_buffers_are_those_of_the_new_statistics(make):
    """A discrete head's bins cover the new robot's range."""
    before = make(**head(type="discrete"))
    config = make(**head(type="discrete"), data={"action_bounds": [-3.0, 3.0]})
    policy = policy_from_parts(checkpoint_of(before), "c", config, statistics_for(config), "auto")
    fresh = make_policy(config)
    for name, value in policy.action_head.named_buffers():
        assert torch.equal(value, dict(fresh.action_head.named_buffers())[name]), name


def test_another_camera_of_a_fused_backbone(tmp_path, tiny_siglip_llm_dir):
    names = {
        f"{part}_model_name_or_path": str(tiny_siglip_llm_dir / kind)
        for part, kind in (("vision", "siglip"), ("language", "qwen2"))
    }
    fusion = {"hidden_dim": 32, "num_latents": 4, "num_layers": 1, "num_heads": 2}
    vlm = {"type": "siglip_llm", "fusion": fusion, **names}
    before = policy_config(tiny_siglip_llm_dir, tmp_path, model={"vlm_config": vlm})
    config = policy_config(tiny_siglip_llm_dir, tmp_path, model={"vlm_config": {**vlm, "use_aux_camera": True}})
    checkpoint = checkpoint_of(before)
    policy = policy_from_parts(checkpoint, "c", config, statistics_for(config), "auto")
    marks_VD = policy.backbone.fusion.camera_VD
    assert marks_VD.shape[0] == 2 and torch.equal(marks_VD[:1], checkpoint["model"]["backbone.fusion.camera_VD"])


def test_without_parts_the_refusal_names_them(make):
    before, config = make(), make(**head(per_action_dim=7))
    with pytest.raises(ConfigError, match=r"per_action_dim: checkpoint 4, config 7.* take what fits with --init_parts"):
        policy_from_parts(checkpoint_of(before), "c", config, statistics_for(config), "all")
    other = make(model={"vlm_config": {"num_language_layers": 1}})
    with pytest.raises(ConfigError, match="num_language_layers: checkpoint None, config 1; make them agree$"):
        policy_from_parts(checkpoint_of(before), "c", other, statistics_for(other), "auto")
