"""Normalization statistics of training data: one pass over the numeric columns, images are never read."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from data.schema import ACTION, STATE, episode_numbers, flags, vectors
from data.state_columns import StateColumns
from data.tables import open_table
from utils.config_utils import Config
from utils.recordings import Recording, fingerprint, resolve_recordings
from utils.splits import used_episodes, validation_episodes
from utils.statistics import STATISTICS, StatisticsError, statistics_settings, wanted_statistics
from utils.streaming_statistics import StepStatistics

if TYPE_CHECKING:
    from data.dataset import MixtureDataset

logger = logging.getLogger(__name__)
ROWS_PER_BATCH = 16384
BYTES_PER_TASK = 32 * 2**20  # smaller files are read several to a task

Task = TypeVar("Task")
Result = TypeVar("Result")


def calculate_statistics(
    files: Sequence[Recording],
    state_dim: int,
    per_action_dim: int,
    *,
    name: str = "default",
    val_fraction: float = 0.0,
    split_seed: int = 0,
    max_episodes: int | None = None,
    action_mode: str = "absolute",
    absolute_action_dims: Sequence[int] = (),
    horizon: int = 1,
    state_columns: Sequence[str] = (STATE,),
    needs_state: bool = True,
    state_key: str = "state_dim",
    deciles: bool = False,
    num_workers: int | None = None,
) -> dict[str, Any]:
    """Statistics per dimension of `state` and `action` of one dataset's training episodes, in physical units.

    `absolute` actions count once per time step. `delta` actions, `action[t + k] - state[t]` in float32, count once
    for every step t and k < horizon with both in one episode: each pair that carries loss when every step is
    drawn alike. Dimensions that stay absolute count once per time step in either mode.

    Memory grows with the logarithm of the number of rows alone: a worker holds the `state` and `action` of one row
    group as they are stored, a few batches, and what `StepStatistics` keeps. The work is divided by files alone and
    the parts are merged in file order, so the number of workers changes nothing.

    Args:
        files: Parquet files in order; an episode may go on from one into the next.
        state_dim, per_action_dim: widths of the columns.
        name: of the dataset; its held-out episodes depend on it, see `validation_episodes`.
        val_fraction, split_seed, max_episodes: which episodes are held out or unused, and left out here.
        action_mode: `absolute`, or `delta` for actions relative to the current state's same dimension.
        absolute_action_dims: dimensions that stay absolute in delta mode; those past `per_action_dim` are ignored.
        horizon: actions per sample, for delta mode.
        state_columns: numeric columns that are joined into the state.
        needs_state: whether something reads the state; if not, files may lack it, and it counts as zeros.
        state_key: the config key that sets `state_dim`, for messages.
        deciles: make q10 and q90 as well.
        num_workers: threads; None: one per core. Reading, summing and sorting run outside the interpreter's lock,
            so threads scale as processes would and start at once.

    Returns:
        `{"state": {"min": [state_dim numbers], "max", "mean", "std", "q01", "q99", "count", "quantile_rank_error"},
        "action": {...}, "files": [...], "rows", "bytes_read", "file_bytes"}`, in delta mode also `"horizon"` and
        `action["pairs"]`, for a joined state `"state_columns"`, the width of each column. `count` is the number of time
        steps. min and max are exact, mean and std (the
        population's) to float64 rounding; q01 and q99 equal `numpy.quantile` up to 65,536 values, beyond which
        their ranks are off by at most the share `quantile_rank_error` (`QuantileSketch`). A dimension that never
        changes has std 0 and min = mean = max: the normalizer handles it. `rows` counts held-out steps too;
        `bytes_read` are the column chunks and footers that were needed, out of `file_bytes` (pyarrow reads the last
        64 KiB of a file at once, which in small files covers more than the footer).

    Raises:
        DataError: missing column, wrong width or type, null, NaN or infinity, naming file and row.
        StatisticsError: delta mode without a state dimension for an action dimension that is not absolute.
    """
    delta = action_mode == "delta"
    columns = StateColumns.of_tables(state_columns, state_dim, map(open_table, files), state_key, needed=needs_state)
    spec = _Spec(
        columns,
        per_action_dim,
        delta_dims=[d for d in range(per_action_dim) if delta and d not in absolute_action_dims],
        horizon=horizon if delta else 1,
        needs_episodes=delta or val_fraction > 0 or max_episodes is not None,
        deciles=deciles,
    )
    unmatched = [d for d in spec.delta_dims if d >= state_dim]
    if unmatched:
        raise StatisticsError(
            f"dataset {name}: action_mode delta subtracts state[i] from action[i], but its state_dim {state_dim} has "
            f"no value for action dimensions {unmatched}; list them in data.absolute_action_dims"
        )
    num_workers = num_workers or os.cpu_count() or 1
    sizes = [int(fingerprint(path)[1]) for path in files]
    tasks = list(_tasks(files, sizes))
    episodes_before, flag_bytes, held_out = [0] * len(tasks), 0, np.zeros(0, dtype=bool)
    if spec.needs_episodes:
        counts = list(_in_order(_count_episodes, tasks, num_workers))
        flag_bytes = sum(size for _, size in counts)
        *episodes_before, episodes = np.cumsum([0, *(number for number, _ in counts)]).tolist()
        used = used_episodes(name, episodes, split_seed, max_episodes)
        held_out = ~used | validation_episodes(name, episodes, val_fraction, split_seed, max_episodes)
    parts = _in_order(
        partial(_read, spec=spec, held_out=held_out), zip(tasks, episodes_before, strict=True), num_workers
    )
    total, rows, bytes_read = next(parts)
    for part in parts:
        total.merge(part.statistics)
        rows += part.rows
        bytes_read += part.bytes_read
    result: dict[str, Any] = total.result()
    result |= {"files": [str(path) for path in files], "rows": rows}
    result |= {"bytes_read": flag_bytes + bytes_read, "file_bytes": sum(sizes)}
    if columns.names != [STATE]:
        result["state_columns"] = columns.widths
    return result | {"horizon": horizon} if delta else result


def calculate_for_config(config: Config, num_workers: int | None = None) -> dict[str, Any]:
    """The content of the statistics file of a config: every dataset, on its training episodes.

    Raises:
        DataError, StatisticsError: see `calculate_statistics`.
    """
    data = config.data
    datasets = {}
    for entry in config.datasets:
        key = f"data.mixture {entry.name}: path" if data.mixture else "data.train_parquet_files"
        started = time.perf_counter()
        statistics = calculate_statistics(
            resolve_recordings(entry.path, key, entry.lerobot),
            entry.state_dim,
            entry.per_action_dim,
            name=entry.name,
            val_fraction=data.val_fraction,
            split_seed=data.split_seed,
            max_episodes=data.max_episodes,
            action_mode=data.action_mode,
            absolute_action_dims=data.absolute_action_dims,
            horizon=entry.horizon,
            state_columns=data.state_columns,
            needs_state=config.reads_state,
            deciles=len(wanted_statistics(data)) > len(STATISTICS),
            num_workers=num_workers,
        )
        _log_summary(entry.name, statistics, time.perf_counter() - started)
        datasets[entry.name] = statistics
    return statistics_settings(data) | {"datasets": datasets}


def require_statistics_of(train: MixtureDataset, statistics: Sequence[dict[str, Any]], action_mode: str) -> None:
    """Refuse statistics that were made of other data than are trained on.

    What counts is the content: as many rows, and the same extremes in every dimension of the training steps. So data
    may be moved or renamed. Statistics that do not say how many rows they were made of were written by hand: they are
    taken as they are, with a warning where training goes beyond them.

    Args:
        train: the training data.
        statistics: of each dataset, those that the policy normalizes with.
        action_mode: `data.action_mode`; the extremes of delta actions are not looked at.

    Raises:
        StatisticsError: naming the dataset, its files, and what the statistics were made of.
    """
    for dataset, made in zip(train.datasets, statistics, strict=True):
        starts = dataset.store.episode_starts
        mine = np.isin(np.arange(len(starts) - 1), dataset.episodes)
        rows = np.flatnonzero(np.repeat(mine, np.diff(starts)))  # those that sample_weighting leaves out, too
        columns = {"state": dataset.store.state, "action": dataset.store.action}
        if action_mode == "delta":
            del columns["action"]
        if not dataset.store.state_columns.widths:
            del columns["state"]  # nothing reads it, and the files have none
        labels = dataset.store.state_columns.labels
        columns = {name: values for name, values in columns.items() if {"min", "max"} <= (made.get(name) or {}).keys()}
        differing, outside = [], 0.0
        for name, values in columns.items():
            low, high = (np.array(made[name][key], np.float32) for key in ("min", "max"))
            here = values if len(rows) == len(values) else values[rows]
            differing += [
                labels[d] if name == "state" else f"{name}[{d}]"
                for d in np.flatnonzero((here.min(0) != low) | (here.max(0) != high))
            ]
            outside = max(outside, float(((here < low) | (here > high)).mean()))
        if "rows" not in made:
            if outside > 0:
                logger.warning(
                    "dataset %s: up to %.3g %% of its values lie outside of the statistics' min and max",
                    *(dataset.name, 100 * outside),
                )
        elif made["rows"] != len(dataset.store) or differing:
            values = f"; min and max of {', '.join(differing[:4])} differ" if differing else ""
            far = f", {100 * outside:.3g} % of the values lie outside" if outside else ""
            raise StatisticsError(
                f"dataset {dataset.name}: its statistics were made of {_listed(made.get('files') or [])} "
                f"({made['rows']} rows), training reads {_listed(dataset.store.files)} ({len(dataset.store)} rows)"
                f"{values}{far}; make the statistics again (utils/calculate_normalization_stats.py) and start a new "
                "run with them, or train on the data that they were made of"
            )


def _listed(files: Sequence[Recording]) -> str:
    names = [str(path) for path in files]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "unnamed files"


class _Spec(NamedTuple):
    """What to make statistics of; see `StepStatistics`."""

    state: StateColumns
    per_action_dim: int
    delta_dims: list[int]
    horizon: int
    needs_episodes: bool  # whether is_first has to be read
    deciles: bool


class _Part(NamedTuple):
    """The result of one task."""

    statistics: StepStatistics
    rows: int
    bytes_read: int


def _tasks(files: Sequence[Recording], sizes: list[int]) -> Iterator[list[Recording]]:
    """Consecutive files, so many to a task that reading them outweighs handing them over."""
    task, filled = [], 0
    for path, size in zip(files, sizes, strict=True):
        task.append(path)
        filled += size
        if filled >= BYTES_PER_TASK:
            yield task
            task, filled = [], 0
    if task:
        yield task


def _in_order(function: Callable[[Task], Result], tasks: Iterable[Task], num_workers: int) -> Iterator[Result]:
    """Results in the order of the tasks; one more is under way than workers, so that results never pile up."""
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_workers) as executor:
        try:
            for task in tasks:
                pending.append(executor.submit(function, task))
                if len(pending) > num_workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _count_episodes(paths: list[Recording]) -> tuple[int, int]:
    """(episodes that begin in these files, bytes read)."""
    episodes = bytes_read = 0
    for path in paths:
        with open_table(path, use_threads=False) as table:
            for row, batch in table.batches(["is_first"], ROWS_PER_BATCH):
                episodes += int(_is_first(batch, path, row).sum())
            bytes_read += table.bytes_needed(["is_first"])
    return episodes, bytes_read


def _read(task: tuple[list[Recording], int], spec: _Spec, held_out: np.ndarray) -> _Part:
    """The statistics of some files' training steps; a task is the files and how many episodes begin before them."""
    paths, episodes = task
    statistics = StepStatistics(spec.state.width, spec.per_action_dim, spec.delta_dims, spec.horizon, spec.deciles)
    columns = [*spec.state.names, ACTION, *(["is_first"] if spec.needs_episodes else [])]
    rows = bytes_read = 0
    for path in paths:
        with open_table(path, use_threads=False) as table:
            for row, batch in table.batches(columns, ROWS_PER_BATCH):
                state = spec.state.read(batch, path, row).T
                width, key = spec.per_action_dim, "per_action_dim"
                action = vectors(batch.column(ACTION), ACTION, width, path, row, width_from=key).T
                episode = np.zeros(batch.num_rows, np.int64)
                if spec.needs_episodes:
                    episode = episode_numbers(_is_first(batch, path, row), episodes, path, row)
                    episodes = int(episode[-1]) + 1
                    keep = ~held_out[episode]
                    state, action, episode = state[:, keep], action[:, keep], episode[keep]
                statistics.add(np.ascontiguousarray(state), np.ascontiguousarray(action), episode)
                rows += batch.num_rows
            bytes_read += table.bytes_needed(columns)
    return _Part(statistics, rows, bytes_read)


def _is_first(batch: pa.RecordBatch, path: Recording, row: int) -> np.ndarray:
    return flags(batch.column("is_first"), "is_first", path, row)


def _log_summary(name: str, statistics: dict[str, Any], seconds: float) -> None:
    for key in ("state", "action"):
        of_column = statistics[key]
        constant = [
            i for i, (low, high) in enumerate(zip(of_column["min"], of_column["max"], strict=True)) if low == high
        ]
        note = f", constant dimensions {constant}" if constant else ""
        rows = f"{of_column['count']} of {statistics['rows']} rows"
        logger.info("%s %s: %s, %d dimensions%s", name, key, rows, len(of_column["min"]), note)
    size, total = statistics["bytes_read"], statistics["file_bytes"]
    logger.info(
        "%s: %.1f s, %.1f of %.1f MB read (%.1f %%)", name, seconds, size / 1e6, total / 1e6, 100 * size / total
    )
