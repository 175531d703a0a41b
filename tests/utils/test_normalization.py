"""Normalization of published policies, against LeRobot's own values and openpi's formulae."""

from __future__ import annotations

import pytest
import torch

from tests.pi_fixtures import KINDS, arrays, folder
from utils.normalization import published_scaling
from utils.policy_folder import read_policy_folder
from utils.statistics import StatisticsError


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_lerobots_to_the_bit(kind: str) -> None:
    policy, found = read_policy_folder(folder(kind) / "policy"), arrays(kind, "processors")
    for name, width in (("state", 8), ("action", 7)):
        scaling = published_scaling(policy.statistics[name], policy.normalization[name], "lerobot", width)
        assert torch.equal(scaling.normalize(found[f"raw_{name}"]), found[f"{name}_normalized"])
    assert torch.equal(scaling.denormalize(found["post_in"]), found["post_out"])


@pytest.mark.parametrize("kind", KINDS)
def test_relative_actions_are_lerobots(kind: str) -> None:
    policy, found = read_policy_folder(folder(kind) / "policy"), arrays(kind, "relative")
    raw = arrays(kind, "processors")
    origin = torch.zeros(3, 1, 7)
    origin[..., :6] = raw["raw_state"][:, None, :6]
    scaling = published_scaling(policy.statistics["action"], policy.normalization["action"], "lerobot", 7)
    assert torch.equal(scaling.normalize(raw["raw_action"] - origin), found["action_normalized"])
    assert torch.equal(scaling.denormalize(found["post_in"]) + origin, found["post_out"])


STATISTICS = {"min": [-2.0, 1.0], "max": [2.0, 1.0], "q10": [-1.0, 1.0], "q90": [1.0, 1.0]}
STATISTICS |= {"mean": [0.5, 1.0], "std": [2.0, 0.0], "q01": [-1.5, 1.0], "q99": [1.5, 1.0]}


@pytest.mark.parametrize(
    ("mode", "arithmetic", "normalized", "restored"),
    [
        ("mean_std", "lerobot", [0.25, 0.0], [2.5, 1.0]),
        ("min_max", "lerobot", [0.5, -1.0], [2.0, 1.0]),
        ("quantile", "lerobot", [2 / 3, -1.0], [1.5, 1.0]),
        ("quantile10", "lerobot", [1.0, -1.0], [1.0, 1.0]),
        ("mean_std", "openpi", [0.25, 0.0], [2.500001, 1.000001]),
        ("quantile", "openpi", [2 / 3, -1.0], [1.500001, 1.000001]),
        ("identity", "openpi", [1.0, 1.0], [1.0, 1.0]),
    ],
)
def test_every_mode(mode: str, arithmetic: str, normalized: list[float], restored: list[float]) -> None:
    scaling = published_scaling(STATISTICS, mode, arithmetic, 2)
    torch.testing.assert_close(scaling.normalize(torch.ones(2)), torch.tensor(normalized), atol=1e-6, rtol=0)
    torch.testing.assert_close(scaling.denormalize(torch.ones(2)), torch.tensor(restored), atol=1e-6, rtol=0)


def test_missing_statistics_are_named() -> None:
    with pytest.raises(StatisticsError, match="normalization quantile needs q01 and q99; there are mean, std"):
        published_scaling({"mean": [0.0], "std": [1.0]}, "quantile", "openpi", 1)
    with pytest.raises(StatisticsError, match="needs mean and std; there are none at all"):
        published_scaling({}, "mean_std", "lerobot", 1)
