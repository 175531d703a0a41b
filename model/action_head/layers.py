"""Small pieces that several heads share.

Shape letters: B batch, N rows, L context tokens, T horizon, A per_action_dim, E context width, D head width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.context import Context, ContextSpec
from utils.config_utils import ActionHeadConfig


def state_encoder(state_dim: int, width: int) -> nn.Sequential:
    """Normalized state (B, S) -> (B, D)."""
    return nn.Sequential(nn.Linear(state_dim, width), nn.SiLU(), nn.Linear(width, width))


def required_state(context: Context) -> Tensor:
    """The context's state, float32 (B, S), for heads with `use_state_input`."""
    assert context.state_BS is not None, "use_state_input needs a state in the context"
    return context.state_BS


def sinusoid(time: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding of t in [0, 1], periods from about 0.004 to 4 (as pi0), of any shape: (..., width)."""
    half = width // 2
    periods = torch.logspace(math.log10(4e-3), math.log10(4.0), half, device=time.device)
    angles = 2 * math.pi * time[..., None] / periods
    embedding = torch.cat([angles.sin(), angles.cos()], dim=-1)
    return F.pad(embedding, (0, width - 2 * half))


def zero_init(layer: nn.Linear | nn.Conv1d) -> nn.Linear | nn.Conv1d:
    """The same layer with weights and bias 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def masked_mean(tokens_BLE: Tensor, mask_BL: Tensor) -> Tensor:
    """Mean over the tokens that exist, (B, E); what the others hold, NaN included, has no influence."""
    kept_BLE = tokens_BLE.masked_fill(~mask_BL[..., None], 0.0)
    return kept_BLE.sum(dim=1) / mask_BL.sum(dim=1, keepdim=True).clamp(min=1)


class PooledContext(nn.Module):
    """The context as one vector: mean of the normalized tokens that exist, with the state beside it.

    Attributes:
        width: of the vector, that of the context plus, with `use_state_input`, that of the encoded state.
    """

    def __init__(self, config: ActionHeadConfig, spec: ContextSpec, state_dim: int, state_width: int) -> None:
        super().__init__()
        self.context_norm = nn.LayerNorm(spec.width)
        self.state_proj = state_encoder(state_dim, state_width) if config.use_state_input else None
        self.width = spec.width + (state_width if config.use_state_input else 0)

    def forward(self, context: Context) -> Tensor:
        """(B, width)."""
        pooled_BE = masked_mean(self.context_norm(context.tokens_BLE.float()), context.mask_BL)
        if self.state_proj is None:
            return pooled_BE
        return torch.cat([pooled_BE, self.state_proj(required_state(context)).to(pooled_BE)], dim=-1)
