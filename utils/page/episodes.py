"""Episodes for the viewer: which steps have values, and curves out of arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from utils.page.content import Curve

MAX_EPISODES = 50  # of a page
MAX_SAMPLED = 300  # steps of an episode that have values in curves
MAX_CURVES = 16  # of a group
MAX_MARKS = 40  # of an episode


def sampled_steps(steps: int, also: Sequence[int] = ()) -> list[int]:
    """Steps of an episode that curves have values for: all of a short one, else evenly chosen ones and `also`."""
    even = np.linspace(0, steps - 1, min(steps, MAX_SAMPLED)).round().astype(int).tolist()
    return sorted({*even, *(step for step in also if 0 <= step < steps)})


def curves_of(
    group: str,
    names: Sequence[str],
    values: np.ndarray,
    sampled: Sequence[int],
    *,
    drawn: np.ndarray | None = None,
    marked: Mapping[int, list[int]] | None = None,
) -> list[Curve]:
    """One curve per dimension, at most MAX_CURVES.

    Args:
        group: what the values are, such as `state`.
        names: of the dimensions.
        values: (T, D); what is not finite leaves a gap.
        sampled: steps to take.
        drawn: (K, T, D), K draws of a policy; the first is its prediction.
        marked: dimension -> steps whose values are wrong.
    """
    result = []
    for d, name in enumerate(names[:MAX_CURVES]):
        predicted, low, high = None, None, None
        if drawn is not None:
            predicted = numbers(drawn[0, sampled, d])
            if len(drawn) > 1:
                low, high = (numbers(limit(drawn[:, sampled, d], axis=0)) for limit in (np.min, np.max))
        steps = (marked or {}).get(d, [])
        result.append(Curve(group, name, numbers(values[sampled, d]), predicted, low, high, steps))
    return result


def numbers(values: np.ndarray) -> list[float | None]:
    """An array as numbers for a curve; None where it is not finite."""
    return [value if np.isfinite(value) else None for value in values.astype(float).tolist()]


def left_out(shown: int, episodes: int, frames: int, longest: int, widest: int, choice: str) -> list[str]:
    """What a viewer does not show, a sentence each.

    Args:
        shown, episodes: how many are in the viewer, and how many there are.
        frames: of each episode and camera, at most.
        longest, widest: steps of the longest episode shown, and dimensions of the widest column.
        choice: how the episodes were chosen.
    """
    result = []
    if shown < episodes:
        result.append(f"The viewer has {shown} of {episodes} episodes: {choice}.")
    if frames < longest:
        result.append(f"It has about {frames} frames of each episode and camera, evenly chosen, and made smaller.")
    else:
        result.append("Its frames are made smaller than they were recorded.")
    if longest > MAX_SAMPLED:
        result.append(
            f"Curves of episodes longer than {MAX_SAMPLED} steps have evenly chosen values and the marked ones."
        )
    if widest > MAX_CURVES:
        result.append(f"Of vectors with more than {MAX_CURVES} dimensions the first {MAX_CURVES} are drawn.")
    return result
