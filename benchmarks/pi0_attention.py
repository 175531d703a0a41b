"""Who sees whom in a pi0 or pi0.5, and where its tokens stand: rows of `pi0_parity.py`, read off the network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.pi0_reference import Reference, Row, largest


def attention(reference: Reference) -> Iterator[Row]:
    """Who sees whom, and positions, as attention and rotation are given them; ours leave out what does not exist."""
    found, head = reference.arrays("model"), reference.head
    exists, positions = found["prefix_pad_mask"], []
    rotary = reference.backbone.backbone.language_model.rotary_emb
    hook = rotary.register_forward_pre_hook(
        lambda _, args, kwargs: positions.append(kwargs["position_ids"]), with_kwargs=True
    )
    with watched() as masks:
        context = reference.context()
    hook.remove()
    with watched() as of_state:
        memory = head.encode_context(context)
    with watched() as of_actions:
        head.velocity(found["x_t"], 0.5 * torch.ones(len(exists)), memory)
    length, suffix = exists.shape[1], found["suffix_pad_mask"].shape[1]
    horizon = found["x_t"].shape[1]
    seen = torch.zeros_like(found["att_2d"])
    placed = torch.full_like(found["position_ids"], -1)
    for row, there in enumerate(exists):
        where, compact = there.nonzero().flatten(), context.mask_BL[row].nonzero().flatten()
        places = torch.cat([where, torch.arange(length, length + suffix)])
        here = torch.cat([compact, torch.arange(context.mask_BL.shape[1], context.mask_BL.shape[1] + suffix)])
        seen[row, where[:, None], where] = masks[0][row, 0].expand(-1, masks[0].shape[3])[0, compact]
        placed[row, where] = positions[0][row, compact]
        first = memory.next_position_B[row] - (suffix - horizon)
        placed[row, length:] = first + torch.arange(suffix)
        if of_state:
            known = here[: len(where) + 1]
            seen[row, length, places[: len(where) + 1]] = of_state[0][row, 0, 0, known]
        seen[row, length + suffix - horizon :, places] = of_actions[0][row, 0, 0, here]
    yield "model", "att_2d", largest(seen, found["att_2d"]), 0.0
    read = exists.new_ones(len(exists), length + suffix)
    read[:, :length] = exists  # positions of what does not exist are never read
    yield "model", "position_ids", largest(placed[read], found["position_ids"][read]), 0.0
    # Blocks: a token sees those of its own block and of earlier ones.
    whole = torch.stack([seen[row, :length, :length][there][:, there].all() for row, there in enumerate(exists)])
    prefix_blocks = (~whole)[:, None].expand_as(found["prefix_att_mask"])
    yield "model", "prefix_att_mask", largest(prefix_blocks, found["prefix_att_mask"]), 0.0
    starts = seen[:, length:, length:].diagonal(offset=1, dim1=1, dim2=2).logical_not()
    blocks = torch.cat([exists.new_ones(len(exists), 1), starts], dim=1)
    yield "model", "suffix_att_mask", largest(blocks, found["suffix_att_mask"]), 0.0
    yield "model", "suffix_pad_mask", largest(seen[:, -1, length:], found["suffix_pad_mask"]), 0.0


@contextlib.contextmanager
def watched() -> Iterator[list[Tensor]]:
    """As a context: the masks of all attention within, as its kernel is given them."""
    kernel, masks = F.scaled_dot_product_attention, []

    def watch(*args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if attn_mask is not None:
            masks.append(attn_mask)
        return kernel(*args, attn_mask=attn_mask, **kwargs)

    F.scaled_dot_product_attention = watch
    try:
        yield masks
    finally:
        F.scaled_dot_product_attention = kernel
