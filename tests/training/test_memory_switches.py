"""Switches that trade time for memory or the reverse must not change what is computed."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from model.vla_model import VLAModel
from tests.policies import make_batch, make_policy, policy_config


def loss_and_gradients(policy: VLAModel, batch: dict) -> tuple[torch.Tensor, list[torch.Tensor]]:
    policy.train().zero_grad()
    torch.manual_seed(0)
    loss = policy(batch)
    loss.mean().backward()
    return loss.detach(), [p.grad for p in policy.parameters() if p.grad is not None]


def with_open_gates(policy: VLAModel) -> VLAModel:
    """A fresh head passes no gradient on: its output and gates are zero."""
    for parameter in policy.action_head.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return policy


@pytest.mark.parametrize("lora", [None, {"rank": 2, "vision": True}])
def test_checkpointing_recomputes_each_layer_once(tmp_path, tiny_paligemma_dir, lora):
    vlm = {"lora": lora}
    plain = with_open_gates(make_policy(policy_config(tiny_paligemma_dir, tmp_path, model={"vlm_config": vlm})))
    vlm["gradient_checkpointing"] = True
    policy = make_policy(policy_config(tiny_paligemma_dir, tmp_path, model={"vlm_config": vlm}))
    policy.load_state_dict(plain.state_dict())
    calls: dict[str, int] = {}
    for name, module in policy.backbone.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            # Within the layer, since the layer's own hooks lie outside of what is recomputed.
            module.mlp.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    expected, found = loss_and_gradients(plain, make_batch()), loss_and_gradients(policy, make_batch())
    assert len(calls) == 4 and set(calls.values()) == {2}, "once forward, once in the backward pass"
    assert torch.equal(expected[0], found[0]) and all(map(torch.equal, expected[1], found[1]))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile makes C++ on a CPU")
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_compiled_layers_compute_the_same(tmp_path, tiny_paligemma_dir, gradient_checkpointing):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    vlm = {"gradient_checkpointing": gradient_checkpointing}
    policy = with_open_gates(make_policy(policy_config(tiny_paligemma_dir, tmp_path, model={"vlm_config": vlm})))
    names, batches = list(policy.state_dict()), [make_batch(), make_batch(3)]
    expected = [(loss, [g.clone() for g in grads]) for loss, grads in (loss_and_gradients(policy, b) for b in batches)]
    assert policy.compile_layers("default") == 5 and list(policy.state_dict()) == names
    for batch, (wanted_loss, wanted) in zip(batches, expected, strict=True):
        loss, found = loss_and_gradients(policy, batch)
        torch.testing.assert_close(loss, wanted_loss)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-3)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] <= 6 and not counters["graph_break"], "three kinds of layers, two sizes"
