"""Statistics of states and actions from a stream of time steps, in memory that grows with its length's logarithm.

Shape letters: D dimensions, n consecutive steps. Arrays are float32 (D, n), dimension first, so that sums and sorts
run over contiguous memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from utils.quantile_sketch import QuantileSketch
from utils.statistics import DECILES, STATISTICS

PAIRS_PER_BLOCK = 65536  # deltas per dimension that are formed at once


class StreamSummary:
    """Exact extremes, float64 moments and a quantile sketch of D streams fed in pieces.

    Pieces are combined as Chan, Golub and LeVeque do (Updating formulae and a pairwise algorithm for computing sample
    variances, 1979), so a mean far from zero costs no precision.
    """

    def __init__(self, dims: int, deciles: bool = False) -> None:
        self.count, self.deciles = 0, deciles
        self.min, self.max = np.full(dims, np.inf, np.float32), np.full(dims, -np.inf, np.float32)
        self.mean, self.squares = np.zeros(dims), np.zeros(dims)  # squares: summed squared deviations from the mean
        self.sketch = QuantileSketch(dims)

    def add(self, values: np.ndarray) -> None:
        """Take in finite values, float32 (D, n), any n. The array is kept: don't write to it afterwards."""
        if values.size:
            wide = values.astype(np.float64)
            mean = wide.mean(axis=1)
            wide -= mean[:, None]
            squares = np.einsum("ij,ij->i", wide, wide)
            self._combine(values.shape[1], values.min(axis=1), values.max(axis=1), mean, squares)
            self.sketch.add(values)

    def merge(self, other: StreamSummary) -> None:
        """Take in what another summary has seen."""
        if other.count:
            self._combine(other.count, other.min, other.max, other.mean, other.squares)
            self.sketch.merge(other.sketch)

    def values(self) -> dict[str, np.ndarray]:
        """Each of STATISTICS, and of DECILES where asked for, (D,).

        A stream that never changed has std 0 and min = mean = max.
        """
        constant = self.min == self.max
        q01, q99, *more = self.sketch.quantiles([0.01, 0.99, *([0.1, 0.9] if self.deciles else [])])
        return {
            "min": self.min,
            "max": self.max,
            "mean": np.where(constant, self.min, self.mean),
            "std": np.where(constant, 0.0, np.sqrt(self.squares / max(self.count, 1))),
            "q01": q01,
            "q99": q99,
            **dict(zip(DECILES, more, strict=False)),
        }

    def _combine(self, count: int, low: np.ndarray, high: np.ndarray, mean: np.ndarray, squares: np.ndarray) -> None:
        total = self.count + count
        shift = mean - self.mean
        self.squares += squares + shift**2 * (self.count * count / total)
        self.mean += shift * (count / total)
        self.min, self.max = np.minimum(self.min, low), np.maximum(self.max, high)
        self.count = total


@dataclass
class _Window:
    """Consecutive steps, of which only the delta dimensions are kept: float32 (D, n); episode numbers int64 (n,)."""

    state: np.ndarray
    action: np.ndarray
    episode: np.ndarray

    def __len__(self) -> int:
        return len(self.episode)

    def __add__(self, later: _Window) -> _Window:
        return _Window(
            np.concatenate([self.state, later.state], axis=1),
            np.concatenate([self.action, later.action], axis=1),
            np.concatenate([self.episode, later.episode]),
        )

    def cut(self, begin: int, end: int) -> _Window:
        """A copy of some steps, so that the whole is not kept alive."""
        steps = slice(max(0, begin), end)
        return _Window(self.state[:, steps].copy(), self.action[:, steps].copy(), self.episode[steps].copy())


class StepStatistics:
    """Statistics of the time steps of some consecutive rows, which can be merged with those of the rows that follow."""

    def __init__(
        self, state_dim: int, per_action_dim: int, delta_dims: list[int], horizon: int, deciles: bool = False
    ) -> None:
        """
        Args:
            state_dim, per_action_dim: widths of states and actions.
            delta_dims: action dimensions d taken as `action[d]` at t + k minus `state[d]` at t, for every step t and
                k < horizon with both in one episode; the others are taken as they are, once per step.
            horizon: actions per sample.
            deciles: make DECILES too.
        """
        self.keys = (*STATISTICS, *(DECILES if deciles else ()))
        self.delta_dims, self.reach = delta_dims, horizon - 1
        self.plain_dims = [d for d in range(per_action_dim) if d not in delta_dims]
        self.state = StreamSummary(state_dim, deciles)
        self.plain, self.delta = (StreamSummary(len(dims), deciles) for dims in (self.plain_dims, delta_dims))
        nothing = np.empty((len(delta_dims), 0), np.float32)
        self._head = self._tail = _Window(nothing, nothing, np.empty(0, np.int64))  # first and last `reach` steps

    def add(self, state: np.ndarray, action: np.ndarray, episode: np.ndarray) -> None:
        """Take in the next steps: float32 (state_dim, n) and (per_action_dim, n), episode numbers int64 (n,)."""
        self.state.add(state)
        self.plain.add(action[self.plain_dims])
        if self.delta_dims:
            new = _Window(state[self.delta_dims], action[self.delta_dims], episode)
            window, old = self._tail + new, len(self._tail)
            self._add_deltas(window, old, len(window))
            self._remember(new, window)

    def merge(self, later: StepStatistics) -> None:
        """Take in the statistics of the rows that follow."""
        self.state.merge(later.state)
        self.plain.merge(later.plain)
        if self.delta_dims:
            self._add_deltas(self._tail + later._head, len(self._tail), len(self._tail))
            self.delta.merge(later.delta)
            self._remember(later._head, self._tail + later._tail)

    def result(self) -> dict[str, dict[str, Any]]:
        """`{"state": {each of STATISTICS: [numbers], "count", "quantile_rank_error"}, "action": {...}}`.

        `count` is the number of steps; `action["pairs"]`, where there are delta dimensions, that of their values.
        """
        groups = [(self.plain, self.plain_dims), (self.delta, self.delta_dims)]
        groups = [(summary, dims) for summary, dims in groups if dims]
        action = {key: np.empty(len(self.plain_dims) + len(self.delta_dims)) for key in self.keys}
        for summary, dims in groups:
            for key, values in summary.values().items():
                action[key][dims] = values
        result = {}
        for name, values, summaries in (
            ("state", self.state.values(), [self.state]),
            ("action", action, [summary for summary, _ in groups]),
        ):
            result[name] = {key: values[key].tolist() for key in self.keys}
            result[name]["count"] = self.state.count
            result[name]["quantile_rank_error"] = max(summary.sketch.rank_error for summary in summaries)
        if self.delta_dims:
            result["action"]["pairs"] = self.delta.count
        return result

    def _add_deltas(self, window: _Window, old: int, starts: int) -> None:
        """Deltas of all pairs (t, t + k) of one episode with t < starts and t + k >= old."""
        block = max(1, PAIRS_PER_BLOCK // (self.reach + 1))
        for begin in range(max(0, old - self.reach), starts, block):
            deltas = []
            for k in range(self.reach + 1):
                t = slice(max(begin, old - k), max(begin, old - k, min(begin + block, starts, len(window) - k)))
                later = slice(t.start + k, t.stop + k)
                same = window.episode[t] == window.episode[later]
                deltas.append(np.compress(same, window.action[:, later] - window.state[:, t], axis=1))
            self.delta.add(np.concatenate(deltas, axis=1))

    def _remember(self, new: _Window, window: _Window) -> None:
        """Keep the first and the last steps, which pair with steps of the rows before and after."""
        if len(self._head) < self.reach:
            self._head = (self._head + new).cut(0, self.reach)
        self._tail = window.cut(len(window) - self.reach, len(window))
