"""Statistics beside data: shares outside, what values become, and the mistake that explains it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.comparison.fit import as_table, statistics_fit
from model.published_normalizer import build_normalizer
from utils.config_utils import ConfigError, DataConfig, config_from_dict


def statistics_of(values):
    names = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    names |= {f"q{q:02d}": np.quantile(values, q / 100, axis=0) for q in (1, 10, 90, 99)}
    return {name: value.tolist() for name, value in names.items()}


@pytest.fixture
def arm():
    """float (4000, 3): two joints in radians and a gripper."""
    rng = np.random.default_rng(0)
    return np.stack([rng.uniform(-1.2, 0.4, 4000), rng.uniform(0.5, 2.5, 4000), rng.beta(0.3, 1.2, 4000)], axis=1)


def kinds(values, made_of, *, of_training=False, **settings):
    statistics = {name: statistics_of(data) for name, data in made_of.items()}
    table, found = statistics_fit(values, statistics, DataConfig(**settings), of_training=of_training)
    return table, {(mismatch.kind, mismatch.where) for mismatch in found}


def test_data_fit_their_own_statistics(arm):
    table, found = kinds({"state": arm[::2]}, {"state": arm})
    assert not found and [fit.name for fit in table] == ["state[0]", "state[1]", "state[2]"]
    assert all(abs(fit.outside - 0.02) < 0.01 and -1 <= fit.mapped[0] < fit.mapped[1] <= 1 for fit in table)
    lines = as_table(table).splitlines()
    assert lines[0].split()[:4] == ["dimension", "outside", "q01", "to"] and len(lines) == 5


@pytest.mark.parametrize(
    ("change", "kind", "where"),
    [
        (lambda v: v * (180 / np.pi, 180 / np.pi, 1), "degrees_for_radians", "state"),
        (lambda v: v * (1000, 1000, 1), "thousandfold", "state"),
        (lambda v: v[:, [1, 0, 2]], "dimensions_exchanged", "state"),
        (lambda v: v * (1, 1, -1) + (0, 0, 1), "inverted", "state[2]"),
        (lambda v: v * (1, -1, 1), "sign_reversed", "state[1]"),
        (lambda v: v + (5, 0, 0), "outside_training", "state[0]"),
        (lambda v: v[:, [0, 0, 2]], "duplicated", "state[1]"),
    ],
)
def test_a_mistake_is_named(arm, change, kind, where):
    assert (kind, where) in kinds({"state": change(arm)}, {"state": arm})[1]


def test_a_tiny_scale_blows_up_and_a_wild_value_flattens(arm):
    still = arm.copy()
    still[:, 0] = 0.3 + 1e-3 * arm[:, 0]
    table, found = kinds({"state": arm}, {"state": still})
    assert ("blown_up", "state[0]") in found and abs(table[0].mapped[0]) > 100
    wild = arm.copy()
    wild[7, 1] = 4000.0
    assert ("flattened", "state[1]") in kinds({"state": wild}, {"state": wild}, of_training=True)[1]
    found = kinds({"state": wild}, {"state": wild}, of_training=True, normalization_type="quantile")[1]
    assert found == set(), "quantiles are not moved by it"
    still[:, 0] = 0.3
    assert ("constant_in_statistics", "state[0]") in kinds({"state": arm}, {"state": still})[1]


def test_what_training_shows_too_is_said_of_training_alone(arm):
    twins = arm[:, [0, 0, 2]]
    twins[7, 2] = 4000.0
    said = {("duplicated", "state[1]"), ("flattened", "state[2]")}
    assert kinds({"state": twins}, {"state": twins}, of_training=True)[1] == said
    assert kinds({"state": twins[8:]}, {"state": twins})[1] == set()


def test_relative_where_absolute_was_declared(arm):
    targets = arm[1:]
    found = kinds({"state": arm[:-1], "action": targets - arm[:-1]}, {"state": arm[:-1], "action": targets})[1]
    assert ("relative_for_absolute", "action") in found
    deltas = 0.01 * (targets - arm[:-1])
    found = kinds({"state": arm[:-1], "action": arm[:-1] + deltas}, {"state": arm[:-1], "action": deltas})[1]
    assert ("absolute_for_relative", "action") in found


@pytest.mark.parametrize("mode", ["min_max", "quantile", "mean_std", "quantile10", "identity"])
@pytest.mark.parametrize("state_mode", [None, "quantile10", "identity"])
@pytest.mark.parametrize("whose", ["own", "lerobot", "openpi"])
def test_values_become_what_the_model_normalizes_them_to(arm, whose, mode, state_mode):
    settings = {"normalization_arithmetic": whose, "normalization_type": mode, "state_normalization_type": state_mode}
    if whose == "own" and (state_mode or mode in ("quantile10", "identity")):
        with pytest.raises(ConfigError):
            DataConfig(**settings)
        return
    arm[:20, 2], arm[20:, 2] = 1.0, 0.0  # a gripper that shuts so rarely that its quantiles are equal
    columns, statistics = {"state": arm, "action": arm}, {name: statistics_of(arm) for name in ("state", "action")}
    head = {"horizon": 2, "per_action_dim": 3}
    config = config_from_dict({"data": settings | {"state_dim": 3}, "model": {"action_head_config": head}})
    table, _ = statistics_fit(columns, statistics, config.data, of_training=True)
    normalizer, first = build_normalizer(config, [statistics]), torch.zeros(1, dtype=torch.int64)
    ends = torch.tensor(np.quantile(arm, (0.01, 0.99), axis=0), dtype=torch.float32)
    state = torch.stack([normalizer.normalize_state(row[None], first)[0] for row in ends], dim=1)
    action = normalizer.normalize_action(ends[None], torch.zeros(1, 3), first)[0].T
    found = torch.tensor([fit.mapped for fit in table])
    torch.testing.assert_close(found, torch.cat([state, action]))
