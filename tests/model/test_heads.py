"""What every action head promises, whatever it is inside; parametrised over ACTION_HEADS."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from model.action_head import ACTION_HEADS, build_action_head
from model.context import Context
from tests.model.heads import (
    EXPERT,
    SMALL,
    SPEC,
    STATE,
    WIDTH,
    context_of,
    make_context,
    make_head,
    no_pad,
    sample,
    seeded,
)
from utils.config_utils import ActionHeadConfig, ConfigError

# Each head, and each choice within a head that changes its network, its loss or its way to sample.
VARIANTS = {name: {} for name in ACTION_HEADS} | {
    "flow_matching heun": {"integrator": "heun"},
    "discrete expectation": {"decoding": "expectation"},
    "discrete sample": {"decoding": "sample"},
    "diffusion ddpm": {"scheduler": "ddpm", "prediction_type": "v"},
    "diffusion sample": {"prediction_type": "sample"},
    "diffusion transformer": {"denoiser": "transformer"},
    "action_expert adaptive": {"expert": dataclasses.replace(EXPERT, time="adaptive_norm")},
}
LONG = ["flow_matching heun", "diffusion", "diffusion ddpm", "diffusion sample"]


def variant(name: str, **options):
    return make_head(name.split()[0], **VARIANTS[name], **options)


def train(head, loss, *, steps: int, lr: float) -> None:
    """Minimise `loss()`, float (B, T), in training mode; leave the head in evaluation mode."""
    optimizer = torch.optim.AdamW(head.train().parameters(), lr=lr, weight_decay=0.0)
    torch.manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().mean().backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
    head.eval()


every_variant = pytest.mark.parametrize("name", VARIANTS)
# The U-Net is in the slow set, the diffusion transformer, which shares all but the network, in the fast one.
trained_variant = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in VARIANTS]
)


def test_which_heads_draw_their_samples():
    one_answer = {"regression", "discrete", "discrete expectation"}
    known = {name for name in VARIANTS if name.split()[0] in ("flow_matching", "regression", "discrete", "diffusion")}
    assert {name for name in known if not variant(name).is_stochastic} == one_answer


@every_variant
def test_shapes_and_precision(name):
    head, context = variant(name), make_context()
    action = torch.rand(3, 4, 2) * 2 - 1
    loss = head.loss(context, action, no_pad(3), seeded(0))
    actions = sample(head, context, 0, 4)
    assert loss.shape == (3, 4) and loss.dtype == torch.float32 and loss.requires_grad
    assert actions.shape == (3, 4, 2) and actions.dtype == torch.float32
    assert (head.horizon, head.per_action_dim) == (4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert head.loss(context, action, no_pad(3), seeded(0)).dtype == torch.float32
        assert sample(head, context, 0, 4).dtype == torch.float32


@every_variant
def test_every_parameter_trains(name):
    """A parameter without a gradient would be dead weight, and an error under DDP."""
    head = variant(name)
    head.loss(make_context(), torch.rand(3, 4, 2), no_pad(3)).sum().backward()
    assert [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []


@trained_variant
def test_one_batch_overfits(name):
    head, context = variant(name, voice=False, noise_draws_per_sample=8, unet_width=32), make_context(batch=4)
    action = torch.rand(4, 4, 2, generator=seeded(3)) * 1.8 - 0.9
    train(head, lambda: head.loss(context, action, no_pad(4)), steps=300, lr=4e-3)
    with torch.no_grad():
        error = (sample(head, context, 0, 10) - action).abs().mean()
    assert error < 0.1, f"mean error {error:.3f} after 300 steps on four samples, actions in [-0.9, 0.9]"


@trained_variant
def test_two_modes(name):
    """Each context has two right answers, +m and -m for the whole chunk (m depends on the context).

    Heads that sample from the joint distribution find both, one per chunk; sampled bins find both, but each step for
    itself; the most probable bin is one of the two; a mean or a median lies between them.
    """
    head = variant(name, voice=False, horizon=2, per_action_dim=1, use_state_input=False)
    modes, tokens_BLE = torch.tensor([0.4, 0.8]), torch.eye(WIDTH)[:2, None, :] * 3

    def context_for(which: torch.Tensor) -> Context:
        return context_of(tokens_BLE[which], torch.ones(len(which), 1, dtype=torch.bool))

    def loss() -> torch.Tensor:
        which, sign = torch.randint(2, (128,)), torch.randint(2, (128,)) * 2.0 - 1.0
        action = (modes[which] * sign)[:, None, None].expand(-1, 2, 1)
        return head.loss(context_for(which), action, no_pad(128, 2))

    steps, lr = (1000, 4e-3) if "adaptive" in name else (500, 2e-3)  # adaptive norms start with every gate shut
    if name == "diffusion":  # of three seeds 88 to 99 % of samples are on a mode after 500 steps, 97 % after 1,000
        steps = 1000
    train(head, loss, steps=steps, lr=lr)
    for i, mode in enumerate(modes):
        with torch.no_grad():
            samples = sample(head, context_for(torch.full((200,), i)), 1000 * i, 20)[..., 0]
        on_a_mode = ((samples.abs() - mode).abs() < 0.15).float().mean()
        positive = samples > 0
        if name == "discrete":
            assert on_a_mode == 1 and (samples == samples[:1]).all(), "one mode, always the same"
        elif not head.is_stochastic:
            assert (samples == samples[:1]).all() and (samples.abs() < mode + 0.02).all()
            if name != "regression":  # of two equal halves any value between them is a median
                assert (samples.abs() < mode / 3).all()
        else:
            assert on_a_mode > 0.9, "samples lie on a mode"
            assert 0.3 < positive[:, 0].float().mean() < 0.7, "both modes are hit"
            agree = (positive[:, 0] == positive[:, 1]).float().mean()
            assert 0.35 < agree < 0.65 if name == "discrete sample" else agree > 0.9, "steps of a chunk"


@every_variant
def test_padded_steps_have_no_influence_and_no_gradient(name):
    head, context = variant(name), make_context()
    pad = torch.tensor([[False, False, True, True]] * 3)
    action = (torch.rand(3, 4, 2) * 2 - 1).requires_grad_()
    loss = head.loss(context, action, pad, seeded(0))
    assert (loss[pad] == 0).all() and (loss[~pad] > 0).all()
    loss.sum().backward()
    gradients = [p.grad.clone() for p in head.parameters() if p.grad is not None]
    if action.grad is not None:  # classes have no gradient
        assert (action.grad[pad] == 0).all() and action.grad[~pad].abs().sum() > 0
    spoiled = action.detach().clone()
    spoiled[pad] = float("nan")
    head.zero_grad(set_to_none=True)
    again = head.loss(context, spoiled, pad, seeded(0))
    assert torch.equal(again, loss)
    again.sum().backward()
    assert all(map(torch.equal, gradients, (p.grad for p in head.parameters() if p.grad is not None)))


@every_variant
def test_missing_dimensions_are_neither_seen_nor_predicted(name):
    head, context = variant(name), make_context()
    context = dataclasses.replace(context, action_dim_mask_BA=torch.tensor([[True, False]] * 3))
    action = torch.rand(3, 4, 2) * 2 - 1
    other = action.clone()
    other[..., 1] = 0.7
    a, b = (head.loss(context, one, no_pad(3), seeded(0)) for one in (action, other))
    assert torch.equal(a, b)
    a.sum().backward()
    rows = [p for n, p in head.named_parameters() if n.endswith(("action_out.bias", "action_out.weight"))]
    assert all((p.grad[1] == 0).all() for p in rows), "the output of a missing dimension has no gradient"
    actions = sample(head, context, 0, 4)
    assert (actions[..., 1] == 0).all() and actions[..., 0].abs().sum() > 0


@every_variant
def test_masked_context_is_inert(name):
    head, context = variant(name), make_context()
    longer = context_of(
        torch.cat([context.tokens_BLE, 100 * torch.randn(3, 5, WIDTH)], dim=1),
        torch.cat([context.mask_BL, torch.zeros(3, 5, dtype=torch.bool)], dim=1),
        context.state_BS,
    )
    a, b = (sample(head, c, 0, 4) for c in (context, longer))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    action = torch.rand(3, 4, 2)
    a, b = (head.loss(c, action, no_pad(3), seeded(0)) for c in (context, longer))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@every_variant
def test_every_input_matters(name):
    head, context, action = variant(name), make_context(), torch.rand(3, 4, 2)
    loss = lambda c, **options: variant(name, **options).loss(c, action, no_pad(3), seeded(0))  # noqa: E731
    base = loss(context)
    assert not torch.allclose(base, loss(context_of(context.tokens_BLE.flip(2), context.mask_BL, context.state_BS)))
    assert not torch.allclose(base, loss(context_of(context.tokens_BLE, context.mask_BL, context.state_BS + 1)))
    stateless = context_of(context.tokens_BLE, context.mask_BL, None)
    assert loss(stateless, use_state_input=False).isfinite().all()
    with pytest.raises(AssertionError, match="use_state_input needs a state"):
        head.loss(stateless, action, no_pad(3))


@every_variant
def test_the_seed_decides(name):
    head, context = variant(name), make_context(batch=8)
    a, b, other = (sample(head, context, seed, 4) for seed in (5, 5, 50))
    assert torch.equal(a, b)
    assert torch.equal(a, other) != head.is_stochastic, "another seed: another sample, of a stochastic head alone"
    action = torch.rand(8, 4, 2)
    assert torch.equal(*(head.loss(context, action, no_pad(8), seeded(5)) for _ in range(2)))
    state = torch.random.get_rng_state()
    sample(head, context, 5, 4)
    head.loss(context, action, no_pad(8), seeded(5))
    assert torch.equal(torch.random.get_rng_state(), state), "a given generator is the only source of randomness"


@every_variant
def test_a_generator_per_sample_is_independent_of_the_batch(name):
    head, context = variant(name), make_context()
    together = sample(head, context, 1, 3)
    for i in range(3):
        alone = context_of(context.tokens_BLE[i : i + 1], context.mask_BL[i : i + 1], context.state_BS[i : i + 1])
        torch.testing.assert_close(sample(head, alone, i + 1, 3)[0], together[i], atol=1e-5, rtol=1e-5)


@every_variant
def test_sampling_is_drawing_noise_and_then_a_function_of_tensors(name):
    head, context = variant(name), make_context()
    noise = head.draw_noise([seeded(7 + row) for row in range(3)], torch.device("cpu"), 4)
    assert (noise is not None) == head.is_stochastic
    schedule, state = head.schedule(4, torch.device("cpu")), torch.random.get_rng_state()
    kept = head.sample(context, noise, 4, schedule)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(kept, sample(head, context, 7, 4))
    assert torch.equal(kept, head.sample(context, noise, 4, schedule)), "a schedule can be used again"


@trained_variant
def test_sampling_is_one_graph(name):
    """Nothing on the way needs Python to decide: torch.compile traces it whole."""
    torch.compiler.reset()
    head, context = variant(name), make_context()
    generators, device = [seeded(7 + row) for row in range(3)], torch.device("cpu")
    noise, schedule = head.draw_noise(generators, device, 3), head.schedule(3, device)
    with torch.no_grad():
        compiled = torch.compile(lambda: head.sample(context, noise, 3, schedule), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(), head.sample(context, noise, 3, schedule), atol=1e-4, rtol=1e-4)


@every_variant
def test_state_dict_round_trip(name):
    head, other, context = variant(name), variant(name, seed=1), make_context()
    action = torch.rand(3, 4, 2)
    actions, loss = sample(head, context, 0, 3), head.loss(context, action, no_pad(3), seeded(0))
    assert not torch.equal(other.loss(context, action, no_pad(3), seeded(0)), loss)
    other.load_state_dict(head.state_dict(), strict=True)
    assert torch.equal(sample(other, context, 0, 3), actions)
    assert torch.equal(other.loss(context, action, no_pad(3), seeded(0)), loss)


def test_unknown_heads_are_named():
    message = "model.action_head_config.type is 'flow'; choose from flow_matching, regression, discrete, diffusion, "
    with pytest.raises(ConfigError, match=re.escape(message) + ".*did you mean flow_matching"):
        build_action_head(ActionHeadConfig(**SMALL, type="flow"), SPEC, STATE)
    assert isinstance(make_head("Regression"), ACTION_HEADS["regression"]), "as every choice, in any case of letters"
