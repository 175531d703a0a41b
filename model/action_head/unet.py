"""A conditional 1-D U-Net over the steps of an action chunk (Janner et al. 2022, "Diffuser", app. C; with FiLM
conditioning as in Chi et al. 2023, "Diffusion Policy", sec. III).

Shape letters: B batch, K draws per sample, N = B K rows, T horizon, A per_action_dim, C channels, D condition width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.action_head.layers import PooledContext, sinusoid, zero_init
from model.context import Context, ContextSpec
from utils.config_utils import ActionHeadConfig

GROUPS = 8  # of every group norm, as in Diffusion Policy


class TimeEmbedding(NamedTuple):
    """The embedded time, (N, D); N = 1 is the same for all rows."""

    embedded_ND: Tensor

    def row(self, index: int) -> TimeEmbedding:
        """One row alone."""
        return TimeEmbedding(self.embedded_ND[index : index + 1])


class ConditionalUnet1D(nn.Module):
    """Noised actions, their time and the pooled context in, one vector per action step out; see `denoise`."""

    def __init__(self, config: ActionHeadConfig, spec: ContextSpec, state_dim: int) -> None:
        super().__init__()
        width = config.hidden_dim
        self.width, self.multiple = width, 2 ** (config.unet_levels - 1)
        self.pool = PooledContext(config, spec, state_dim, width)
        self.context_proj = nn.Linear(self.pool.width, width)
        self.time_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        channels = [config.unet_width * 2**level for level in range(config.unet_levels)]
        pairs = list(zip([config.per_action_dim, *channels], channels, strict=False))
        dropout = config.dropout_prob
        self.down = nn.ModuleList(_Level(before, after, width, dropout) for before, after in pairs)
        self.shrink = nn.ModuleList(nn.Conv1d(count, count, 3, stride=2, padding=1) for count in channels[:-1])
        self.middle = _Level(channels[-1], channels[-1], width, dropout)
        # Each level takes what comes from below beside what the same level saw on the way down.
        self.up = nn.ModuleList(_Level(2 * after, max(before, channels[0]), width, dropout) for before, after in pairs)
        self.grow = nn.ModuleList(nn.ConvTranspose1d(count, count, 4, stride=2, padding=1) for count in channels[:-1])
        self.out = _conv(channels[0], channels[0])
        self.action_out = zero_init(nn.Conv1d(channels[0], config.per_action_dim, 1))

    def encode_context(self, context: Context) -> Tensor:
        """The pooled context, (B, D): once per prediction."""
        return self.context_proj(self.pool(context))

    def conditions(self, time_N: Tensor) -> TimeEmbedding:
        """What `denoise` needs of time, float32 in [0, 1]: the same for every observation."""
        return TimeEmbedding(self.time_mlp(sinusoid(time_N, self.width)))

    def denoise(
        self,
        x_NTA: Tensor,
        time: Tensor | TimeEmbedding,
        context_BD: Tensor,
        action_is_pad_NT: Tensor | None = None,
    ) -> Tensor:
        """One vector per action step, as `ActionTransformer.denoise`.

        Args:
            x_NTA: float32, partly noised normalized actions; N is the context's batch or a multiple of it.
            time: float32 in [0, 1], (N,); or what `conditions` made of it.
            context_BD: from `encode_context`.
            action_is_pad_NT: bool, steps that are shown as zeros; None: all exist.

        Returns:
            (N, T, A), in the compute precision.
        """
        horizon = x_NTA.shape[1]
        if action_is_pad_NT is not None:
            x_NTA = x_NTA.masked_fill(action_is_pad_NT[..., None], 0.0)
        rows = len(x_NTA) // len(context_BD)
        embedding = self.conditions(time) if isinstance(time, Tensor) else time
        condition_ND = embedding.embedded_ND + context_BD.repeat_interleave(rows, dim=0)
        x_NCT = F.pad(x_NTA.transpose(1, 2), (0, -horizon % self.multiple))  # every level halves evenly
        seen = []
        for level, block in enumerate(self.down):
            x_NCT = block(x_NCT, condition_ND)
            seen.append(x_NCT)
            if level < len(self.shrink):
                x_NCT = self.shrink[level](x_NCT)
        x_NCT = self.middle(x_NCT, condition_ND)
        for level in reversed(range(len(self.up))):
            x_NCT = self.up[level](torch.cat([x_NCT, seen[level]], dim=1), condition_ND)
            if level > 0:
                x_NCT = self.grow[level - 1](x_NCT)
        return self.action_out(self.out(x_NCT))[..., :horizon].transpose(1, 2)


class _Level(nn.Module):
    """Two residual blocks, (N, C, T) -> (N, C', T)."""

    def __init__(self, before: int, after: int, width: int, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_ResidualBlock(count, after, width, dropout) for count in (before, after))

    def forward(self, x_NCT: Tensor, condition_ND: Tensor) -> Tensor:
        for block in self.blocks:
            x_NCT = block(x_NCT, condition_ND)
        return x_NCT


class _ResidualBlock(nn.Module):
    """Two convolutions, between them a scale and a shift per channel that the condition decides (FiLM)."""

    def __init__(self, before: int, after: int, width: int, dropout: float) -> None:
        super().__init__()
        self.first, self.second = _conv(before, after), _conv(after, after)
        self.film = nn.Sequential(nn.Mish(), nn.Linear(width, 2 * after))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv1d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x_NCT: Tensor, condition_ND: Tensor) -> Tensor:
        scale_NC, shift_NC = self.film(condition_ND).chunk(2, dim=-1)
        hidden_NCT = self.first(x_NCT) * (1 + scale_NC[..., None]) + shift_NC[..., None]
        return self.second(self.dropout(hidden_NCT)) + self.skip(x_NCT)


def _conv(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(before, after, 5, padding=2), nn.GroupNorm(GROUPS, after), nn.Mish())
