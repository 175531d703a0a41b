"""How a prediction is run fast. None of it changes what is computed, except for rounding.

    kept       embedded prompts, and what the head computes from the number of steps alone (its schedule)
    compiled   torch.compile or CUDA graphs, as `inference.compile` says
    stored     weights in the precision of the arithmetic (`inference.weight_dtype`), the backbone's matrices in 8 or
               4 bits (`inference.quantization`), and an action expert's (`inference.expert_quantization`)

How far rounding may move an action is stated in tests/inference/test_engine.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from model.action_head.action_expert import ActionExpertHead
from model.adapters import quantize_linears
from model.context import ActionPrefix
from model.vla_model import VLAModel
from utils.batch import Batch
from utils.config_utils import InferenceConfig
from utils.misc import require_compiler

Tensors = dict[str, Tensor]
Predicted = tuple[Tensor, Tensor]  # actions and how unsure the head was: `VLAModel.act_measured`
TensorFunction = Callable[[Tensors], Any]

OBSERVATION = ("image_mask", "vlm_attention_mask", "state", "dataset_index")  # read beside the images and the prompt
# What may be quantized, the setting that asks for it, and the setting that it was trained with.
BACKBONE = "backbone", "inference.quantization", "model.vlm_config.quantization"
EXPERT = "action expert", "inference.expert_quantization", "model.action_head_config.expert.quantization"
MAX_EMBEDDED_PROMPTS = 256  # instructions whose embeddings stay on the device
MAX_FUNCTIONS = 8  # pairs of (draws, integration steps) whose schedules, compiled code and graphs are kept
MAX_GRAPHS = 8  # CUDA graphs of one function; each keeps its own inputs and shares the pool of intermediate results


class Engine:
    """Runs a model whose weights no longer change: everything that is kept was computed from them as they are.

    The host does what a GPU would otherwise have to be waited for: it looks up the prompts and finds the images that
    exist. Where code is compiled or captured, prompts are padded to one length, so that every instruction has the
    same shape.

    Args:
        model: changed in place: moved to `device`, its weights stored as the settings say, never trained again.
        settings: the `inference` section.
        device: where the model runs.
        prompt_max_len: text tokens of the longest prompt.
        trained_quantization: how the matrices of the backbone (`model.vlm_config.quantization`) and of the action
            expert (`model.action_head_config.expert.quantization`) are stored already.

    Attributes:
        weight_dtype: that the matrices are stored in.

    Raises:
        ValueError: the device can't do what `inference.compile` asks for, the head can't take so many steps, weights
            would be rounded below the compute precision, or are quantized already.
        ImportError: the library of that quantization is missing.
    """

    def __init__(
        self,
        model: VLAModel,
        settings: InferenceConfig,
        device: torch.device,
        *,
        prompt_max_len: int,
        trained_quantization: tuple[str, str],
    ) -> None:
        self.weight_dtype = choose_weight_dtype(settings.weight_dtype, model.compute_dtype, device)
        head = model.action_head
        store_weights(model, self.weight_dtype, [*model.backbone.vision_parts(), *head.exact_parts()])
        quantize([model.backbone], settings.quantization, trained_quantization[0])
        if settings.expert_quantization != "none":
            if not isinstance(head, ActionExpertHead):
                raise ValueError(
                    f"inference.expert_quantization is {settings.expert_quantization}, but the policy's action head is "
                    "no action expert; give none"
                )
            quantize(head.expert.matrices(), settings.expert_quantization, trained_quantization[1], EXPERT)
        self.model, self.device = model.to(device).eval().requires_grad_(False), device
        self.compile = settings.compile
        self._prompt_length = prompt_max_len if self.compile != "none" else None
        self._embedded = functools.lru_cache(maxsize=MAX_EMBEDDED_PROMPTS)(self._embed)
        self._schedule = functools.lru_cache(maxsize=MAX_FUNCTIONS)(self._make_schedule)
        self._function = functools.lru_cache(maxsize=MAX_FUNCTIONS)(self._make_function)
        self._function(1, settings.num_inference_steps)  # so that what device or head can't do is refused here

    @torch.no_grad()
    def __call__(
        self, batch: Batch, num_inference_steps: int, *, num_draws: int = 1, prefix: ActionPrefix | None = None
    ) -> Predicted:
        """Actions, float32 (K, B, T, A), physical units, and how unsure the head was, (K, B, T): as `act_measured`.

        With a prefix the model runs as it is, whatever `inference.compile` says: guidance differentiates the network.
        """
        tensors = self.prepared(batch)
        if prefix is not None:
            schedule = self._schedule(num_inference_steps)
            rest = {"num_draws": num_draws, "schedule": schedule, "prefix": prefix}
            return self.model.act_measured(tensors, num_inference_steps, **rest)
        return self._function(num_draws, num_inference_steps)(tensors)

    @torch.no_grad()
    def prepared(self, batch: Batch) -> Tensors:
        """The tensors that the model reads, on its device, with `prompt_embeds` and `image_slots` filled in."""
        ids_BL, mask_BL = batch["input_ids"], batch["prompt_mask"]
        if self._prompt_length is not None:
            missing = self._prompt_length - ids_BL.shape[1]
            ids_BL, mask_BL = F.pad(ids_BL, (0, missing)), F.pad(mask_BL, (0, missing))
        slot_mask_BSV = batch["vlm_attention_mask"][:, :, None] & batch["image_mask"][:, None, :]
        tensors = {name: batch[name] for name in (*self.model.cameras, *OBSERVATION, "noise") if name in batch}
        tensors |= {"prompt_mask": mask_BL, "image_slots": slot_mask_BSV.flatten().nonzero().squeeze(1)}
        tensors = {name: tensor.to(self.device, non_blocking=True) for name, tensor in tensors.items()}
        rows = [self._embedded(tuple(ids)) for ids in ids_BL.tolist()]
        return {**tensors, "prompt_embeds": torch.stack(rows) if len(rows) > 1 else rows[0][None]}

    @torch.no_grad()
    def _embed(self, input_ids: tuple[int, ...]) -> Tensor:
        """The tokens of one instruction as the backbone fuses them, (L, E)."""
        with self.model.autocast():
            return self.model.backbone.embed_prompt(torch.tensor([input_ids], device=self.device))[0]

    @torch.no_grad()
    def _make_schedule(self, num_inference_steps: int) -> Any:
        with self.model.autocast():
            return self.model.action_head.schedule(num_inference_steps, self.device)

    def _make_function(self, num_draws: int, num_inference_steps: int) -> TensorFunction:
        """Prepared tensors to actions: `VLAModel.act_measured`, run as `inference.compile` says."""
        steps = {"num_draws": num_draws, "num_inference_steps": num_inference_steps}
        schedule = self._schedule(num_inference_steps)
        if self.compile in ("default", "max-autotune"):
            for tensor in filter(torch.is_tensor, tree_leaves(schedule)):
                torch._dynamo.mark_static_address(tensor)  # as weights are: else inductor's graphs copy it every time
        return accelerate(
            functools.partial(self.model.act_measured, **steps, schedule=schedule), self.compile, self.device
        )


def accelerate(function: TensorFunction, mode: str, device: torch.device) -> TensorFunction:
    """The same function, run in the way that `inference.compile` names.

    Args:
        function: from named tensors of fixed shapes to tensors, without a random number or a wait for the GPU.
        mode: `none`, `default`, `max-autotune` (both torch.compile's) or `cuda_graph`.
        device: where the tensors are.

    Raises:
        ValueError: a CUDA graph on another device, or nothing to compile with.
    """
    if mode == "none":
        return function
    if mode != "cuda_graph":
        require_compiler(f"inference.compile is {mode}", "give --compile none")
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
    def __call__(self, tensors: Tensors) -> Predicted:
        """The function's value: a copy, because the next call writes to the same place."""
        with torch.cuda.device(self.device):
            graph, inputs, output = self._captured(tuple((name, x.shape, x.dtype) for name, x in tensors.items()))
            for name, value in tensors.items():
                inputs[name].copy_(value, non_blocking=True)
            graph.replay()
            return tree_map(torch.clone, output)

    @torch.no_grad()
    def _capture(
        self, signature: tuple[tuple[str, torch.Size, torch.dtype], ...]
    ) -> tuple[torch.cuda.CUDAGraph, Tensors, Predicted]:
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


def choose_weight_dtype(setting: str, compute_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What `inference.weight_dtype` means on this device.

    Raises:
        ValueError: coarser than the arithmetic.
    """
    if setting == "auto":
        return compute_dtype if device.type == "cuda" else torch.float32
    dtype = getattr(torch, setting)
    if dtype not in (torch.float32, compute_dtype):
        raise ValueError(
            f"inference.weight_dtype is {setting}, but the policy computes in {str(compute_dtype)[6:]}; give auto or "
            "float32, or compute in bfloat16 (--use_amp)"
        )
    return dtype


def store_weights(model: nn.Module, dtype: torch.dtype, whole: Iterable[nn.Module] = ()) -> None:
    """Round once, in place, the matrices that autocast would round at every call; half the memory and its traffic.

    Norms, biases of norms and statistics stay float32. Embeddings are rounded too, so the backbone's residual
    stream is in `dtype`, as in the published PaliGemma weights. For inference only: such weights can't be trained.

    Args:
        model: changed in place.
        dtype: float32 changes nothing.
        whole: parts of it that stay as they are.
    """
    if dtype == torch.float32:
        return  # as trained; frozen weights may be stored in fewer bits already
    kept = {id(module) for part in whole for module in part.modules()}
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d)) and id(module) not in kept:
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point():  # others are quantized already
                    parameter.data = parameter.data.to(dtype)


def quantize(
    parts: Sequence[nn.Module], mode: str, trained_quantization: str = "none", names: tuple[str, str, str] = BACKBONE
) -> None:
    """Store the matrices of every linear layer in fewer bits, in place; they are widened where they are used.

    `int8`: symmetric, one scale per output (torchao). `int4`: NF4, one scale per 64 weights (Dettmers et al. 2023,
    "QLoRA", sec. 3; bitsandbytes). Embeddings, convolutions, norms and biases stay as they are. So do action heads but
    for the layers of an expert: they are small, and what they round is the action itself.

    Args:
        parts: modules, their matrices in the precision that they are multiplied in.
        mode: `int8`, `int4`, or `none`: nothing is done.
        trained_quantization: how the matrices are stored already.
        names: what is quantized, the setting that asks for it, and the setting that it was trained with.

    Raises:
        ValueError: they are quantized already.
        ImportError: the library is missing.
    """
    if mode == "none":
        return
    what, setting, trained_setting = names
    if trained_quantization != "none":
        raise ValueError(
            f"{setting} is {mode}, but the policy was trained with its {what} in {trained_quantization} "
            f"({trained_setting}) and keeps it so; give none"
        )
    setting = f"{setting} {mode}"
    if mode == "int4":
        for part in parts:
            quantize_linears(part, "4bit", setting)
        return
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise ImportError(f"{setting} needs the torchao package: pip install torchao") from None
    for part in parts:
        quantize_(part, Int8WeightOnlyConfig())
