"""Adapters, quantized weights and freezing of the action expert, on published policies; what cannot be is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from inference.predictor import VLAPredictor
from inference.published import published_checkpoint
from inference.serving.export_published import export_published
from model.adapters import is_adapted
from model.checkpointing import require_same_architecture, state_to_save
from model.transfer import policy_from_parts
from model.vla_model import VLAModel
from scripts.merge_lora import merge_checkpoint
from tests.pi_fixtures import KINDS, arrays, folder, model_batch
from tests.policies import act, merged
from training.fit_estimate import expected_memory
from training.optimizer import what_trains
from utils.checkpoint import CheckpointError, save_checkpoint
from utils.config_utils import Config, ConfigError, config_from_dict, config_to_dict

both = pytest.mark.parametrize("kind", KINDS)
LORA = {"rank": 4, "alpha": 8.0}


def base(kind: str) -> dict[str, Any]:
    return published_checkpoint(
        folder(kind) / "policy",
        tokenizer_name_or_path=str(folder(kind) / "tokenizer"),
        vision_num_attention_heads=2,
    )


def changed(checkpoint: dict[str, Any], vlm: dict[str, Any] | None = None, **expert: Any) -> Config:
    """The checkpoint's config with other settings of backbone and expert."""
    model = {"vlm_config": vlm or {}, "action_head_config": {"expert": expert}}
    return config_from_dict(merged(checkpoint["config"], {"model": model}))


def batch(kind: str) -> dict[str, Any]:
    raw = arrays(kind, "processors")
    return {
        **model_batch(kind),
        "state": raw["raw_state"],
        "action": raw["raw_action"],
        "action_is_pad": torch.zeros(3, 10, dtype=torch.bool),
        "dataset_index": torch.zeros(3, dtype=torch.int64),
    }


def loss_of(policy: VLAModel, kind: str) -> torch.Tensor:
    torch.manual_seed(0)
    return policy(batch(kind)).mean()


def trained(policy: VLAModel, kind: str, steps: int = 3) -> VLAModel:
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(policy.train(), kind).backward()
        optimizer.step()
    return policy.eval()


@both
@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_adapters_train_on_a_frozen_expert(kind: str, quantization: str, tmp_path: Path) -> None:
    checkpoint = base(kind)
    config = changed(checkpoint, {"train_expert_only": True}, lora=LORA, quantization=quantization)
    require_same_architecture(checkpoint["config"], config, "base")
    policy = VLAModel.from_checkpoint(checkpoint, config)
    plain = loss_of(VLAModel.from_checkpoint(checkpoint).train(), kind)
    allowed = {"none": 1e-5, "8bit": 0.05, "4bit": 0.5}[quantization]
    assert abs(loss_of(policy.train(), kind) - plain) <= allowed * plain, "an adapter begins as nothing"

    head = "action_head."
    names = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    adapters = {name for name in names if ".lora_" in name}
    assert all(name.startswith(f"{head}expert.") for name in adapters)
    layers = [name for name, module in policy.action_head.expert.named_modules() if is_adapted(module)]
    assert len(adapters) == 2 * len(layers) and len(layers) == 3 * 7 + (7 if kind == "pi05" else 0)
    assert {name.split(".")[1] for name in names - adapters} == {
        name.split(".")[0] for name, _ in policy.action_head.named_parameters() if not name.startswith("expert.")
    }
    assert "action head in part" in what_trains(policy) and "language model frozen" in what_trains(policy)
    assert expected_memory(policy, config)["gradients"] == 4 * sum(
        dict(policy.named_parameters())[n].numel() for n in names
    )

    before = {name: value.clone() for name, value in policy.state_dict().items()}
    trained(policy, kind)
    moved = {name for name, value in policy.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == names

    content = {**checkpoint, **state_to_save(policy), "config": config_to_dict(config)}
    save_checkpoint(content, tmp_path / "adapters.pth.tar")
    again = torch.load(tmp_path / "adapters.pth.tar", weights_only=True)
    wanted = act(policy, batch(kind), 3)
    assert torch.equal(act(VLAModel.from_checkpoint(again).eval(), batch(kind), 3), wanted)

    with pytest.raises(CheckpointError, match="model.action_head_config.expert.lora .merge it first"):
        export_published(again, tmp_path / "unmerged", "lerobot")
    with pytest.raises(ConfigError, match="expert.lora.*merge_lora.py"):
        require_same_architecture(again["config"], changed(checkpoint), "adapters")
    whole = merge_checkpoint(again, torch.float32)
    assert whole["merged_from"]["expert"]["quantization"] == quantization
    found = act(VLAModel.from_checkpoint(whole).eval(), batch(kind), 3)
    # Layers of 8 bits round what enters them as well.
    torch.testing.assert_close(found, wanted, atol=0.1 if quantization == "8bit" else 1e-4, rtol=1e-3)
    export_published(whole, tmp_path / "merged", "lerobot")


@both
def test_backbone_and_expert_have_settings_of_their_own(kind: str) -> None:
    checkpoint = base(kind)
    backbone = {"rank": 2, "targets": ["q_proj"], "vision": True}
    config = changed(checkpoint, {"lora": backbone, "quantization": "4bit"}, lora={**LORA, "targets": ["k_proj"]})
    policy = trained(VLAModel.from_checkpoint(checkpoint, config), kind)
    ranks = {name: m.lora_A["default"].out_features for name, m in policy.named_modules() if is_adapted(m)}
    assert {rank for name, rank in ranks.items() if name.startswith("backbone")} == {2}
    assert {rank for name, rank in ranks.items() if name.startswith("action_head")} == {4}
    assert {name.rsplit(".")[-1] for name in ranks if name.startswith("action_head")} == {"k_proj"}
    kinds = (
        {type(m).__name__ for m in policy.action_head.modules()},
        {type(m).__name__ for m in policy.backbone.modules()},
    )
    assert "Linear4bit" in kinds[1] and "Linear4bit" not in kinds[0]


@both
def test_the_expert_alone(kind: str) -> None:
    checkpoint = base(kind)
    policy = VLAModel.from_checkpoint(checkpoint, changed(checkpoint, {"train_expert_only": True}))
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    trained(policy, kind, 2)
    moved = {name for name, value in policy.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"action_head.{name}" for name, _ in policy.action_head.named_parameters()}


@both
def test_bfloat16_rounds_no_norm_and_no_projection_of_the_expert(kind: str) -> None:
    """Stored for inference, and frozen under adapters; and the actions stay as near to float32 as LeRobot's."""
    checkpoint = base(kind)
    policy = VLAModel.from_checkpoint(checkpoint, changed(checkpoint, {"dtype": "bfloat16"}, lora=LORA))
    types = {name: parameter.dtype for name, parameter in policy.action_head.named_parameters()}
    rounded = {name for name, dtype in types.items() if dtype == torch.bfloat16}
    assert rounded and all("self_attn" in name or "mlp" in name for name in rounded)
    assert torch.isfinite(loss_of(policy.train(), kind))

    settings = {"tokenizer_name_or_path": str(folder(kind) / "tokenizer"), "vision_num_attention_heads": 2}
    place = folder(kind) / "policy"
    predictor = VLAPredictor.from_pretrained(place, "cpu", use_amp=True, weight_dtype="bfloat16", **settings)
    head = predictor.model.action_head
    types = {name: parameter.dtype for name, parameter in head.named_parameters()}
    assert {name for name, dtype in types.items() if dtype == torch.bfloat16} == {
        name for name in types if name.startswith("expert.") and ("self_attn" in name or ".mlp." in name)
    }
    seen = {**batch(kind), "noise": arrays(kind, "model")["noise"][None]}
    index = seen["dataset_index"]
    actions = predictor.model.normalizer.normalize_action(predictor.model.act(seen, 10)[0], seen["state"], index)
    wanted, theirs = (arrays(kind, name)["sampled_10"][..., :7] for name in ("model", "bfloat16"))
    moves = [0, 2, 3, 4, 5, 6]  # dimension 1 is constant
    error, allowed = ((one - wanted)[..., moves].square().mean().sqrt() for one in (actions, theirs))
    assert error <= allowed


@both
@pytest.mark.parametrize(("mode", "allowed"), [("int8", 0.1), ("int4", 2.0)])
def test_the_expert_is_quantized_for_inference_by_its_own_setting(kind: str, mode: str, allowed: float) -> None:
    settings = {"tokenizer_name_or_path": str(folder(kind) / "tokenizer"), "vision_num_attention_heads": 2}
    load = lambda **more: VLAPredictor.from_pretrained(folder(kind) / "policy", "cpu", **settings, **more)  # noqa: E731
    plain, quantized = load(), load(expert_quantization=mode)
    assert quantized.quantization == f"none, expert {mode}"
    seen = {**batch(kind), "noise": arrays(kind, "model")["noise"][None]}
    actions = [
        one.model.normalizer.normalize_action(one.model.act(seen, 10)[0], seen["state"], seen["dataset_index"])
        for one in (plain, quantized)
    ]
    assert 0 < (actions[0] - actions[1])[..., 2:].abs().max() < allowed
    for (name, one), other in zip(
        plain.model.backbone.named_parameters(), quantized.model.backbone.parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_an_expert_quantized_already_stays_as_it_is(tmp_path: Path) -> None:
    checkpoint = base("pi0")
    config = changed(checkpoint, lora=LORA, quantization="4bit")
    policy = VLAModel.from_checkpoint(checkpoint, config)
    save_checkpoint({**checkpoint, **state_to_save(policy), "config": config_to_dict(config)}, tmp_path / "a.pth.tar")
    with pytest.raises(
        ValueError,
        match="inference.expert_quantization is int8, but the policy was trained with its action expert in 4bit",
    ):
        VLAPredictor.from_checkpoint(tmp_path / "a.pth.tar", "cpu", expert_quantization="int8")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"vlm_config": {"train_expert_only": True, "lora": {}}},
            "train_expert_only freezes the backbone, whose adapters",
        ),
        (
            {"action_head_config": {"expert": {"quantization": "4bit"}}},
            "the expert trains, and quantized weights cannot",
        ),
        (
            {"vlm_config": {"freeze_patch_embedding": True, "train_expert_only": True}},
            "freeze_patch_embedding adds nothing where the vision tower is frozen",
        ),
        (
            {"vlm_config": {"freeze_patch_embedding": True, "lora": {"vision": True}}},
            "freeze_patch_embedding adds nothing where the vision tower is frozen",
        ),
        ({"action_head_config": {"expert": {"lora": {"rank": 0}}}}, "expert.lora.rank is 0; it must be positive"),
        ({"action_head_config": {"expert": {"lora": {"vision": True}}}}, "unknown key .*expert.lora.vision"),
        (
            {"vlm_config": {"train_expert_only": True}, "vision_resampler_config": {"type": "mlp"}},
            "vision_resampler_config.type mlp would train too; set the freeze_",
        ),
    ],
)
def test_contradictions_are_refused(model: dict[str, Any], message: str) -> None:
    model = merged({"action_head_config": {"type": "action_expert"}}, model)
    with pytest.raises(ConfigError, match=message):
        config_from_dict({"model": model})


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("model.vlm_config", "train_expert_only", True),
        ("model.action_head_config", "detach_context", True),
        ("model.action_head_config.expert", "lora", {}),
        ("model.action_head_config.expert", "gradient_checkpointing", True),
        ("inference", "expert_quantization", "int8"),
    ],
)
def test_settings_of_the_expert_without_an_expert_are_refused(section: str, name: str, value: Any) -> None:
    tree: Any = {name: value}
    for part in reversed(section.split(".")):
        tree = {part: tree}
    with pytest.raises(ConfigError, match=f"{section}.{name} is set, but .*type is flow_matching, which has no use"):
        config_from_dict(tree)


def test_targets_that_are_not_there(tmp_path: Path) -> None:
    checkpoint = base("pi0")
    config = changed(checkpoint, lora={"targets": ["q_prj"]})
    with pytest.raises(
        ConfigError, match="expert.lora.targets: no linear layer 'q_prj' in the expert part; did you mea"
    ):
        VLAModel.from_checkpoint(checkpoint, config)


def test_adapters_of_an_expert_that_is_new_are_refused(tiny_paligemma_dir: Path) -> None:
    checkpoint = base("pi0")
    with pytest.raises(ConfigError, match="expert.lora adapts an expert that has learnt already, but this one is new"):
        VLAModel.from_pretrained(changed(checkpoint, lora=LORA), checkpoint["statistics"], (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ConfigError, match="--init_parts auto makes a new one or parts of it; give --init_parts all"):
        policy_from_parts(checkpoint, "base", changed(checkpoint, lora=LORA), checkpoint["statistics"], "auto")
