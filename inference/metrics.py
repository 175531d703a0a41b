"""The numbers of an evaluation: errors of predicted chunks, trivial predictors to compare with, success intervals.

utils/metrics.py computes the errors, for validation during training needs them too. This file adds the trivial
predictors and the intervals. Both are plain numpy and need no model.

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
    """A trivial predictor: the mean action of the training data at every step of the chunk, (N, A) -> (N, T, A)."""
    return np.repeat(np.asarray(mean_action_NA)[:, None], horizon, axis=1)


def repeat_last_action_prediction(
    previous_action_N: Sequence[np.ndarray | None], mean_action_NA: np.ndarray, horizon: int
) -> np.ndarray:
    """A trivial predictor: the action that was executed just before, repeated at every step of the chunk.

    Args:
        previous_action_N: for each sample the action (A,) of the step before. None at an episode's first step, where
            nothing was executed yet; the mean action is predicted there.
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
        ValueError: there are no episodes, or fewer than 0 or more than `episodes` successes.
    """
    if episodes <= 0 or not 0 <= successes <= episodes:
        raise ValueError(f"{successes} successes of {episodes} episodes: no interval; give 0 <= successes <= episodes")
    z = 1.959963984540054
    rate = successes / episodes
    center = (rate + z * z / (2 * episodes)) / (1 + z * z / episodes)
    half = z / (1 + z * z / episodes) * math.sqrt(rate * (1 - rate) / episodes + z * z / (4 * episodes**2))
    return max(0.0, center - half), min(1.0, center + half)
