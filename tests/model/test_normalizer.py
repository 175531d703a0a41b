"""Normalization: exact round trips, constant dimensions, one set of statistics per dataset."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.normalizer import Normalizer

DIM = 5


def statistics_of(values: np.ndarray) -> dict[str, list[float]]:
    q01, q99 = np.quantile(values, [0.01, 0.99], axis=0)
    found = dict(min=values.min(0), max=values.max(0), mean=values.mean(0), std=values.std(0), q01=q01, q99=q99)
    return {name: [float(x) for x in row] for name, row in found.items()}


@pytest.fixture
def values():
    generator = np.random.default_rng(0)
    data = (generator.normal(size=(400, DIM)) * [1, 10, 0.01, 1000, 0] + [0, 5, 1, -2000, 0.3]).astype(np.float32)
    return data


@pytest.mark.parametrize("kind", ["min_max", "quantile", "mean_std"])
def test_round_trip_and_constant_dimension(values, kind):
    statistics = {"state": statistics_of(values), "action": statistics_of(values)}
    normalizer = Normalizer([statistics], kind, (-1.0, 1.0))
    action_BTA = torch.from_numpy(values).view(50, 8, DIM)
    index = torch.zeros(50, dtype=torch.int64)
    normalized = normalizer.normalize_action(action_BTA, index)
    back = normalizer.denormalize_action(normalized, index)
    scale = action_BTA.abs().amax(dim=(0, 1))
    assert ((back - action_BTA).abs().amax(dim=(0, 1)) / scale).max() < 1e-6
    constant = torch.tensor(0.3, dtype=torch.float32)
    assert (back[..., 4] == constant).all() and (normalized[..., 4] == 0).all()
    wild = normalizer.denormalize_action(torch.full((50, 8, DIM), 3.0), index)
    assert (wild[..., 4] == constant).all(), "whatever a head predicts, a constant dimension stays what it was"
    torch.testing.assert_close(normalizer.normalize_state(action_BTA[:, 0], index), normalized[:, 0])


@pytest.mark.parametrize("kind", ["min_max", "quantile", "mean_std"])
def test_a_dimension_that_rarely_changes_is_not_constant(values, kind):
    values[:, 2] = 0
    values[7, 2] = 1  # 1 of 400: both quantiles are 0
    normalizer = Normalizer([{"state": statistics_of(values), "action": statistics_of(values)}], kind, (-1.0, 1.0))
    action, index = torch.from_numpy(values)[None], torch.zeros(1, dtype=torch.int64)
    back = normalizer.denormalize_action(normalizer.normalize_action(action, index), index)
    torch.testing.assert_close(back[..., 2], action[..., 2], atol=1e-6, rtol=0)


def test_ranges(values):
    statistics = {"state": statistics_of(values), "action": statistics_of(values)}
    index, action = torch.zeros(1, dtype=torch.int64), torch.from_numpy(values)[None]
    bounded = Normalizer([statistics], "min_max", (-2.0, 3.0)).normalize_action(action, index)[0, :, :4]
    torch.testing.assert_close(bounded.amin(0), torch.full((4,), -2.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(bounded.amax(0), torch.full((4,), 3.0), atol=1e-4, rtol=0)
    quantile = Normalizer([statistics], "quantile", (-1.0, 1.0)).normalize_action(action, index)[0, :, :4]
    inside = (quantile.abs() <= 1).float().mean(0)
    assert ((inside > 0.97) & (inside < 0.99)).all()
    standard = Normalizer([statistics], "mean_std", (-1.0, 1.0)).normalize_action(action, index)[0, :, :4]
    torch.testing.assert_close(standard.std(0, correction=0), torch.ones(4), atol=1e-3, rtol=0)


def test_each_dataset_has_its_own_statistics(values):
    sets = [{"state": statistics_of(v), "action": statistics_of(v)} for v in (values, values * 2 + 1)]
    normalizer = Normalizer(sets, "min_max", (-1.0, 1.0))
    action = torch.from_numpy(values[:2]).view(2, 1, DIM)
    mixed = normalizer.normalize_action(action, torch.tensor([0, 1]))
    for i in range(2):
        alone = Normalizer([sets[i]], "min_max", (-1.0, 1.0)).normalize_action(
            action, torch.zeros(2, dtype=torch.int64)
        )
        torch.testing.assert_close(mixed[i], alone[i])


def test_statistics_are_part_of_the_state_dict(values):
    statistics = {"state": statistics_of(values), "action": statistics_of(values)}
    names = Normalizer([statistics], "min_max", (-1.0, 1.0)).state_dict()
    assert {"state_center", "state_slope", "action_center", "action_slope", "action_constant"} <= set(names)
