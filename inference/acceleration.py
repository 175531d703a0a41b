"""How a prediction is run: weights in the precision of the arithmetic, compiled code, CUDA graphs.

None of it changes what is computed, only in which order and by how many kernels; rounding differs, and
tests/inference/test_acceleration.py states by how much.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]
TensorFunction = Callable[[Tensors], Tensor]

MAX_GRAPHS = 8  # captured at the same time; each keeps its own inputs and shares the pool of intermediate results


def accelerate(function: TensorFunction, mode: str, device: torch.device) -> TensorFunction:
    """The same function, run in the way that `inference.compile` names.

    Args:
        function: from named tensors of fixed shapes to one tensor, without a random number or a wait for the GPU.
        mode: `none`, `default`, `max-autotune` (both torch.compile's) or `cuda_graph`.
        device: where the tensors are.

    Raises:
        ValueError: a CUDA graph on another device.
    """
    if mode == "none":
        return function
    if mode != "cuda_graph":
        return torch.compile(function, mode=mode, dynamic=False)
    if device.type != "cuda":
        raise ValueError(
            f"inference.compile is cuda_graph, but the policy runs on {device}, and CUDA graphs need a CUDA device; "
            "give --device cuda, or --compile default"
        )
    return GraphedFunction(function, device)


class GraphedFunction:
    """A function captured as a CUDA graph, once per shape of its inputs: one launch instead of thousands.

    Args:
        function, device: as for `accelerate`. Tensors that the function reads beside its inputs, such as weights,
            must stay where they are.
    """

    def __init__(self, function: TensorFunction, device: torch.device) -> None:
        self.function, self.device = function, device
        self._pool = torch.cuda.graph_pool_handle()
        self._captured = functools.lru_cache(maxsize=MAX_GRAPHS)(self._capture)

    @torch.no_grad()
    def __call__(self, tensors: Tensors) -> Tensor:
        """The function's value: a copy, because the next call writes to the same place."""
        with torch.cuda.device(self.device):
            graph, inputs, output = self._captured(tuple((name, x.shape, x.dtype) for name, x in tensors.items()))
            for name, value in tensors.items():
                inputs[name].copy_(value, non_blocking=True)
            graph.replay()
            return output.clone()

    @torch.no_grad()
    def _capture(
        self, signature: tuple[tuple[str, torch.Size, torch.dtype], ...]
    ) -> tuple[torch.cuda.CUDAGraph, Tensors, Tensor]:
        inputs = {name: torch.zeros(shape, dtype=dtype, device=self.device) for name, shape, dtype in signature}
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):  # libraries allocate and choose their kernels on first use, outside of the graph
            for _ in range(2):
                self.function(inputs)
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = self.function(inputs)
        return graph, inputs, output


def choose_weight_dtype(wanted: str, compute_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """`inference.weight_dtype` on this device.

    Raises:
        ValueError: coarser than the arithmetic.
    """
    if wanted == "auto":
        return compute_dtype if device.type == "cuda" else torch.float32
    dtype = getattr(torch, wanted)
    if dtype not in (torch.float32, compute_dtype):
        raise ValueError(
            f"inference.weight_dtype is {wanted}, but the policy computes in {str(compute_dtype)[6:]}; give auto or "
            "float32, or compute in bfloat16 (--use_amp)"
        )
    return dtype


def store_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round once, in place, the matrices that autocast would round at every call; half the memory and its traffic.

    Norms, biases of norms and statistics stay float32. Embeddings are rounded too, so the backbone's residual
    stream is in `dtype`, as in the published PaliGemma weights. For inference only: such weights can't be trained.
    """
    if dtype == torch.float32:
        return  # as trained; frozen weights may be stored in fewer bits already
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d)):
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point():  # others are quantized already
                    parameter.data = parameter.data.to(dtype)
