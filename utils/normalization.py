"""How numbers in physical units become normalized ones: our arithmetic, and LeRobot's and openpi's to the last bit.

Ours maps constants exactly (`own_affine`). The other two write y = (x - offset) / divisor gain + shift and back
x = (y - shift) / gain width + offset. They differ in what keeps them from dividing by 0, and LeRobot's two directions
differ from each other: divisor and width are not the same.

Shape letters: D values of a state or an action, M datasets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from utils.config_data import DataConfig, MixtureEntry
from utils.statistics import STATISTICS, StatisticsError

# Per mode the statistics that it needs: a place and a spread, or two ends.
NEEDED: dict[str, tuple[str, ...]] = {
    "mean_std": ("mean", "std"),
    "min_max": ("min", "max"),
    "quantile": ("q01", "q99"),
    "quantile10": ("q10", "q90"),
    "identity": (),
}
EPS = {"lerobot": 1e-8, "openpi": 1e-6}
OPENPI_MODES = {"pi0": "mean_std", "pi05": "quantile"}
WIDEST = 50.0  # half the range of a dimension, in units of its scale, from which on min and max are the better scale


@dataclass(frozen=True)
class Scaling:
    """One state's or action's map, see above; tensors are float32 (D,)."""

    offset: Tensor
    divisor: Tensor
    width: Tensor
    gain: float
    shift: float

    def normalize(self, value: Tensor) -> Tensor:
        """float32 (..., D), physical -> normalized; nothing is clipped."""
        return (value - self.offset) / self.divisor * self.gain + self.shift

    def denormalize(self, value: Tensor) -> Tensor:
        """float32 (..., D), normalized -> physical."""
        return (value - self.shift) / self.gain * self.width + self.offset


def published_scaling(
    statistics: Mapping[str, Sequence[float]],
    mode: str,
    arithmetic: Literal["lerobot", "openpi"],
    size: int,
    eps: float | None = None,
) -> Scaling:
    """The map of a published policy.

    Args:
        statistics: one list of `size` numbers per statistic.
        mode: `identity` changes nothing and needs no statistics.
        arithmetic: whose.
        size: D.
        eps: what it adds to avoid dividing by 0; None: the library's.

    Raises:
        StatisticsError: naming what the mode needs and is not there.
    """
    missing = [name for name in NEEDED[mode] if name not in statistics]
    if missing:
        there = ", ".join(sorted(statistics)) or "none at all"
        raise StatisticsError(f"normalization {mode} needs {' and '.join(missing)}; there are {there}")
    eps = EPS[arithmetic] if eps is None else eps
    if mode == "identity":
        return Scaling(torch.zeros(size), torch.ones(size), torch.ones(size), 1.0, 0.0)
    low, high = (torch.as_tensor(statistics[name], dtype=torch.float32) for name in NEEDED[mode])
    if mode == "mean_std":
        return Scaling(low, high + eps, high if arithmetic == "lerobot" else high + eps, 1.0, 0.0)
    spread = high - low
    spread = torch.where(spread == 0, eps, spread) if arithmetic == "lerobot" else spread + eps
    return Scaling(low, spread, spread, 2.0, -1.0)


def own_affine(
    statistics: Sequence[Mapping[str, Sequence[float]]], kind: str, bounds: tuple[float, float], width: int
) -> dict[str, Tensor]:
    """Our map of states or actions: y = (x - center) slope + target, and back where a dimension is not constant.

    Args:
        statistics: one per dataset, of at most `width` values.
        kind: `min_max`, `quantile` or `mean_std`.
        bounds: what the first two map their ends onto.
        width: D.

    Returns:
        `center`, `slope` and `target`, float32, `constant` and `exists`, bool, each (M, D).
    """
    rows = {
        key: torch.tensor([one[key] + [0.0] * (width - len(one[key])) for one in statistics], dtype=torch.float64)
        for key in STATISTICS
    }
    lengths = torch.tensor([len(one["min"]) for one in statistics])
    if kind == "mean_std":
        center, scale = rows["mean"], rows["std"]
        target_center, target_scale = 0.0, 1.0
    else:
        low, high = (rows["min"], rows["max"]) if kind == "min_max" else (rows["q01"], rows["q99"])
        center, scale = (low + high) / 2, (high - low) / 2
        target_center, target_scale = (bounds[0] + bounds[1]) / 2, (bounds[1] - bounds[0]) / 2
    smallest = 1e-6 * rows["max"].abs().maximum(rows["min"].abs()).clamp(min=1.0)
    middle, half = (rows["min"] + rows["max"]) / 2, (rows["max"] - rows["min"]) / 2
    constant = half <= smallest
    degenerate = constant | (scale <= smallest) | (half > WIDEST * scale)
    center, scale = torch.where(degenerate, middle, center), torch.where(degenerate, half, scale)
    return {
        "center": center.float(),
        "slope": torch.where(constant, torch.ones_like(scale), target_scale / scale).float(),
        "target": torch.full_like(center, target_center).float(),
        "constant": constant,
        "exists": torch.arange(width) < lengths[:, None],
    }


def needed_statistics(data: DataConfig) -> dict[str, tuple[str, ...]]:
    """Of `state` and `action`, the statistics that a configuration's normalization needs."""
    if data.normalization_arithmetic == "own":
        return {"state": STATISTICS, "action": STATISTICS}
    return {"state": NEEDED[data.state_mode], "action": NEEDED[data.normalization_type]}


class StateNormalizer:
    """Normalized states for prompts that say them, as `model.normalizer` makes them for the model."""

    def __init__(self, data: DataConfig, statistics: Sequence[Mapping], datasets: Sequence[MixtureEntry]) -> None:
        """
        Args:
            data: how to normalize.
            statistics: per dataset, in the order of `dataset_index`.
            datasets: the same datasets; a state has a dataset's own width.
        """
        self.data, self.widths = data, [entry.state_dim for entry in datasets]
        self._affine, self._scalings = None, []
        states = [one["state"] for one in statistics]
        if data.normalization_arithmetic == "own":
            self._affine = own_affine(states, data.normalization_type, data.action_bounds, data.state_dim)
        else:
            settings = data.state_mode, data.normalization_arithmetic
            self._scalings = [
                published_scaling(one, *settings, width, data.normalization_eps)
                for one, width in zip(states, self.widths, strict=True)
            ]

    def __call__(self, state: np.ndarray, dataset_index: int) -> np.ndarray:
        """float32 (..., state_dim), physical and padded to the model's width -> normalized, the dataset's own width."""
        width = self.widths[dataset_index]
        values = torch.from_numpy(np.ascontiguousarray(state[..., :width], dtype=np.float32))
        if self._affine is None:
            return self._scalings[dataset_index].normalize(values).numpy()
        center, slope, target = (self._affine[part][dataset_index, :width] for part in ("center", "slope", "target"))
        values = (values - center) * slope + target
        clip = self.data.clip_normalized
        return (values if clip is None else values.clamp(-clip, clip)).numpy()
