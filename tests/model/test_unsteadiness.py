"""How unsure a head was, and several draws of one context: the same numbers as draw by draw, NaN where none mean
anything."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from model.action_head.unsteadiness import wandering
from model.context import ActionPrefix
from tests.model.heads import make_context, seeded
from tests.model.test_heads import every_variant, variant

STEPS = 5


def noise_of(head, draws, batch=3, steps=STEPS):
    """(K, B, ...) of noise, or a None for each draw."""
    drawn = [
        head.draw_noise([seeded(100 * k + row) for row in range(batch)], torch.device("cpu"), steps)
        for k in range(draws)
    ]
    return drawn if drawn[0] is None else torch.stack(drawn)


def test_only_what_changes_wanders():
    exists = torch.ones(2, 1, 3)
    steady = torch.randn(2, 4, 3)
    torch.testing.assert_close(wandering([steady] * 3, exists), torch.zeros(2, 4))
    assert wandering([steady], exists).isnan().all()
    two = wandering([steady - 0.5, steady + 0.5], exists)
    torch.testing.assert_close(two, torch.full((2, 4), 0.5))
    about_the_last = wandering([steady - 1, steady], exists, steady)
    torch.testing.assert_close(about_the_last, torch.full((2, 4), 0.5**0.5))
    # dimensions that do not exist, and padding beyond them, have no part in it
    exists[..., 2] = 0.0
    noisy = [torch.cat([steady[..., :2], torch.randn(2, 4, 3)], dim=-1) for _ in range(3)]
    torch.testing.assert_close(wandering(noisy, exists), torch.zeros(2, 4))


def test_eulers_velocities_give_the_straightness_of_the_path():
    head, context = variant("flow_matching"), make_context()
    noise = noise_of(head, 1)
    actions, unsure = head.sample_draws(context, noise, STEPS)
    x, velocities = noise[0], []
    with torch.no_grad():
        for step in range(STEPS):
            time = torch.full((3,), step / STEPS)
            velocities.append(head.velocity(x, time, head.encode_context(context)))
            x = x + velocities[-1] / STEPS
    way = actions[0] - noise[0]
    wanted = torch.stack([(v - way).square().mean(dim=-1) for v in velocities]).mean(dim=0).sqrt()
    torch.testing.assert_close(unsure[0], wanted, atol=1e-5, rtol=1e-4)


@every_variant
@torch.no_grad()
def test_draws_together_are_the_draws_one_by_one(name):
    head, context = variant(name), make_context()
    noise = noise_of(head, 3)
    actions, unsure = head.sample_draws(context, noise, STEPS)
    assert actions.shape == (3, 3, 4, 2) and unsure.shape == (3, 3, 4) and unsure.dtype == torch.float32
    for k in range(3):
        torch.testing.assert_close(actions[k], head.sample(context, noise[k], STEPS), atol=1e-5, rtol=1e-4)
        _, alone = head.sample_draws(context, noise[k : k + 1], STEPS)
        torch.testing.assert_close(unsure[k], alone[0], atol=1e-5, rtol=1e-4, equal_nan=True)
    assert unsure.isnan().all() if head.uncertainty is None else (unsure > 0).all()


@every_variant
@torch.no_grad()
def test_one_step_says_nothing(name):
    head = variant(name)
    _, unsure = head.sample_draws(make_context(), noise_of(head, 2, steps=1), 1)
    assert unsure.isnan().all() if head.uncertainty != "entropy" else unsure.isfinite().all()


@pytest.mark.parametrize("clean", [False, True])
@torch.no_grad()
def test_a_held_chunk_says_nothing_and_draws_are_as_alone(clean):
    head, context = variant("flow_matching", max_clean_prefix=2), make_context()
    weight = torch.tensor([1.0, 1.0, 0.3, 0.0]).repeat(3, 1)
    prefix = ActionPrefix(torch.randn(3, 4, 2), weight, clean=clean)
    noise = noise_of(head, 2)
    actions, unsure = head.sample_draws(context, noise, STEPS, prefix=prefix)
    assert unsure.shape == (2, 3, 4) and unsure.isnan().all()
    for k in range(2):
        torch.testing.assert_close(actions[k], head.sample(context, noise[k], STEPS, prefix=prefix))


@torch.no_grad()
def test_bins_that_are_all_alike_have_the_largest_entropy():
    head, context = variant("discrete"), make_context()
    torch.nn.init.zeros_(head.mlp[-1].weight)
    torch.nn.init.zeros_(head.mlp[-1].bias)
    _, unsure = head.sample_draws(context, [None], STEPS)
    torch.testing.assert_close(unsure, torch.full((1, 3, 4), math.log(32)))
    missing = dataclasses.replace(context, action_dim_mask_BA=torch.tensor([[True, False]] * 3))
    torch.testing.assert_close(head.sample_draws(missing, [None], STEPS)[1], unsure)
