"""Physical units <-> the normalized range that heads work in, with the statistics as part of the model.

Shape letters: B batch, T horizon, A per_action_dim, S state_dim, D datasets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.config_utils import Config
from utils.normalization import own_affine


class ActionRange(NamedTuple):
    """Where normalized actions lie, each float32 (2, A): row 0 the lowest, row 1 the highest value.

    Attributes:
        covered_2A: what a head should resolve: the bounds that `min_max` and `quantile` map onto; for `mean_std`,
            which has none, the extremes. A bin or a clip outside of it serves outliers only.
        extremes_2A: of all training actions (the bounds for `min_max`; beyond them for `quantile`).
    """

    covered_2A: Tensor
    extremes_2A: Tensor


class Normalizer(nn.Module):
    """Affine maps per dataset and dimension, kept as buffers so that no checkpoint exists without them.

    `min_max` maps [min, max] and `quantile` maps [q01, q99] onto `bounds`; `mean_std` subtracts the mean and
    divides by the standard deviation. A dimension that never changed in training (range below 1e-6 of its
    size) is only shifted, and denormalizing returns its constant exactly, whatever a head predicts. One that
    changes, but so rarely that its quantiles (or its standard deviation) are a tiny part of its range, is mapped by its
    min and max: a gripper that shuts once, a wrist that rests but for encoder noise. So no training value lies more
    than WIDEST (utils/normalization.py) times the scale from the center.

    In delta mode an action dimension is taken relative to the same dimension of the current state before it is
    normalized, and the state is added back after denormalizing.

    Datasets narrower than the model are padded: their missing dimensions are 0 on both sides, and
    `action_exists` and `state_exists`, both bool (D, width), say which are real.
    """

    def __init__(
        self,
        statistics: Sequence[dict[str, Any]],
        kind: str,
        bounds: tuple[float, float],
        *,
        state_dim: int,
        per_action_dim: int,
        delta_dims: Sequence[int] = (),
        clip: float | None = None,
    ) -> None:
        """
        Args:
            statistics: one dict per dataset, as `calculate_statistics` returns it, of at most the model's widths.
            kind: `min_max`, `quantile` or `mean_std`.
            bounds: normalized range of `min_max` and `quantile`.
            state_dim, per_action_dim: the model's widths.
            delta_dims: action dimensions relative to the state; none in absolute mode.
            clip: bound of normalized states and of predicted actions; None: no bound.
        """
        super().__init__()
        self.clip = clip
        with torch.device("cpu"):  # also in a model on the meta device: a head may read the range when it is built
            for name, width in (("state", state_dim), ("action", per_action_dim)):
                for part, value in own_affine([entry[name] for entry in statistics], kind, bounds, width).items():
                    self.register_buffer(f"{name}_{part}", value)
            delta_A = torch.zeros(per_action_dim, dtype=torch.bool)
            delta_A[list(delta_dims)] = True
            self.register_buffer("action_is_delta_A", delta_A)
            self.action_range = self._action_range([entry["action"] for entry in statistics], kind, bounds)

    @classmethod
    def from_config(cls, config: Config, statistics: Sequence[dict[str, Any]]) -> Normalizer:
        """The normalizer that a configuration asks for, over the statistics of its datasets in order."""
        data, width = config.data, config.model.action_head_config.per_action_dim
        relative = range(width) if data.action_mode == "delta" else ()
        return cls(
            statistics,
            data.normalization_type,
            data.action_bounds,
            state_dim=data.state_dim,
            per_action_dim=width,
            delta_dims=[dim for dim in relative if dim not in data.absolute_action_dims],
            clip=data.clip_normalized,
        )

    def normalize_state(self, state_BS: Tensor, dataset_index_B: Tensor) -> Tensor:
        """float32 (B, S) physical -> normalized, clipped, 0 in padded dimensions."""
        return self._clipped(self._normalize("state", state_BS, dataset_index_B))

    def normalize_action(self, action_BTA: Tensor, state_BS: Tensor, dataset_index_B: Tensor) -> Tensor:
        """float32 (B, T, A) physical -> normalized; `state_BS` is the physical state at the chunk's start."""
        return self._normalize("action", action_BTA - self._origin(state_BS), dataset_index_B)

    def denormalize_action(self, action_BTA: Tensor, state_BS: Tensor, dataset_index_B: Tensor) -> Tensor:
        """float32 (B, T, A) normalized -> physical: clipped, then the inverse of `normalize_action`."""
        center, slope, target, constant, exists = self._rows("action", action_BTA, dataset_index_B)
        values = torch.where(constant, center, (self._clipped(action_BTA) - target) / slope + center)
        return (values + self._origin(state_BS)).masked_fill(~exists, 0.0)

    def action_dim_mask(self, dataset_index_B: Tensor) -> Tensor:
        """bool (B, A), True for action dimensions that a sample's dataset has."""
        return self.action_exists[dataset_index_B]

    def _action_range(
        self, statistics: list[dict[str, list[float]]], kind: str, bounds: tuple[float, float]
    ) -> ActionRange:
        bounds_2A = torch.tensor(bounds)[:, None].repeat(1, self.action_exists.shape[1])
        extremes = []
        for row, (part, worst) in enumerate((("min", torch.inf), ("max", -torch.inf))):
            width = self.action_exists.shape[1]
            value_DA = torch.tensor([entry[part] + [0.0] * (width - len(entry[part])) for entry in statistics])
            value_DA = (value_DA - self.action_center) * self.action_slope + self.action_target
            value_DA = value_DA.masked_fill(~self.action_exists | self.action_constant, worst)
            extremes.append(value_DA.amin(dim=0) if row == 0 else value_DA.amax(dim=0))
        extremes_2A = torch.stack(extremes)
        varies_A = extremes_2A[0] < extremes_2A[1]  # in one dataset at least
        extremes_2A = torch.where(varies_A, extremes_2A, bounds_2A)
        return ActionRange(extremes_2A if kind == "mean_std" else bounds_2A, extremes_2A)

    def _origin(self, state_BS: Tensor) -> Tensor:
        """What delta actions are relative to, (B, 1, A): the state in delta dimensions, 0 elsewhere."""
        width = len(self.action_is_delta_A)
        padded_BA = F.pad(state_BS, (0, max(0, width - state_BS.shape[1])))[:, :width]
        return torch.where(self.action_is_delta_A, padded_BA, 0.0)[:, None]

    def _normalize(self, name: str, values: Tensor, dataset_index_B: Tensor) -> Tensor:
        center, slope, target, _, exists = self._rows(name, values, dataset_index_B)
        return ((values - center) * slope + target).masked_fill(~exists, 0.0)

    def _clipped(self, values: Tensor) -> Tensor:
        return values if self.clip is None else values.clamp(-self.clip, self.clip)

    def _rows(self, name: str, values: Tensor, dataset_index_B: Tensor) -> list[Tensor]:
        shape = (len(dataset_index_B), *([1] * (values.ndim - 2)), values.shape[-1])
        parts = ("center", "slope", "target", "constant", "exists")
        return [getattr(self, f"{name}_{part}")[dataset_index_B].view(shape) for part in parts]
