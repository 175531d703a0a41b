"""Offline metrics of predicted action chunks, and the intervals of success rates.

A metric is one small function from `ActionErrors` to an array (N, T, A), listed in METRICS; the accumulator
does the masking, the averaging and the breakdowns. Plain numpy, no model needed.

Shape letters: N samples, T horizon, A per_action_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


class NonFiniteError(ValueError):
    """An action is NaN or infinite where it counts."""


@dataclass(frozen=True)
class MetricSettings:
    """What the accuracies mean.

    Attributes:
        num_action_bins: bins of binned accuracy per dimension, over `action_bounds`.
        action_bounds: (low, high) of the normalized range; values outside fall in the outermost bins.
        accuracy_threshold: threshold accuracy counts |error| below this, in normalized units.
    """

    num_action_bins: int = 256
    action_bounds: tuple[float, float] = (-1.0, 1.0)
    accuracy_threshold: float = 0.1


@dataclass(frozen=True)
class ActionErrors:
    """What a metric sees: predictions and ground truth in both units, each float64 (N, T, A).

    Padded steps hold zeros in all four arrays, so that a metric may compute with them; the accumulator
    leaves them out by `valid_NT`.
    """

    predicted_NTA: np.ndarray
    true_NTA: np.ndarray
    predicted_normalized_NTA: np.ndarray
    true_normalized_NTA: np.ndarray
    valid_NT: np.ndarray
    settings: MetricSettings

    def bins_NTA(self, normalized_NTA: np.ndarray) -> np.ndarray:
        """Bin index, 0 to num_action_bins - 1, of each normalized value."""
        low, high = self.settings.action_bounds
        index = np.floor((normalized_NTA - low) / (high - low) * self.settings.num_action_bins)
        return np.clip(index, 0, self.settings.num_action_bins - 1)


def _mse(errors: ActionErrors) -> np.ndarray:
    return (errors.predicted_NTA - errors.true_NTA) ** 2


def _mae(errors: ActionErrors) -> np.ndarray:
    return np.abs(errors.predicted_NTA - errors.true_NTA)


def _mse_normalized(errors: ActionErrors) -> np.ndarray:
    return (errors.predicted_normalized_NTA - errors.true_normalized_NTA) ** 2


def _mae_normalized(errors: ActionErrors) -> np.ndarray:
    return np.abs(errors.predicted_normalized_NTA - errors.true_normalized_NTA)


def _bin_distance(errors: ActionErrors) -> np.ndarray:
    return np.abs(errors.bins_NTA(errors.predicted_normalized_NTA) - errors.bins_NTA(errors.true_normalized_NTA))


def _binned_accuracy(errors: ActionErrors) -> np.ndarray:
    return _bin_distance(errors) == 0


def _binned_accuracy_within_1(errors: ActionErrors) -> np.ndarray:
    return _bin_distance(errors) <= 1


def _threshold_accuracy(errors: ActionErrors) -> np.ndarray:
    return _mae_normalized(errors) < errors.settings.accuracy_threshold


# A new metric is one more function here. It may return NaN where it is not defined (a second difference at
# the first two steps, an endpoint error before the endpoint): those entries are left out of its means.
METRICS: dict[str, Callable[[ActionErrors], np.ndarray]] = {
    "mse": _mse,
    "mae": _mae,
    "mse_normalized": _mse_normalized,
    "mae_normalized": _mae_normalized,
    "binned_accuracy": _binned_accuracy,
    "binned_accuracy_within_1": _binned_accuracy_within_1,
    "threshold_accuracy": _threshold_accuracy,
}


class MetricAccumulator:
    """Sums every metric of METRICS over batches, and breaks the means down.

    Args:
        dataset_names: the name of each dataset; `dataset_index` of `update` counts into it.
        horizon: T. per_action_dim: A.
        settings: bins, bounds and threshold of the accuracies.
    """

    def __init__(
        self, dataset_names: Sequence[str], horizon: int, per_action_dim: int, settings: MetricSettings | None = None
    ):
        self.dataset_names = list(dataset_names)
        self.horizon, self.per_action_dim = horizon, per_action_dim
        self.settings = settings or MetricSettings()
        shape = (len(self.dataset_names), horizon, per_action_dim)
        self._sums = {name: np.zeros(shape) for name in METRICS}
        self._counts = {name: np.zeros(shape, np.int64) for name in METRICS}
        self._samples = np.zeros(len(self.dataset_names), np.int64)
        self._steps = np.zeros(len(self.dataset_names), np.int64)

    def update(
        self,
        predicted_NTA: np.ndarray,
        true_NTA: np.ndarray,
        action_is_pad_NT: np.ndarray,
        predicted_normalized_NTA: np.ndarray,
        true_normalized_NTA: np.ndarray,
        dataset_index_N: np.ndarray,
    ) -> None:
        """Add a batch.

        Args:
            predicted_NTA, true_NTA: actions in physical units.
            action_is_pad_NT: bool, True past the episode's end; whatever the other arrays hold there, it
                enters no metric.
            predicted_normalized_NTA, true_normalized_NTA: the same actions in normalized units.
            dataset_index_N: int, which dataset each sample came from.

        Raises:
            NonFiniteError: a value at a valid step is not finite.
            ValueError: an array of another shape, or a dataset index without a name.
        """
        valid_NT = ~np.asarray(action_is_pad_NT, bool)
        dataset_index_N = np.asarray(dataset_index_N)
        shape = (len(valid_NT), self.horizon, self.per_action_dim)
        arrays = {
            "predicted_NTA": predicted_NTA,
            "true_NTA": true_NTA,
            "predicted_normalized_NTA": predicted_normalized_NTA,
            "true_normalized_NTA": true_normalized_NTA,
        }
        for name, array in arrays.items():
            array = np.asarray(array, np.float64)
            if array.shape != shape or valid_NT.shape != shape[:2]:
                raise ValueError(f"{name} has shape {array.shape} and action_is_pad {valid_NT.shape}; wanted {shape}")
            arrays[name] = array = np.where(valid_NT[..., None], array, 0.0)
            bad = np.argwhere(~np.isfinite(array))
            if len(bad):
                n, t, a = bad[0]
                raise NonFiniteError(f"{name}: sample {n} of the batch, step {t}, dimension {a} is {array[n, t, a]}")
        if len(valid_NT) and not 0 <= dataset_index_N.min() <= dataset_index_N.max() < len(self.dataset_names):
            raise ValueError(f"dataset_index holds {dataset_index_N.max()}; there are {len(self.dataset_names)} names")
        errors = ActionErrors(**arrays, valid_NT=valid_NT, settings=self.settings)
        np.add.at(self._samples, dataset_index_N, 1)
        np.add.at(self._steps, dataset_index_N, valid_NT.sum(1))
        for name, metric in METRICS.items():
            value_NTA = np.asarray(metric(errors), np.float64)
            counted_NTA = valid_NT[..., None] & ~np.isnan(value_NTA)
            np.add.at(self._sums[name], dataset_index_N, np.where(counted_NTA, value_NTA, 0.0))
            np.add.at(self._counts[name], dataset_index_N, counted_NTA)

    def result(self) -> dict[str, Any]:
        """The means, ready for JSON (None where nothing was counted).

        Returns:
            `{"samples", "valid_steps", "overall": {metric: float}, "per_step": {metric: [T floats]},
            "per_dimension": {metric: [A floats]}, "per_dataset": {name: the same without per_dataset}}`.
            Means are over elements, so that a longer dataset weighs more in `overall`.
        """
        everything = np.arange(len(self.dataset_names))
        by_name = {name: self._summary(everything[i : i + 1]) for i, name in enumerate(self.dataset_names)}
        return {**self._summary(everything), "per_dataset": by_name}

    def _summary(self, datasets: np.ndarray) -> dict[str, Any]:
        summary: dict[str, Any] = {
            "samples": int(self._samples[datasets].sum()),
            "valid_steps": int(self._steps[datasets].sum()),
            "overall": {},
            "per_step": {},
            "per_dimension": {},
        }
        for name in METRICS:
            sum_TA = self._sums[name][datasets].sum(0)
            count_TA = self._counts[name][datasets].sum(0)
            summary["overall"][name] = _mean(sum_TA.sum(), count_TA.sum())
            summary["per_step"][name] = [_mean(*pair) for pair in zip(sum_TA.sum(1), count_TA.sum(1), strict=True)]
            summary["per_dimension"][name] = [_mean(*pair) for pair in zip(sum_TA.sum(0), count_TA.sum(0), strict=True)]
        return summary


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


def _mean(total: float, count: int) -> float | None:
    return float(total / count) if count else None
