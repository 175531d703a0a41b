"""Recorded episodes held against a policy: against its statistics, and against what its training data look like."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data.comparison.fit import DimensionFit, as_table, statistics_fit
from data.comparison.profile import profile_of
from data.dataset import MixtureDataset, VLADataset
from data.processing import processors_from_checkpoint
from utils.comparison.facts import Profile, is_profile
from utils.comparison.kinds import Mismatch
from utils.comparison.mismatch import mismatches
from utils.config_utils import Config, ConfigError, config_from_dict
from utils.recordings import Recording

logger = logging.getLogger(__name__)
FIT_ROWS = 20_000  # steps of a dataset that its statistics are compared with before training
# Kinds that a profile judges better.
OF_RANGES = {"outside_training", "sign_reversed", "inverted", "dimensions_exchanged", "constant_in_statistics"}


def training_profiles(train: MixtureDataset) -> list[Profile]:
    """The profile of each dataset's training episodes, as checkpoints keep them under `training_data`."""
    return [
        profile_of(dataset.store, dataset.cameras, dataset.image_processor, dataset.episodes)
        for dataset in train.datasets
    ]


def announce_fit(train: MixtureDataset, statistics: Sequence[dict[str, Any]], config: Config, *, kept: bool) -> None:
    """Log how the statistics of a run fit its training data: one line where nothing is wrong, else each finding.

    Args:
        train: the training data; as many as FIT_ROWS steps of each dataset are looked at, spread evenly.
        statistics: of each dataset.
        config: the run's, whose `data` section says how they are used.
        kept: whether they are a base policy's, made of other data: then every dimension is shown.
    """
    for dataset, of_dataset in zip(train.datasets, statistics, strict=True):
        columns = sampled_columns(dataset, config)
        steps = len(columns["action"])
        table, found = statistics_fit(columns, of_dataset, config.data, of_training=True)
        whose = "statistics kept from the base policy" if kept else "statistics"
        if not table:
            logger.info("%s of %s: they do not say how far values went, so nothing is compared", whose, dataset.name)
            continue
        if not found and not kept:
            logger.info("%s of %s fit %d of its steps in all %d dimensions", whose, dataset.name, steps, len(table))
            continue
        logger.info("%s of %s beside %d of its steps:\n%s", whose, dataset.name, steps, as_table(table))
        for mismatch in found:
            logger.warning("statistics of %s: %s", dataset.name, mismatch)


def sampled_columns(dataset: VLADataset, config: Config) -> dict[str, np.ndarray]:
    """State, where the policy reads one, and action as they are normalized, at some steps of a dataset's episodes.

    Returns:
        Of `state` and `action` float32 (N, width), N as many as FIT_ROWS, spread evenly.
    """
    store, starts = dataset.store, dataset.store.episode_starts
    ends = starts[1:][dataset.episodes]
    lengths = ends - starts[:-1][dataset.episodes]
    chosen = np.unique(np.linspace(0, lengths.sum() - 1, min(FIT_ROWS, int(lengths.sum()))).round().astype(np.int64))
    episode = np.cumsum(lengths).searchsorted(chosen, side="right")
    rows = starts[:-1][dataset.episodes][episode] + chosen - (np.cumsum(lengths) - lengths)[episode]
    state, action = np.asarray(store.state[rows]), np.asarray(store.action[rows])
    columns = {"state": state} if config.reads_state else {}
    if config.data.action_mode == "delta":
        ahead = np.arange(len(rows)) % dataset.horizon  # steps from the state to the action, as in training
        action = np.asarray(store.action[np.minimum(rows + ahead, ends[episode] - 1)])
        relative = [d for d in range(action.shape[1]) if d not in config.data.absolute_action_dims]
        action = action.copy()
        action[:, relative] -= state[:, relative]
    return {**columns, "action": action}


def held_against(
    checkpoint: dict[str, Any], files: Sequence[Recording], dataset: str | None = None
) -> tuple[list[DimensionFit], list[Mismatch], bool]:
    """Episodes beside a policy.

    Args:
        checkpoint: as `inference.policy_files.read_policy` gives it.
        files: Parquet files of our schema, such as a recorded session.
        dataset: of the policy's training data, for one trained on a mixture; None: the first.

    Returns:
        (each dimension beside the statistics, suspected mistakes, whether the checkpoint knows its training data).

    Raises:
        DataError: the files break the schema, or have other widths than the policy.
        ConfigError: an unknown dataset.
    """
    config = config_from_dict(checkpoint["config"], source="checkpoint")
    names = [entry.name for entry in config.datasets]
    if dataset is not None and dataset not in names:
        raise ConfigError(f"this policy was trained on {', '.join(names)}; there is no dataset {dataset!r}")
    index = 0 if dataset is None else names.index(dataset)
    image_processor, prompt_tokenizer = processors_from_checkpoint(checkpoint)
    store = VLADataset(
        files,
        dataclasses.replace(config.data, cache=False),
        horizon=config.model.action_head_config.horizon,
        per_action_dim=config.model.action_head_config.per_action_dim,
        cameras=config.cameras,
        reads_state=config.reads_state,
        image_processor=image_processor,
        prompt_tokenizer=prompt_tokenizer,
        entry=config.datasets[index],
        dataset_index=index,
    ).store
    delta = config.data.action_mode == "delta"
    columns = {"state": np.asarray(store.state)} | ({} if delta else {"action": np.asarray(store.action)})
    table, found = statistics_fit(columns, checkpoint["statistics"][index], config.data)
    profiles = checkpoint.get("training_data") or []
    if len(profiles) <= index or not is_profile(profiles[index]):
        return table, found, False
    training = profiles[index]
    if not delta:
        found = [*_other_statistics(checkpoint["statistics"][index], training), *found]
    session = profile_of(store, list(training["cameras"]), image_processor, against=training)
    named = mismatches(session, training)
    places = {mismatch.where for mismatch in named}
    # Ranges alone don't tell a mistake from a policy that goes elsewhere by itself; the profile knows where it began.
    rest = [mismatch for mismatch in found if mismatch.where not in places and mismatch.kind not in OF_RANGES]
    return table, [*named, *rest], True


def _other_statistics(statistics: dict[str, Any], training: Profile) -> Iterator[Mismatch]:
    """Statistics whose extremes are not those of the data that the policy was trained on."""
    for column in ("state", "action"):
        if not {"min", "max"} <= statistics[column].keys():
            continue
        made_of = np.array([statistics[column]["min"], statistics[column]["max"]], np.float64)
        trained = np.array(training[column]["quantiles"])[:, [0, -1]].T
        if made_of.shape != trained.shape:
            continue
        tolerance = 0.05 * np.maximum(np.ptp(trained, axis=0), 1e-3)
        differing = np.flatnonzero((np.abs(made_of - trained) > tolerance).any(axis=0))
        if len(differing):
            d = int(differing[0])
            evidence = (
                f"{len(differing)} dimensions: {column}[{d}] from {made_of[0, d]:.4g} to {made_of[1, d]:.4g}, in the "
                f"training data {trained[0, d]:.4g} to {trained[1, d]:.4g}"
            )
            remedy = "serve the policy with the statistics of its own data, unless it keeps a base policy's on purpose"
            yield Mismatch("statistics_of_other_data", f"statistics of {column}", evidence, remedy)
