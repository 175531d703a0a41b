"""Validation: losses and errors over the held-out samples, and pictures of a few fixed ones.

Shape letters: B batch, K draws, T horizon, A per_action_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.vla_model import VLAModel
from utils.batch import Batch, steps_with_loss, to_device
from utils.config_utils import Config
from utils.metrics import MetricAccumulator, MetricSettings
from utils.misc import derive_seed

PLOT_DRAWS = 16  # draws per sample of a picture, which shows their spread as a band


class ValidationStopped(Exception):
    """The run was asked to stop while it validated."""


@dataclass
class PlottedChunks:
    """Predicted and recorded actions of the N samples that are drawn at every validation, in physical units.

    Attributes:
        drawn_KNTA, true_NTA: float32.
        is_pad_NT: bool, True past the episode's end.
        captions: where each sample comes from.
    """

    drawn_KNTA: np.ndarray
    true_NTA: np.ndarray
    is_pad_NT: np.ndarray
    captions: list[str]


@dataclass
class Validation:
    """The results of one validation.

    Attributes:
        values: numbers for the log: `val_loss`, `val_action_mse` (normalized units), `val_action_mae` (physical
            units) and, as `val/{metric}`, the mean of every metric of utils/metrics.py that is defined.
        details: `MetricAccumulator.result`: the same per horizon step, dimension and dataset.
        plotted: what to draw; None with `training.val_num_plots` 0.
    """

    values: dict[str, float]
    details: dict[str, Any]
    plotted: PlottedChunks | None


@torch.no_grad()
def validate(
    policy: VLAModel,
    batches: Iterable[Batch],
    num_batches: int,
    config: Config,
    device: torch.device,
    *,
    rank: int,
    reduce_sum: Callable[[Tensor], Tensor],
) -> Validation:
    """Judge a policy in evaluation mode over this rank's batches; every rank calls this and gets the same numbers.

    Sampled actions, and with them all errors, do not depend on how samples are split into batches: a sample's noise is
    a function of its place in the data. The noise of `val_loss` is drawn per batch, so that another batch size or
    number of ranks gives another draw.

    The samples of the pictures are spread evenly over the rank's batches and are the same every time. All ranks predict
    samples of their own although only the first one draws: a sharded model must be called equally often on all of them.

    Args:
        policy: the model, without the wrapper that trains it.
        batches, num_batches: held-out samples on any device, and how many batches come at most.
        config: of the run; decides draws, pictures and inference steps.
        device: of the policy.
        rank, reduce_sum: of the trainer.

    Raises:
        NonFiniteError: the policy predicts NaN or infinity.
    """
    head, seed = config.model.action_head_config, config.training.seed
    names = [entry.name for entry in config.datasets]
    settings = MetricSettings.from_config(config, policy.normalizer.action_range.covered_2A.numpy())
    accumulator = MetricAccumulator(names, head.horizon, head.per_action_dim, settings)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    plot_rows = _spread_rows(config.training.val_num_plots, num_batches)
    plotted = []
    for i, batch in enumerate(batches):
        batch = to_device(batch, device)
        torch.manual_seed(derive_seed("validation", seed, i, rank))
        sums += torch.stack([policy(batch).sum(), steps_with_loss(batch, config).sum()]).double()
        _add_errors(accumulator, policy, batch, config)
        if i in plot_rows:
            rows = sorted({row % len(batch["action"]) for row in plot_rows[i]})
            plotted.append(_plotted(policy, _rows(batch, rows), config))
    loss, count = reduce_sum(sums).tolist()
    accumulator.reduce(lambda values: reduce_sum(torch.from_numpy(values).to(device)).cpu().numpy())
    details = accumulator.result()
    overall = {name: value for name, value in details["overall"].items() if value is not None}
    values = {"val_loss": loss / count, "val_action_mse": overall["mse_normalized"], "val_action_mae": overall["mae"]}
    values |= {f"val/{name}": value for name, value in overall.items()}
    return Validation(values, details, _joined(plotted) if plotted else None)


def _add_errors(accumulator: MetricAccumulator, policy: VLAModel, batch: Batch, config: Config) -> None:
    drawn_KBTA = _draw(policy, batch, config, config.training.val_num_samples)
    state_BS, index_B = batch["state"], batch["dataset_index"]
    normalized = [policy.normalizer.normalize_action(a, state_BS, index_B) for a in (*drawn_KBTA, batch["action"])]
    arrays = drawn_KBTA, batch["action"], batch["action_is_pad"], torch.stack(normalized[:-1]), normalized[-1], index_B
    exists_BA = policy.normalizer.action_dim_mask(index_B)
    accumulator.update(*(array.cpu().numpy() for array in (*arrays, exists_BA)))


def _draw(policy: VLAModel, batch: Batch, config: Config, draws: int) -> Tensor:
    """Actions in physical units, (K, B, T, A); a draw's noise depends on the sample's place in the data.

    A head that does not sample gives one draw.
    """
    draws = draws if policy.action_head.is_stochastic else 1
    places = [batch[key].tolist() for key in ("dataset_index", "episode_index", "frame_index")]
    seeds = [
        [derive_seed("validation", config.training.seed, *place, k) for place in zip(*places, strict=True)]
        for k in range(draws)
    ]
    steps = config.inference.num_inference_steps
    noise = policy.draw_noise(seeds, steps)
    return policy.act(batch if noise is None else {**batch, "noise": noise}, steps, num_draws=draws)


def _spread_rows(num_samples: int, num_batches: int) -> dict[int, list[int]]:
    """`num_samples` samples spread evenly over the batches: batch -> rows of it."""
    rows: dict[int, list[int]] = {}
    for i in range(num_samples):
        batch = i * num_batches // num_samples
        rows.setdefault(batch, []).append(len(rows.get(batch, ())))
    return rows


def _rows(batch: Batch, rows: list[int]) -> Batch:
    """Some samples of a batch, as a batch."""
    return {
        key: value[rows] if torch.is_tensor(value) else [value[row] for row in rows] for key, value in batch.items()
    }


def _plotted(policy: VLAModel, batch: Batch, config: Config) -> PlottedChunks:
    drawn_KNTA = _draw(policy, batch, config, PLOT_DRAWS)
    names = [config.datasets[i].name for i in batch["dataset_index"].tolist()]
    places = zip(names, batch["episode_index"].tolist(), batch["frame_index"].tolist(), strict=True)
    captions = [f"{name}, episode {episode}, step {frame}" for name, episode, frame in places]
    arrays = (array.cpu().numpy() for array in (drawn_KNTA, batch["action"], batch["action_is_pad"]))
    return PlottedChunks(*arrays, captions)


def _joined(parts: list[PlottedChunks]) -> PlottedChunks:
    return PlottedChunks(
        np.concatenate([part.drawn_KNTA for part in parts], axis=1),
        np.concatenate([part.true_NTA for part in parts]),
        np.concatenate([part.is_pad_NT for part in parts]),
        [caption for part in parts for caption in part.captions],
    )
