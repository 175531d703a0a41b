"""Flow matching over action chunks (Lipman et al. 2023, "Flow Matching for Generative Modeling", sec. 4.1;
for robot actions as in Black et al. 2024, "pi0", sec. IV).

    x_t = (1 - t) noise + t action        t = 0 is noise, t = 1 is data
    velocity target = action - noise
    loss = |v(x_t, t, context) - (action - noise)|^2

The network is a transformer over T action tokens with adaptive layer norm and zero-initialised gates
(Peebles & Xie 2023, "DiT", sec. 3.2) and cross-attention to the context.

Shape letters: B batch, K noise draws per sample, N = B K rows, L context tokens (a state token included),
T horizon, A per_action_dim, S state_dim, E context width, D head width, H attention heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.action_head.base import ActionHeadBase, Generators, rand, randn
from model.context import Context
from utils.config_utils import ActionHeadConfig


class FlowmatchingActionHead(ActionHeadBase):
    """Predicts a velocity per action token; samples by Euler integration from noise to action."""

    def __init__(self, config: ActionHeadConfig, context_dim: int, state_dim: int) -> None:
        super().__init__(config, context_dim, state_dim)
        width = config.hidden_dim
        self.num_heads = config.num_heads
        self.context_norm = nn.LayerNorm(context_dim)
        self.context_proj = nn.Linear(context_dim, width)
        if config.use_state_input:
            self.state_proj = nn.Sequential(nn.Linear(state_dim, width), nn.SiLU(), nn.Linear(width, width))
        self.action_in = nn.Linear(config.per_action_dim, width)
        self.position = nn.Parameter(torch.randn(config.horizon, width) * 0.02)
        self.time_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.blocks = nn.ModuleList(
            _Block(width, config.num_heads, config.dropout_prob) for _ in range(config.num_layers)
        )
        self.out_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.out_modulation = _zero_init(nn.Linear(width, 2 * width))
        self.action_out = _zero_init(nn.Linear(width, config.per_action_dim))

    def loss(
        self, context: Context, action_BTA: Tensor, action_is_pad_BT: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Mean squared velocity error per action step, float32 (B, T), averaged over existing A and the noise draws.

        The context is encoded once for all `noise_draws_per_sample` draws.
        """
        draws = self.config.noise_draws_per_sample
        action_is_pad_BT = action_is_pad_BT.bool()
        action_NTA = action_BTA.float().masked_fill(action_is_pad_BT[..., None], 0.0).repeat_interleave(draws, dim=0)
        exists_N1A = self._dim_mask(context, action_NTA.device).repeat_interleave(draws, dim=0)
        noise_NTA = self._noise(action_NTA.shape, generator, action_NTA.device) * exists_N1A
        action_NTA = action_NTA * exists_N1A
        time_N = self._time(len(action_NTA), generator, action_NTA.device)
        x_NTA, target_NTA = flow_interpolate(noise_NTA, action_NTA, time_N)
        # Padded action tokens are hidden from the others, so that what they hold can't reach the loss.
        velocity_NTA = self.velocity(
            x_NTA, time_N, self.encode_context(context), action_is_pad_BT.repeat_interleave(draws, dim=0)
        )
        weight_N1A = exists_N1A / exists_N1A.sum(dim=-1, keepdim=True)
        error_NT = ((velocity_NTA.float() - target_NTA).square() * weight_N1A).sum(dim=-1)
        error_BT = error_NT.unflatten(0, (-1, draws)).mean(dim=1)
        return error_BT.masked_fill(action_is_pad_BT, 0.0)

    def sample(self, context: Context, generator: Generators = None, num_inference_steps: int = 10) -> Tensor:
        """Euler integration of the learned velocity from t = 0 to 1, float32 (B, T, A), normalized."""
        keys_values = self.encode_context(context)
        batch, device = len(context.tokens_BLE), context.tokens_BLE.device
        exists_B1A = self._dim_mask(context, device)
        x_BTA = self._noise((batch, self.horizon, self.per_action_dim), generator, device) * exists_B1A
        for step in range(num_inference_steps):
            time_B = torch.full((batch,), step / num_inference_steps, device=device)
            velocity_BTA = self.velocity(x_BTA, time_B, keys_values).float() * exists_B1A
            x_BTA = x_BTA + velocity_BTA / num_inference_steps
        return x_BTA

    def encode_context(self, context: Context) -> ContextKeysValues:
        """Keys and values of the context for every block: once per prediction, reused by every velocity."""
        tokens_BLD = self.context_proj(self.context_norm(context.tokens_BLE.float()))
        mask_BL = context.mask_BL
        if self.config.use_state_input:
            assert context.state_BS is not None, "use_state_input needs a state in the context"
            tokens_BLD = torch.cat([tokens_BLD, self.state_proj(context.state_BS)[:, None].to(tokens_BLD)], dim=1)
            mask_BL = F.pad(mask_BL, (0, 1), value=True)
        return ContextKeysValues([block.context_keys_values(tokens_BLD) for block in self.blocks], mask_BL)

    def velocity(
        self, x_NTA: Tensor, time_N: Tensor, context: ContextKeysValues, action_is_pad_NT: Tensor | None = None
    ) -> Tensor:
        """The velocity field at x_t.

        Args:
            x_NTA: float32, partly noised normalized actions; N is the context's batch or a multiple of it.
            time_N: float32 in [0, 1].
            context: from `encode_context`.
            action_is_pad_NT: bool, tokens that others must not attend to; None: all exist.

        Returns:
            (N, T, A), in the compute precision.
        """
        width = self.config.hidden_dim
        condition_ND = self.time_mlp(_sinusoid(time_N, width))
        tokens_NTD = self.action_in(x_NTA) + self.position
        self_mask = None
        if action_is_pad_NT is not None:  # the diagonal stays, so that no row is without a key
            itself_TT = torch.eye(self.horizon, dtype=torch.bool, device=x_NTA.device)
            self_mask = (~action_is_pad_NT[:, None, None, :]) | itself_TT
        for block, keys_values in zip(self.blocks, context.layers_BHLD, strict=True):
            tokens_NTD = block(tokens_NTD, condition_ND, keys_values, context.mask_BL, self_mask)
        shift_ND, scale_ND = self.out_modulation(condition_ND).chunk(2, dim=-1)
        return self.action_out(_modulate(self.out_norm(tokens_NTD), shift_ND, scale_ND))

    def _dim_mask(self, context: Context, device: torch.device) -> Tensor:
        """1.0 for action dimensions that exist, (B, 1, A)."""
        if context.action_dim_mask_BA is None:
            return torch.ones(len(context.tokens_BLE), 1, self.per_action_dim, device=device)
        return context.action_dim_mask_BA[:, None].float()

    def _noise(self, shape: tuple[int, ...], generator: Generators, device: torch.device) -> Tensor:
        if self.config.noise_distribution == "gaussian":
            return randn(shape, generator, device)
        return 2 * rand(shape, generator, device) - 1

    def _time(self, count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        if self.config.time_distribution == "uniform":
            time_N = rand((count,), generator, device)
        else:
            source = device if generator is None else generator.device
            shape_2N = torch.tensor(self.config.time_beta, device=source)[:, None].expand(2, count)
            gamma_2N = torch._standard_gamma(shape_2N.contiguous(), generator=generator)
            time_N = (gamma_2N[0] / gamma_2N.sum(dim=0)).to(device)
        low, high = self.config.time_clamp
        return low + (high - low) * time_N


class ContextKeysValues:
    """Per block the context's (keys, values), each (B, H, L, D/H), and the key mask (B, L)."""

    def __init__(self, layers_BHLD: list[tuple[Tensor, Tensor]], mask_BL: Tensor) -> None:
        self.layers_BHLD, self.mask_BL = layers_BHLD, mask_BL


def flow_interpolate(noise_NTA: Tensor, action_NTA: Tensor, time_N: Tensor) -> tuple[Tensor, Tensor]:
    """The straight path between noise and action, and its velocity.

    Returns:
        x_t = (1 - t) noise + t action, and d x_t / d t = action - noise, both (N, T, A).
    """
    time_N11 = time_N[:, None, None]
    return (1 - time_N11) * noise_NTA + time_N11 * action_NTA, action_NTA - noise_NTA


class _Block(nn.Module):
    """Self-attention among action tokens, cross-attention to the context, MLP; each modulated and gated by time."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(3))
        self.modulation = _zero_init(nn.Linear(width, 9 * width))
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
        return self._split(keys_BLD), self._split(values_BLD)

    def forward(
        self,
        x_NTD: Tensor,
        condition_ND: Tensor,
        context_BHLD: tuple[Tensor, Tensor],
        mask_BL: Tensor,
        self_mask: Tensor | None,
    ) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2, shift_3, scale_3, gate_3 = self.modulation(
            condition_ND
        ).chunk(9, dim=-1)
        dropout = self.dropout if self.training else 0.0

        qkv = self.self_qkv(_modulate(self.norms[0](x_NTD), shift_1, scale_1)).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(*map(self._split, qkv), attn_mask=self_mask, dropout_p=dropout)
        x_NTD = x_NTD + gate_1[:, None] * self.self_out(self._join(attended))

        # Draws of one sample share its keys and values: they become more queries of one row.
        batch, rows = len(mask_BL), len(x_NTD)
        query = self.cross_q(_modulate(self.norms[1](x_NTD), shift_2, scale_2)).reshape(batch, -1, x_NTD.shape[-1])
        attended = F.scaled_dot_product_attention(
            self._split(query), *context_BHLD, attn_mask=mask_BL[:, None, None, :], dropout_p=dropout
        )
        x_NTD = x_NTD + gate_2[:, None] * self.cross_out(self._join(attended).reshape(rows, -1, x_NTD.shape[-1]))

        return x_NTD + gate_3[:, None] * self.mlp(_modulate(self.norms[2](x_NTD), shift_3, scale_3))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _join(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)


def _modulate(x_NTD: Tensor, shift_ND: Tensor, scale_ND: Tensor) -> Tensor:
    return x_NTD * (1 + scale_ND[:, None]) + shift_ND[:, None]


def _zero_init(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _sinusoid(time_N: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding of t in [0, 1], periods from about 0.004 to 4 (as pi0), (N, width)."""
    half = width // 2
    periods = torch.logspace(math.log10(4e-3), math.log10(4.0), half, device=time_N.device)
    angles_ND = 2 * math.pi * time_N[:, None] / periods
    embedding = torch.cat([angles_ND.sin(), angles_ND.cos()], dim=-1)
    return F.pad(embedding, (0, width - 2 * half))
