"""A state that begins elsewhere than in training: the mistake that explains it is named, and none where none does."""

from __future__ import annotations

import numpy as np
import pytest

from utils.comparison.facts import QUANTILES
from utils.comparison.numbers import _at_the_start

BEGINS = np.array([[-0.01, 0.01], [0.59, 0.61], [0.15, 0.2], [0.99, 1.0]])  # x, y, z, and a gripper that is open
RANGE = np.array([[-0.4, 0.4], [0.4, 0.9], [0.0, 0.4], [0.2, 1.0]])


def quantiles(range_W2):
    """Of values that are spread evenly over each dimension's range, (width, 9)."""
    low, high = np.asarray(range_W2, float).T
    return low[:, None] + np.array(QUANTILES) * (high - low)[:, None]


def told(state_NS):
    begin = np.quantile(np.asarray(state_NS, float), QUANTILES, axis=0).T
    mismatch = _at_the_start(begin, quantiles(BEGINS), quantiles(RANGE))
    return None if mismatch is None else (mismatch.kind, mismatch.where)


def starts(seed=0):
    return np.random.default_rng(seed).uniform(*BEGINS.T, (12, 4))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s * 1000, ("thousandfold", "state")),
        (lambda s: s / 1000, ("a_thousandth", "state")),
        (np.degrees, ("degrees_for_radians", "state")),
        (lambda s: s[:, [1, 2, 0, 3]], ("dimensions_exchanged", "state")),
        (lambda s: np.column_stack([s[:, :3], 1 - s[:, 3]]), ("inverted", "state[3]")),
        (lambda s: np.column_stack([s[:, :3], 1.2 - s[:, 3]]), ("inverted", "state[3]")),  # the other end of its range
    ],
)
def test_what_explains_another_beginning_is_named(change, expected):
    assert told(change(starts())) == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s,
        lambda s: s + (0.2, 0.0, 0.0, 0.0),  # the robot begins further left
        lambda s: s + (0.2, -0.15, 0.1, 0.0),
        lambda s: s - (0.0, 0.0, 0.0, 0.5),  # its gripper is half open
        lambda s: np.column_stack([s[:, :2], s[:, 3], s[:, 3]]),  # one dimension twice is no other order
    ],
)
def test_another_place_alone_is_no_mistake(change):
    assert told(change(starts())) is None


def test_values_near_zero_are_no_other_unit():
    """Joints that began at zero and begin elsewhere in their range fit when divided by 57, which says nothing."""
    usual, known = quantiles([[-0.01, 0.01]] * 3), quantiles([[-1, 1]] * 3)
    begin = quantiles([[0.4, 0.5], [-0.5, -0.4], [0.3, 0.4]])
    assert _at_the_start(begin, usual, known) is None
    assert _at_the_start(begin * 20, usual, known).kind == "thousandfold"
