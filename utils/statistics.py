"""Normalization statistics as a file: what it holds, and whether it belongs to a config.

The file holds `{"action_mode", "absolute_action_dims", "val_fraction", "split_seed", "max_episodes", "state_columns",
"datasets": {name: statistics}}`; a single dataset is called "default". A dataset's statistics are `{"state": {"min":
[state_dim numbers], "max", "mean", "std", "q01", "q99", ...}, "action": {...}, ...}` in physical units: STATISTICS are
what the normalizer needs, and what else is there tells where the numbers come from. `data/statistics.py` computes them.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.config_utils import Config, DataConfig, MixtureEntry
from utils.foreign_files import ForeignFileError, read_json

logger = logging.getLogger(__name__)

STATISTICS = ("min", "max", "mean", "std", "q01", "q99")
DECILES = ("q10", "q90")  # made where a config asks for them (quantile10)
FLOAT32_MAX = float(np.finfo(np.float32).max)


class StatisticsError(ValueError):
    """A statistics file is missing, unreadable, or does not belong to the config."""


def load_statistics(path: str | None, config: Config, config_path: str) -> list[dict[str, Any]]:
    """Read a statistics file and check that it belongs to the config.

    Args:
        path: `data.normalization_stats_path`.
        config: the configuration that trains.
        config_path: where it was read from, for the command in error messages.

    Returns:
        Statistics per dataset as `calculate_statistics` gives them, in the order of `config.datasets`.

    Raises:
        StatisticsError: no path or no file (the message is the command that makes it), not JSON, a dataset or
            statistic missing, another number of dimensions, another action mode, horizon or split.
    """
    target = path or "stats.json"
    command = f"python utils/calculate_normalization_stats.py --config_path {config_path} --output_path {target}"
    if path is None:
        raise StatisticsError(f"data.normalization_stats_path is not set; set it to {target} and run: {command}")
    if not Path(path).exists():
        raise StatisticsError(f"data.normalization_stats_path: {path} does not exist; make it with: {command}")
    remedy = f"make it again with: {command}"
    try:
        content = read_json(Path(path))
    except ForeignFileError as error:
        raise StatisticsError(f"{error}; {remedy}") from None
    if not isinstance(content, dict) or not isinstance(content.get("datasets"), dict):
        raise StatisticsError(f"{path}: no section 'datasets'; {remedy}")
    _check_settings(content, config, path, command)
    return [_dataset_statistics(content["datasets"], entry, config, path, remedy) for entry in config.datasets]


def require_same_statistics(
    kept: Sequence[dict[str, Any]], checkpoint_path: str, config: Config, config_path: str
) -> None:
    """Raise a StatisticsError where a run that goes on names other statistics than those of its checkpoint.

    Its weights predict in the units of the checkpoint's statistics, which therefore stay. Where the config names no
    file, or one that is not there, the log says so.

    Args:
        kept: the checkpoint's, per dataset.
        checkpoint_path: for messages.
        config, config_path: as for `load_statistics`.
    """
    path = config.data.normalization_stats_path
    if path is None or not Path(path).is_file():
        reason = "data.normalization_stats_path is null" if path is None else f"{path} is not there"
        logger.info("statistics: those of %s (%s)", checkpoint_path, reason)
        return
    given = load_statistics(path, config, config_path)
    for entry, before, now in zip(config.datasets, kept, given, strict=False):
        for column in ("state", "action"):
            for name in STATISTICS:
                here, there = (each[column].get(name) for each in (now, before))
                if here != there:
                    raise StatisticsError(
                        f"{path}: not the statistics of {checkpoint_path} (dataset {entry.name}, {column}.{name}: "
                        f"{here}, in the checkpoint {there}). A run that goes on keeps "
                        "those of its checkpoint, in whose units its weights predict: give --set "
                        "data.normalization_stats_path=null to go on with them, or begin a new run with the new ones: "
                        f"--init_checkpoint {checkpoint_path} --experiment_name NEW"
                    )
    logger.info("statistics: those of %s, which %s holds too", checkpoint_path, path)


def check_statistics(
    statistics: Any,
    state_dim: int,
    per_action_dim: int,
    source: str,
    remedy: str,
    needed: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Raise a StatisticsError unless every statistic is there with the right number of values that go together.

    Args:
        needed: of `state` and `action`, the statistics to look for; None: STATISTICS of both.
    """
    if not isinstance(statistics, dict):
        raise StatisticsError(f"{source}: is {shown(statistics)}; wanted an object with 'state' and 'action'; {remedy}")
    for name, key, width in (("state", "data.state_dim", state_dim), ("action", "per_action_dim", per_action_dim)):
        of_column, columns = statistics.get(name), {}
        for statistic in STATISTICS if needed is None else needed[name]:
            values = of_column.get(statistic) if isinstance(of_column, dict) else None
            if values is None:
                raise StatisticsError(f"{source}: no {name}.{statistic}; {remedy}")
            if not isinstance(values, list | tuple) or not all(type(value) in (int, float) for value in values):
                raise StatisticsError(
                    f"{source}: {name}.{statistic} is {shown(values)}; wanted a list of {width} numbers; {remedy}"
                )
            if len(values) != width:
                raise StatisticsError(
                    f"{source}: {name}.{statistic} has {len(values)} values, config wants {key} {width}; {remedy}"
                )
            if not all(abs(value) <= FLOAT32_MAX for value in values):  # false for NaN
                raise StatisticsError(
                    f"{source}: {name}.{statistic} is not finite in float32: {shown(values)}; {remedy}"
                )
            columns[statistic] = np.array(values, dtype=np.float64)
        pairs = (("min", "q01"), ("q01", "q99"), ("q99", "max"), ("min", "mean"), ("mean", "max"))
        for low, high in (*pairs, ("q01", "q10"), ("q10", "q90"), ("q90", "q99")):
            if not columns.keys() >= {low, high}:
                continue
            slack = 1e-6 * np.maximum(np.abs(columns[low]), np.abs(columns[high]))
            wrong = np.flatnonzero(columns[low] > columns[high] + slack)
            if len(wrong):
                d = int(wrong[0])
                raise StatisticsError(
                    f"{source}: {name}.{low}[{d}] is {columns[low][d]:g}, more than {high}, {columns[high][d]:g}; "
                    f"{remedy}"
                )
        if (columns.get("std", np.zeros(1)) < 0).any():
            raise StatisticsError(f"{source}: {name}.std is less than 0: {shown(of_column['std'])}; {remedy}")


def wanted_statistics(data: DataConfig) -> tuple[str, ...]:
    """The statistics that a file for this config must have."""
    return (*STATISTICS, *(DECILES if "quantile10" in (data.normalization_type, data.state_mode) else ()))


def state_widths(statistics: Mapping[str, Any], names: Sequence[str], state_dim: int) -> dict[str, int]:
    """Values of each column that a dataset's state is joined from, in order.

    Args:
        statistics: of the dataset, which say the widths of several columns.
        names: `data.state_columns`.
        state_dim: the state's width. Without known widths it is one column's, called `state`.
    """
    widths = statistics.get("state_columns")
    if isinstance(widths, dict) and all(type(widths.get(name)) is int for name in names):
        if sum(widths[name] for name in names) == state_dim:
            return {name: widths[name] for name in names}
    return {names[0] if len(names) == 1 else "state": state_dim}


def state_labels(widths: Mapping[str, int]) -> list[str]:
    """What each value of a state is called: `state[0]`, ..., `force[2]`."""
    return [f"{name}[{i}]" for name, width in widths.items() for i in range(width)]


def shown(value: Any) -> str:
    """A value for a message, cut after some characters."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def statistics_settings(data: DataConfig) -> dict[str, Any]:
    """The settings that the statistics of every dataset depend on."""
    return {
        "action_mode": data.action_mode,
        "absolute_action_dims": sorted(data.absolute_action_dims),
        "val_fraction": data.val_fraction,
        "split_seed": data.split_seed,
        "max_episodes": data.max_episodes,
        "state_columns": list(data.state_columns),
    }


def _check_settings(content: dict[str, Any], config: Config, path: str, command: str) -> None:
    settings = statistics_settings(config.data)
    if config.data.action_mode == "absolute":
        del settings["absolute_action_dims"]
    if config.data.val_fraction == 0 and config.data.max_episodes is None:
        del settings["split_seed"]
    content = {"state_columns": ["state"], **content}  # files of earlier versions do not say
    others = {key: value for key, value in settings.items() if content.get(key) != value}
    if others:
        made_with = ", ".join(f"{key} {content.get(key)}" for key in others)
        needed = ", ".join(f"data.{key} {value}" for key, value in others.items())
        flags = " ".join(f"'data.{key}={'null' if value is None else value}'" for key, value in others.items())
        raise StatisticsError(
            f"{path}: made with {made_with}, config wants {needed}; where other configs use the file, give this one "
            f"another data.normalization_stats_path; make it again with: {command} --set {flags}"
        )


def _dataset_statistics(
    datasets: dict[str, Any], entry: MixtureEntry, config: Config, path: str, remedy: str
) -> dict[str, Any]:
    if entry.name not in datasets:
        near = difflib.get_close_matches(entry.name, datasets, n=1, cutoff=0.0)
        hint = f" (nearest: {near[0]!r})" if near else ""
        raise StatisticsError(f"{path}: no statistics of dataset {entry.name!r}{hint}; {remedy}")
    statistics = datasets[entry.name]
    source = f"{path}: dataset {entry.name}"
    needed = dict.fromkeys(("state", "action"), wanted_statistics(config.data))
    check_statistics(statistics, entry.state_dim, entry.per_action_dim, source, remedy, needed)
    if config.data.action_mode == "delta" and statistics.get("horizon") != entry.horizon:
        raise StatisticsError(
            f"{source}: made with horizon {statistics.get('horizon')}, config wants horizon {entry.horizon}, and "
            f"statistics of delta actions depend on it; {remedy}"
        )
    return statistics
