"""Expected memory: counts that must be exact, and the activation formula against what autograd keeps."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model.tiny.paligemma import make_tiny_paligemma
from model.tiny.siglip_llm import make_tiny_siglip_llm
from model.vla_model import VLAModel
from scripts import estimate_memory
from tests.policies import make_batch, make_policy, policy_config
from training.fit_estimate import (
    GB,
    activation_bytes,
    estimate_report,
    expected_memory,
    meta_policy,
    tokens_per_sample,
)
from training.optimizer import build_optimizer
from utils.batch import Batch
from utils.config_utils import load_config

SHAPE = {"model.vlm_config.model_name_or_path": "configs/paligemma-3b-pt-224"}


def kept_bytes(policy: VLAModel, batch: Batch) -> int:
    """Bytes that autograd saves in a forward pass, parameters and buffers apart, each storage once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*policy.parameters(), *policy.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        policy(batch)
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in own)


@pytest.mark.parametrize(
    "vlm",
    [
        {},
        {"dtype": "bfloat16"},
        {"freeze_vision_tower": True},
        {"dtype": "bfloat16", "freeze_language_model": True},
        {"dtype": "bfloat16", "lora": {"rank": 4}, "freeze_vision_tower": True},
        {"dtype": "bfloat16", "lora": {"rank": 4, "vision": True}},
        {"dtype": "bfloat16", "lora": {"rank": 4, "vision": True}, "quantization": "4bit"},
    ],
    ids=str,
)
def test_activations_are_what_autograd_keeps(tmp_path, vlm):
    make_tiny_paligemma(
        tmp_path, ["a b"], image_size=32, patch_size=4, vision_width=64, text_width=64, text_layers=3, vocab_size=512
    )
    config = policy_config(tmp_path, tmp_path, model={"vlm_config": vlm}, data={"prompt_max_len": 6, "batch_size": 8})
    policy = make_policy(config).train()
    expected = sum(activation_bytes(policy, config, 8).values())
    memory = expected_memory(policy, config)
    expected += memory.get("16-bit copies of trained matrices (autocast)", 0)
    assert kept_bytes(policy, make_batch(8)) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("time", ["token", "adaptive_norm"])
def test_an_action_expert_keeps_what_autograd_keeps(tmp_path, time, dtype):
    """A policy like pi0 or pi0.5: vision and everything that adapts to time compute in float32, and are not copied."""
    make_tiny_paligemma(
        tmp_path, ["a b"], image_size=32, patch_size=4, vision_width=64, text_width=64, text_layers=3, vocab_size=512
    )
    expert = {"width": 64, "mlp_dim": 128, "num_heads": 4, "time": time, "state_token": time == "token"}
    model = {
        "vlm_config": {"dtype": dtype, "vision_dtype": "float32"},
        "action_head_config": {"type": "action_expert", "horizon": 16, "expert": expert},
    }
    data = {"prompt_max_len": 6, "batch_size": 8, "prompt_format": "pi0" if time == "token" else "pi05"}
    config = policy_config(tmp_path, tmp_path, model=model, data=data)
    policy = make_policy(config).train()
    memory = expected_memory(policy, config)
    assert all(size > 0 for size in memory.values()), memory
    assert memory == expected_memory(meta_policy(config), config)
    expected = sum(activation_bytes(policy, config, 8).values())
    expected += memory.get("16-bit copies of trained matrices (autocast)", 0)
    batch = make_batch(8) | {"action": torch.rand(8, 16, 4), "action_is_pad": torch.zeros(8, 16, dtype=torch.bool)}
    assert kept_bytes(policy, batch) == pytest.approx(expected, rel=0.15)


HEADS = {
    "flow_matching": {"noise_draws_per_sample": 3},
    "regression": {},
    "discrete": {"mlp_hidden_dims": [256, 64]},
    "diffusion": {"unet_width": 32, "noise_draws_per_sample": 2, "dropout_prob": 0.1},
    "diffusion transformer": {"denoiser": "transformer", "use_state_input": False},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", HEADS)
def test_heads_keep_what_autograd_keeps_of_them(tmp_path, tiny_paligemma_dir, name, dtype):
    """Everything before the head is frozen but the projector, and the head is large: what is kept is its own."""
    head = {"type": name.split()[0], "horizon": 16, "hidden_dim": 128, "num_layers": 3, **HEADS[name]}
    frozen = {"freeze_vision_tower": True, "freeze_language_model": True, "dtype": dtype}
    model = {"vlm_config": frozen, "action_head_config": head}
    config = policy_config(tiny_paligemma_dir, tmp_path, model=model, data={"prompt_max_len": 6, "batch_size": 64})
    policy = make_policy(config).train()
    context = policy.encode(make_batch(64))
    leaf = dataclasses.replace(context, tokens_BLE=context.tokens_BLE.detach().float().requires_grad_())
    kept, own = {}, {tensor.untyped_storage().data_ptr() for tensor in policy.action_head.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), policy.autocast():
        policy.action_head.loss(leaf, torch.rand(64, 16, 4), torch.zeros(64, 16, dtype=torch.bool))
    size = sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in own)
    copies = {"float32": 0, "bfloat16": 2}[dtype] * sum(
        p.numel() for p in policy.action_head.parameters() if p.ndim > 1
    )
    for planned in (policy, meta_policy(config)):
        estimate = activation_bytes(planned, config, 64)["activations, action head"]
        assert size - copies == pytest.approx(estimate, rel=0.05)


def test_checkpointing_keeps_one_tensor_a_layer(tmp_path):
    kept, expected = [], []
    for layers in (2, 6):
        directory = tmp_path / str(layers)
        make_tiny_paligemma(directory, ["a b"], image_size=32, patch_size=4, text_layers=layers)
        vlm = {"gradient_checkpointing": True}
        config = policy_config(directory, tmp_path, model={"vlm_config": vlm}, data={"prompt_max_len": 6})
        policy = make_policy(config).train()
        kept.append(kept_bytes(policy, make_batch(4)))
        expected.append(activation_bytes(policy, config, 4)["activations, language model"])
    assert kept[1] - kept[0] == expected[1] - expected[0] == 4 * 4 * 96 * 4 * (64 + 6)


def test_weights_gradients_and_moments_are_counted_exactly(tmp_path, tiny_paligemma_dir):
    for changes in ({}, {"type": "AdamW8bit"}, {"type": "SGD"}):
        config = policy_config(tiny_paligemma_dir, tmp_path, optimizer=changes)
        policy = make_policy(config)
        torch.manual_seed(0)
        policy(make_batch()).mean().backward()
        optimizer = build_optimizer(policy, config.optimizer)
        optimizer.step()
        memory = expected_memory(policy, config)
        assert "averaged weights" not in memory
        assert memory["weights"] == sum(p.numel() * p.element_size() for p in policy.parameters())
        assert memory["gradients"] == sum(p.grad.numel() * 4 for p in policy.parameters() if p.grad is not None)
        states = (value for state in optimizer.state.values() for key, value in state.items() if "qmap" not in key)
        moments = sum(value.numel() * value.element_size() for value in states if torch.is_tensor(value) and value.ndim)
        assert memory[f"optimizer ({config.optimizer.type})"] == pytest.approx(moments, rel=0.005)


def test_averaged_weights(tmp_path, tiny_paligemma_dir):
    config = policy_config(tiny_paligemma_dir, tmp_path, training={"ema_decay": 0.99})
    policy = make_policy(config)
    assert expected_memory(policy, config)["averaged weights"] == 4 * sum(p.numel() for p in policy.parameters())


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantized_weights_are_counted_alike_with_and_without_weights(tmp_path, tiny_paligemma_dir, quantization):
    vlm = {"lora": {"rank": 2}, "quantization": quantization}
    config = policy_config(tiny_paligemma_dir, tmp_path, model={"vlm_config": vlm})
    policy = make_policy(config)
    real, planned = expected_memory(policy, config), expected_memory(meta_policy(config), config)
    assert real == planned
    stored = sum(value.numel() * value.element_size() for value in policy.state_dict().values())
    assert real["weights"] == pytest.approx(stored, rel=0.03)


def test_the_published_shape():
    config = load_config("configs/vla_config.yaml", SHAPE)
    policy = meta_policy(config)
    assert all(parameter.is_meta for parameter in policy.parameters())
    assert sum(p.numel() for p in policy.backbone.parameters()) == 2_923_466_480  # google/paligemma-3b-pt-224
    assert tokens_per_sample(policy, config) == {"vision": 512, "language": 560, "context": 560, "action": 32}


@pytest.mark.parametrize(("name", "limit"), [("vla_lora", 24), ("vla_full_finetune", 80)])
def test_recipes_state_what_they_are_expected_to_take(name, limit):
    """The figures in the comments, and room for what is not in the estimate."""
    path = f"configs/{name}.yaml"
    config = load_config(path, SHAPE)
    memory = expected_memory(meta_policy(config), config)
    assert sum(memory.values()) < 0.85 * limit * GB
    comments = [line for line in open(path, encoding="utf-8") if line.startswith("#")]
    stated = {}
    for line in comments:
        label, _, figure = line.strip("# \n").rpartition(" ")
        if label.strip() in (*memory, "sum"):
            stated[label.strip()] = float(figure)
    wanted = {**memory, "sum": sum(memory.values())}
    assert stated == {key: pytest.approx(value / GB, abs=0.006) for key, value in wanted.items()}
    assert any("not measured" in line for line in comments)


def test_another_backbone(tmp_path):
    make_tiny_siglip_llm(tmp_path, prompts=["a b"])
    vlm = {
        "type": "siglip_llm",
        "vision_model_name_or_path": str(tmp_path / "siglip"),
        "language_model_name_or_path": str(tmp_path / "qwen2"),
        "lora": {"rank": 2},
    }
    config = policy_config(tmp_path, tmp_path, model={"vlm_config": vlm})
    policy = make_policy(config)
    assert expected_memory(policy, config) == expected_memory(meta_policy(config), config)
    assert tokens_per_sample(policy, config)["language"] == config.data.prompt_max_len
    report = estimate_report(policy, config)
    assert "fusion" in report and "sum (calculated, not measured)" in report


def test_the_script(capsys):
    estimate_memory.main(
        ["--config_path", "configs/vla_lora.yaml", "--model_name_or_path", "configs/paligemma-3b-pt-224"]
    )
    output = capsys.readouterr().out
    assert "language model" in output and "sum (calculated, not measured)" in output and "micro-batch 32" in output
