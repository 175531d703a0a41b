"""Which episodes are trained on and which are held out: a function of (name, number of episodes, settings) alone."""

from __future__ import annotations

import numpy as np

from utils.misc import derive_seed


def validation_episodes(
    name: str, num_episodes: int, fraction: float, seed: int, max_episodes: int | None = None
) -> np.ndarray:
    """Which episodes `data.val_fraction` holds out.

    Args:
        name: of the dataset, so that datasets of a mixture are split independently.
        num_episodes: episodes in file order.
        fraction: share to hold out; more than 0 holds out at least one episode, and at least one stays.
        seed: `data.split_seed`.
        max_episodes: `data.max_episodes`; the share is of those that it leaves.

    Returns:
        bool (num_episodes,), True for held-out episodes. Training, validation and statistics all ask here, so
        an episode is never on both sides.
    """
    used = np.flatnonzero(used_episodes(name, num_episodes, seed, max_episodes))
    held_out = np.zeros(num_episodes, dtype=bool)
    if fraction > 0 and len(used) > 1:
        count = min(len(used) - 1, max(1, round(fraction * len(used))))
        drawn = np.random.default_rng(derive_seed("split", name, seed)).permutation(len(used))[:count]
        held_out[used[drawn]] = True
    return held_out


def used_episodes(name: str, num_episodes: int, seed: int, max_episodes: int | None) -> np.ndarray:
    """Which episodes `data.max_episodes` leaves, bool (num_episodes,).

    They are drawn at random, because files often hold one task after the other. A larger limit keeps the episodes of a
    smaller one and adds to them.
    """
    used = np.zeros(num_episodes, dtype=bool)
    order = np.random.default_rng(derive_seed("limit", name, seed)).permutation(num_episodes)
    used[order[:max_episodes]] = True
    return used
