"""All that passes between a backbone and an action head.

Shape letters: B batch, L context tokens, E embedding width, T horizon, A per_action_dim, S state_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ContextSpec:
    """What a backbone's contexts look like; an action head is built for one.

    Attributes:
        width: E, of the context tokens.
        num_layers, num_kv_heads, head_dim, rope_theta: of the language model whose keys and values the backbone hands
            over. `num_layers` is 0, and so are the others, where a backbone has none that would mean anything.
    """

    width: int
    num_layers: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    rope_theta: float = 0.0


@dataclass(frozen=True)
class Context:
    """The fused observation: the only thing that an action head sees. A backbone makes the tokens, the mask and the
    keys and values; `VLAModel.encode` adds the rest.

    Attributes:
        tokens_BLE: float, image and text tokens after the backbone.
        mask_BL: bool, True for tokens that exist; heads must attend to no others.
        state_BS: float32, normalized proprioception, or None when the head takes no state.
        action_dim_mask_BA: bool, True for action dimensions that the sample's dataset has; None: all. A head
            neither sees nor predicts the others.
        keys_values: per layer of the backbone's language model its (keys, values), each (B, num_kv_heads, L, head_dim),
            the keys after rotary position. None unless they were asked for.
        first_position: of those keys. Positions count the tokens that exist, so that what follows the context goes on
            at `mask_BL.sum(dim=1) + first_position`.
    """

    tokens_BLE: Tensor
    mask_BL: Tensor
    state_BS: Tensor | None = None
    action_dim_mask_BA: Tensor | None = None
    keys_values: tuple[tuple[Tensor, Tensor], ...] | None = None
    first_position: int = 1


@dataclass(frozen=True)
class ActionPrefix:
    """What is already planned for the steps of the chunk to be sampled.

    Attributes:
        action_BTA: float32; row i is the plan for the new chunk's step i. Normalized units for heads; physical
            units for `VLAModel` and `VLAPredictor`, which normalize it for the new observation. Where the weight
            is 0 it has no influence, whatever it holds.
        weight_BT: float32 in [0, 1]: 1 is committed, 0 is free (`model.action_head.guidance.soft_mask`).
        max_guidance_weight: beta, the clip of the guidance weight.
        clean: condition on the committed steps (weight 1) as clean action tokens instead of guiding, for heads
            trained with `max_clean_prefix`; other weights have no influence then.
    """

    action_BTA: Tensor
    weight_BT: Tensor
    max_guidance_weight: float = 5.0
    clean: bool = False

    @property
    def committed_BT(self) -> Tensor:
        """bool, True for committed steps."""
        return self.weight_BT >= 1

    def target_BTA(self) -> Tensor:
        """The planned actions, 0 where the weight is 0."""
        return self.action_BTA.masked_fill(self.weight_BT[..., None] <= 0, 0.0)
