"""The flow-matching head: its target, its masks, its caches, and a two-mode toy problem."""

from __future__ import annotations

import pytest
import torch

from model.action_head.flow_matching import flow_interpolate
from model.context import Context
from tests.model import heads
from tests.model.heads import WIDTH, make_context


def make_head(**options):
    return heads.make_head("flow_matching", **options)


def test_velocity_target_by_finite_difference():
    noise, action = torch.randn(2, 5, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    time, step = torch.linspace(0.1, 0.9, 5, dtype=torch.float64), 1e-6
    x, target = flow_interpolate(noise, action, time)
    ahead, _ = flow_interpolate(noise, action, time + step)
    torch.testing.assert_close((ahead - x) / step, target, atol=1e-8, rtol=0)
    torch.testing.assert_close(flow_interpolate(noise, action, torch.zeros(5))[0], noise)
    torch.testing.assert_close(flow_interpolate(noise, action, torch.ones(5))[0], action)


def test_loss_is_the_squared_error_against_that_velocity():
    head, context = make_head(time_distribution="uniform"), make_context()
    action, pad = torch.randn(3, 4, 2), torch.zeros(3, 4, dtype=torch.bool)
    loss = head.loss(context, action, pad, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    noise, time = torch.randn(3, 4, 2, generator=generator), torch.rand(3, generator=generator)
    x = (1 - time[:, None, None]) * noise + time[:, None, None] * action
    velocity = head.velocity(x, time, head.encode_context(context), pad)
    torch.testing.assert_close(loss, (velocity - (action - noise)).square().mean(-1))


def test_padded_steps_have_no_influence_and_no_gradient():
    head, context = make_head(), make_context()
    pad = torch.tensor([[False, False, True, True]] * 3)
    action = torch.randn(3, 4, 2, requires_grad=True)
    loss = head.loss(context, action, pad, torch.Generator().manual_seed(0))
    assert (loss[pad] == 0).all() and (loss[~pad] > 0).all()
    loss.sum().backward()
    assert (action.grad[pad] == 0).all() and action.grad[~pad].abs().sum() > 0
    spoiled = action.detach().clone()
    spoiled[pad] = float("nan")
    assert torch.equal(head.loss(context, spoiled, pad, torch.Generator().manual_seed(0)), loss)


def test_padded_noise_does_not_reach_valid_steps():
    head, context = make_head(), make_context()
    pad, time = torch.tensor([[False, False, True, True]] * 3), torch.rand(3)
    keys_values = head.encode_context(context)
    x = torch.randn(3, 4, 2)
    changed = x.clone()
    changed[pad] += 10
    a, b = head.velocity(x, time, keys_values, pad), head.velocity(changed, time, keys_values, pad)
    torch.testing.assert_close(a[~pad], b[~pad], atol=0, rtol=0)


def test_masked_context_is_inert():
    head, context = make_head(), make_context()
    longer = Context(
        torch.cat([context.tokens_BLE, 100 * torch.randn(3, 5, WIDTH)], dim=1),
        torch.cat([context.mask_BL, torch.zeros(3, 5, dtype=torch.bool)], dim=1),
        context.state_BS,
    )
    a, b = (head.sample(c, torch.Generator().manual_seed(0), 4) for c in (context, longer))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_every_input_matters():
    head, context = make_head(), make_context()
    sample = lambda c: head.sample(c, torch.Generator().manual_seed(0), 4)  # noqa: E731
    base = sample(context)
    assert not torch.allclose(base, sample(Context(context.tokens_BLE.flip(2), context.mask_BL, context.state_BS)))
    assert not torch.allclose(base, sample(Context(context.tokens_BLE, context.mask_BL, context.state_BS + 1)))
    without = make_head(use_state_input=False)
    blind = Context(context.tokens_BLE, context.mask_BL, None)
    assert without.sample(blind, torch.Generator().manual_seed(0), 2).shape == (3, 4, 2)


def test_context_is_encoded_once_per_prediction():
    head, calls = make_head(), []
    for block in head.blocks:
        block.cross_kv.register_forward_hook(lambda *_: calls.append(1))
    head.sample(make_context(), None, num_inference_steps=10)
    assert len(calls) == len(head.blocks)


def test_cached_equals_uncached_sampling():
    head, context = make_head(), make_context()
    x = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(9))
    for step in range(5):
        fresh = head.encode_context(context)
        x = x + head.velocity(x, torch.full((3,), step / 5), fresh) / 5
    torch.testing.assert_close(head.sample(context, torch.Generator().manual_seed(9), 5), x, atol=1e-6, rtol=0)


def test_noise_draws_share_one_context_and_average():
    torch.manual_seed(0)
    context, action, pad = make_context(), torch.randn(3, 4, 2), torch.zeros(3, 4, dtype=torch.bool)
    many, one = make_head(noise_draws_per_sample=3), make_head()
    calls = []
    many.blocks[0].cross_kv.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    loss = many.loss(context, action, pad, torch.Generator().manual_seed(1))
    assert calls == [3] and loss.shape == (3, 4)
    generator = torch.Generator().manual_seed(1)
    rows = Context(
        *(value.repeat_interleave(3, dim=0) for value in (context.tokens_BLE, context.mask_BL, context.state_BS))
    )
    repeated = one.loss(rows, action.repeat_interleave(3, dim=0), pad.repeat_interleave(3, dim=0), generator)
    torch.testing.assert_close(loss, repeated.view(3, 3, 4).mean(dim=1))


def test_a_generator_per_sample_is_independent_of_the_batch():
    head, context = make_head(), make_context()
    generators = lambda: [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]  # noqa: E731
    together = head.sample(context, generators(), 3)
    for i, generator in enumerate(generators()):
        alone = Context(context.tokens_BLE[i : i + 1], context.mask_BL[i : i + 1], context.state_BS[i : i + 1])
        torch.testing.assert_close(head.sample(alone, [generator], 3)[0], together[i], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "mean"),
    [
        ({"time_distribution": "uniform"}, 0.5),
        ({"time_beta": (1.0, 1.5)}, 0.4),
        ({"time_beta": (2.0, 2.0)}, 0.5),
        ({"time_distribution": "uniform", "time_clamp": (0.2, 0.4)}, 0.3),
    ],
)
def test_time_distributions(options, mean):
    time = make_head(**options)._time(20_000, torch.Generator().manual_seed(0), torch.device("cpu"))
    low, high = options.get("time_clamp", (0.0, 1.0))
    assert time.min() >= low and time.max() <= high and abs(time.mean().item() - mean) < 0.01


def test_noise_distributions():
    shape, generator, device = (200, 4, 2), torch.Generator().manual_seed(0), torch.device("cpu")
    uniform = make_head(noise_distribution="uniform")._noise(shape, generator, device)
    gaussian = make_head()._noise(shape, generator, device)
    assert uniform.abs().max() <= 1 and abs(uniform.std().item() - 3**-0.5) < 0.03
    assert gaussian.abs().max() > 2 and abs(gaussian.std().item() - 1) < 0.05


def test_samples_land_on_both_modes():
    """Each context has two right answers, +m and -m (m depends on the context); a regression would answer 0."""
    torch.manual_seed(0)
    head = make_head(horizon=2, per_action_dim=1, use_state_input=False)
    head.train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3)
    modes = torch.tensor([0.4, 0.8])
    tokens_BLE = torch.eye(WIDTH)[:2, None, :] * 3

    def context_of(which: torch.Tensor) -> Context:
        return Context(tokens_BLE[which], torch.ones(len(which), 1, dtype=torch.bool))

    for _ in range(500):
        which = torch.randint(2, (128,))
        sign = torch.randint(2, (128,)) * 2.0 - 1.0
        action = (modes[which] * sign)[:, None, None].expand(-1, 2, 1)
        loss = head.loss(context_of(which), action, torch.zeros(128, 2, dtype=torch.bool)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head.eval()
    for i, mode in enumerate(modes):
        with torch.no_grad():
            samples = head.sample(context_of(torch.full((200,), i)), torch.Generator().manual_seed(i), 20)[..., 0]
        assert ((samples.abs() - mode).abs() < 0.15).float().mean() > 0.9, "samples lie on a mode"
        assert 0.3 < (samples[:, 0] > 0).float().mean() < 0.7, "both modes are hit"
        assert ((samples[:, 0] > 0) == (samples[:, 1] > 0)).float().mean() > 0.9, "the steps of a chunk agree"
