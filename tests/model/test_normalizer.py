"""Normalization: exact round trips, constant dimensions, one set of statistics per dataset."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.normalizer import Normalizer
from utils.config_utils import config_from_dict
from utils.normalization import WIDEST

DIM = 5


def make(statistics, kind, bounds=(-1.0, 1.0), **options):
    return Normalizer(statistics, kind, bounds, **({"state_dim": DIM, "per_action_dim": DIM} | options))


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
    normalizer = make([statistics], kind, (-1.0, 1.0))
    action_BTA = torch.from_numpy(values).view(50, 8, DIM)
    index = torch.zeros(50, dtype=torch.int64)
    normalized = normalizer.normalize_action(action_BTA, action_BTA[:, 0], index)
    back = normalizer.denormalize_action(normalized, action_BTA[:, 0], index)
    scale = action_BTA.abs().amax(dim=(0, 1))
    assert ((back - action_BTA).abs().amax(dim=(0, 1)) / scale).max() < 1e-6
    constant = torch.tensor(0.3, dtype=torch.float32)
    assert (back[..., 4] == constant).all() and (normalized[..., 4] == 0).all()
    wild = normalizer.denormalize_action(torch.full((50, 8, DIM), 3.0), action_BTA[:, 0], index)
    assert (wild[..., 4] == constant).all(), "whatever a head predicts, a constant dimension stays what it was"
    torch.testing.assert_close(normalizer.normalize_state(action_BTA[:, 0], index), normalized[:, 0])


@pytest.mark.parametrize("kind", ["min_max", "quantile", "mean_std"])
def test_a_dimension_that_rarely_changes_is_not_constant(values, kind):
    values[:, 2] = 0
    values[7, 2] = 1  # 1 of 400: both quantiles are 0
    normalizer = make([{"state": statistics_of(values), "action": statistics_of(values)}], kind, (-1.0, 1.0))
    action, index = torch.from_numpy(values)[None], torch.zeros(1, dtype=torch.int64)
    back = normalizer.denormalize_action(normalizer.normalize_action(action, action[:, 0], index), action[:, 0], index)
    torch.testing.assert_close(back[..., 2], action[..., 2], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["min_max", "quantile", "mean_std"])
def test_a_nearly_constant_dimension_with_noise(kind):
    """A wrist that rests, with encoder noise, and moves in 0.7 % of the steps."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(900, DIM)).astype(np.float32)
    values[:, 3] = 1.569 + rng.normal(0, 2e-4, 900)
    values[60:66, 3] = 0.0
    normalizer = make([{"state": statistics_of(values), "action": statistics_of(values)}], kind)
    action, index = torch.from_numpy(values)[None], torch.zeros(1, dtype=torch.int64)
    normalized = normalizer.normalize_action(action, action[:, 0], index)
    assert normalized.abs().max() <= WIDEST + 1
    assert normalizer.action_range.extremes_2A.abs().max() <= WIDEST + 1
    back = normalizer.denormalize_action(normalized, action[:, 0], index)
    torch.testing.assert_close(back, action, atol=1e-5, rtol=0)


def test_ranges(values):
    statistics = {"state": statistics_of(values), "action": statistics_of(values)}
    index, action = torch.zeros(1, dtype=torch.int64), torch.from_numpy(values)[None]
    bounded = make([statistics], "min_max", (-2.0, 3.0)).normalize_action(action, action[:, 0], index)[0, :, :4]
    torch.testing.assert_close(bounded.amin(0), torch.full((4,), -2.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(bounded.amax(0), torch.full((4,), 3.0), atol=1e-4, rtol=0)
    quantile = make([statistics], "quantile", (-1.0, 1.0)).normalize_action(action, action[:, 0], index)[0, :, :4]
    inside = (quantile.abs() <= 1).float().mean(0)
    assert ((inside > 0.97) & (inside < 0.99)).all()
    standard = make([statistics], "mean_std", (-1.0, 1.0)).normalize_action(action, action[:, 0], index)[0, :, :4]
    torch.testing.assert_close(standard.std(0, correction=0), torch.ones(4), atol=1e-3, rtol=0)


def test_each_dataset_has_its_own_statistics(values):
    sets = [{"state": statistics_of(v), "action": statistics_of(v)} for v in (values, values * 2 + 1)]
    normalizer = make(sets, "min_max", (-1.0, 1.0))
    action = torch.from_numpy(values[:2]).view(2, 1, DIM)
    mixed = normalizer.normalize_action(action, action[:, 0], torch.tensor([0, 1]))
    for i in range(2):
        first = torch.zeros(2, dtype=torch.int64)
        alone = make([sets[i]], "min_max").normalize_action(action, action[:, 0], first)
        torch.testing.assert_close(mixed[i], alone[i])


def test_statistics_are_part_of_the_state_dict(values):
    statistics = {"state": statistics_of(values), "action": statistics_of(values)}
    names = make([statistics], "min_max", (-1.0, 1.0)).state_dict()
    assert {"state_center", "state_slope", "action_center", "action_slope", "action_constant"} <= set(names)


@pytest.mark.parametrize("kind", ["min_max", "quantile", "mean_std"])
def test_delta_mode_round_trips(values, kind):
    """Deltas are taken against the state and undone exactly; a gripper dimension stays absolute."""
    state = torch.from_numpy(values[:50])
    action = torch.from_numpy(values[50:250]).view(50, 4, DIM)
    deltas = (action - torch.where(torch.arange(DIM) == 3, 0.0, state)[:, None]).reshape(-1, DIM).numpy()
    statistics = {"state": statistics_of(values), "action": statistics_of(deltas)}
    normalizer, index = make([statistics], kind, delta_dims=(0, 1, 2, 4)), torch.zeros(50, dtype=torch.int64)
    normalized = normalizer.normalize_action(action, state, index)
    back = normalizer.denormalize_action(normalized, state, index)
    scale = action.abs().amax(dim=(0, 1))
    assert ((back - action).abs().amax(dim=(0, 1)) / scale).max() < 1e-6
    moved = normalizer.normalize_action(action + 5, state + 5, index)
    torch.testing.assert_close(moved[..., 1], normalized[..., 1], atol=1e-5, rtol=0)
    assert (moved[..., 3] - normalized[..., 3]).abs().min() > 0


def test_padded_dimensions_are_zero_on_both_sides(values):
    wide = {"state": statistics_of(values), "action": statistics_of(values)}
    narrow = {"state": statistics_of(values[:, :2]), "action": statistics_of(values[:, :3])}
    normalizer, index = make([wide, narrow], "min_max"), torch.tensor([0, 1])
    action = torch.from_numpy(values[:4]).view(2, 2, DIM)
    normalized = normalizer.normalize_action(action, action[:, 0], index)
    assert (normalized[1, :, 3:] == 0).all() and (normalized[0] != 0).any(dim=0).sum() >= 4
    assert (normalizer.denormalize_action(torch.ones(2, 2, DIM), action[:, 0], index)[1, :, 3:] == 0).all()
    assert (normalizer.normalize_state(action[:, 0], index)[1, 2:] == 0).all()
    assert normalizer.action_dim_mask(index).tolist() == [[True] * 5, [True] * 3 + [False] * 2]


def test_clipping_bounds_states_and_predictions(values):
    statistics = {"state": statistics_of(values), "action": statistics_of(values)}
    normalizer, index = make([statistics], "mean_std", clip=1.5), torch.zeros(1, dtype=torch.int64)
    wild = torch.full((1, 1, DIM), 1e6)
    assert normalizer.normalize_state(wild[:, 0], index).abs().max() == 1.5
    bound = normalizer.denormalize_action(torch.full((1, 1, DIM), 1.5), wild[:, 0], index)
    assert torch.equal(normalizer.denormalize_action(wild, wild[:, 0], index), bound)


def test_the_configuration_decides(values):
    statistics = {"state": statistics_of(values), "action": statistics_of(values)}
    config = config_from_dict(
        {
            "data": {
                "state_dim": DIM,
                "normalization_type": "quantile",
                "clip_normalized": 1.5,
                "action_mode": "delta",
                "absolute_action_dims": [3],
            },
            "model": {"action_head_config": {"per_action_dim": DIM}},
        }
    )
    built = Normalizer.from_config(config, [statistics])
    expected = make([statistics], "quantile", delta_dims=(0, 1, 2, 4), clip=1.5)
    assert built.clip == 1.5 and all(torch.equal(v, expected.state_dict()[k]) for k, v in built.state_dict().items())


@pytest.mark.parametrize("kind", ["min_max", "quantile", "mean_std"])
def test_action_range(kind):
    """Where training actions lie after normalization: what bins cover, and what no clip may cut off."""
    action = np.random.default_rng(0).normal(size=(500, 3)) * [1, 10, 0] + [0, 5, 2]
    action[7] = [9, -80, 2]  # outliers; the last dimension never changes
    found = statistics_of(action)
    normalizer = make([{"state": found, "action": found}], kind, state_dim=3, per_action_dim=4)
    values = torch.tensor(action, dtype=torch.float32)[None]
    padded = torch.nn.functional.pad(values, (0, 1))
    normal = normalizer.normalize_action(padded, torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64))[0]
    covered, extremes = normalizer.action_range
    torch.testing.assert_close(extremes[:, :2], torch.stack([normal.amin(0), normal.amax(0)])[:, :2])
    unit = torch.tensor([[-1.0], [1.0]]).expand(2, 2)
    assert torch.equal(extremes[:, 2:], unit), "constant and missing dimensions"
    torch.testing.assert_close(covered, extremes if kind == "mean_std" else unit.repeat(1, 2))
    assert (extremes.abs().max() > 2) == (kind != "min_max")
