"""The quantile sketch: exact up to its capacity, and never further off than it says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from utils.quantile_sketch import QuantileSketch

FRACTIONS = (0.0, 0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 1.0)


def streams(count: int) -> tuple[list[str], np.ndarray]:
    """Orders that are hard on a sketch, float32 (streams, count)."""
    rng = np.random.default_rng(0)
    ordered = np.sort(rng.normal(size=count))
    found = {
        "sorted": ordered,
        "reversed": ordered[::-1],
        "shuffled": rng.permutation(ordered),
        "outside in": np.stack([ordered[: count // 2], ordered[::-1][: count // 2]], axis=1).ravel(),
        "constant": np.full(count, 0.1),
        "heavy ties": rng.integers(0, 5, count),
        "ties in order": np.sort(rng.integers(0, 5, count)),
        "almost constant": np.where(np.arange(count) % 211 == 7, 1.0, 0.0),
        "bimodal": np.where(rng.random(count) < 0.98, rng.normal(size=count), 1000 + rng.normal(size=count)),
        "sawtooth": np.arange(count) % 97,
        "heavy tails": rng.standard_cauchy(count),
        "alternating": np.where(np.arange(count) % 2, ordered, -ordered),
    }
    return list(found), np.stack([values[:count] for values in found.values()]).astype(np.float32)


def promised(count: int, capacity: int) -> float:
    """The bound that the module's docstring gives in advance."""
    if count <= capacity:
        return 0.0
    return (math.floor(math.log2(count / capacity)) + 2) / (2 * capacity)


def check_ranks(sketch: QuantileSketch, values: np.ndarray) -> None:
    """Every quantile's rank in the true values is as close as `rank_error` says, and that as small as promised."""
    count = values.shape[1]
    assert sketch.count == count
    assert sketch.rank_error <= promised(count, sketch.capacity)
    slack = sketch.rank_error * count
    for fraction, found in zip(FRACTIONS, sketch.quantiles(FRACTIONS), strict=True):
        below = (values < found[:, None]).sum(axis=1)
        below_or_equal = (values <= found[:, None]).sum(axis=1)
        assert (below <= fraction * count + slack).all(), fraction
        assert (below_or_equal >= fraction * count - slack).all(), fraction
        assert all(x in row for x, row in zip(found.astype(np.float32), values, strict=True)), "a value of the data"


@pytest.mark.parametrize("pieces", [1, 7, 300])
def test_exact_up_to_the_capacity(pieces):
    _, values = streams(1000)
    sketch = QuantileSketch(len(values), capacity=1000)
    for piece in np.array_split(values, pieces, axis=1):
        sketch.add(piece)
    assert sketch.rank_error == 0
    wanted = np.quantile(values.astype(np.float64), FRACTIONS, axis=1)
    np.testing.assert_array_equal(sketch.quantiles(FRACTIONS), wanted)


@pytest.mark.parametrize("count", [66, 130, 1000, 20_000])
@pytest.mark.parametrize("pieces", [1, 13, 500])
def test_ranks_are_within_the_bound_for_every_order(count, pieces):
    names, values = streams(count)
    sketch = QuantileSketch(len(names), capacity=64)
    for piece in np.array_split(values, pieces, axis=1):
        sketch.add(piece)
    check_ranks(sketch, values)


@pytest.mark.parametrize("seed", range(5))
def test_ranks_are_within_the_bound_after_merging(seed):
    rng = np.random.default_rng(seed)
    names, values = streams(30_000)
    cuts = np.sort(rng.integers(0, values.shape[1], 40))
    sketches = []
    for part in np.split(values, cuts, axis=1):
        sketches.append(QuantileSketch(len(names), capacity=64))
        sketches[-1].add(part)
    while len(sketches) > 1:  # in any order
        one = sketches.pop(rng.integers(len(sketches)))
        sketches[rng.integers(len(sketches))].merge(one)
    check_ranks(sketches[0], values)


def test_merging_stays_exact_up_to_the_capacity():
    _, values = streams(900)
    parts = np.split(values, [100, 100, 450], axis=1)
    total = QuantileSketch(len(values), capacity=900)
    for part in parts:
        one = QuantileSketch(len(values), capacity=900)
        one.add(part)
        total.merge(one)
    assert total.rank_error == 0
    np.testing.assert_array_equal(
        total.quantiles([0.01, 0.99]), np.quantile(values.astype(np.float64), [0.01, 0.99], axis=1)
    )


def test_the_bound_is_not_loose():
    """The worst error of sorted data is a good part of what is stated."""
    values = np.arange(4096, dtype=np.float32)[None]
    sketch = QuantileSketch(1, capacity=64)
    sketch.add(values)
    worst = max(
        abs((values <= found).sum() - fraction * 4096)
        for fraction, found in zip(np.linspace(0, 1, 513), sketch.quantiles(np.linspace(0, 1, 513))[:, 0], strict=True)
    )
    assert worst >= 0.25 * sketch.rank_error * 4096


def test_memory_grows_with_the_logarithm():
    rng = np.random.default_rng(0)
    sketch = QuantileSketch(1, capacity=128)
    for exponent in range(8, 18):
        sketch.add(rng.normal(size=(1, 2**exponent - sketch.count)).astype(np.float32))
        kept = sum(part.size for part in (*sketch._recent, *sketch._buffers) if part is not None)
        assert kept <= 128 + 64 * (exponent - 6)


def test_refusals():
    with pytest.raises(ValueError, match="capacity is 7; give a positive even number"):
        QuantileSketch(1, capacity=7)
    with pytest.raises(ValueError, match="no values, so no quantiles"):
        QuantileSketch(1).quantiles([0.5])
    with pytest.raises(ValueError, match=r"values of shape \(3, 2\); wanted \(2, n\)"):
        QuantileSketch(2).add(np.zeros((3, 2), np.float32))
    with pytest.raises(ValueError, match="merging 1 dims of capacity 4 into 1 dims of capacity 8; both must be alike"):
        QuantileSketch(1, capacity=8).merge(QuantileSketch(1, capacity=4))
