"""What an evaluation measures: errors of predicted chunks, trivial predictors to compare with, success intervals.

The errors themselves are in utils/metrics.py, which validation during training uses too; here is what only an
evaluation needs. Plain numpy, no model needed.

Shape letters: N samples, T horizon, A per_action_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from utils.metrics import METRICS, MetricAccumulator, MetricSettings, NonFiniteError

__all__ = [
    "METRICS",
    "MetricAccumulator",
    "MetricSettings",
    "NonFiniteError",
    "mean_action_prediction",
    "repeat_last_action_prediction",
    "wilson_interval",
]


def mean_action_prediction(mean_action_NA: np.ndarray, horizon: int) -> np.ndarray:
    """The first trivial predictor: the training data's mean action at every step, (N, A) -> (N, T, A)."""
    return np.repeat(np.asarray(mean_action_NA)[:, None], horizon, axis=1)


def repeat_last_action_prediction(
    previous_action_N: Sequence[np.ndarray | None], mean_action_NA: np.ndarray, horizon: int
) -> np.ndarray:
    """The second trivial predictor: the action executed just before, at every step.

    Args:
        previous_action_N: per sample the (A,) action of the step before, or None at an episode's first step,
            where no action has been executed yet: the mean action stands in.
        mean_action_NA: (N, A), physical units.

    Returns:
        (N, T, A) in physical units.
    """
    rows = [
        mean if previous is None else previous
        for previous, mean in zip(previous_action_N, np.asarray(mean_action_NA), strict=True)
    ]
    return np.repeat(np.stack(rows)[:, None], horizon, axis=1)


def wilson_interval(successes: int, episodes: int) -> tuple[float, float]:
    """The 95 % score interval of a success rate (Wilson 1927), as (low, high) in [0, 1].

    Raises:
        ValueError: no episodes, or a count of successes that they cannot have.
    """
    if episodes <= 0 or not 0 <= successes <= episodes:
        raise ValueError(f"{successes} successes of {episodes} episodes: no interval; give 0 <= successes <= episodes")
    z = 1.959963984540054
    rate = successes / episodes
    center = (rate + z * z / (2 * episodes)) / (1 + z * z / episodes)
    half = z / (1 + z * z / episodes) * math.sqrt(rate * (1 - rate) / episodes + z * z / (4 * episodes**2))
    return max(0.0, center - half), min(1.0, center + half)
