"""Which time steps training draws, and how often: `data.sample_weighting`.

Episodes with corrections (column `intervention`) hold what a policy did wrong beside what was right, and recorded
rollouts hold failures (column `success`). Left-out steps make no sample, and a chunk of actions that runs into them
ends there: what follows counts as padding.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from data.episode_store import EpisodeStore
from data.schema import INTERVENTION, SUCCESS
from utils.config_utils import SampleWeightingConfig
from utils.parquet_utils import DataError

KEY = "data.sample_weighting"


def left_out_rows(store: EpisodeStore, weighting: SampleWeightingConfig) -> np.ndarray:
    """The store's rows that training leaves out, int64, ascending.

    Raises:
        DataError: a column that is no flag, or a `success` that changes within an episode.
    """
    left_out = np.zeros(len(store), dtype=bool)
    if weighting.leave_out_failures:
        left_out |= ~store.label(SUCCESS, otherwise=True)
    if weighting.leave_out_before:
        intervention = store.label(INTERVENTION, otherwise=False)
        episode_of = np.repeat(np.arange(store.num_episodes), np.diff(store.episode_starts))
        corrected = np.flatnonzero(intervention)
        following = np.concatenate([corrected, [len(store)]])[corrected.searchsorted(np.arange(len(store)))]
        near = (following < len(store)) & (following - np.arange(len(store)) <= weighting.leave_out_before)
        near[near] = episode_of[following[near]] == episode_of[near]
        left_out |= near & ~intervention
    return np.flatnonzero(left_out)


def sample_probabilities(store: EpisodeStore, rows: np.ndarray, weighting: SampleWeightingConfig) -> np.ndarray | None:
    """Probability of each sample of a dataset, float64 that sum to 1; None: all alike, as a permutation gives them.

    Args:
        store: of the dataset.
        rows: int64 (samples,), the store's row of each.
        weighting: what is drawn how often.
    """
    weights = np.ones(len(rows))
    if weighting.by != "step":
        groups = store.prompt_index[rows]
        if weighting.by == "episode":
            groups = np.searchsorted(store.episode_starts, rows, side="right")
        _, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
        weights = 1.0 / (len(counts) * counts[inverse])
        if weighting.corrections == 1:
            return weights
    elif weighting.corrections == 1:
        return None
    weights = weights * np.where(store.label(INTERVENTION, otherwise=False)[rows], weighting.corrections, 1.0)
    return weights / weights.sum()


def check_weighting(samples: Mapping[str, tuple[EpisodeStore, np.ndarray]], weighting: SampleWeightingConfig) -> None:
    """
    Args:
        samples: per dataset its store, and the store's row of each of its training samples.
        weighting: what is drawn how often.

    Raises:
        DataError: everything of a dataset is left out, or a setting changes nothing in any of them.
    """
    for name, (_, rows) in samples.items():
        if not len(rows) and (weighting.leave_out_failures or weighting.leave_out_before):
            raise DataError(f"dataset {name}: {KEY} leaves out every step; lower leave_out_before, or remove it")
    if weighting.corrections != 1:
        labels = [store.label(INTERVENTION, otherwise=False)[rows] for store, rows in samples.values()]
        if not any(flags.any() and not flags.all() for flags in labels):
            raise DataError(
                f"{KEY}.corrections is {weighting.corrections:g}, but no dataset has steps with intervention true "
                "beside others, so it changes nothing; record corrections (scripts/record_demos.py --takeover), or "
                "remove it"
            )
    for key, column, fault in (
        ("leave_out_failures", SUCCESS, "no episode has success false"),
        ("leave_out_before", INTERVENTION, "no step comes before one with intervention true"),
    ):
        only = SampleWeightingConfig(**{key: getattr(weighting, key)})
        if getattr(weighting, key) and not any(len(left_out_rows(store, only)) for store, _ in samples.values()):
            raise DataError(
                f"{KEY}.{key} is {getattr(weighting, key)}, but {fault} in the training data (optional column "
                f"{column}), so it changes nothing; remove it"
            )
