"""Numbers that describe demonstrations: ranges per dimension, lengths, prompts, episodes that occur twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from data.dataset import VLADataset


def row_digests(values: np.ndarray) -> np.ndarray:
    """uint64 (N,): equal for rows of a float32 (N, D) array that are equal in every bit."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return pd.util.hash_pandas_object(pd.DataFrame(bits), index=False).to_numpy()


def shared_episodes(train: np.ndarray, val: np.ndarray, val_starts: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """Validation episodes that training has seen.

    Args:
        train, val: float32 (N, D), state and action of every row side by side.
        val_starts: int64 (episodes + 1,), first row of each validation episode.
        threshold: part of an episode's rows that must occur in the training rows.

    Returns:
        int64, positions of those episodes.
    """
    seen = np.isin(row_digests(val), row_digests(train)).astype(np.float64)
    return np.flatnonzero(np.add.reduceat(seen, val_starts[:-1]) / np.diff(val_starts) > threshold)


def describe_episodes(
    dataset: VLADataset, split: str, episodes: Sequence[int] | np.ndarray | None = None
) -> list[dict[str, Any]]:
    """Where episodes are and what they look like.

    Args:
        dataset: whose store holds them.
        split: written into every entry.
        episodes: numbers in the dataset's files; None: those of the dataset's split.

    Returns:
        One entry per episode: dataset, split, episode, file, row where it begins in that file, steps, prompt, and in
        physical units the length of the path of the state (sum of the distances between steps), the mean and the
        largest absolute action, and the mean absolute change from one action to the next.
    """
    store = dataset.store
    result = []
    for episode in np.asarray(dataset.episodes if episodes is None else episodes).tolist():
        begin, end = (int(row) for row in store.episode_starts[episode : episode + 2])
        file = int(np.searchsorted(store.file_starts, begin, side="right")) - 1
        source = {"file": str(store.files[file]), "row": begin - int(store.file_starts[file])}
        about = {"dataset": dataset.name, "split": split, "episode": episode, **source}
        about |= {"steps": end - begin, "prompt": store.prompt(begin)}
        result.append(about | _describe_motion(store.state[begin:end], store.action[begin:end]))
    return result


def _describe_motion(state: np.ndarray, action: np.ndarray) -> dict[str, float]:
    moved, changed = np.diff(state, axis=0), np.abs(np.diff(action, axis=0))
    return {
        "state_path": float(np.linalg.norm(moved, axis=1).sum()),
        "action_mean_abs": float(np.abs(action).mean()),
        "action_max_abs": float(np.abs(action).max()),
        "action_change": float(changed.mean()) if len(changed) else 0.0,
    }


def unused_episodes(splits: Sequence[VLADataset]) -> np.ndarray:
    """Episodes of the files that the splits share which are in none of them (`data.max_episodes`), int64."""
    used = np.concatenate([dataset.episodes for dataset in splits])
    return np.setdiff1d(np.arange(splits[0].store.num_episodes), used)


def prompts_by_split(episodes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per dataset and prompt: episodes and steps of each split, as `{"train": [episodes, steps], ...}`, and both in
    total; the most frequent prompt of a dataset first.

    Args:
        episodes: from `describe_episodes`.
    """
    by_prompt: dict[tuple[str, str], dict[str, Any]] = {}
    for episode in episodes:
        key = (episode["dataset"], episode["prompt"])
        entry = by_prompt.setdefault(
            key, {"dataset": key[0], "prompt": key[1], "splits": {}, "episodes": 0, "steps": 0}
        )
        counts = entry["splits"].setdefault(episode["split"], [0, 0])
        for counter, amount in ((0, 1), (1, episode["steps"])):
            counts[counter] += amount
        entry["episodes"] += 1
        entry["steps"] += episode["steps"]
    return sorted(by_prompt.values(), key=lambda entry: (entry["dataset"], -entry["episodes"], entry["prompt"]))


def overlap(train: VLADataset, val: VLADataset) -> list[int]:
    """Episodes of `val` (numbers of its files) that `train` holds too: the same one, or one with the same rows."""
    (train_values, _), (val_values, val_starts) = _values(train), _values(val)
    shared = set(val.episodes[shared_episodes(train_values, val_values, val_starts)].tolist())
    if train.store.files == val.store.files:
        shared |= set(train.episodes.tolist()) & set(val.episodes.tolist())
    return sorted(shared)


def split_rows(dataset: VLADataset) -> np.ndarray:
    """Rows of the store that belong to the dataset's split, bool (rows,)."""
    chosen = np.zeros(dataset.store.num_episodes, dtype=bool)
    chosen[dataset.episodes] = True
    return np.repeat(chosen, np.diff(dataset.store.episode_starts))


def _values(dataset: VLADataset) -> tuple[np.ndarray, np.ndarray]:
    """State and action side by side in every row of a split, and the first row of each of its episodes."""
    store, rows = dataset.store, split_rows(dataset)
    lengths = np.diff(store.episode_starts)[dataset.episodes]
    return np.concatenate([store.state[rows], store.action[rows]], axis=1), np.concatenate([[0], np.cumsum(lengths)])


def describe_dimensions(values: np.ndarray) -> dict[str, Any]:
    """Per dimension of float (N, D): min, q01, mean, q99, max, std over finite rows, as lists of D numbers.

    Empty lists where no row is finite.
    """
    finite = values[np.isfinite(values).all(axis=1)].astype(np.float64)
    if not len(finite):
        return {"rows": 0, "min": [], "q01": [], "mean": [], "q99": [], "max": [], "std": []}
    q01, q99 = np.quantile(finite, [0.01, 0.99], axis=0)
    columns = {
        "min": finite.min(axis=0),
        "q01": q01,
        "mean": finite.mean(axis=0),
        "q99": q99,
        "max": finite.max(axis=0),
        "std": finite.std(axis=0),
    }
    return {"rows": len(finite), **{name: [float(x) for x in array] for name, array in columns.items()}}


def describe_lengths(lengths: np.ndarray) -> dict[str, float | int] | None:
    """Shortest, median, mean and longest episode, in steps; None without episodes."""
    if not len(lengths):
        return None
    return {
        "min": int(lengths.min()),
        "median": float(np.median(lengths)),
        "mean": float(lengths.mean()),
        "max": int(lengths.max()),
    }
