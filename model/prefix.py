"""The prefix pass for heads that read keys and values alone: no token that does not exist, no layer that nothing reads.

Attention is bidirectional over the tokens that exist and positions count those alone, so leaving the others out changes
no number (tested). They count from 0, as in pi0: attention sees differences alone, but rounding is then pi0's too. Of
the last layer only what makes its keys and values is computed.

Shape letters: B batch, L context tokens, N images of the batch, n tokens per image, E width of the language model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from model.keys_values import KeysValues


def without_gaps(
    embeds_BLE: Tensor, mask_BL: Tensor, image_slots_N: Tensor | None, tokens_per_image: int, num_images: int
) -> tuple[Tensor, Tensor]:
    """Tokens that exist moved to the front, as many as the fullest sample has, and their mask.

    Args:
        embeds_BLE: first the tokens of `num_images` slots, then the text's.
        mask_BL: bool, True for tokens that exist.
        image_slots_N: int64, which slots of the batch hold an image, where the caller knows it. The host then waits for
            no GPU, and only a single sample is packed, and only its images.
        tokens_per_image: n.
        num_images: slots per sample.
    """
    length = mask_BL.shape[1]
    if image_slots_N is not None:
        if len(embeds_BLE) > 1 or len(image_slots_N) == num_images:
            return embeds_BLE, mask_BL
        within = torch.arange(tokens_per_image, device=mask_BL.device)
        text = torch.arange(num_images * tokens_per_image, length, device=mask_BL.device)
        kept = torch.cat([(image_slots_N[:, None] * tokens_per_image + within).flatten(), text])
        return embeds_BLE[:, kept], mask_BL[:, kept]
    longest = int(mask_BL.sum(dim=1).max())
    if longest == length:
        return embeds_BLE, mask_BL
    order_BL = (~mask_BL).byte().argsort(dim=1, stable=True)[:, : max(longest, 1)]
    packed_BLE = embeds_BLE.gather(1, order_BL[..., None].expand(-1, -1, embeds_BLE.shape[2]))
    return packed_BLE, mask_BL.gather(1, order_BL)


def keys_values_alone(
    language_model: PreTrainedModel, embeds_BLE: Tensor, mask_BL: Tensor
) -> tuple[Tensor, tuple[tuple[Tensor, Tensor], ...]]:
    """What a stock Gemma's layers attend to, each layer's keys (after rotary position) and values.

    Args:
        language_model: with an attention implementation of `model.keys_values.collecting`.
        embeds_BLE: its input.
        mask_BL: bool, True for tokens that exist.

    Returns:
        What enters the last layer, (B, L, E), and per layer keys and values, each (B, kv_heads, L, head_dim).
    """
    position_ids_BL = mask_BL.cumsum(dim=1) - 1
    rotary = language_model.rotary_emb(embeds_BLE, position_ids=position_ids_BL)
    seen_B11L = mask_BL[:, None, None]
    if not language_model.config._attn_implementation.startswith("sdpa"):  # eager attention adds its mask
        lowest = torch.finfo(embeds_BLE.dtype).min
        seen_B11L = torch.where(seen_B11L, 0.0, lowest).to(embeds_BLE.dtype)
    *layers, last = language_model.layers
    collected, hidden_BLE = KeysValues(), embeds_BLE
    for layer in layers:
        hidden_BLE = layer(
            hidden_BLE,
            attention_mask=seen_B11L,
            position_ids=position_ids_BL,
            position_embeddings=rotary,
            keys_values=collected,
        )
    pairs = collected.close()
    attention = last.self_attn
    normed_BLE = last.input_layernorm(hidden_BLE)
    key, value = (
        projection(normed_BLE).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.k_proj, attention.v_proj)
    )
    _, key = sys.modules[type(attention).__module__].apply_rotary_pos_emb(key, key, *rotary)
    return hidden_BLE, (*pairs, (key, value))


def unread_parameters(language_model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """Those that `keys_values_alone` makes nothing of: of the last layer and the norm after it."""
    read = ("input_layernorm.", "self_attn.k_proj.", "self_attn.v_proj.")
    yield from language_model.norm.parameters()
    for name, parameter in language_model.layers[-1].named_parameters():
        if not name.startswith(read):
            yield parameter
