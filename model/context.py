"""What a backbone hands to an action head.

Shape letters: B batch, L context tokens, E embedding width, S state_dim, A per_action_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Context:
    """The fused observation: the only thing an action head sees.

    Attributes:
        tokens_BLE: float, image and text tokens after the backbone.
        mask_BL: bool, True for tokens that exist; heads must attend to no others.
        state_BS: float32, normalized proprioception, or None when the head takes no state.
        action_dim_mask_BA: bool, True for action dimensions that the sample's dataset has; None: all. A head
            neither sees nor predicts the others.
        layers_KV: per backbone layer (keys, values), each (B, heads, L, head_dim); None unless a head asks
            for joint attention.
    """

    tokens_BLE: Tensor
    mask_BL: Tensor
    state_BS: Tensor | None = None
    action_dim_mask_BA: Tensor | None = None
    layers_KV: list[tuple[Tensor, Tensor]] | None = None
