"""Whether normalization statistics fit data: per dimension what the statistics make of it, and what looks wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from utils.comparison.facts import QUANTILES
from utils.comparison.kinds import Mismatch
from utils.comparison.numbers import other_distribution
from utils.config_data import DataConfig
from utils.normalization import own_affine, published_scaling
from utils.text_table import text_table

BLOWN_UP = 20.0  # normalized values from which a dimension drowns the others
FLATTENED = 0.05  # share of the range of all values within which 98 % of them lie, from which one wild value rules
FLATTENING = ("min_max", "mean_std")  # the modes that a wild value stretches
LIMIT = 0.25  # distance of quantiles, in ranges, up to which data are those that statistics were made of


@dataclass(frozen=True)
class DimensionFit:
    """One dimension.

    Attributes:
        name: such as `state[2]`.
        outside: share of the values outside the statistics' q01 to q99; 0.02 in the data that these were made of.
        mapped: what the data's 1 % and 99 % quantiles become when they are normalized.
        note: what looks wrong, or "".
    """

    name: str
    outside: float
    mapped: tuple[float, float]
    note: str


def statistics_fit(
    values: Mapping[str, np.ndarray],
    statistics: Mapping[str, Mapping[str, Sequence[float]]],
    data_config: DataConfig,
    *,
    of_training: bool = False,
) -> tuple[list[DimensionFit], list[Mismatch]]:
    """Data beside the statistics that they are to be normalized with.

    Args:
        values: `state` and `action`, (N, width), physical units; either may be missing.
        statistics: of the same columns.
        data_config: how these are normalized.
        of_training: whether the values are the training data. Then what is wrong with these alone is said too; beside
            other values it is no difference: dimensions that are equal in both, and a wild value in the statistics.

    Returns:
        Every dimension, and suspected mistakes.
    """
    table, found = [], []
    modes = {"state": data_config.state_mode, "action": data_config.normalization_type}
    for column, data in values.items():
        if not {"min", "max", "q01", "q99", "mean", "std"} <= statistics[column].keys():
            continue  # openpi's statistics do not say how far values went
        known = _quantiles(statistics[column])
        data = data[:, : len(known)].astype(np.float64)
        new = np.quantile(data, QUANTILES, axis=0).T
        constant = np.ptp(known[:, [0, -1]], axis=1) <= 1e-6 * np.abs(known).max(axis=1).clip(1)
        of_column = [
            mismatch
            for d, other, mismatch in _duplicates(column, data, constant)
            if of_training or not np.array_equal(known[d], known[other])
        ]
        limit = np.full(len(known), LIMIT)
        of_column += other_distribution(column, new, known, limit, left_out=np.flatnonzero(constant).tolist())
        ends = _normalized(new[:, [1, -2]].T, statistics[column], modes[column], data_config)
        for d, (low, high) in enumerate(ends.T.tolist()):
            outside = float(((data[:, d] < known[d, 1]) | (data[:, d] > known[d, -2])).mean())
            of_column += _scale_mistakes(f"{column}[{d}]", new[d], known[d], (low, high), bool(constant[d]))
            if of_training and not constant[d] and modes[column] in FLATTENING:
                of_column += _flattened(f"{column}[{d}]", known[d])
            here = [m.kind.replace("_", " ") for m in of_column if m.where in (column, f"{column}[{d}]")]
            table.append(DimensionFit(f"{column}[{d}]", outside, (low, high), ", ".join(here)))
        found += of_column
    found += _relative(values, statistics)
    return table, found


def as_table(fits: Sequence[DimensionFit]) -> str:
    """The dimensions as aligned text."""
    rows = [(fit.name, f"{100 * fit.outside:.1f} %", *map(float, fit.mapped), fit.note) for fit in fits]
    return text_table(("dimension", "outside q01 to q99", "1 % becomes", "99 % becomes", ""), rows)


def _quantiles(statistics: Mapping[str, Sequence[float]]) -> np.ndarray:
    """Quantiles at QUANTILES, (width, 9), as far as statistics tell: straight between those that they hold."""
    known = np.array([statistics[name] for name in ("min", "q01", "mean", "q99", "max")], np.float64)
    known[2] = np.clip(known[2], known[1], known[3])
    return np.stack([np.interp(QUANTILES, (0, 0.01, 0.5, 0.99, 1), column) for column in known.T])


def _normalized(
    values: np.ndarray, statistics: Mapping[str, Sequence[float]], mode: str, data_config: DataConfig
) -> np.ndarray:
    """(N, width), physical -> normalized; nothing is clipped."""
    value_ND, width = torch.from_numpy(values).float(), values.shape[1]
    whose = data_config.normalization_arithmetic
    if whose != "own":
        return (
            published_scaling(statistics, mode, whose, width, data_config.normalization_eps).normalize(value_ND).numpy()
        )
    affine = own_affine([statistics], mode, data_config.action_bounds, width)
    return ((value_ND - affine["center"]) * affine["slope"] + affine["target"]).numpy()


def _scale_mistakes(
    name: str, new: np.ndarray, known: np.ndarray, mapped: tuple[float, float], constant: bool
) -> Iterator[Mismatch]:
    if constant:
        if np.ptp(new) > 1e-3 * max(1.0, float(np.abs(known).max())):
            evidence = f"{known[0]:.4g} throughout in the statistics, here {new[0]:.4g} to {new[-1]:.4g}"
            yield Mismatch("constant_in_statistics", name, evidence, "make the statistics of data in which it moves")
        return
    if max(abs(mapped[0]), abs(mapped[1])) > BLOWN_UP:
        evidence = f"98 % of the data become {mapped[0]:.3g} to {mapped[1]:.3g}"
        yield Mismatch("blown_up", name, evidence, "make statistics of these data, or check its units")


def _flattened(name: str, known: np.ndarray) -> Iterator[Mismatch]:
    span = known[-1] - known[0]
    if known[-2] - known[1] < FLATTENED * span:
        evidence = f"98 % of its values within {100 * (known[-2] - known[1]) / span:.1f} % of min to max"
        remedy = "remove the wild values (inspect_parquet.py finds them), or set data.normalization_type: quantile"
        yield Mismatch("flattened", name, evidence, remedy)


def _duplicates(column: str, data: np.ndarray, constant: np.ndarray) -> Iterator[tuple[int, int, Mismatch]]:
    """Dimensions that are always equal: both, and what there is to say."""
    moving = [d for d in np.flatnonzero(~constant).tolist() if np.ptp(data[:, d]) > 0]
    for i, d in enumerate(moving):
        for other in moving[:i]:
            if np.array_equal(data[:, d], data[:, other]):
                evidence = f"always equal to {column}[{other}]"
                remedy = "see that each joint is written to its place"
                yield d, other, Mismatch("duplicated", f"{column}[{d}]", evidence, remedy)


def _relative(
    values: Mapping[str, np.ndarray], statistics: Mapping[str, Mapping[str, Sequence[float]]]
) -> Iterator[Mismatch]:
    """Actions that fit the statistics only after the state is added or subtracted, in most of their dimensions."""
    if not values.keys() >= {"state", "action"} or "q01" not in statistics["action"]:
        return
    width = min(values["state"].shape[1], values["action"].shape[1])
    state, action = (values[name][:, :width].astype(np.float64) for name in ("state", "action"))
    low, high = (np.array(statistics["action"][name][:width], np.float64) for name in ("q01", "q99"))
    margin = 0.1 * (high - low) + 1e-6
    moving = np.ptp(state, axis=0) > 0

    def misfit(data: np.ndarray) -> np.ndarray:
        return ((data < low - margin) | (data > high + margin)).mean(axis=0)

    here = misfit(action)
    for kind, other, remedy in (
        ("relative_for_absolute", action + state, "write absolute targets, or normalize by statistics of deltas"),
        ("absolute_for_relative", action - state, "set data.action_mode: delta, or make statistics of these actions"),
    ):
        better = (here > 0.3) & (misfit(other) < 0.05) & moving
        if better.sum() >= max(2, width // 2):
            evidence = f"{100 * here[better].mean():.0f} % of the values do not fit, but do with the state"
            yield Mismatch(kind, "action", evidence, remedy)
