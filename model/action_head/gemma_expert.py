"""The transformer of pi0's and pi0.5's action expert: a Gemma of its own width whose every layer attends to the
backbone's keys and values of the same layer (Black et al. 2024, "pi0", sec. IV and app. B; Physical Intelligence 2025,
"pi0.5", app. E). The names of its weights are those of the published files.

What the backbone saw (the prefix) never attends to the expert's tokens (the suffix), so the prefix's keys and values
serve all noise draws of training and all steps of sampling.

Shape letters: B batch, K noise draws per sample, N = B K rows, L tokens remembered, T tokens of the suffix, E the
expert's width, H query heads, h heads of keys and values, D width of a head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.context import ContextSpec
from utils.config_model import ExpertConfig

EPS = 1e-6  # of every norm, as in Gemma

Modulation = tuple[Tensor, Tensor, Tensor]  # 1 + scale, shift and gate, each (N, 1 or T, E)
KeysValues = tuple[Tensor, Tensor]  # each (B, h, L, D)


@dataclass(frozen=True)
class Memory:
    """What the tokens of a suffix attend to besides each other.

    Attributes:
        layers: keys and values per layer, after rotary position.
        mask_BL: bool, True for tokens that exist.
        next_position_B: int64, the position of the suffix's first token.
        room: places at the end of every layer that a suffix of that many tokens writes its own keys and values into,
            so that a step of sampling copies nothing; only without gradients. 0: none.
    """

    layers: tuple[KeysValues, ...]
    mask_BL: Tensor
    next_position_B: Tensor
    room: int = 0

    def with_room(self, room: int) -> Memory:
        """The same with `room` places more."""
        layers = []
        for pair in self.layers:
            wider = tuple(one.new_empty(*one.shape[:2], one.shape[2] + room, one.shape[3]) for one in pair)
            for one, old in zip(wider, pair, strict=True):
                one[:, :, : old.shape[2]] = old
            layers.append(wider)
        return dataclasses.replace(self, layers=tuple(layers), room=room)

    def joined(self, layer: int, keys_BhTD: Tensor, values_BhTD: Tensor) -> KeysValues:
        """A layer's keys and values, followed by a suffix's own."""
        result = []
        for old, new in zip(self.layers[layer], (keys_BhTD, values_BhTD), strict=True):
            if self.room:
                assert new.shape[2] == self.room, (new.shape, self.room)
                old[:, :, -self.room :] = new
                result.append(old)
            else:
                result.append(torch.cat([old, new.to(old.dtype)], dim=2))
        return result[0], result[1]

    def attention_mask(self, draws: int, token_mask_NT: Tensor) -> Tensor:
        """Who sees whom: all see the memory; the tokens of one draw see each other and those of no other draw.

        Args:
            draws: K.
            token_mask_NT: bool, False for tokens that no other may see.

        Returns:
            bool, (B, 1, 1, L + T) for one draw, which suits all queries, else (B, 1, K T, L + K T).
        """
        batch, length = len(self.mask_BL), token_mask_NT.shape[1]
        if draws == 1:
            return torch.cat([self.mask_BL, token_mask_NT], dim=1)[:, None, None]
        draw_of = torch.arange(draws, device=self.mask_BL.device).repeat_interleave(length)
        own = (draw_of[:, None] == draw_of) & token_mask_NT.reshape(batch, 1, 1, -1)
        seen = self.mask_BL[:, None, None].expand(-1, 1, draws * length, -1)
        return torch.cat([seen, own], dim=-1)


class GemmaExpert(nn.Module):
    """Suffix tokens in, suffix tokens out; see `forward`."""

    def __init__(self, config: ExpertConfig, spec: ContextSpec) -> None:
        """
        Args:
            config: sizes of its own.
            spec: of the backbone; one block for each of its layers, with its heads of keys and values.
        """
        super().__init__()
        self.config, self.spec = config, spec
        self.blocks = nn.ModuleList(ExpertBlock(config, spec) for _ in range(spec.num_layers))
        self.norm = _norm(config)

    @property
    def checkpoints(self) -> bool:
        """Whether a forward pass now keeps each block's input alone, and runs the block again in the backward pass."""
        return self.config.gradient_checkpointing and self.training and torch.is_grad_enabled()

    def norms(self) -> list[nn.Module]:
        """Every norm in turn: two a block, and the last."""
        norms = [norm for block in self.blocks for norm in (block.input_layernorm, block.post_attention_layernorm)]
        return [*norms, self.norm]

    def matrices(self) -> list[nn.Module]:
        """The parts whose linear layers may be stored in fewer bits: all but the norms."""
        return [part for block in self.blocks for part in (block.self_attn, block.mlp)]

    def modulations(self, condition: Tensor) -> list[Modulation | None]:
        """What `condition` (N, 1 or T, E) makes of each norm in turn, float32; None for norms without.

        Autocast or not: what these round would scale every token.
        """
        with torch.autocast(condition.device.type, enabled=False):
            return [norm.modulation(condition) if isinstance(norm, AdaptiveRMSNorm) else None for norm in self.norms()]

    def forward(
        self,
        tokens_NTE: Tensor,
        modulations: Sequence[Modulation | None],
        memory: Memory,
        token_mask_NT: Tensor | None = None,
    ) -> Tensor:
        """The tokens after the last norm, (N, T, E).

        Args:
            tokens_NTE: N is the memory's batch or a multiple of it: the draws of a sample follow each other.
            modulations: from `modulations`, of these rows or of one that is the same for all.
            memory: what they see besides each other.
            token_mask_NT: bool, False for tokens that the others must not see; None: all may be seen.
        """
        rows, length = tokens_NTE.shape[:2]
        draws = rows // len(memory.mask_BL)
        if token_mask_NT is None:
            token_mask_NT = torch.ones(rows, length, dtype=torch.bool, device=tokens_NTE.device)
        mask = memory.attention_mask(draws, token_mask_NT)
        rotary = self.rotary(memory.next_position_B.repeat_interleave(draws), length)
        for layer, block in enumerate(self.blocks):
            arguments = tokens_NTE, modulations[2 * layer : 2 * layer + 2], rotary, memory, layer, mask
            if self.checkpoints:
                tokens_NTE, _ = checkpoint(block, *arguments, use_reentrant=False)
            else:
                tokens_NTE, _ = block(*arguments)
        return self.norm(tokens_NTE, modulations[-1])[0]

    def remember(self, tokens_BTE: Tensor, modulations: Sequence[Modulation | None], memory: Memory) -> Memory:
        """The memory with tokens added that see it and each other, and that all later tokens see."""
        exist_BT = torch.ones(tokens_BTE.shape[:2], dtype=torch.bool, device=tokens_BTE.device)
        mask = memory.attention_mask(1, exist_BT)
        rotary = self.rotary(memory.next_position_B, tokens_BTE.shape[1])
        layers = []
        for layer, block in enumerate(self.blocks):
            pair = modulations[2 * layer : 2 * layer + 2]
            tokens_BTE, joined = block(tokens_BTE, pair, rotary, memory, layer, mask)
            layers.append(joined)
        mask_BL = torch.cat([memory.mask_BL, exist_BT], dim=1)
        return Memory(tuple(layers), mask_BL, memory.next_position_B + exist_BT.shape[1])

    def rotary(self, first_N: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of `length` positions from `first_N` on, each float32 (N, T, 1, D) (Su et al. 2021).

        The sines of the first half are negative, as `_rotate` wants them.
        """
        exponents = torch.arange(0, self.spec.head_dim, 2, device=first_N.device).float() / self.spec.head_dim
        positions_NT = first_N[:, None] + torch.arange(length, device=first_N.device)
        angles = positions_NT[:, :, None, None].float() * (1.0 / self.spec.rope_theta**exponents)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


class ExpertBlock(nn.Module):
    """One Gemma layer: attention to the memory and among the suffix, then a gated MLP."""

    def __init__(self, config: ExpertConfig, spec: ContextSpec) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = _norm(config), _norm(config)
        self.self_attn = _Projections(config, spec)
        self.mlp = _GatedMLP(config)

    def forward(
        self,
        x_NTE: Tensor,
        modulations: Sequence[Modulation | None],
        rotary: tuple[Tensor, Tensor],
        memory: Memory,
        layer: int,
        mask: Tensor,
    ) -> tuple[Tensor, KeysValues]:
        """The tokens after this layer, and the keys and values that they attended to, their own at the end."""
        normed_NTE, gate = self.input_layernorm(x_NTE, modulations[0])
        query, key, value = self.self_attn.heads(normed_NTE, rotary)
        attended, joined = attend(query, key, value, memory, layer, mask)
        x_NTE = _add(x_NTE, self.self_attn.o_proj(attended), gate)
        normed_NTE, gate = self.post_attention_layernorm(x_NTE, modulations[1])
        return _add(x_NTE, self.mlp(normed_NTE), gate), joined


def attend(
    query_NTHD: Tensor, key_NThD: Tensor, value_NThD: Tensor, memory: Memory, layer: int, mask: Tensor
) -> tuple[Tensor, KeysValues]:
    """Attention of a suffix to the memory and itself, (N, T, H D), and the keys and values that it saw.

    Query heads that share a head of keys and values, like the draws of one sample, become more queries of one row: no
    key is copied for them, and where there is one head of keys and values no query is moved either.

    Args:
        mask: from `Memory.attention_mask`.
    """
    batch, (rows, length, heads, width), kv_heads = len(mask), query_NTHD.shape, key_NThD.shape[2]
    group = heads // kv_heads
    joined = memory.joined(
        layer, *(one.reshape(batch, -1, kv_heads, width).transpose(1, 2) for one in (key_NThD, value_NThD))
    )
    query = query_NTHD.reshape(batch, -1, kv_heads, group, width).transpose(1, 2).flatten(2, 3)  # B h (K T g) D
    if mask.shape[2] > 1:
        mask = mask.repeat_interleave(group, dim=2)
    attended = F.scaled_dot_product_attention(query.to(joined[0].dtype), *joined, attn_mask=mask)
    attended = attended.unflatten(2, (-1, group)).transpose(1, 2)  # B (K T) h g D
    return attended.reshape(rows, length, heads * width).to(value_NThD.dtype), joined


def _add(x_NTE: Tensor, update_NTE: Tensor, gate: Tensor | None) -> Tensor:
    return x_NTE + update_NTE if gate is None else torch.addcmul(x_NTE, update_NTE, gate)


class _Projections(nn.Module):
    def __init__(self, config: ExpertConfig, spec: ContextSpec) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.q_proj = nn.Linear(config.width, config.num_heads * spec.head_dim, bias=False)
        self.k_proj = nn.Linear(config.width, spec.num_kv_heads * spec.head_dim, bias=False)
        self.v_proj = nn.Linear(config.width, spec.num_kv_heads * spec.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * spec.head_dim, config.width, bias=False)

    def heads(self, x_NTE: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (N, T, H, D), keys and values (N, T, h, D); queries and keys turned by their positions."""
        query, key, value = (
            projection(x_NTE).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return _rotate(query, rotary), _rotate(key, rotary), value


class _GatedMLP(nn.Module):
    def __init__(self, config: ExpertConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp_dim, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp_dim, bias=False)
        self.down_proj = nn.Linear(config.mlp_dim, config.width, bias=False)

    def forward(self, x_NTE: Tensor) -> Tensor:
        # Under autocast the product is rounded once, where down_proj takes it.
        gate_NTM, up_NTM = self.gate_proj(x_NTE).float(), self.up_proj(x_NTE).float()
        return self.down_proj(F.gelu(gate_NTM, approximate="tanh") * up_NTM)


class RMSNorm(nn.Module):
    """x / rms(x) (1 + weight), in float32 (Zhang & Sennrich 2019; the 1 is Gemma's)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x_NTE: Tensor, modulation: None = None) -> tuple[Tensor, None]:
        """The normalized tokens, and no gate."""
        return F.rms_norm(x_NTE.float(), x_NTE.shape[-1:], 1 + self.weight.float(), EPS), None


class AdaptiveRMSNorm(nn.Module):
    """x / rms(x) (1 + scale) + shift, where a condition decides scale, shift and the gate of what follows (pi0.5)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.dense.weight)  # every sub-layer starts shut, as in DiT (Peebles & Xie 2022, adaLN-Zero)
        nn.init.zeros_(self.dense.bias)

    def modulation(self, condition: Tensor) -> Modulation:
        """What a condition (N, 1 or T, E) decides."""
        scale, shift, gate = self.dense(condition).float().chunk(3, dim=-1)
        return 1 + scale, shift, gate

    def forward(self, x_NTE: Tensor, modulation: Modulation) -> tuple[Tensor, Tensor]:
        """The normalized tokens, and the gate of what follows; `modulation` from `modulation`."""
        scale, shift, gate = modulation
        return torch.addcmul(shift, F.rms_norm(x_NTE.float(), x_NTE.shape[-1:], eps=EPS), scale), gate


def _norm(config: ExpertConfig) -> nn.Module:
    return AdaptiveRMSNorm(config.width) if config.time == "adaptive_norm" else RMSNorm(config.width)


def _rotate(x_NTHD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs (i, i + D / 2) by their position's angles."""
    cos, sin = rotary
    first, second = x_NTHD.chunk(2, dim=-1)
    return torch.addcmul(x_NTHD * cos, torch.cat([second, first], dim=-1), sin)
