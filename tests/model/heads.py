"""Small heads and contexts that the tests of the action heads share.

Shape letters: B batch, L context tokens, E context width, T horizon, A per_action_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.action_head import build_action_head
from model.action_head.base import ActionHeadBase
from model.context import ActionPrefix, Context, ContextSpec
from utils.config_utils import ActionHeadConfig, ExpertConfig

WIDTH, STATE = 12, 3
SPEC = ContextSpec(WIDTH, num_layers=2, num_kv_heads=1, head_dim=6, rope_theta=1e4)
SMALL = {"horizon": 4, "per_action_dim": 2, "hidden_dim": 32, "num_layers": 2, "num_heads": 4}
SMALL |= {"mlp_hidden_dims": (64,), "num_action_bins": 32, "unet_width": 16, "unet_levels": 2}
EXPERT = ExpertConfig(width=32, mlp_dim=64, num_heads=4, max_state_dim=4, max_action_dim=3)
SMALL |= {"expert": EXPERT}


def make_head(type: str, *, seed: int = 0, voice: bool = True, **options: Any) -> ActionHeadBase:
    """A head in evaluation mode.

    Args:
        type: a key of ACTION_HEADS.
        voice: give parameters that start at zero (gates, last layers) random values, so that every path is heard.
        options: differences from SMALL.
    """
    torch.manual_seed(seed)
    head = build_action_head(ActionHeadConfig(**(SMALL | options | {"type": type})), SPEC, STATE)
    for parameter in head.parameters() if voice else ():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return head.eval()


def make_context(batch: int = 3, length: int = 6, seed: int = 1) -> Context:
    """A random context in which every token exists."""
    generator = torch.Generator().manual_seed(seed)
    return context_of(
        torch.randn(batch, length, WIDTH, generator=generator),
        torch.ones(batch, length, dtype=torch.bool),
        torch.randn(batch, STATE, generator=generator),
    )


def context_of(tokens_BLE: Tensor, mask_BL: Tensor, state_BS: Tensor | None = None) -> Context:
    """A context whose keys and values are fixed linear functions of its tokens."""
    generator = torch.Generator().manual_seed(11)
    size = (SPEC.num_layers, 2, WIDTH, SPEC.num_kv_heads * SPEC.head_dim)
    weights = torch.randn(size, generator=generator) / WIDTH**0.5
    flat = torch.einsum("ble,npef->npblf", tokens_BLE, weights).unflatten(-1, (SPEC.num_kv_heads, -1))
    pairs = tuple((keys, values) for keys, values in flat.transpose(3, 4))
    return Context(tokens_BLE, mask_BL, state_BS, keys_values=pairs)


def no_pad(batch: int, horizon: int = 4) -> torch.Tensor:
    """`action_is_pad` of a batch without padding."""
    return torch.zeros(batch, horizon, dtype=torch.bool)


def seeded(seed: int) -> torch.Generator:
    """A CPU generator."""
    return torch.Generator().manual_seed(seed)


def sample(
    head: ActionHeadBase, context: Context, seed: int = 0, steps: int = 10, prefix: ActionPrefix | None = None
) -> torch.Tensor:
    """Actions from the noise of consecutive seeds, one per sample; the first sample's is `seed`."""
    generators = [seeded(seed + row) for row in range(len(context.tokens_BLE))]
    noise = head.draw_noise(generators, context.tokens_BLE.device, steps)
    return head.sample(context, noise, steps, prefix=prefix)
