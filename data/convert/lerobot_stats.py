"""Statistics of LeRobot v3.0's stats.json and meta/episodes, computed as lerobot does (datasets/compute_stats.py).

Numbers use every step. Images use evenly spaced frames of each episode, at least 100 where there are so many, and every
k-th pixel of frames of 300 pixels and more. Quantiles come from histograms of 5000 bins. Two things differ on purpose:
sums are in float64 throughout, where lerobot uses float32 for images and float32 features (so its image `std` is off by
up to 0.05); and the dataset's quantiles are those of all its steps, not the outermost of its episodes'.
"""

from __future__ import annotations

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
BINS = 5000

Stats = dict[str, np.ndarray]  # min, max, mean, std, count, q01, q10, q50, q90, q99


def sampled_frames(length: int) -> list[int]:
    """The frames of an episode of `length` steps that image statistics use, ascending."""
    number = max(min(100, length), min(int(length**0.75), 10_000))
    return np.round(np.linspace(0, length - 1, number)).astype(int).tolist()


def count_pixels(image: np.ndarray) -> np.ndarray:
    """How often each channel has each value: uint8 (H, W, 3) -> int64 (3, 256)."""
    height, width, _ = image.shape
    if max(height, width) >= 300:
        step = int(max(height, width) / 150)
        image = image[::step, ::step]
    return np.stack([np.bincount(image[..., channel].reshape(-1), minlength=256) for channel in range(3)])


def image_stats(counts: np.ndarray, num_frames: int) -> Stats:
    """Statistics of an image feature in [0, 1], each (3, 1, 1).

    Args:
        counts: int64 (3, 256), summed over the sampled frames.
        num_frames: how many these were.
    """
    values = np.arange(256)
    channels = [vector_stats(values[row > 0, None], row[row > 0]) for row in counts]
    stats = {
        key: np.stack([channel[key] for channel in channels]).reshape(3, 1, 1) / 255
        for key in channels[0]
        if key != "count"
    }
    return {key: stats.get(key, np.array([num_frames])) for key in channels[0]}


def vector_stats(values: np.ndarray, weights: np.ndarray | None = None) -> Stats:
    """Statistics of a numeric feature over the first axis.

    Args:
        values: (N, D).
        weights: int (N,), how often each row counts; None: once.

    Returns:
        Arrays (D,), and `count` (1,).
    """
    values = values.astype(np.float64)
    weights = np.ones(len(values), dtype=np.int64) if weights is None else weights
    total = int(weights.sum())
    mean = weights @ values / total
    stats = {
        "min": values.min(axis=0),
        "max": values.max(axis=0),
        "mean": mean,
        "std": np.sqrt(weights @ (values - mean) ** 2 / total),
        "count": np.array([total]),
    }
    if total < 2:
        return {**stats, **{key: mean.copy() for key in QUANTILES}}
    columns = [_quantiles(column, weights, total) for column in values.T]
    return {**stats, **{key: np.array([column[i] for column in columns]) for i, key in enumerate(QUANTILES)}}


def _quantiles(values: np.ndarray, weights: np.ndarray, total: int) -> list[float]:
    edges = np.linspace(values.min() - 1e-10, values.max() + 1e-10, BINS + 1)
    histogram, _ = np.histogram(values, bins=edges, weights=weights)
    cumulative = np.cumsum(histogram)
    results = []
    for share in QUANTILES.values():
        target = share * total
        i = int(np.searchsorted(cumulative, target))
        if i == 0 or i == BINS:
            results.append(float(edges[i]))
        else:
            within = (target - cumulative[i - 1]) / histogram[i]
            results.append(float(edges[i] + within * (edges[i + 1] - edges[i])))
    return results
