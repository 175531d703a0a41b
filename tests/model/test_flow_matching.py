"""The flow-matching head: its target, its masks, its caches and its integrators."""

from __future__ import annotations

import math

import pytest
import torch

from model.action_head.flow_matching import flow_interpolate, integrate
from model.context import Context
from tests.model import heads
from tests.model.heads import WIDTH, make_context, sample


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
    a, b = (sample(head, c, 0, 4) for c in (context, longer))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_every_input_matters():
    head, context = make_head(), make_context()
    base = sample(head, context, 0, 4)
    assert not torch.allclose(
        base, sample(head, Context(context.tokens_BLE.flip(2), context.mask_BL, context.state_BS), 0, 4)
    )
    assert not torch.allclose(
        base, sample(head, Context(context.tokens_BLE, context.mask_BL, context.state_BS + 1), 0, 4)
    )
    without = make_head(use_state_input=False)
    blind = Context(context.tokens_BLE, context.mask_BL, None)
    assert sample(without, blind, 0, 2).shape == (3, 4, 2)


def test_context_is_encoded_once_per_prediction():
    head, calls = make_head(), []
    for block in head.blocks:
        block.cross_kv.register_forward_hook(lambda *_: calls.append(1))
    sample(head, make_context(), steps=10)
    assert len(calls) == len(head.blocks)


def test_cached_equals_uncached_sampling():
    head, context = make_head(), make_context()
    x = noise = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(9))
    for step in range(5):
        fresh = head.encode_context(context)
        x = x + head.velocity(x, torch.full((3,), step / 5), fresh) / 5
    torch.testing.assert_close(head.sample(context, noise, 5), x, atol=1e-6, rtol=0)


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
    together = sample(head, context, 1, 3)
    for i in range(3):
        alone = Context(context.tokens_BLE[i : i + 1], context.mask_BL[i : i + 1], context.state_BS[i : i + 1])
        torch.testing.assert_close(sample(head, alone, i + 1, 3)[0], together[i], atol=1e-6, rtol=1e-5)


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


def spiral(x: torch.Tensor, time: float) -> torch.Tensor:
    """dx/dt = (1 + t) J x, whose solution at t = 1 turns x by 1.5 radians."""
    return (1 + time) * torch.stack([-x[1], x[0]])


@pytest.mark.parametrize(("integrator", "order", "evaluations"), [("euler", 1, 1), ("midpoint", 2, 2), ("heun", 2, 2)])
def test_order_of_integrators(integrator, order, evaluations):
    calls = []

    def velocity(x: torch.Tensor, time: float) -> torch.Tensor:
        calls.append(time)
        return spiral(x, time)

    start = torch.tensor([1.0, 0.0], dtype=torch.float64)
    turn = torch.tensor(1.5, dtype=torch.float64)
    end = torch.stack([turn.cos(), turn.sin()])
    errors = [(integrate(velocity, start, steps, integrator) - end).norm() for steps in (20, 40, 80)]
    assert len(calls) == evaluations * 140 and min(calls) == 0 and max(calls) <= 1
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert abs(math.log2(coarse / fine) - order) < 0.15, "halving the step divides the error by 2 to the order"


@pytest.mark.parametrize("integrator", ["euler", "midpoint", "heun"])
@pytest.mark.parametrize("steps", [1, 3])
def test_straight_paths_are_exact_in_any_number_of_steps(integrator, steps):
    slope = torch.tensor([2.0, -1.0])
    end = integrate(lambda x, time: slope, torch.tensor([0.5, 0.5]), steps, integrator)
    torch.testing.assert_close(end, torch.tensor([2.5, -0.5]))


@pytest.mark.parametrize("integrator", ["euler", "midpoint", "heun"])
def test_samples_follow_the_velocity_with_the_configured_integrator(integrator):
    head, context = make_head(integrator=integrator), make_context()
    keys_values = head.encode_context(context)
    start = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(2))
    end = integrate(lambda x, t: head.velocity(x, torch.full((3,), t), keys_values), start, 5, integrator)
    actions = head.sample(context, start, 5)
    torch.testing.assert_close(actions, end, atol=1e-5, rtol=1e-5)
    euler = make_head().sample(context, start, 5)
    assert torch.equal(actions, euler) == (integrator == "euler")
