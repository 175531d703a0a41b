"""Physical units <-> the normalized range that heads work in, with the statistics as part of the model.

Shape letters: B batch, T horizon, A per_action_dim, S state_dim, D datasets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from utils.calculate_normalization_stats import STATISTICS


class Normalizer(nn.Module):
    """Affine maps per dataset and dimension, kept as buffers so that no checkpoint exists without them.

    `min_max` maps [min, max] and `quantile` maps [q01, q99] onto `bounds`; `mean_std` subtracts the mean and
    divides by the standard deviation. A dimension that never changed in training (range below 1e-6 of its
    size) is only shifted, and denormalizing returns its constant exactly, whatever a head predicts. One that
    changes, but too rarely for its quantiles to differ (a gripper that shuts once), is mapped by its min and max.
    """

    def __init__(self, statistics: Sequence[dict[str, Any]], kind: str, bounds: tuple[float, float]) -> None:
        """
        Args:
            statistics: one dict per dataset, as `calculate_statistics` returns it.
            kind: `min_max`, `quantile` or `mean_std`.
            bounds: normalized range of `min_max` and `quantile`.
        """
        super().__init__()
        for name in ("state", "action"):
            rows = {key: torch.tensor([s[name][key] for s in statistics], dtype=torch.float64) for key in STATISTICS}
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
            degenerate = constant | (scale <= smallest)
            center, scale = torch.where(degenerate, middle, center), torch.where(degenerate, half, scale)
            slope = torch.where(constant, torch.ones_like(scale), target_scale / scale)
            self.register_buffer(f"{name}_center", center.float())
            self.register_buffer(f"{name}_slope", slope.float())
            self.register_buffer(f"{name}_target", torch.full_like(center, target_center).float())
            self.register_buffer(f"{name}_constant", constant)
            self.register_buffer(f"{name}_mean", rows["mean"].float())

    def normalize_state(self, state_BS: Tensor, dataset_index_B: Tensor) -> Tensor:
        """float32 (B, S) physical -> normalized."""
        return self._normalize("state", state_BS, dataset_index_B)

    def normalize_action(self, action_BTA: Tensor, dataset_index_B: Tensor) -> Tensor:
        """float32 (B, T, A) physical -> normalized."""
        return self._normalize("action", action_BTA, dataset_index_B)

    def denormalize_action(self, action_BTA: Tensor, dataset_index_B: Tensor) -> Tensor:
        """float32 (B, T, A) normalized -> physical; the inverse of `normalize_action` on training data."""
        center, slope, target, constant = self._rows("action", action_BTA, dataset_index_B)
        return torch.where(constant, center, (action_BTA - target) / slope + center)

    def _normalize(self, name: str, values: Tensor, dataset_index_B: Tensor) -> Tensor:
        center, slope, target, _ = self._rows(name, values, dataset_index_B)
        return (values - center) * slope + target

    def _rows(self, name: str, values: Tensor, dataset_index_B: Tensor) -> list[Tensor]:
        shape = (len(dataset_index_B), *([1] * (values.ndim - 2)), values.shape[-1])
        parts = ("center", "slope", "target", "constant")
        return [getattr(self, f"{name}_{part}")[dataset_index_B].view(shape) for part in parts]
