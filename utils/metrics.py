"""Offline metrics of predicted action chunks: what training validation, main_eval.py and every comparison report.

A metric is one small function to an array (N, T, A), listed in METRICS; the accumulator does the masking, the
averaging and the breakdowns. Plain numpy, no model needed.

Shape letters: K draws per sample, N samples, T horizon, A per_action_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from utils.config_utils import Config


class NonFiniteError(ValueError):
    """An action is NaN or infinite where it counts."""


@dataclass(frozen=True)
class MetricSettings:
    """What the accuracies mean.

    Attributes:
        num_action_bins: bins of binned accuracy per dimension, over `bin_range`.
        bin_range: (low, high) in normalized units, numbers or one per dimension (A,); values outside fall in the
            outermost bins.
        accuracy_threshold: threshold accuracy counts |error| below this, in normalized units.
    """

    num_action_bins: int = 256
    bin_range: tuple[float, float] | np.ndarray = (-1.0, 1.0)
    accuracy_threshold: float = 0.1

    @classmethod
    def from_config(cls, config: Config, bin_range_2A: np.ndarray) -> MetricSettings:
        """What a configuration says about them; the range is the normalizer's, `action_range.covered_2A`."""
        bins = config.model.action_head_config.num_action_bins
        return cls(bins, bin_range_2A, config.inference.accuracy_threshold)


@dataclass(frozen=True)
class Chunks:
    """Predictions and ground truth in one unit, float64, zeros wherever nothing counts.

    Attributes:
        drawn_KNTA: independent draws for each sample; the first is the prediction.
        true_NTA: what was done.
        counted_NTA: bool, True where there is a truth: a step before the episode's end, an existing dimension.
    """

    drawn_KNTA: np.ndarray
    true_NTA: np.ndarray
    counted_NTA: np.ndarray

    @property
    def predicted_NTA(self) -> np.ndarray:
        return self.drawn_KNTA[0]

    @property
    def ends_NTA(self) -> np.ndarray:
        """True at the last step that counts."""
        return self.counted_NTA & ~np.pad(self.counted_NTA, ((0, 0), (0, 1), (0, 0)))[:, 1:]


@dataclass(frozen=True)
class ActionErrors:
    """What a metric sees: the same chunks in physical and in normalized units."""

    physical: Chunks
    normalized: Chunks
    settings: MetricSettings

    @cached_property
    def best_draw_N(self) -> np.ndarray:
        """The draw of each sample whose squared error in normalized units is the smallest."""
        chunks = self.normalized
        return ((chunks.drawn_KNTA - chunks.true_NTA) ** 2).sum(axis=(2, 3)).argmin(axis=0)

    def bins_NTA(self, normalized_NTA: np.ndarray) -> np.ndarray:
        """Bin index, 0 to num_action_bins - 1, of each normalized value."""
        low, high = self.settings.bin_range
        index = np.floor((normalized_NTA - low) / (high - low) * self.settings.num_action_bins)
        return np.clip(index, 0, self.settings.num_action_bins - 1)


# Metrics in either unit. NaN where a metric is not defined: those entries are left out of its means.


def _mse(chunks: Chunks, errors: ActionErrors) -> np.ndarray:
    return (chunks.predicted_NTA - chunks.true_NTA) ** 2


def _mae(chunks: Chunks, errors: ActionErrors) -> np.ndarray:
    return np.abs(chunks.predicted_NTA - chunks.true_NTA)


def _first_step_error(chunks: Chunks, errors: ActionErrors) -> np.ndarray:
    """|error| of the action that is executed at once."""
    error_NTA = _mae(chunks, errors)
    error_NTA[:, 1:] = np.nan
    return error_NTA


def _endpoint_error(chunks: Chunks, errors: ActionErrors) -> np.ndarray:
    """|error| of a chunk's last valid action."""
    return np.where(chunks.ends_NTA, _mae(chunks, errors), np.nan)


def _trajectory_mse(chunks: Chunks, errors: ActionErrors) -> np.ndarray:
    """MSE of each whole chunk, so that one cut short by the episode's end weighs as much as a full one.

    It stands at the chunk's last valid step: `per_step` tells short chunks from long ones.
    """
    steps_N1A = np.maximum(chunks.counted_NTA.sum(axis=1, keepdims=True), 1)
    mean_N1A = np.where(chunks.counted_NTA, _mse(chunks, errors), 0.0).sum(axis=1, keepdims=True) / steps_N1A
    return np.where(chunks.ends_NTA, mean_N1A, np.nan)


def _smoothness(chunks: Chunks, errors: ActionErrors) -> np.ndarray:
    return _second_difference(chunks.predicted_NTA, chunks.counted_NTA)


def _smoothness_true(chunks: Chunks, errors: ActionErrors) -> np.ndarray:
    return _second_difference(chunks.true_NTA, chunks.counted_NTA)


def _second_difference(action_NTA: np.ndarray, counted_NTA: np.ndarray) -> np.ndarray:
    """|a[t] - 2 a[t-1] + a[t-2]|, defined where all three steps count; the smaller, the smoother."""
    value_NTA = np.full_like(action_NTA, np.nan)
    difference = np.abs(action_NTA[:, 2:] - 2 * action_NTA[:, 1:-1] + action_NTA[:, :-2])
    counted = counted_NTA[:, 2:] & counted_NTA[:, 1:-1] & counted_NTA[:, :-2]
    value_NTA[:, 2:] = np.where(counted, difference, np.nan)
    return value_NTA


def _spread(chunks: Chunks, errors: ActionErrors) -> np.ndarray:
    """Standard deviation over the draws (unbiased variance); needs two or more."""
    if len(chunks.drawn_KNTA) < 2:
        return np.full_like(chunks.true_NTA, np.nan)
    return chunks.drawn_KNTA.std(axis=0, ddof=1)


def _best_of_k_mse(chunks: Chunks, errors: ActionErrors) -> np.ndarray:
    """Squared error of the draw that comes nearest to the truth as a whole chunk; needs two or more."""
    if len(chunks.drawn_KNTA) < 2:
        return np.full_like(chunks.true_NTA, np.nan)
    best_NTA = chunks.drawn_KNTA[errors.best_draw_N, np.arange(len(chunks.true_NTA))]
    return (best_NTA - chunks.true_NTA) ** 2


# Accuracies, which are about normalized units.


def _bin_distance(errors: ActionErrors) -> np.ndarray:
    chunks = errors.normalized
    return np.abs(errors.bins_NTA(chunks.predicted_NTA) - errors.bins_NTA(chunks.true_NTA))


def _binned_accuracy(errors: ActionErrors) -> np.ndarray:
    return _bin_distance(errors) == 0


def _binned_accuracy_within_1(errors: ActionErrors) -> np.ndarray:
    return _bin_distance(errors) <= 1


def _threshold_accuracy(errors: ActionErrors) -> np.ndarray:
    return _mae(errors.normalized, errors) < errors.settings.accuracy_threshold


# A new metric is one more function above and one more line here: each name of the first dict stands for two
# metrics, `name` in physical and `name_normalized` in normalized units.
METRICS_IN_BOTH_UNITS: dict[str, Callable[[Chunks, ActionErrors], np.ndarray]] = {
    "mse": _mse,
    "mae": _mae,
    "first_step_error": _first_step_error,
    "endpoint_error": _endpoint_error,
    "trajectory_mse": _trajectory_mse,
    "smoothness": _smoothness,
    "smoothness_true": _smoothness_true,
    "spread": _spread,
    "best_of_k_mse": _best_of_k_mse,
}
ACCURACIES: dict[str, Callable[[ActionErrors], np.ndarray]] = {
    "binned_accuracy": _binned_accuracy,
    "binned_accuracy_within_1": _binned_accuracy_within_1,
    "threshold_accuracy": _threshold_accuracy,
}
METRICS = (*METRICS_IN_BOTH_UNITS, *(f"{name}_normalized" for name in METRICS_IN_BOTH_UNITS), *ACCURACIES)


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
        datasets = len(self.dataset_names)
        self._sums = np.zeros((2, len(METRICS), datasets, horizon, per_action_dim))  # of values, and how many
        self._sizes = np.zeros((2, datasets))  # samples, and their valid steps

    def update(
        self,
        predicted_KNTA: np.ndarray,
        true_NTA: np.ndarray,
        action_is_pad_NT: np.ndarray,
        predicted_normalized_KNTA: np.ndarray,
        true_normalized_NTA: np.ndarray,
        dataset_index_N: np.ndarray,
        action_dim_mask_NA: np.ndarray | None = None,
    ) -> None:
        """Add a batch.

        Args:
            predicted_KNTA: K draws of each prediction in physical units. The first counts as the prediction;
                spread and best-of-k are over all of them.
            true_NTA: true actions in physical units.
            action_is_pad_NT: bool, True past the episode's end; whatever the other arrays hold there, it
                enters no metric.
            predicted_normalized_KNTA, true_normalized_NTA: the same actions in normalized units.
            dataset_index_N: int, which dataset each sample came from.
            action_dim_mask_NA: bool, True for dimensions that the sample's dataset has; None: all of them.

        Raises:
            NonFiniteError: a value that counts is not finite.
            ValueError: an array of another shape, or a dataset index without a name.
        """
        valid_NT = ~np.asarray(action_is_pad_NT, bool)
        dataset_index_N = np.asarray(dataset_index_N)
        shape = (len(valid_NT), self.horizon, self.per_action_dim)
        if valid_NT.shape != shape[:2]:
            raise ValueError(f"action_is_pad_NT has shape {valid_NT.shape}; wanted {shape[:2]}")
        if len(valid_NT) and not 0 <= dataset_index_N.min() <= dataset_index_N.max() < len(self.dataset_names):
            raise ValueError(f"dataset_index holds {dataset_index_N.max()}; there are {len(self.dataset_names)} names")
        exists_NA = np.ones((shape[0], shape[2]), bool) if action_dim_mask_NA is None else action_dim_mask_NA
        counted_NTA = valid_NT[..., None] & np.asarray(exists_NA, bool)[:, None]
        draws = (len(predicted_KNTA), *shape)
        errors = ActionErrors(
            Chunks(
                _checked("predicted_KNTA", predicted_KNTA, draws, counted_NTA),
                _checked("true_NTA", true_NTA, shape, counted_NTA),
                counted_NTA,
            ),
            Chunks(
                _checked("predicted_normalized_KNTA", predicted_normalized_KNTA, draws, counted_NTA),
                _checked("true_normalized_NTA", true_normalized_NTA, shape, counted_NTA),
                counted_NTA,
            ),
            self.settings,
        )
        np.add.at(self._sizes[0], dataset_index_N, 1)
        np.add.at(self._sizes[1], dataset_index_N, valid_NT.sum(1))
        values = [metric(errors.physical, errors) for metric in METRICS_IN_BOTH_UNITS.values()]
        values += [metric(errors.normalized, errors) for metric in METRICS_IN_BOTH_UNITS.values()]
        values += [metric(errors) for metric in ACCURACIES.values()]
        for i, value_NTA in enumerate(values):
            defined_NTA = counted_NTA & ~np.isnan(value_NTA)
            np.add.at(self._sums[0, i], dataset_index_N, np.where(defined_NTA, value_NTA, 0.0))
            np.add.at(self._sums[1, i], dataset_index_N, defined_NTA)

    def reduce(self, reduce_sum: Callable[[np.ndarray], np.ndarray]) -> None:
        """Replace the sums by those over all ranks: every rank calls this once, after its last batch.

        Args:
            reduce_sum: a float64 vector to its sum over ranks; one collective in all.
        """
        total = reduce_sum(np.concatenate([self._sums.ravel(), self._sizes.ravel()]))
        sums, sizes = np.split(total, [self._sums.size])
        self._sums, self._sizes = sums.reshape(self._sums.shape), sizes.reshape(self._sizes.shape)

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
        samples, steps = self._sizes[:, datasets].sum(1)
        summary: dict[str, Any] = {
            "samples": int(samples),
            "valid_steps": int(steps),
            "overall": {},
            "per_step": {},
            "per_dimension": {},
        }
        for i, name in enumerate(METRICS):
            sum_TA, count_TA = self._sums[:, i, datasets].sum(1)
            summary["overall"][name] = _mean(sum_TA.sum(), count_TA.sum())
            summary["per_step"][name] = [_mean(*pair) for pair in zip(sum_TA.sum(1), count_TA.sum(1), strict=True)]
            summary["per_dimension"][name] = [_mean(*pair) for pair in zip(sum_TA.sum(0), count_TA.sum(0), strict=True)]
        return summary


def _checked(name: str, values: np.ndarray, shape: tuple[int, ...], counted_NTA: np.ndarray) -> np.ndarray:
    """float64 of that shape, 0 where nothing counts, finite."""
    values = np.asarray(values, np.float64)
    if values.shape != shape:
        raise ValueError(f"{name} has shape {values.shape}; wanted {shape}")
    values = np.where(counted_NTA, values, 0.0)
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        *_, n, t, a = bad[0]
        raise NonFiniteError(f"{name}: sample {n} of the batch, step {t}, dimension {a} is {values[tuple(bad[0])]}")
    return values


def _mean(total: float, count: float) -> float | None:
    return float(total / count) if count else None
