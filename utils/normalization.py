"""The arithmetic by which LeRobot and openpi normalize states and actions, to the last bit in float32.

Both write y = (x - offset) / divisor gain + shift and back x = (y - shift) / gain width + offset. They differ in what
keeps them from dividing by 0, and LeRobot's two directions differ from each other: divisor and width are not the same.

Shape letters: D values of a state or an action.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Arithmetic = Literal["lerobot", "openpi"]
Mode = Literal["mean_std", "min_max", "quantile", "quantile10", "identity"]

# Per mode the statistics that it needs: a place and a spread, or two ends.
NEEDED: dict[str, tuple[str, ...]] = {
    "mean_std": ("mean", "std"),
    "min_max": ("min", "max"),
    "quantile": ("q01", "q99"),
    "quantile10": ("q10", "q90"),
    "identity": (),
}
EPS = {"lerobot": 1e-8, "openpi": 1e-6}


class MissingStatistics(ValueError):
    """A mode needs statistics that are not there."""


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
    statistics: Mapping[str, Sequence[float]], mode: Mode, arithmetic: Arithmetic, size: int, eps: float | None = None
) -> Scaling:
    """The map of a published policy.

    Args:
        statistics: one list of `size` numbers per statistic.
        mode: `identity` changes nothing and needs no statistics.
        arithmetic: whose.
        size: D.
        eps: what it adds to avoid dividing by 0; None: the library's.

    Raises:
        MissingStatistics: naming what the mode needs and is not there.
    """
    missing = [name for name in NEEDED[mode] if name not in statistics]
    if missing:
        there = ", ".join(sorted(statistics)) or "none at all"
        raise MissingStatistics(f"normalization {mode} needs {' and '.join(missing)}; there are {there}")
    eps = EPS[arithmetic] if eps is None else eps
    if mode == "identity":
        return Scaling(torch.zeros(size), torch.ones(size), torch.ones(size), 1.0, 0.0)
    low, high = (torch.as_tensor(statistics[name], dtype=torch.float32) for name in NEEDED[mode])
    if mode == "mean_std":
        return Scaling(low, high + eps, high if arithmetic == "lerobot" else high + eps, 1.0, 0.0)
    spread = high - low
    spread = torch.where(spread == 0, eps, spread) if arithmetic == "lerobot" else spread + eps
    return Scaling(low, spread, spread, 2.0, -1.0)
