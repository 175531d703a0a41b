"""Offline evaluation: a policy over recorded demonstrations, beside two trivial predictors."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from inference.metrics import (
    MetricAccumulator,
    MetricSettings,
    mean_action_prediction,
    repeat_last_action_prediction,
)
from inference.predictor import VLAPredictor
from utils.batch import Batch
from utils.misc import derive_seed

logger = logging.getLogger(__name__)

PREDICTORS = ("policy", "mean_action", "repeat_last_action")


@dataclass
class Predictions:
    """The samples of one dataset that were predicted.

    Attributes:
        predicted_KNTA: float32, physical units, K draws; the first is the prediction.
        true_NTA: float32, physical units, zeros where `is_pad_NT`.
        is_pad_NT: bool, True past the episode's end.
        state_NS: float32, physical units, in the model's width.
        episode_N, frame_N: int64, where each sample comes from.
        file_N: the Parquet file of each sample.
        action_names: what the A values of an action are called.
    """

    predicted_KNTA: np.ndarray
    true_NTA: np.ndarray
    is_pad_NT: np.ndarray
    state_NS: np.ndarray
    episode_N: np.ndarray
    frame_N: np.ndarray
    file_N: list[str]
    action_names: list[str]


def evaluate_offline(
    predictor: VLAPredictor,
    data: dict[str, tuple[Dataset, Iterable[Batch]]],
    seed: int = 0,
    num_samples: int = 1,
) -> tuple[dict[str, Any], dict[str, Predictions]]:
    """Predict at every time step of every dataset and compare with what was done there.

    Args:
        predictor: the policy.
        data: per name a VLADataset and one pass over batches of its samples, all or some, in any order.
        seed: of the sampling noise; a sample's noise depends on this, on which of `data` its dataset is, and
            on its place in it: not on the batch size, nor on how a path is spelt.
        num_samples: draws per observation. Errors are those of the first, which stays the same whatever this
            is; spread and best-of-k are over all of them and need two or more. A head that does not sample gives one.

    Returns:
        A JSON-able dict and the predictions per dataset. The dict has `settings`, `seconds_per_sample` (model
        time alone, all draws) and, under `predictors`, the `MetricAccumulator.result` of `policy`, `mean_action` (the
        mean of the training data) and `repeat_last_action` (the action executed just before; at an episode's
        first step, where there is none, the mean action).

    Raises:
        NonFiniteError: the policy predicted NaN or infinity.
    """
    horizon, width = predictor.horizon, predictor.per_action_dim
    num_bins = predictor.config.model.action_head_config.num_action_bins
    bin_range_2A = predictor.model.normalizer.action_range.covered_2A[:, :width].numpy()
    settings = MetricSettings(num_bins, bin_range_2A, predictor.settings.accuracy_threshold)
    accumulators = {name: MetricAccumulator(list(data), horizon, width, settings) for name in PREDICTORS}
    num_samples = num_samples if predictor.model.action_head.is_stochastic else 1
    predictions, seconds = {}, 0.0
    for number, (name, (dataset, batches)) in enumerate(data.items()):
        seen, drawn = [], []
        for batch in tqdm(batches, desc=name, unit="batch", disable=None):
            rows = dataset.store.episode_starts[batch["episode_index"].numpy()] + batch["frame_index"].numpy()
            seeds = [[_noise_seed(seed, number, int(row), draw) for row in rows] for draw in range(num_samples)]
            started = time.perf_counter()
            predicted = predictor.predict_draws(batch, seeds)
            seconds += time.perf_counter() - started
            true = batch["action"].numpy()[:, :horizon, :width]
            is_pad = batch["action_is_pad"].numpy()[:, :horizon]
            state = batch["state"].numpy()
            mean_NA = predictor.action_units.mean(state)
            previous = [dataset.previous_action(int(row)) for row in rows]
            previous = [None if action is None else action[:width] for action in previous]
            candidates = {
                "policy": predicted,
                "mean_action": mean_action_prediction(mean_NA, horizon)[None],
                "repeat_last_action": repeat_last_action_prediction(previous, mean_NA, horizon)[None],
            }
            true_normalized, index = predictor.action_units.normalize(true, state), np.full(len(rows), number)
            for which, candidate in candidates.items():
                normalized = np.stack([predictor.action_units.normalize(draw, state) for draw in candidate])
                accumulators[which].update(candidate, true, is_pad, normalized, true_normalized, index)
            seen.append((true, is_pad, state, batch["episode_index"].numpy(), batch["frame_index"].numpy(), rows))
            drawn.append(predicted)
        *arrays, rows = map(np.concatenate, zip(*seen, strict=True))
        files = np.searchsorted(dataset.store.file_starts, rows, side="right") - 1
        predictions[name] = Predictions(
            np.concatenate(drawn, axis=1),
            *arrays,
            file_N=[str(dataset.store.files[i]) for i in files],
            action_names=dataset.names["action"][:width],
        )
    samples = sum(len(p.true_NTA) for p in predictions.values())
    result = {
        "settings": {
            "num_inference_steps": predictor.num_inference_steps,
            "num_samples": num_samples,
            "seed": seed,
            "num_action_bins": settings.num_action_bins,
            "bin_range": bin_range_2A.tolist(),
            "accuracy_threshold": settings.accuracy_threshold,
            "horizon": horizon,
            "per_action_dim": width,
        },
        "seconds_per_sample": seconds / samples,
        "predictors": {name: accumulator.result() for name, accumulator in accumulators.items()},
    }
    return result, predictions


def _noise_seed(seed: int, dataset: int, row: int, draw: int) -> int:
    """The seed of one draw for one sample; that of the first draw does not depend on how many follow."""
    return derive_seed("offline", seed, dataset, row, *([draw] if draw else []))


def quantization_error(
    predictor: VLAPredictor, load_whole: Callable[[], VLAPredictor], batches: Iterable[Batch], seed: int
) -> dict[str, Any]:
    """How far quantization moves a policy's actions, for the same observations and noise; logged and returned.

    Args:
        predictor: the policy.
        load_whole: loads the same policy with whole matrices; not called where `predictor` is not quantized.
        batches: observations.
        seed: of the noise.

    Returns:
        Nothing where the policy is not quantized. Else under `quantization_error`: `quantization`, its name; `max` and
        `mean` of the absolute difference in normalized units; `samples`, how many predictions were compared.
    """
    if predictor.quantization == "none":
        return {}
    reference = load_whole()
    differences = []
    for number, batch in enumerate(batches):
        state = batch["state"].numpy()
        seeds = [derive_seed("difference", seed, number, row) for row in range(len(state))]
        actions = (
            policy.predict_batch(batch, seeds, predictor.num_inference_steps) for policy in (predictor, reference)
        )
        quantized, whole = (reference.action_units.normalize(action, state) for action in actions)
        differences.append(np.abs(quantized - whole))
    stacked = np.concatenate(differences)
    text = "%s moves normalized actions by %.4f on average, at most %.4f (%d predictions)"
    logger.info(text, predictor.quantization, stacked.mean(), stacked.max(), len(stacked))
    error = {"max": float(stacked.max()), "mean": float(stacked.mean()), "samples": len(stacked)}
    return {"quantization_error": {"quantization": predictor.quantization, **error}}


def measure_latency(predictor: VLAPredictor, batch: Batch, repeats: int) -> dict[str, float]:
    """Milliseconds from a collated batch to its actions: `median_ms`, and `p95_ms`, the 95th percentile."""
    seeds, times = list(range(len(batch["state"]))), []
    for _ in range(repeats + 3):  # the first three warm up
        started = time.perf_counter()
        predictor.predict_batch(batch, seeds)
        times.append(1000 * (time.perf_counter() - started))
    return {"median_ms": float(np.median(times[3:])), "p95_ms": float(np.percentile(times[3:], 95))}
