"""Actions as classes: every dimension of every step falls into one of `num_action_bins` equal bins (Brohan et al. 2022,
"RT-1", sec. 5; Kim et al. 2024, "OpenVLA", sec. 3.2), here all predicted at once by an MLP over the pooled context.

Given the context, steps and dimensions are independent of each other, which is what a single pass costs.

Shape letters: B batch, T horizon, A per_action_dim, S state_dim, K bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.action_head.base import ActionHeadBase, draw, existing_dims, step_mean
from model.action_head.layers import PooledContext
from model.context import ActionPrefix, Context, ContextSpec
from model.normalizer import ActionRange
from utils.config_utils import ActionHeadConfig


class ActionHead(ActionHeadBase):
    """An MLP to bin logits, trained by cross-entropy, decoded by arg-max, expectation or sampling (`decoding`)."""

    def __init__(self, config: ActionHeadConfig, spec: ContextSpec, state_dim: int, action_range: ActionRange) -> None:
        super().__init__()
        self.config = config
        self.pool = PooledContext(config, spec, state_dim, config.hidden_dim)
        widths = [self.pool.width, *config.mlp_hidden_dims]
        layers: list[nn.Module] = []
        for width, next_width in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(width, next_width), nn.GELU(approximate="tanh"), nn.Dropout(config.dropout_prob)]
        self.mlp = nn.Sequential(*layers, nn.Linear(widths[-1], config.action_dim * config.num_action_bins))
        # In the checkpoint: a bin means the same value whatever statistics a later run has.
        self.register_buffer("bin_range_2A", action_range.covered_2A.clone())

    uncertainty = "entropy"  # of the bins, in nats

    @property
    def is_stochastic(self) -> bool:
        """Whether bins are drawn rather than chosen."""
        return self.config.decoding == "sample"

    def loss(
        self, context: Context, action_BTA: Tensor, action_is_pad_BT: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Cross-entropy of the true bins per action step, float32 (B, T), averaged over existing A, in nats."""
        action_is_pad_BT = action_is_pad_BT.bool()
        bins_BTA = self.bins(action_BTA.float().masked_fill(action_is_pad_BT[..., None], 0.0))
        entropy_BTA = F.cross_entropy(self.logits(context).movedim(-1, 1), bins_BTA, reduction="none")
        return step_mean(entropy_BTA, existing_dims(context, self.per_action_dim), action_is_pad_BT)

    def draw_noise(
        self, generators: Sequence[torch.Generator], device: torch.device, num_inference_steps: int
    ) -> Tensor | None:
        """With decoding `sample` a uniform draw per value, (B, T, A)."""
        if not self.is_stochastic:
            return None
        shape = (self.horizon, self.per_action_dim)
        return torch.stack([draw(torch.rand, shape, g, g.device) for g in generators]).to(device)

    def sample(
        self,
        context: Context,
        noise: Tensor | None,
        num_inference_steps: int,
        schedule: Any = None,
        prefix: ActionPrefix | None = None,
    ) -> Tensor:
        """The decoded bins, float32 (B, T, A), normalized; the number of steps has no effect."""
        return self.sample_draws(context, (noise,), num_inference_steps, schedule, prefix)[0][0]

    def sample_draws(
        self,
        context: Context,
        noise_K: Tensor | Sequence[None],
        num_inference_steps: int,
        schedule: Any = None,
        prefix: ActionPrefix | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `ActionHeadBase`; the measure is the mean entropy of the bins over existing A, the same for all draws."""
        logits_BTAK, exists_B1A = self.logits(context), existing_dims(context, self.per_action_dim)
        draws = torch.stack([self._decoded(logits_BTAK, noise) for noise in noise_K]) * exists_B1A
        log_BTAK = logits_BTAK.log_softmax(dim=-1)
        entropy_BTA = -(log_BTAK.exp() * log_BTAK).sum(dim=-1) * exists_B1A
        return draws, (entropy_BTA.sum(dim=-1) / exists_B1A.sum(dim=-1)).expand(len(draws), -1, -1)

    def _decoded(self, logits_BTAK: Tensor, noise_BTA: Tensor | None) -> Tensor:
        if self.config.decoding == "expectation":
            return (logits_BTAK.softmax(dim=-1) * self._centers_AK()).sum(dim=-1)
        if self.config.decoding == "argmax":
            return self._values(logits_BTAK.argmax(dim=-1))
        # The inverse of the distribution function at a uniform draw: one draw per value.
        cumulative_BTAK = logits_BTAK.softmax(dim=-1).cumsum(dim=-1)
        bins_BTA = (noise_BTA[..., None] * cumulative_BTAK[..., -1:] >= cumulative_BTAK).sum(dim=-1)
        return self._values(bins_BTA.clamp(max=self.config.num_action_bins - 1))

    def logits(self, context: Context) -> Tensor:
        """Unnormalized log-probabilities of the bins, float32 (B, T, A, K)."""
        shape = (self.horizon, self.per_action_dim, self.config.num_action_bins)
        return self.mlp(self.pool(context)).float().unflatten(-1, shape)

    def bins(self, action_BTA: Tensor) -> Tensor:
        """The bin of each normalized value, int64 (B, T, A); values outside of the range fall into the outermost."""
        low_A, high_A = self.bin_range_2A
        count = self.config.num_action_bins
        return ((action_BTA - low_A) / (high_A - low_A) * count).floor().long().clamp(0, count - 1)

    def _values(self, bins_BTA: Tensor) -> Tensor:
        """The middle of each bin, normalized, (B, T, A)."""
        low_A, high_A = self.bin_range_2A
        return low_A + (bins_BTA + 0.5) * (high_A - low_A) / self.config.num_action_bins

    def _centers_AK(self) -> Tensor:
        return self._values(torch.arange(self.config.num_action_bins, device=self.bin_range_2A.device)[:, None]).T
