"""Which episodes are held out for validation: a function of (name, number of episodes, fraction, seed) alone."""

from __future__ import annotations

import numpy as np

from utils.misc import derive_seed


def validation_episodes(name: str, num_episodes: int, fraction: float, seed: int) -> np.ndarray:
    """Which episodes `data.val_fraction` holds out.

    Args:
        name: of the dataset, so that datasets of a mixture are split independently.
        num_episodes: episodes in file order.
        fraction: share to hold out; more than 0 holds out at least one episode, and at least one stays.
        seed: `data.split_seed`.

    Returns:
        bool (num_episodes,), True for held-out episodes. Training, validation and statistics all ask here, so
        an episode is never on both sides.
    """
    held_out = np.zeros(num_episodes, dtype=bool)
    if fraction > 0 and num_episodes > 1:
        count = min(num_episodes - 1, max(1, round(fraction * num_episodes)))
        held_out[np.random.default_rng(derive_seed("split", name, seed)).permutation(num_episodes)[:count]] = True
    return held_out
