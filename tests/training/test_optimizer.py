"""Which parameters share a learning rate, which decay, and what moves them."""

from __future__ import annotations

import copy
import sys

import pytest
import torch

from tests.policies import make_batch, make_policy, policy_config
from training.optimizer import build_optimizer, undecayed_parameters, what_trains
from utils.config_utils import ConfigError


@pytest.fixture
def make(tmp_path, tiny_paligemma_dir):
    def policy_and_config(**changes):
        config = policy_config(tiny_paligemma_dir, tmp_path, **changes)
        return make_policy(config), config

    return policy_and_config


def names_of(policy, parameters) -> set[str]:
    wanted = {id(parameter) for parameter in parameters}
    return {name for name, parameter in policy.named_parameters() if id(parameter) in wanted}


def test_without_own_rates_there_are_two_groups(make):
    policy, config = make()
    decayed, plain = build_optimizer(policy, config.optimizer).param_groups
    assert plain["weight_decay"] == 0 and decayed["weight_decay"] == 0.01
    assert decayed["lr_scale"] == plain["lr_scale"] == 1.0
    assert len(decayed["params"]) + len(plain["params"]) == len(list(policy.parameters()))


def test_no_decay_on_norms_and_biases(make):
    policy, config = make()
    _, plain = build_optimizer(policy, config.optimizer).param_groups
    names = names_of(policy, plain["params"])
    assert "backbone.backbone.language_model.layers.0.input_layernorm.weight" in names
    assert any("post_layernorm.weight" in name for name in names)
    assert "action_head.action_in.bias" in names
    assert "action_head.action_in.weight" not in names
    assert "backbone.backbone.language_model.embed_tokens.weight" not in names

    class Scale(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2, 3))

    class OddNorm(Scale):
        pass

    module = torch.nn.ModuleDict({"norm": OddNorm(), "scale": Scale(), "torch": torch.nn.LayerNorm((2, 3))})
    assert undecayed_parameters(module) == {"norm.weight", "torch.weight", "torch.bias"}, "by type, not by rank alone"


def test_groups_have_their_own_rates(make):
    policy, config = make(optimizer={"lr": 1e-3, "vision_lr": 1e-5, "language_lr": 1e-4})
    groups = build_optimizer(policy, config.optimizer).param_groups
    found = {(group["lr_scale"], group["weight_decay"]): names_of(policy, group["params"]) for group in groups}
    assert {round(scale, 6) for scale, _ in found} == {1.0, 0.1, 0.01} and len(found) == 6
    everything = set().union(*found.values())
    assert everything == {name for name, _ in policy.named_parameters()}
    for (scale, _), names in found.items():
        parts = {".".join(name.split(".")[:3]) if name.startswith("backbone.") else "head" for name in names}
        wanted = {
            1.0: {"head"},
            0.1: {"backbone.backbone.language_model"},
            0.01: {"backbone.backbone.vision_tower", "backbone.backbone.multi_modal_projector"},
        }
        assert parts <= wanted[round(scale, 6)], (scale, parts)


def test_frozen_parts_are_left_out_and_nothing_to_train_is_refused(make):
    policy, config = make(model={"vlm_config": {"freeze_language_model": True}})
    names = names_of(
        policy, [p for group in build_optimizer(policy, config.optimizer).param_groups for p in group["params"]]
    )
    assert names and not any("language_model" in name for name in names)
    policy.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing trains: every parameter is frozen"):
        build_optimizer(policy, config.optimizer)


def test_sgd(make):
    policy, config = make(optimizer={"type": "SGD"})
    assert isinstance(build_optimizer(policy, config.optimizer), torch.optim.SGD)


def steps(policy, optimizer, count: int) -> list[float]:
    losses = []
    for step in range(count):
        torch.manual_seed(step)
        loss = policy(make_batch()).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_eight_bit_adam_follows_adam_and_keeps_bytes(make):
    pytest.importorskip("bitsandbytes")
    policy, config = make(optimizer={"type": "AdamW8bit"})
    reference = copy.deepcopy(policy)
    optimizer = build_optimizer(policy, config.optimizer)
    losses = steps(policy, optimizer, 8)
    _, plain_config = make()
    wanted = steps(reference, build_optimizer(reference, plain_config.optimizer), 8)
    assert losses == pytest.approx(wanted, rel=0.05)
    large = policy.backbone.backbone.language_model.embed_tokens.weight
    assert optimizer.state[large]["state1"].dtype == torch.uint8
    small = policy.action_head.action_in.bias
    assert optimizer.state[small]["state1"].dtype == torch.float32


def test_eight_bit_state_resumes_bitwise(make):
    pytest.importorskip("bitsandbytes")
    policy, config = make(optimizer={"type": "AdamW8bit"})
    optimizer = build_optimizer(policy, config.optimizer)
    steps(policy, optimizer, 3)
    saved, twin = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(policy)
    resumed = build_optimizer(twin, config.optimizer)
    resumed.load_state_dict(saved)
    assert steps(policy, optimizer, 3) == steps(twin, resumed, 3)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), twin.parameters(), strict=True))


def test_eight_bit_adam_where_it_cannot_run(make, monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    policy, config = make(optimizer={"type": "AdamW8bit"})
    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    with pytest.raises(ConfigError, match=r"AdamW8bit, but bitsandbytes .* has no optimizer for device cpu \(it has"):
        build_optimizer(policy, config.optimizer)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="AdamW8bit needs the bitsandbytes package: pip install bitsandbytes"):
        build_optimizer(policy, config.optimizer)


def test_rates_must_be_positive(make):
    with pytest.raises(ConfigError, match=r"optimizer\.vision_lr is 0\.0; it must be positive"):
        make(optimizer={"vision_lr": 0.0})


def test_float32_masters_move_where_bfloat16_masters_would_not(make):
    """At lr 1e-5 an update of a weight near 1 is far below bfloat16's spacing there (2^-8), and rounds to nothing."""
    policy, config = make(optimizer={"lr": 1e-5, "weight_decay": 0.0}, model={"vlm_config": {"dtype": "bfloat16"}})
    torch.nn.init.normal_(policy.action_head.action_out.weight, std=0.1)  # zero gates pass no gradient to the backbone
    torch.nn.init.normal_(policy.action_head.blocks[0].modulation.weight, std=0.1)
    norms = [p for name, p in policy.named_parameters() if "vision_tower" in name and "norm" in name and (p == 1).all()]
    masters = [norm.detach().bfloat16().requires_grad_() for norm in norms]
    optimizer = build_optimizer(policy, config.optimizer)
    rounding = torch.optim.AdamW(masters, lr=1e-5, betas=config.optimizer.betas, weight_decay=0.0)
    for step in range(10):
        torch.manual_seed(step)
        policy(make_batch()).mean().backward()
        for norm, master in zip(norms, masters, strict=True):
            master.grad = norm.grad.bfloat16()
        for one in (optimizer, rounding):
            one.step()
            one.zero_grad()
    assert norms and all(norm.dtype == torch.float32 for norm in norms)
    assert all((norm != 1).all() for norm in norms) and all((master == 1).all() for master in masters)


@pytest.mark.parametrize(
    ("vlm", "told"),
    [
        ({}, "vision tower whole, projector whole, language model whole, action head whole"),
        (
            {"lora": {"rank": 2}},
            "vision tower whole, projector whole, language model adapters alone, action head whole",
        ),
        (
            {"lora": {"rank": 2, "vision": True}, "freeze_projector": True},
            "vision tower adapters alone, projector frozen, language model adapters alone, action head whole",
        ),
        (
            {"freeze_patch_embedding": True},
            "vision tower in part, projector whole, language model whole, action head whole",
        ),
        (
            {"freeze_vision_tower": True, "freeze_language_model": True},
            "vision tower frozen, projector whole, language model frozen, action head whole",
        ),
    ],
)
def test_what_trains_is_told_and_true(make, vlm, told):
    policy, _ = make(model={"vlm_config": vlm})
    assert what_trains(policy) == told


def test_a_run_that_began_with_another_implementation_keeps_it(make):
    """Fused AdamW rounds otherwise: a checkpoint of an earlier version goes on to every digit as it would have."""
    policy, config = make()
    optimizer = build_optimizer(policy, config.optimizer)
    assert all(group["fused"] for group in optimizer.param_groups)
    earlier = torch.optim.AdamW([{**group, "fused": False} for group in optimizer.param_groups])
    optimizer.load_state_dict(earlier.state_dict())
    assert not any(group["fused"] for group in optimizer.param_groups)
