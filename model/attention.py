"""Multi-head attention on projected tokens, for every transformer block of ours.

Shape letters: B batch, Q queries, M what is attended to, D width, H heads.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def split_heads(x_BMD: Tensor, num_heads: int) -> Tensor:
    """(B, M, D) -> (B, H, M, D/H)."""
    return x_BMD.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attend(
    query_BQD: Tensor, keys_BHMd: Tensor, values_BHMd: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Scaled dot-product attention, (B, Q, D).

    Args:
        query_BQD: all heads side by side.
        keys_BHMd, values_BHMd: from `split_heads`.
        mask: bool, True where a query attends, of any shape that broadcasts to (B, H, Q, M); None: everywhere.
        dropout: probability of dropping an attention weight.
    """
    query_BHQd = split_heads(query_BQD, keys_BHMd.shape[1])
    attended_BHQd = F.scaled_dot_product_attention(
        query_BHQd, keys_BHMd, values_BHMd, attn_mask=mask, dropout_p=dropout
    )
    return attended_BHQd.transpose(1, 2).flatten(2)
