"""Where a run begins: as a run that goes on, or anew from a checkpoint; and which settings then count.

A checkpoint carries settings of its own. For each of them one rule holds, and the log says what came of it: the config
counts where it can be honoured, and what cannot be honoured is refused. What a run cannot change halfway (statistics,
the unit of an older schedule) stays the checkpoint's when the same run goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import Any

from training.schedule import RunLength, learning_rate
from utils.config_utils import Config, ConfigError, config_from_dict, config_to_dict
from utils.statistics import load_statistics, require_same_statistics

logger = logging.getLogger(__name__)


def goes_on(checkpoint: dict[str, Any], path: str, config: Config) -> bool:
    """Whether training from `path` continues its run: it has the same name, or lies in this run's (renamed) folder."""
    same_folder = Path(path).resolve().parent == (config.experiment_dir / "checkpoints").resolve()
    return same_folder or _name(checkpoint) == config.training.experiment_name


def settings_to_go_on(checkpoint: dict[str, Any], path: str, config: Config, config_path: str) -> Config:
    """The config of a run that goes on from a checkpoint, once it is clear that it may.

    A schedule whose `interval` is not given goes on in the unit that it began with: earlier versions counted steps.

    Raises:
        StatisticsError: `data.normalization_stats_path` names other statistics than the checkpoint has.
    """
    require_same_statistics(checkpoint["statistics"], path, config, config_path)
    if _name(checkpoint) != config.training.experiment_name:
        logger.info("this run was called %s before", _name(checkpoint))
    began = checkpoint["config"]["lr_scheduler"].get("interval")
    if config.lr_scheduler.interval is None and began is not None:
        logger.info("lr_scheduler.interval: %s, as the run began (the config gives none)", began)
        schedule = dataclasses.replace(config.lr_scheduler, interval=began)
        config = dataclasses.replace(config, lr_scheduler=schedule)
    return config


def statistics_of_new_run(
    checkpoint: dict[str, Any], path: str, config: Config, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """The statistics of a new run that takes weights from the checkpoint `path`.

    Those that the config names, or with `--statistics pretrained` the checkpoint's.
    """
    if args.statistics == "pretrained":
        logger.info("statistics: those of %s (--statistics pretrained)", path)
        # without what they were made of: they are meant to be of other data (data/statistics.py, require_statistics_of)
        return [{key: value for key, value in one.items() if key != "rows"} for one in checkpoint["statistics"]]
    logger.info("statistics: those of this run's data (%s), not of %s", config.data.normalization_stats_path, path)
    return load_statistics(config.data.normalization_stats_path, config, args.config_path)


def announce_changes(checkpoint: dict[str, Any], path: str, config: Config) -> None:
    """Log what is taken from a checkpoint whatever the config says, and every setting that differs from its config."""
    logger.info(
        "from %s: weights, architecture, tokenizer, image processor; from the config: every other setting", path
    )
    changed = changes(checkpoint["config"], config_to_dict(config))
    if changed:
        logger.info("changed since the checkpoint: %s", "; ".join(changed))
    vlm = config.model.vlm_config
    base = checkpoint.get("base")
    unread = base is None or base["included"]
    if unread and vlm.pretrained_names != _saved_config(checkpoint, path).model.vlm_config.pretrained_names:
        logger.warning("%s is not read: the checkpoint holds every weight", vlm.pretrained_names)


def changes(old: dict[str, Any], new: dict[str, Any], above: str = "") -> list[str]:
    """What differs between two resolved configs, as `section.key old -> new`."""
    found = []
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            found += changes(before, value, f"{above}{key}.")
        elif before != value:
            found.append(f"{above}{key} {before!r} -> {value!r}")
    return found


def position_warnings(checkpoint: dict[str, Any], path: str, config: Config, length: RunLength) -> list[str]:
    """What becomes of the position in the data and of the learning rate where a run goes on with other settings.

    Args:
        checkpoint, path: as loaded, and from where.
        config, length: of the run that goes on, at the checkpoint's step.

    Raises:
        ConfigError: the run would already be over.
    """
    step, old = checkpoint["step"], _saved_config(checkpoint, path)
    before = RunLength.from_config(old, checkpoint["num_samples"])
    epochs = [step / each.epoch_steps for each in (before, length)]
    if step > length.total_steps:
        raise ConfigError(
            f"{path} is at step {step}, which is epoch {epochs[1]:.1f} here, but this run ends at step "
            f"{length.total_steps}: {_lengths(config)}, where the checkpoint's had {_lengths(old)}. Nothing is left to "
            f"train; give --epochs {int(epochs[1]) + 1} or more to go on"
        )
    warnings = []
    if before.num_samples != length.num_samples:
        warnings.append(
            f"the training set has {length.num_samples} samples, the checkpoint's had {before.num_samples}: another "
            "data order from here on"
        )
    if before.epoch_steps != length.epoch_steps:
        fate = "not drawn" if epochs[1] > epochs[0] else "drawn again"
        warnings.append(
            f"data.batch_size {old.data.batch_size} -> {config.data.batch_size}, samples of an epoch "
            f"{before.num_samples} -> {length.num_samples}: step {step} stays step {step}, so the position in the data "
            f"moves from epoch {epochs[0]:.2f} to {epochs[1]:.2f}, and what lies between is {fate}; the run ends at "
            f"step {length.total_steps} instead of {before.total_steps}"
        )
    rates = [
        learning_rate(step, each.optimizer.lr, each.lr_scheduler, of.total_steps, of.epoch_steps)
        for each, of in ((old, before), (config, length))
    ]
    if abs(rates[0] - rates[1]) > 1e-6 * max(rates) and step < length.total_steps:
        warnings.append(
            f"the learning rate goes on at {rates[1]:.3g}, where it would have been {rates[0]:.3g}: the schedule is "
            f"that of this config over {length.total_steps} steps with optimizer.lr {config.optimizer.lr:g}, not that "
            f"of the checkpoint over {before.total_steps} with {old.optimizer.lr:g}"
        )
    return warnings


def _lengths(config: Config) -> str:
    steps = "" if config.training.max_steps is None else f", training.max_steps {config.training.max_steps}"
    return f"training.epochs {config.training.epochs}{steps}, data.batch_size {config.data.batch_size}"


def _saved_config(checkpoint: dict[str, Any], path: str) -> Config:
    return config_from_dict(checkpoint["config"], source=path)


def _name(checkpoint: dict[str, Any]) -> str:
    return checkpoint["config"]["training"]["experiment_name"]
