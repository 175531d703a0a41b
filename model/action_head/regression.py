"""Regression over action chunks: all T steps decoded in parallel from learned queries, L1 loss (Kim et al. 2025,
"OpenVLA-OFT", sec. IV). The honest baseline: where demonstrations disagree it answers between them (their median).

Shape letters: B batch, T horizon, A per_action_dim, S state_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.action_head.base import ActionHeadBase, existing_dims, step_mean
from model.action_head.transformer import ActionTransformer
from model.context import ActionPrefix, Context, ContextSpec
from model.normalizer import ActionRange
from utils.config_utils import ActionHeadConfig


class RegressionActionHead(ActionTransformer, ActionHeadBase):
    """The action transformer without noise and time: learned queries in, actions out."""

    def __init__(self, config: ActionHeadConfig, spec: ContextSpec, state_dim: int, action_range: ActionRange) -> None:
        super().__init__(config, spec, state_dim, timed=False)

    def loss(
        self, context: Context, action_BTA: Tensor, action_is_pad_BT: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Mean absolute error per action step, float32 (B, T), averaged over existing A."""
        action_is_pad_BT = action_is_pad_BT.bool()
        exists_B1A = existing_dims(context, self.per_action_dim)
        target_BTA = action_BTA.float().masked_fill(action_is_pad_BT[..., None], 0.0)
        error_BTA = (self.decode(self.encode_context(context)).float() - target_BTA).abs()
        return step_mean(error_BTA, exists_B1A, action_is_pad_BT)

    def sample(
        self,
        context: Context,
        noise: Tensor | None,
        num_inference_steps: int,
        schedule: Any = None,
        prefix: ActionPrefix | None = None,
    ) -> Tensor:
        """The one answer, float32 (B, T, A), normalized; the number of steps has no effect."""
        action_BTA = self.decode(self.encode_context(context)).float()
        return action_BTA * existing_dims(context, self.per_action_dim)
