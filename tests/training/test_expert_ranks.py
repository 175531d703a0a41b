"""The action expert with what other heads have: two ranks of either strategy, averaged weights, checkpointed and
compiled layers, and a run that goes on to the bit."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.policies import make_batch, make_policy, policy_config
from tests.ranks import losses, run_training, validations
from tests.training.test_memory_switches import loss_and_gradients, with_open_gates
from tests.training.test_trainer_ddp import config_path, difference, final, final_path  # noqa: F401
from training.sharding import shard_model
from utils.config_utils import ConfigError

EXPERT = {"width": 16, "mlp_dim": 24, "num_heads": 4, "max_state_dim": 6, "max_action_dim": 6}
SETTINGS = (
    "model.action_head_config.type=action_expert",
    "model.action_head_config.noise_draws_per_sample=2",
    "model.action_head_config.max_clean_prefix=2",
    *(f"model.action_head_config.expert.{name}={value}" for name, value in EXPERT.items()),
    "training.ema_decay=0.9",
)
ADAPTIVE = ("model.action_head_config.expert.time=adaptive_norm",)
CHECKPOINTED = (
    "model.vlm_config.gradient_checkpointing=true",
    "model.action_head_config.expert.gradient_checkpointing=true",
)
shapes = pytest.mark.parametrize("shape", [(), ADAPTIVE], ids=["token", "adaptive"])


@pytest.mark.slow
@shapes
@pytest.mark.parametrize("ranks", [0, 2])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_goes_on_to_the_bit(config_path, shape, ranks, strategy):  # noqa: F811
    """8 steps = 3 + resume + 5: weights, their average, moments, losses and validations."""
    if ranks == 0 and strategy == "fsdp":
        pytest.skip("one process has nothing to shard over")
    settings = (*SETTINGS, *shape, f"training.strategy={strategy}")
    whole = run_training(config_path, "whole", 8, *settings, ranks=ranks)
    run = run_training(config_path, "run", 3, *settings, ranks=ranks)
    run_training(config_path, "run", 8, *settings, ranks=ranks, resume=final_path(run))
    a, b = final(whole), final(run)
    assert a["step"] == b["step"] == 8 and difference(a, b) == 0 and losses(whole) == losses(run)
    assert all(torch.equal(value, b["ema"]["weights"][name]) for name, value in a["ema"]["weights"].items())
    for index, values in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][index][key]) for key, value in values.items())


@pytest.mark.slow
@shapes
def test_sharded_and_checkpointed_layers_train_alike(config_path, shape):  # noqa: F811
    ddp = run_training(config_path, "ddp", 5, *SETTINGS, *shape, ranks=2)
    fsdp = run_training(config_path, "fsdp", 5, *SETTINGS, *shape, "training.strategy=fsdp", ranks=2)
    less = run_training(config_path, "less", 5, *SETTINGS, *shape, *CHECKPOINTED, "training.strategy=fsdp", ranks=2)
    for other in (fsdp, less):
        assert difference(final(ddp), final(other)) < 1e-5
        for a, b in zip(losses(ddp) + validations(ddp), losses(other) + validations(other), strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def head_of(time: str) -> dict:
    return {"type": "action_expert", "expert": {**EXPERT, "time": time}}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile makes C++ on a CPU")
@pytest.mark.parametrize("time", ["token", "adaptive_norm"])
def test_compiled_layers_compute_the_same(tmp_path, tiny_paligemma_dir, time):
    torch._dynamo.reset()
    config = policy_config(tiny_paligemma_dir, tmp_path, model={"action_head_config": head_of(time)})
    policy = with_open_gates(make_policy(config))
    expected = [g.clone() for g in loss_and_gradients(policy, make_batch())[1]]
    assert policy.compile_layers("default") == 6  # two each of vision tower, language model and expert
    found = loss_and_gradients(policy, make_batch())[1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


def test_quantized_experts_are_not_sharded(tmp_path):
    expert = {**EXPERT, "lora": {"rank": 2}, "quantization": "4bit"}
    config = policy_config(
        tmp_path, tmp_path, model={"action_head_config": {"type": "action_expert", "expert": expert}}
    )
    with pytest.raises(
        ConfigError, match="fsdp and model.action_head_config.expert.quantization 4bit, which it cannot"
    ):
        shard_model(None, config, torch.device("cpu"), 2)
