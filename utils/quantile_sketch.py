"""Quantiles of a stream in bounded memory, with a rank error that is counted, not estimated.

The multi-level compactor of Munro and Paterson (Selection and sorting with limited storage, 1980) as refined by
Manku, Rajagopalan and Lindsay (Approximate medians and other quantiles in one pass and with limited memory, 1998),
for many dimensions at once. Values are kept as they come until there are more than `CAPACITY`. Then `CAPACITY` of
them are sorted and every second one is kept, standing for two; two such buffers are merged, sorted and halved in
the same way, each value now standing for four; and so on, as a binary counter carries.

Why the error is bounded. Halve a sorted buffer of 2k values of weight w and let r of them lie below some cut. Keeping
positions 0, 2, 4, ... keeps ceil(r / 2) values of weight 2w below the cut: the count there grows by w or stays.
Keeping positions 1, 3, 5, ... keeps floor(r / 2): it shrinks by w or stays. No other step changes a count. So a count
is too high by at most the summed weight of the halvings of the first kind, `overcount`, and too low by at most that
of the second, `undercount`, wherever the cut, whatever the order of the data. Each halving takes the kind whose
sum is smaller at the time.

In advance: one level's halvings weigh at most n / CAPACITY together and there are floor(log2(n / CAPACITY)) + 1
levels, of which the balance leaves about half on either side: the rank error is at most
(floor(log2(n / CAPACITY)) + 2) / (2 CAPACITY) of n, 3.8e-5 for a million values and 1.1e-4 for a thousand million.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

CAPACITY = 65536  # values per dimension up to which quantiles are exact


class QuantileSketch:
    """Quantiles of `dims` parallel streams of float32; memory grows with the logarithm of their length.

    Attributes:
        count: values seen per dimension.
        overcount, undercount: how far the number of values below any cut may have grown, or shrunk.
    """

    def __init__(self, dims: int, capacity: int = CAPACITY) -> None:
        """
        Args:
            dims: streams, each with its own quantiles.
            capacity: even number of values per dimension up to which quantiles are exact.
        """
        if capacity < 2 or capacity % 2:
            raise ValueError(f"QuantileSketch: capacity is {capacity}; give a positive even number")
        self.dims, self.capacity = dims, capacity
        self.count = self.overcount = self.undercount = 0
        self._recent: list[np.ndarray] = []  # weight 1, in order of arrival
        self._buffers: list[np.ndarray | None] = []  # [j]: sorted (dims, capacity / 2) of weight 2 ** (j + 1)

    @property
    def rank_error(self) -> float:
        """Largest error of a rank, as a share of `count`; 0.0 while quantiles are exact."""
        return max(self.overcount, self.undercount) / max(self.count, 1)

    def add(self, values: np.ndarray) -> None:
        """Take in finite values, float32 (dims, n), any n. The array is kept: don't write to it afterwards."""
        if values.ndim != 2 or len(values) != self.dims:
            raise ValueError(f"QuantileSketch: values of shape {values.shape}; wanted ({self.dims}, n)")
        self.count += values.shape[1]
        self._recent.append(values)
        self._compact()

    def merge(self, other: QuantileSketch) -> None:
        """Take in another sketch of the same dims and capacity; its error adds to this one's."""
        if (other.dims, other.capacity) != (self.dims, self.capacity):
            raise ValueError(
                f"QuantileSketch: merging {other.dims} dims of capacity {other.capacity} into {self.dims} dims of "
                f"capacity {self.capacity}; both must be alike"
            )
        self.count += other.count
        self.overcount += other.overcount
        self.undercount += other.undercount
        for level, buffer in enumerate(other._buffers):
            if buffer is not None:
                self._carry(buffer, level)
        self._recent += other._recent
        self._compact()

    def quantiles(self, fractions: Sequence[float]) -> np.ndarray:
        """float64 (len(fractions), dims): the quantiles of everything seen.

        Up to `capacity` values: `numpy.quantile`, linearly interpolated. Beyond: for each fraction q a value x of
        the data such that, up to `rank_error * count`, at most q * count values are below x and at least q * count
        are below or equal to it.

        Raises:
            ValueError: nothing was added.
        """
        if self.count == 0:
            raise ValueError("QuantileSketch: no values, so no quantiles")
        recent = np.concatenate(self._recent, axis=1)
        if recent.shape[1] == self.count:
            return np.quantile(recent.astype(np.float64), fractions, axis=1)
        parts, weights = [recent], [np.ones(recent.shape[1], dtype=np.int64)]
        for level, buffer in enumerate(self._buffers):
            if buffer is not None:
                parts.append(buffer)
                weights.append(np.full(buffer.shape[1], 2 ** (level + 1), dtype=np.int64))
        values = np.concatenate(parts, axis=1)
        order = np.argsort(values, axis=1)
        ranks = np.cumsum(np.concatenate(weights)[order], axis=1)  # values below or equal, (dims, kept)
        chosen = np.stack([(ranks < fraction * self.count).sum(axis=1) for fraction in fractions])
        return np.take_along_axis(np.take_along_axis(values, order, axis=1), chosen.T, axis=1).T.astype(np.float64)

    def _compact(self) -> None:
        """Move recent values into the buffers until at most `capacity` are left."""
        if sum(part.shape[1] for part in self._recent) <= self.capacity:
            return
        recent = np.concatenate(self._recent, axis=1)
        begin = 0
        while recent.shape[1] - begin > self.capacity:
            block = np.sort(recent[:, begin : begin + self.capacity], axis=1)
            self._carry(self._halve(block, 1), 0)
            begin += self.capacity
        self._recent = [recent[:, begin:].copy()]

    def _carry(self, buffer: np.ndarray, level: int) -> None:
        """Add a buffer at its level; two of a level make one of the next."""
        self._buffers += [None] * (level + 1 - len(self._buffers))
        held = self._buffers[level]
        if held is None:
            self._buffers[level] = buffer
            return
        self._buffers[level] = None
        both = np.sort(np.concatenate([held, buffer], axis=1), axis=1, kind="stable")  # two runs: linear time
        self._carry(self._halve(both, 2 ** (level + 1)), level + 1)

    def _halve(self, ordered: np.ndarray, weight: int) -> np.ndarray:
        """Every second of the sorted values, each of which weighed `weight`."""
        if self.overcount <= self.undercount:
            self.overcount += weight
            return ordered[:, ::2].copy()
        self.undercount += weight
        return ordered[:, 1::2].copy()
