"""The language model's keys and values, against the stock model's own and against its layers; and who may have them."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PaliGemmaModel
from transformers.models.gemma.modeling_gemma import apply_rotary_pos_emb

from model.action_head import ACTION_HEADS
from model.action_head.base import ActionHeadBase, existing_dims, step_mean
from model.context import ActionPrefix, Context, ContextSpec
from model.keys_values import KeysValues
from model.paligemma_vlm import PaliGemmaVLM
from tests.model.test_paligemma_vlm import load, observation, stock_inputs
from tests.policies import make_batch, make_policy, policy_config
from utils.config_utils import ConfigError

LAYERS, HEADS, HEAD_DIM = 2, 2, 8  # of the tiny fixtures


@pytest.fixture(params=["paligemma", "paligemma2"])
def directory(request: pytest.FixtureRequest, tiny_paligemma_dir: Path, tiny_paligemma2_dir: Path) -> Path:
    return tiny_paligemma_dir if request.param == "paligemma" else tiny_paligemma2_dir


both_ways = pytest.mark.parametrize("checkpointing", [False, True])


def by_projections(model: PaliGemmaVLM, inputs: dict) -> tuple[Context, list[tuple[Tensor, Tensor]]]:
    """The context, and keys and values made of what each layer's projections gave, in the same graph."""
    seen: dict[tuple[str, int], Tensor] = {}
    rotary: list[tuple[Tensor, Tensor]] = []
    language = model.backbone.language_model
    hooks = [language.rotary_emb.register_forward_hook(lambda _, args, out: rotary.append(out))]
    for i, layer in enumerate(language.layers):
        for name in ("k_proj", "v_proj"):
            projection = getattr(layer.self_attn, name)
            hooks.append(projection.register_forward_hook(lambda _, args, out, key=(name, i): seen.update({key: out})))
    context = model(inputs, keys_values=True)
    for hook in hooks:
        hook.remove()
    split = lambda x: x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)  # noqa: E731
    pairs = []
    for i in range(LAYERS):
        keys = split(seen["k_proj", i])
        pairs.append((apply_rotary_pos_emb(keys, keys, *rotary[0])[0], split(seen["v_proj", i])))
    return context, pairs


@pytest.mark.parametrize("attention", ["auto", "eager"])
@both_ways
def test_they_are_those_of_the_stock_model_s_cache(directory: Path, attention: str, checkpointing: bool) -> None:
    model = load(directory, cameras=2, attn_implementation=attention, gradient_checkpointing=checkpointing)
    inputs = observation(cameras=2, frames=2)
    context = model(inputs, keys_values=True)
    stock, cache = PaliGemmaModel.from_pretrained(directory, attn_implementation="eager"), DynamicCache()
    with torch.no_grad():
        stock(**stock_inputs(stock, inputs), use_cache=True, past_key_values=cache)
    spec, exists = model.spec, context.mask_BL
    assert len(context.keys_values) == len(cache.layers) == spec.num_layers == LAYERS
    for (keys, values), layer in zip(context.keys_values, cache.layers, strict=True):
        assert keys.shape == values.shape == (2, spec.num_kv_heads, exists.shape[1], spec.head_dim)
        for ours, theirs in ((keys, layer.keys), (values, layer.values)):
            torch.testing.assert_close(
                ours.transpose(1, 2)[exists], theirs.transpose(1, 2)[exists], atol=2e-5, rtol=1e-5
            )
    assert (spec.num_kv_heads, spec.head_dim, spec.rope_theta) == (HEADS, HEAD_DIM, 1e4)


@pytest.mark.parametrize("autocast", [False, True])
@both_ways
def test_they_are_what_the_projections_gave_to_the_bit(directory: Path, checkpointing: bool, autocast: bool) -> None:
    model = load(directory, gradient_checkpointing=checkpointing)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        context, pairs = by_projections(model, observation())
        plain = model(observation())
    assert torch.equal(context.tokens_BLE, plain.tokens_BLE) and torch.equal(context.mask_BL, plain.mask_BL)
    assert plain.keys_values is None
    for collected, expected in zip(context.keys_values, pairs, strict=True):
        assert all(map(torch.equal, collected, expected))


def gradients(model: PaliGemmaVLM, context: Context, pairs: Any) -> list[Tensor | None]:
    """Gradients of a function of tokens, keys and values alike."""
    generator = torch.Generator().manual_seed(3)
    model.zero_grad(set_to_none=True)
    total = context.tokens_BLE[context.mask_BL].square().sum()
    for tensor in (tensor for pair in pairs for tensor in pair):
        weight = torch.randn(tensor.shape, generator=generator)
        total = total + (weight * tensor * context.mask_BL[:, None, :, None]).sum()
    total.backward()
    return [parameter.grad for parameter in model.parameters()]


def test_gradients_flow_through_them(directory: Path) -> None:
    plain, checkpointed = (load(directory, gradient_checkpointing=value) for value in (False, True))
    context, pairs = by_projections(plain, observation())
    expected = gradients(plain, context, pairs)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in expected)
    found = []
    for model in (plain, checkpointed):
        context = model(observation(), keys_values=True)
        found.append(gradients(model, context, context.keys_values))
    torch.testing.assert_close(found[0], found[1], atol=0, rtol=0)
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=1e-4)


@both_ways
def test_the_last_layer_s_are_enough(tiny_paligemma_dir: Path, checkpointing: bool) -> None:
    """A head may read keys and values alone: everything before the last layer's projections has a gradient."""
    model = load(tiny_paligemma_dir, gradient_checkpointing=checkpointing)
    context = model(observation(), keys_values=True)
    sum(tensor.square().sum() for tensor in context.keys_values[-1]).backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    last = f"language_model.layers.{LAYERS - 1}."
    assert {name.split(last)[1] for name in reached if last in name} == {
        "input_layernorm.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    }
    assert all(name in reached for name, _ in model.named_parameters() if "vision_tower" in name or "layers.0." in name)


@both_ways
def test_nothing_is_kept_when_the_context_goes(tiny_paligemma_dir: Path, checkpointing: bool) -> None:
    model = load(tiny_paligemma_dir, gradient_checkpointing=checkpointing)
    context = model(observation(), keys_values=True)
    key = weakref.ref(context.keys_values[0][0])
    del context
    gc.collect()
    assert key() is None


def test_a_closed_collection_takes_nothing() -> None:
    collected = KeysValues()
    collected.add(torch.zeros(1), torch.ones(1))
    layers = collected.close()
    collected.add(torch.zeros(1), torch.ones(1))
    assert len(layers) == 1


def test_collecting_is_one_graph(directory: Path) -> None:
    torch.compiler.reset()
    model, inputs = load(directory).eval(), observation(padded=False)
    inputs["image_slots"] = torch.arange(2)
    with torch.no_grad():
        expected = model(inputs, keys_values=True)
        function = torch.compile(lambda: model(inputs, keys_values=True).keys_values, fullgraph=True, backend="eager")
        torch.testing.assert_close(function(), expected.keys_values, atol=1e-5, rtol=1e-5)


# --- heads


class KeyReader(ActionHeadBase):
    """Mean of the last layer's values, one linear layer; reads no tokens."""

    wants_keys_values = True

    def __init__(self, config: Any, spec: ContextSpec, state_dim: int, action_range: Any) -> None:
        super().__init__()
        self.config = config
        self.out = torch.nn.Linear(spec.num_kv_heads * spec.head_dim, config.action_dim)

    def loss(self, context, action_BTA, action_is_pad_BT, generator=None) -> Tensor:
        error_BTA = (self.sample(context, None, 1) - action_BTA).square()
        return step_mean(error_BTA, existing_dims(context, self.per_action_dim), action_is_pad_BT)

    def sample(self, context, noise, num_inference_steps, schedule=None, prefix: ActionPrefix | None = None) -> Tensor:
        values_BHLd = context.keys_values[-1][1]
        pooled_BD = (values_BHLd * context.mask_BL[:, None, :, None]).mean(dim=2).flatten(1)
        return self.out(pooled_BD).unflatten(-1, (self.horizon, self.per_action_dim))


def test_a_head_that_wants_them_gets_them(tmp_path, tiny_paligemma_dir, monkeypatch) -> None:
    monkeypatch.setitem(ACTION_HEADS, "key_reader", KeyReader)
    head = {"action_head_config": {"type": "key_reader"}}
    policy = make_policy(policy_config(tiny_paligemma_dir, tmp_path, model=head))
    policy(make_batch()).sum().backward()
    assert policy.backbone.backbone.language_model.layers[-1].self_attn.v_proj.weight.grad.abs().sum() > 0
    assert policy.eval().act(make_batch(), 1).shape == (1, 4, 4, 4)
    other = make_policy(policy_config(tiny_paligemma_dir, tmp_path))
    assert other.encode(make_batch()).keys_values is None


def test_a_backbone_without_them_is_refused_before_weights_load(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(ACTION_HEADS, "key_reader", KeyReader)
    model = {"vlm_config": {"type": "siglip_llm"}, "action_head_config": {"type": "key_reader"}}
    message = "action_head_config.type key_reader reads the keys .* of model.vlm_config.type siglip_llm sees no images"
    with pytest.raises(ConfigError, match=message):
        make_policy(policy_config(tmp_path / "nowhere", tmp_path, model=model))
