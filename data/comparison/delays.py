"""What tells a delay: a fit to the training data, held against a session that is moved by some steps against itself.

One fit says how the state moves: its next change by its last ones and the actions, a linear model (ARX; Ljung 1999,
"System Identification", sec. 4.2). The other reads the state off pictures (`data/comparison/profile.py`). Where
states or pictures come late, the fit leaves less unexplained once they are moved back. Two signals that merely go
together could not tell: in smooth movements neighbouring steps are alike.

Shape letters: T steps, A dimensions of the action, S of the state, F features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from utils.comparison.facts import LAGS

ACTIONS, CHANGES = 3, 2  # the last ones by which the state's next change is told
ENOUGH = 100  # steps, fewer of which tell nothing
RIDGE = 1e-4  # of that fit, in shares of the features' variance
Steps = tuple[np.ndarray, np.ndarray]  # of an episode: states (T, S) and actions (T, A)
Fit = dict[str, np.ndarray]


def state_motion(episodes: Sequence[Steps]) -> dict[str, Any]:
    """How the state moves in training.

    Returns:
        `mean` and `scale` (F,) of the features and `weights` (F, S) of the fit to all episodes; `telling` (S,), how far
        being one step off raises the logarithm of what remains unexplained, of fits to one half of the episodes on
        the other. Nothing where there are too few steps.
    """
    halves = episodes[::2], episodes[1::2]
    if any(_rows(half, 0) is None for half in halves):
        return {}
    left = sum(unexplained_motion(halves[1 - i], _motion_fit(halves[i])) for i in (0, 1))
    fit = {name: _rounded(values) for name, values in _motion_fit(episodes).items()}
    return fit | {"telling": np.round(np.log(left[1] / left[0]), 3).tolist()}


def unexplained_motion(episodes: Sequence[Steps], motion: dict[str, Any]) -> np.ndarray:
    """Mean squares of the state's changes beside what `state_motion` expects, (LAGS + 1, S), or (0, S) of few steps.

    Row k takes the state for k steps late.
    """
    fit = {name: np.array(motion[name]) for name in ("mean", "scale", "weights")}
    left = []
    for late in range(LAGS + 1):
        rows = _rows(episodes, late)
        if rows is None:
            return np.empty((0, fit["weights"].shape[1]))
        features, changes = rows
        expected = ((features - fit["mean"]) / fit["scale"]) @ fit["weights"]
        left.append(((changes - expected) ** 2).mean(axis=0) + 1e-14)
    return np.array(left)


def unexplained_pictures(parts: Iterable[Steps]) -> np.ndarray:
    """Mean squares of what is read off pictures beside the states, apart from an offset, of each part of a session.

    Args:
        parts: what was read (T, S) and the states (T, S).

    Returns:
        (parts, LAGS + 1, S), or nothing of few steps. Row k takes the pictures for k steps late.
    """
    left, steps = [], 0
    for read, states in parts:
        if len(read) > 2 * LAGS:
            after = np.arange(LAGS, len(read))
            apart = np.stack([read[after] - states[after - late] for late in range(LAGS + 1)])
            left.append(apart.var(axis=1) + 1e-14)
            steps += len(after)
    return np.array(left if steps >= ENOUGH else [])


def _motion_fit(episodes: Sequence[Steps]) -> Fit:
    features, changes = _rows(episodes, 0)
    mean, scale = features.mean(axis=0), features.std(axis=0) + 1e-6
    mean[-1], scale[-1] = 0.0, 1.0  # the constant
    x = (features - mean) / scale
    gram = x.T @ x + RIDGE * len(x) * np.eye(x.shape[1])
    return {"mean": mean, "scale": scale, "weights": np.linalg.solve(gram, x.T @ changes)}


def _rows(episodes: Sequence[Steps], late: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Features (N, F) and the changes (N, S) that they tell; the same rows whatever `late` is. None: too few."""
    features, told = [], []
    for states, actions in episodes:
        changes = np.diff(states.astype(np.float64), axis=0)
        now = np.arange(LAGS + ACTIONS - 1, len(changes))
        parts = [actions[now - late - back].astype(np.float64) for back in range(ACTIONS)]
        parts += [changes[now - 1 - back] for back in range(CHANGES)]
        features.append(np.concatenate([*parts, np.ones((len(now), 1))], axis=1))
        told.append(changes[now])
    if sum(map(len, told)) < ENOUGH:
        return None
    return np.concatenate(features), np.concatenate(told)


def _rounded(values: np.ndarray) -> list[Any]:
    """Plain numbers of five digits."""
    return [_rounded(row) if values.ndim > 1 else float(f"{row:.5g}") for row in values]
