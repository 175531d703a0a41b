"""A bound on the memory that a model's configuration can ask for, when the configuration came with a file.

A checkpoint's configuration says how large a model is to be built, and its weights how large it was. A width of 400,000
in the one would take hundreds of gigabytes before anybody compared it with the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from utils.checkpoint import CheckpointError

SPARE_BYTES = 64_000_000  # for buffers that no checkpoint holds: positions, schedules
SPARE_TENSORS = 4_000
_SIZED = {"empty", "empty_strided", "zeros", "ones", "full", "rand", "randn", "randint", "new_empty", "new_zeros"}
_SIZED |= {"new_ones", "new_full"}
_RANGES = {"arange", "linspace", "logspace", "eye", "randperm"}


class AllocationLimit(TorchDispatchMode):
    """While active, new tensors may have four times the values of some weights together, and a little besides."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        sizes = [weight.numel() for weight in weights]
        self.values, self.left = sum(sizes), 4 * sum(sizes) + SPARE_BYTES // 4
        self.tensors = 8 * len(sizes) + SPARE_TENSORS

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count a tensor before it is made.

        Raises:
            CheckpointError: more, or larger ones, than the weights bear out.
        """
        name = func._schema.name.removeprefix("aten::")
        if name in _SIZED or name in _RANGES:
            self.left -= _values(name, args)
            self.tensors -= 1
            if self.left < 0 or self.tensors < 0:
                raise CheckpointError(
                    f"checkpoint: its configuration describes a model that is several times larger than the weights "
                    f"that it holds ({self.values:,} values); one of the two was changed, so do not use it"
                )
        return func(*args, **(kwargs or {}))


def _values(name: str, args: Any) -> int:
    """How many values a call will make: the product of its sizes, or the length of its range."""
    if name in _RANGES:
        numbers = [abs(value) for value in args if isinstance(value, int | float)]
        return int(max(numbers, default=0))
    sizes = next((value for value in args if isinstance(value, list | tuple | torch.Size)), ())
    return math.prod(abs(size) for size in sizes)
