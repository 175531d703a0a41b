"""Chunks that continue each other: soft mask, guidance through the network, clean prefixes, units.

Shape letters: B batch, T horizon, A per_action_dim.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from inference.predictor import VLAPredictor
from model.action_head.flow_matching import flow_interpolate, integrate
from model.action_head.guidance import guidance_weight, guided, soft_mask
from model.action_head.transformer import ContextKeysValues
from model.context import ActionPrefix
from tests.helpers import write_episodes
from tests.inference.checkpoints import train_tiny
from tests.model.heads import make_context, make_head, no_pad, sample, seeded

BATCH, HORIZON = 3, 8


@pytest.fixture(scope="module")
def head():
    """A flow head whose every path is heard; frozen, as at inference."""
    return make_head("flow_matching", horizon=HORIZON).requires_grad_(False)


def make_prefix(delay: int = 3, overlap: int = 6, beta: float = 5.0, clean: bool = False, horizon: int = HORIZON):
    action = torch.randn(BATCH, horizon, 2, generator=seeded(4))
    return ActionPrefix(action, soft_mask(horizon, delay, overlap).expand(BATCH, -1), beta, clean)


def test_soft_mask_is_the_paper_s():
    weight = soft_mask(horizon=10, delay=3, overlap=7)
    assert weight[:3].tolist() == [1, 1, 1] and weight[7:].tolist() == [0, 0, 0]
    for i in range(3, 7):
        c = (7 - i) / (7 - 3 + 1)
        assert weight[i].item() == pytest.approx(c * (math.exp(c) - 1) / (math.e - 1), rel=1e-6)
    assert (weight[2:8].diff() < 0).all()
    assert soft_mask(4, 4, 4).tolist() == [1] * 4 and soft_mask(4, 0, 0).tolist() == [0] * 4
    with pytest.raises(ValueError, match="delay 5, overlap 4, horizon 8: wanted 0 <= delay <= overlap <= horizon"):
        soft_mask(8, 5, 4)


def test_guidance_weight_is_clipped():
    for t in (0.2, 0.5, 0.8):
        r_squared = (1 - t) ** 2 / (t**2 + (1 - t) ** 2)
        assert guidance_weight(t, 1e9) == pytest.approx((1 - t) / (t * r_squared))
    assert guidance_weight(0.5, 5.0) == pytest.approx(2.0)
    assert guidance_weight(0.0, 5.0) == guidance_weight(1.0, 5.0) == guidance_weight(0.05, 5.0) == 5.0


def test_guidance_is_the_vector_jacobian_product_through_the_network(head):
    """Against finite differences of the denoised chunk, in float64; and far from the identity Jacobian."""
    encoded = head.encode_context(make_context(BATCH))
    layers = [(keys.double(), values.double()) for keys, values in encoded.layers_BHLD]
    keys_values = ContextKeysValues(layers, encoded.mask_BL)
    head64 = make_head("flow_matching", horizon=HORIZON).double().requires_grad_(False)

    def velocity(x, time):
        return head64.velocity(x, torch.full((len(x),), time, dtype=torch.float64), keys_values)

    prefix, time = make_prefix(), 0.3
    prefix = ActionPrefix(prefix.action_BTA.double(), prefix.weight_BT.double())
    x = torch.randn(BATCH, HORIZON, 2, dtype=torch.float64, generator=seeded(2))
    with torch.no_grad():
        plain, bent = velocity(x, time), guided(velocity, prefix)(x, time)

    def denoised(x):
        return x + (1 - time) * velocity(x, time)

    error = prefix.weight_BT[..., None] * (prefix.action_BTA - denoised(x))
    product, step = torch.empty_like(x), 1e-6
    for index in np.ndindex(*x.shape):
        ahead, behind = x.clone(), x.clone()
        ahead[index] += step
        behind[index] -= step
        product[index] = ((denoised(ahead) - denoised(behind)) / (2 * step) * error).sum()
    weight = guidance_weight(time, 5.0)
    torch.testing.assert_close(bent - plain, weight * product, atol=1e-7, rtol=1e-6)
    identity = weight * error  # what a denoiser outside the graph would give
    assert (bent - plain - identity).norm() > 0.2 * identity.norm()
    assert (bent - plain)[:, 6:].abs().max() > 1e-3 and (identity[:, 6:] == 0).all()  # free steps are moved as well


def test_guidance_works_where_gradients_are_off_and_leaves_no_graph(head):
    context = make_context(BATCH)
    with torch.no_grad():
        action = sample(head, context, 0, 5, make_prefix())
    assert not action.requires_grad
    assert all(parameter.grad is None for parameter in head.parameters())


def test_strong_guidance_reproduces_committed_steps(head):
    context, prefix = make_context(BATCH), make_prefix(beta=8.0)
    with torch.no_grad():
        free = sample(head, context, 0, 10)
        bent = sample(head, context, 0, 10, prefix)
    off = lambda action: (action - prefix.action_BTA)[:, :3].abs().mean().item()  # noqa: E731
    assert off(bent) < 0.1 * off(free) and off(free) > 0.5
    weak = sample(head, context, 0, 10, make_prefix(beta=0.5))
    assert off(bent) < off(weak) < off(free)


def test_weight_zero_changes_nothing(head):
    """A sample without a prefix may be in one batch with others; what its prefix holds is never read."""
    context, prefix = make_context(BATCH), make_prefix()
    weight, action = prefix.weight_BT.clone(), prefix.action_BTA.clone()
    weight[1] = 0
    action[1] = float("nan")
    with torch.no_grad():
        bent = sample(head, context, 0, 5, ActionPrefix(action, weight))
        free = sample(head, context, 0, 5)
    torch.testing.assert_close(bent[1], free[1], atol=1e-6, rtol=0)
    assert (bent[0] - free[0]).abs().max() > 0.05


@pytest.mark.parametrize("integrator", ["euler", "midpoint", "heun"])
def test_same_seed_same_chunk(integrator):
    head, context = make_head("flow_matching", horizon=HORIZON, integrator=integrator), make_context(BATCH)
    first, second, other = (sample(head, context, seed, 4, make_prefix()) for seed in (0, 0, 10))
    assert torch.equal(first, second) and not torch.allclose(first, other) and first.isfinite().all()


def test_one_time_for_all_tokens_is_each_token_s_time(head):
    keys_values = head.encode_context(make_context(BATCH))
    x, time = torch.randn(BATCH, HORIZON, 2), torch.rand(BATCH)
    one = head.velocity(x, time, keys_values)
    torch.testing.assert_close(head.velocity(x, time[:, None].expand(-1, HORIZON), keys_values), one)
    changed = time[:, None].repeat(1, HORIZON)
    changed[:, 2] = 1.0
    assert not torch.allclose(head.velocity(x, changed, keys_values)[:, 2], one[:, 2])


def test_training_with_clean_prefixes_has_no_loss_on_them():
    """Replays the draws: noise, time, then how many leading actions are clean."""
    head = make_head("flow_matching", horizon=HORIZON, max_clean_prefix=5, time_distribution="uniform")
    batch, context = 64, make_context(64)
    action = torch.randn(batch, HORIZON, 2, generator=seeded(3))
    loss = head.loss(context, action, no_pad(batch, HORIZON), seeded(5))

    generator = seeded(5)
    noise, time = torch.randn(batch, HORIZON, 2, generator=generator), torch.rand(batch, generator=generator)
    length = (torch.rand(batch, 1, generator=generator) * 6).floor()
    clean = torch.arange(HORIZON) < length
    assert set(length.flatten().tolist()) == {0, 1, 2, 3, 4, 5}
    assert (loss[clean] == 0).all() and (loss[~clean] > 0).all()
    time = torch.where(clean, 1.0, time[:, None])
    x, target = flow_interpolate(noise, action, time)
    torch.testing.assert_close(x[clean], action[clean])
    velocity = head.velocity(x, time, head.encode_context(context), no_pad(batch, HORIZON))
    torch.testing.assert_close(loss, (velocity - target).square().mean(-1).masked_fill(clean, 0.0))


def test_without_clean_prefixes_the_draws_are_as_before():
    """max_clean_prefix 0 takes no random numbers, so runs of older configs repeat."""
    head, generator = make_head("flow_matching", time_distribution="uniform"), seeded(5)
    head.loss(make_context(), torch.randn(3, 4, 2), no_pad(3), generator)
    reference = seeded(5)
    torch.randn(3, 4, 2, generator=reference), torch.rand(3, generator=reference)
    assert torch.equal(torch.rand(1, generator=generator), torch.rand(1, generator=reference))


def test_a_clean_prefix_is_kept_exactly_and_conditions_the_rest():
    head = make_head("flow_matching", horizon=HORIZON, max_clean_prefix=4)
    context, prefix = make_context(BATCH), make_prefix(delay=3, clean=True)
    action = sample(head, context, 0, 5, prefix)
    assert torch.equal(action[:, :3], prefix.action_BTA[:, :3])
    other = ActionPrefix(prefix.action_BTA + 1, prefix.weight_BT, clean=True)
    assert not torch.allclose(sample(head, context, 0, 5, other)[:, 3:], action[:, 3:], atol=1e-3)
    with pytest.raises(ValueError, match="the prefix commits 5 actions, but this policy was trained with max_clean_pr"):
        sample(head, context, 0, 5, make_prefix(delay=5, clean=True))


def test_one_network_learns_to_continue_a_clean_prefix():
    """Two equally good chunks, all +1 and all -1, under one context: the prefix decides which."""
    head = make_head("flow_matching", voice=False, max_clean_prefix=2, time_distribution="uniform").train()
    context = make_context(batch=64)
    blank = {name: torch.zeros_like(getattr(context, name)) for name in ("tokens_BLE", "state_BS")}
    context = dataclasses.replace(context, **blank)
    sign = torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0)[:, None, None]
    optimizer, generator = torch.optim.Adam(head.parameters(), lr=3e-3), seeded(0)
    for _ in range(300):
        optimizer.zero_grad()
        head.loss(context, sign.expand(64, 4, 2), no_pad(64), generator).mean().backward()
        optimizer.step()
    head.eval().requires_grad_(False)
    prefix = ActionPrefix(sign.expand(64, 4, 2), soft_mask(4, 2, 2).expand(64, -1), clean=True)
    continued = sample(head, context, 1, 10, prefix)
    assert ((continued * sign)[:, 2:] > 0.5).float().mean() > 0.95
    free = sample(head, context, 1, 10)
    assert 0.25 < ((free * sign) > 0).float().mean() < 0.75
    guided_too = sample(head, context, 1, 10, ActionPrefix(prefix.action_BTA, prefix.weight_BT))
    assert ((guided_too * sign)[:, 2:] > 0.5).float().mean() > 0.8


def test_integration_of_a_known_field_towards_a_prefix():
    """With v = mean - x the denoised chunk and its Jacobian are known, so the guided field is too."""
    mean, prefix, time = torch.tensor(0.5), make_prefix(), 0.6
    field = guided(lambda x, t: mean - x, prefix)
    x = torch.randn(BATCH, HORIZON, 2, generator=seeded(0))
    jacobian = 1 - (1 - time)  # of x + (1 - t)(mean - x)
    error = prefix.weight_BT[..., None] * (prefix.action_BTA - (jacobian * x + (1 - time) * mean))
    torch.testing.assert_close(field(x, time), mean - x + guidance_weight(time, 5.0) * jacobian * error)
    assert integrate(field, x, 10).isfinite().all()


@pytest.fixture(scope="module")
def delta_predictor(tmp_path_factory, tiny_paligemma_dir):
    folder = tmp_path_factory.mktemp("delta")
    files = [write_episodes(folder / "a.parquet", [10, 9])]
    sections = {"data": {"action_mode": "delta", "absolute_action_dims": [3]}, "head": {"max_clean_prefix": 2}}
    return VLAPredictor.from_checkpoint(train_tiny(folder, tiny_paligemma_dir, files, **sections), "cpu")


def observe(predictor, state):
    image = np.full((40, 40, 3), 90, np.uint8)
    return predictor.observe(image, prompt="press the button", state=state)


def test_a_prefix_is_normalized_for_the_new_state(delta_predictor):
    """Physical actions are committed; in delta mode the same action is another number once the robot has moved."""
    state = np.array([0.1, 0.2, 0.3, 1.0], np.float32)
    committed = torch.tensor([[0.3, -0.2, 0.5, 0.1]]).expand(1, 4, 4)
    prefix = ActionPrefix(committed, soft_mask(4, 2, 2)[None], clean=True)
    for moved in (0.0, 0.7):
        action = delta_predictor.predict_batch(observe(delta_predictor, state + moved), [0], prefix=prefix)
        np.testing.assert_allclose(action[0, :2], committed[0, :2], atol=1e-5)


def test_a_prefix_for_a_batch(delta_predictor):
    states = [np.full(4, value, np.float32) for value in (0.1, 0.6)]
    samples = [observe(delta_predictor, state) for state in states]
    batch = {
        key: torch.cat([sample[key] for sample in samples])
        if torch.is_tensor(samples[0][key])
        else sum((sample[key] for sample in samples), [])
        for key in samples[0]
    }
    weight = torch.stack([soft_mask(4, 2, 3), torch.zeros(4)])
    prefix = ActionPrefix(torch.full((2, 4, 4), 0.4), weight)
    together = delta_predictor.predict_batch(batch, [3, 4], prefix=prefix)
    first = ActionPrefix(prefix.action_BTA[:1], weight[:1])
    np.testing.assert_allclose(together[0], delta_predictor.predict_batch(samples[0], [3], prefix=first)[0], atol=1e-5)
    np.testing.assert_allclose(together[1], delta_predictor.predict_batch(samples[1], [4])[0], atol=1e-5)


def test_heads_that_cannot_continue_say_so(tmp_path, tiny_paligemma_dir):
    files = [write_episodes(tmp_path / "a.parquet", [10])]
    predictor = VLAPredictor.from_checkpoint(
        train_tiny(tmp_path, tiny_paligemma_dir, files, head={"type": "regression"}), "cpu"
    )
    prefix = ActionPrefix(torch.zeros(1, 4, 4), torch.ones(1, 4))
    with pytest.raises(ValueError, match="RegressionActionHead cannot continue a chunk; execute synchronous"):
        predictor.predict_batch(observe(predictor, np.zeros(4, np.float32)), [0], prefix=prefix)
