"""The keys and values of a stock language model, layer by layer, as its attention computes with them.

transformers calls the attention function that a model's configuration names, with queries, keys and values after rotary
position and with every keyword argument that the model's own forward was given. `collecting` registers, through
transformers' `AttentionInterface`, a function that hands its arguments to the stock one and shows keys and values to a
`KeysValues` on the way, if one was given. Nothing is patched, and the stock function computes what it always does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

SUFFIX = "_collecting"  # of the registered names


class KeysValues:
    """What one forward pass collects: give it to the model's forward as the keyword argument `keys_values`.

    It must be closed after the forward pass: gradient checkpointing runs the layers again in the backward pass, and
    if the second run were collected too, the graph would hold on to itself and never be freed.
    """

    def __init__(self) -> None:
        self._layers: list[tuple[Tensor, Tensor]] | None = []

    def add(self, key_BHLD: Tensor, value_BHLD: Tensor) -> None:
        """Take a layer's keys and values, each (B, num_kv_heads, L, head_dim); nothing once closed."""
        if self._layers is not None:
            self._layers.append((key_BHLD, value_BHLD))

    def close(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Per layer, in order, its keys and values; called once."""
        assert self._layers is not None, "already closed"
        layers, self._layers = self._layers, None
        return tuple(layers)


def collecting(implementation: str) -> str:
    """The name of the attention implementation that computes like `implementation` and can collect.

    Args:
        implementation: `sdpa` or `eager`.

    Returns:
        The name, to be given to transformers in place of `implementation`.
    """
    name = implementation + SUFFIX
    AttentionInterface.register(name, _collecting_sdpa if implementation == "sdpa" else _collecting_eager)
    AttentionMaskInterface.register(name, AttentionMaskInterface()[implementation])
    return name


def _collecting_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    return _collected(AttentionInterface()["sdpa"], module, query, key, value, *args, **kwargs)


def _collecting_eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    # Eager attention differs from model to model (Gemma 2's caps its logits): each has it beside its attention layer.
    stock = sys.modules[type(module).__module__].eager_attention_forward
    return _collected(stock, module, query, key, value, *args, **kwargs)


def _collected(
    stock: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    keys_values: KeysValues | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if keys_values is not None:
        keys_values.add(key, value)
    return stock(module, query, key, value, *args, **kwargs)
