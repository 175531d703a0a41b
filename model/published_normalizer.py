"""Normalization as LeRobot or openpi do it, for policies that were trained with theirs.

Shape letters: B batch, T horizon, A per_action_dim, S state_dim, D datasets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.normalizer import ActionRange, Normalizer
from utils.config_utils import Config
from utils.normalization import Scaling, published_scaling


class PublishedNormalizer(Normalizer):
    """A `Normalizer` with the arithmetic of `utils.normalization.Scaling`; nothing is constant by itself or clipped.

    Its buffers are `offset`, `divisor`, `width` and `exists` of state and action, each (D, width).
    """

    def __init__(
        self,
        scalings: dict[str, Sequence[Scaling]],
        *,
        state_dim: int,
        per_action_dim: int,
        delta_dims: Sequence[int] = (),
        clip: float | None = None,
    ) -> None:
        """
        Args:
            scalings: of `state` and `action`, one per dataset, alike in `gain` and `shift`.
            state_dim, per_action_dim, delta_dims, clip: see `Normalizer`.
        """
        nn.Module.__init__(self)
        self.clip = clip
        self._line = {name: (of[0].gain, of[0].shift) for name, of in scalings.items()}
        with torch.device("cpu"):  # see `Normalizer`
            for name, width in (("state", state_dim), ("action", per_action_dim)):
                for part, filler in (("offset", 0.0), ("divisor", 1.0), ("width", 1.0)):
                    rows = [getattr(one, part) for one in scalings[name]]
                    padded = [F.pad(row, (0, width - len(row)), value=filler) for row in rows]
                    self.register_buffer(f"{name}_{part}", torch.stack(padded))
                lengths = torch.tensor([len(one.offset) for one in scalings[name]])
                self.register_buffer(f"{name}_exists", torch.arange(width) < lengths[:, None])
            delta_A = torch.zeros(per_action_dim, dtype=torch.bool)
            delta_A[list(delta_dims)] = True
            self.register_buffer("action_is_delta_A", delta_A)
            unit_2A = torch.tensor([[-1.0], [1.0]]).repeat(1, per_action_dim)
            self.action_range = ActionRange(unit_2A, unit_2A)

    def denormalize_action(self, action_BTA: Tensor, state_BS: Tensor, dataset_index_B: Tensor) -> Tensor:
        """See `Normalizer.denormalize_action`."""
        scaling, exists = self._scaling("action", action_BTA, dataset_index_B)
        values = scaling.denormalize(self._clipped(action_BTA))
        return (values + self._origin(state_BS)).masked_fill(~exists, 0.0)

    def _normalize(self, name: str, values: Tensor, dataset_index_B: Tensor) -> Tensor:
        scaling, exists = self._scaling(name, values, dataset_index_B)
        return scaling.normalize(values).masked_fill(~exists, 0.0)

    def _scaling(self, name: str, values: Tensor, dataset_index_B: Tensor) -> tuple[Scaling, Tensor]:
        shape = (len(dataset_index_B), *([1] * (values.ndim - 2)), values.shape[-1])
        parts = ("offset", "divisor", "width", "exists")
        *rows, exists = (getattr(self, f"{name}_{part}")[dataset_index_B].view(shape) for part in parts)
        return Scaling(*rows, *self._line[name]), exists


def build_normalizer(config: Config, statistics: Sequence[dict[str, Any]]) -> Normalizer:
    """The normalizer that `data.normalization_arithmetic` names, over the statistics of the datasets in order.

    Raises:
        StatisticsError: statistics that its mode needs are missing.
    """
    data, width = config.data, config.model.action_head_config.per_action_dim
    if data.normalization_arithmetic == "own":
        return Normalizer.from_config(config, statistics)
    modes = {"state": data.state_mode, "action": data.normalization_type}
    sizes = {"state": "state_dim", "action": "per_action_dim"}
    scalings = {
        name: [
            published_scaling(
                one[name], mode, data.normalization_arithmetic, getattr(entry, sizes[name]), data.normalization_eps
            )
            for one, entry in zip(statistics, config.datasets, strict=True)
        ]
        for name, mode in modes.items()
    }
    relative = range(width) if data.action_mode == "delta" else ()
    return PublishedNormalizer(
        scalings,
        state_dim=data.state_dim,
        per_action_dim=width,
        delta_dims=[dim for dim in relative if dim not in data.absolute_action_dims],
        clip=data.clip_normalized,
    )
