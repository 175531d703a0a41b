"""The transformer over action tokens that heads share: self-attention among the T tokens of a chunk,
cross-attention to the context, and adaptive layer norm with zero-initialised gates where there is a time
(Peebles & Xie 2023, "DiT", sec. 3.2).

Shape letters: B batch, K draws per sample, N = B K rows, L context tokens (a state token included), T horizon,
A per_action_dim, E context width, D head width, H attention heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.action_head.layers import required_state, sinusoid, state_encoder, zero_init
from model.attention import attend, split_heads
from model.context import Context, ContextSpec
from utils.config_utils import ActionHeadConfig


class TimeConditions(NamedTuple):
    """What time does to the tokens, in the order that they are used; N = 1 does the same to all rows.

    Attributes:
        blocks: per block (shift, 1 + scale, gate) of its three sub-layers, (N, 1 or T, 9, D).
        out: (shift, 1 + scale) before the output, (N, 1 or T, 2, D).
    """

    blocks: tuple[Tensor, ...]
    out: Tensor

    def row(self, index: int) -> TimeConditions:
        """One row alone."""
        rows = slice(index, index + 1)
        return TimeConditions(tuple(block[rows] for block in self.blocks), self.out[rows])


@dataclass(frozen=True)
class ContextKeysValues:
    """Per block the context's (keys, values), each (B, H, L, D/H), and the key mask (B, L)."""

    layers_BHLD: list[tuple[Tensor, Tensor]]
    mask_BL: Tensor


NEUTRAL = (0.0, 1.0, 1.0) * 3  # shift, 1 + scale and gate of the sub-layers of a block without a time


class ActionTransformer(nn.Module):
    """Noised actions, their time and the context in, one vector per action step out.

    Without time (`timed=False`) the tokens are learned queries alone, all answered in parallel.
    """

    def __init__(self, config: ActionHeadConfig, spec: ContextSpec, state_dim: int, *, timed: bool = True) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_dim
        self.context_norm = nn.LayerNorm(spec.width)
        self.context_proj = nn.Linear(spec.width, width)
        if config.use_state_input:
            self.state_proj = state_encoder(state_dim, width)
        if timed:
            self.action_in = nn.Linear(config.per_action_dim, width)
        self.position = nn.Parameter(torch.randn(config.horizon, width) * 0.02)
        if timed:
            self.time_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.blocks = nn.ModuleList(
            ActionBlock(width, config.num_heads, config.dropout_prob, timed=timed) for _ in range(config.num_layers)
        )
        self.out_norm = nn.LayerNorm(width, elementwise_affine=not timed)
        if timed:
            self.out_modulation = zero_init(nn.Linear(width, 2 * width))
        self.action_out = zero_init(nn.Linear(width, config.per_action_dim))

    def encode_context(self, context: Context) -> ContextKeysValues:
        """Keys and values of the context for every block: once per prediction, reused by every step of it."""
        tokens_BLD = self.context_proj(self.context_norm(context.tokens_BLE.float()))
        mask_BL = context.mask_BL
        if self.config.use_state_input:
            state_BD = self.state_proj(required_state(context))
            tokens_BLD = torch.cat([tokens_BLD, state_BD[:, None].to(tokens_BLD)], dim=1)
            mask_BL = F.pad(mask_BL, (0, 1), value=True)
        return ContextKeysValues([block.context_keys_values(tokens_BLD) for block in self.blocks], mask_BL)

    def conditions(self, time: Tensor) -> TimeConditions:
        """What `denoise` needs of time: a function of time and weights alone, so the same for every observation.

        Args:
            time: float32 in [0, 1], (N,), or (N, T): one per action token.
        """
        condition_NTD = self.time_mlp(sinusoid(time.reshape(len(time), -1), self.config.hidden_dim))
        blocks = tuple(_with_unit_scales(block.modulation(condition_NTD), 9) for block in self.blocks)
        return TimeConditions(blocks, _with_unit_scales(self.out_modulation(condition_NTD), 2))

    def denoise(
        self,
        x_NTA: Tensor,
        time: Tensor | TimeConditions,
        context: ContextKeysValues,
        action_is_pad_NT: Tensor | None = None,
    ) -> Tensor:
        """One vector per action token: a velocity, the noise, the action, whatever the head trains it to be.

        Args:
            x_NTA: float32, partly noised normalized actions; N is the context's batch or a multiple of it.
            time: float32 in [0, 1], (N,), or (N, T): one per action token; or what `conditions` made of it.
            context: from `encode_context`.
            action_is_pad_NT: bool, tokens that others must not attend to; None: all exist.

        Returns:
            (N, T, A), in the compute precision.
        """
        conditions = self.conditions(time) if isinstance(time, Tensor) else time
        tokens_NTD = self.action_in(x_NTA) + self.position
        self_mask = None
        if action_is_pad_NT is not None:  # the diagonal stays, so that no row is without a key
            itself_TT = torch.eye(x_NTA.shape[1], dtype=torch.bool, device=x_NTA.device)
            self_mask = (~action_is_pad_NT[:, None, None, :]) | itself_TT
        tokens_NTD = self._attend(tokens_NTD, conditions.blocks, context, self_mask)
        return self.action_out(_modulate(self.out_norm(tokens_NTD), *conditions.out.unbind(-2)))

    def decode(self, context: ContextKeysValues) -> Tensor:
        """One vector per learned query, (B, T, A), in the compute precision; for `timed=False`."""
        queries_BTD = self.position.expand(len(context.mask_BL), -1, -1)
        return self.action_out(self.out_norm(self._attend(queries_BTD, (None,) * len(self.blocks), context, None)))

    def _attend(
        self,
        tokens_NTD: Tensor,
        modulations: Sequence[Tensor | None],
        context: ContextKeysValues,
        self_mask: Tensor | None,
    ) -> Tensor:
        for block, modulation, keys_values in zip(self.blocks, modulations, context.layers_BHLD, strict=True):
            tokens_NTD = block(tokens_NTD, modulation, keys_values, context.mask_BL, self_mask)
        return tokens_NTD


class ActionBlock(nn.Module):
    """Self-attention among action tokens, cross-attention to the context, MLP; each modulated and gated by time."""

    def __init__(self, width: int, num_heads: int, dropout: float, *, timed: bool = True) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=not timed) for _ in range(3))
        self.modulation = zero_init(nn.Linear(width, 9 * width)) if timed else None
        self.self_qkv = nn.Linear(width, 3 * width)
        self.self_out = nn.Linear(width, width)
        self.context_norm = nn.LayerNorm(width)
        self.cross_q = nn.Linear(width, width)
        self.cross_kv = nn.Linear(width, 2 * width)
        self.cross_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )

    def context_keys_values(self, tokens_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """(keys, values) of the context, each (B, H, L, D/H)."""
        keys_BLD, values_BLD = self.cross_kv(self.context_norm(tokens_BLD)).chunk(2, dim=-1)
        return split_heads(keys_BLD, self.num_heads), split_heads(values_BLD, self.num_heads)

    def forward(
        self,
        x_NTD: Tensor,
        modulation: Tensor | None,
        context_BHLD: tuple[Tensor, Tensor],
        mask_BL: Tensor,
        self_mask: Tensor | None,
    ) -> Tensor:
        """The tokens after this block, (N, T, D); arguments as `ActionTransformer.denoise` makes them."""
        parts = NEUTRAL if modulation is None else modulation.unbind(-2)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2, shift_3, scale_3, gate_3 = parts
        dropout = self.dropout if self.training else 0.0

        query, *rest = self.self_qkv(_modulate(self.norms[0](x_NTD), shift_1, scale_1)).chunk(3, dim=-1)
        keys, values = (split_heads(x, self.num_heads) for x in rest)
        x_NTD = x_NTD + gate_1 * self.self_out(attend(query, keys, values, self_mask, dropout))

        # Draws of one sample share its keys and values: they become more queries of one row.
        batch, rows = len(mask_BL), len(x_NTD)
        query = self.cross_q(_modulate(self.norms[1](x_NTD), shift_2, scale_2)).reshape(batch, -1, x_NTD.shape[-1])
        attended = attend(query, *context_BHLD, mask_BL[:, None, None, :], dropout)
        x_NTD = x_NTD + gate_2 * self.cross_out(attended.reshape(rows, -1, x_NTD.shape[-1]))

        return x_NTD + gate_3 * self.mlp(_modulate(self.norms[2](x_NTD), shift_3, scale_3))


def _modulate(x_NTD: Tensor, shift: Tensor | float, scale: Tensor | float) -> Tensor:
    return x_NTD * scale + shift


def _with_unit_scales(parts: Tensor, count: int) -> Tensor:
    """(shift, scale, gate, shift, ...) side by side -> (shift, 1 + scale, gate, ...) along a dimension of its own."""
    unit = (torch.arange(count, device=parts.device) % 3 == 1).to(parts.dtype)
    return parts.unflatten(-1, (count, -1)) + unit[:, None]
