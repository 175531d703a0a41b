"""Numbers that describe demonstrations: ranges per dimension, lengths, prompts, episodes that occur twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd


def row_digests(values: np.ndarray) -> np.ndarray:
    """uint64 (N,): equal for rows of a float32 (N, D) array that are equal in every bit."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return pd.util.hash_pandas_object(pd.DataFrame(bits), index=False).to_numpy()


def shared_episodes(
    train: tuple[np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray], threshold: float = 0.5
) -> list[int]:
    """Validation episodes that training has seen.

    Args:
        train, val: float32 (N, D) state and action side by side, and int64 (episodes + 1,) first rows of episodes.
        threshold: part of an episode's rows that must occur in the training rows.
    """
    seen = np.isin(row_digests(val[0]), row_digests(train[0]))
    starts = val[1]
    parts = np.add.reduceat(seen.astype(np.float64), starts[:-1]) / np.diff(starts)
    return np.flatnonzero(parts > threshold).tolist()


def describe_dimensions(values: np.ndarray) -> dict[str, Any]:
    """Per dimension of float (N, D): min, q01, mean, q99, max, std over finite rows, as lists of D numbers.

    Empty lists where no row is finite.
    """
    finite = values[np.isfinite(values).all(axis=1)].astype(np.float64)
    if not len(finite):
        return {"rows": 0, "min": [], "q01": [], "mean": [], "q99": [], "max": [], "std": []}
    q01, q99 = np.quantile(finite, [0.01, 0.99], axis=0)
    found = {
        "min": finite.min(axis=0),
        "q01": q01,
        "mean": finite.mean(axis=0),
        "q99": q99,
        "max": finite.max(axis=0),
        "std": finite.std(axis=0),
    }
    return {"rows": len(finite), **{name: [float(x) for x in array] for name, array in found.items()}}


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
