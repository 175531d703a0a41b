"""Will it fit? Parameters by component, and expected memory of a training step.

Counted exactly: weights as stored, float32 gradients and moments of the weights that train, averaged weights, and what
autograd keeps of the action head, whose loss is run on tensors without storage (`_head_activation_bytes`).
Estimated: the activations of the pretrained parts, by a formula over the values that autograd keeps for the backward
pass (`_layer_bytes`), and the bfloat16 copies that autocast makes of float32 weights. Left out: the CUDA context, the
allocator's fragmentation, and temporary buffers. tests/training/test_fit_estimate.py compares with what autograd keeps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from model.action_head import build_action_head
from model.action_head.base import ActionHeadBase
from model.adapters import is_adapted
from model.backbone import backbone_class
from model.context import Context
from model.pretrained import num_image_tokens
from model.vla_model import VLAModel
from utils.config_utils import Config
from utils.text_table import text_table

GB = 1e9
MOMENTS = {"AdamW": 8, "SGD": 4}  # bytes per trained value; AdamW8bit: see `_moment_bytes`


def estimate_report(policy: VLAModel, config: Config, world_size: int = 1) -> str:
    """Tables of parameters and expected memory, and the tokens of a sample."""
    parts = {name: list(module.parameters()) for name, module in policy.components().items()}
    parts = {name: parameters for name, parameters in parts.items() if parameters}
    parts["total"] = list(policy.parameters())
    components = [[name, *_counts(parameters)] for name, parameters in parts.items()]
    memory = expected_memory(policy, config, world_size)
    memory["sum (calculated, not measured)"] = sum(memory.values())
    tokens, micro_batch = tokens_per_sample(policy, config), micro_batch_size(config, world_size)
    return "\n\n".join(
        [
            text_table(["component", "parameters", "train", "stored GB"], components),
            text_table(["expected memory per process", "GB"], [[n, f"{b / GB:.2f}"] for n, b in memory.items()]),
            f"micro-batch {micro_batch} of batch {config.data.batch_size}; tokens per sample: {tokens['vision']} in "
            f"the vision tower, {tokens['language']} in the language model, {tokens['context']} of context, "
            f"{tokens['action']} of actions",
        ]
    )


def _counts(parameters: list[nn.Parameter]) -> tuple[str, str, str]:
    """Of a component: all values, those that train, and the gigabytes in which they are stored."""
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    stored = sum(map(_stored_bytes, parameters)) / GB
    return f"{sum(map(_values, parameters)):,}", f"{trained:,}", f"{stored:.3f}"


def micro_batch_size(config: Config, world_size: int = 1) -> int:
    """Samples that a process holds at once."""
    return math.ceil(config.data.batch_size / config.training.gradient_accumulation_steps / world_size)


def tokens_per_sample(policy: VLAModel, config: Config) -> dict[str, int]:
    """Tokens that a sample costs where every camera and frame exists and the prompt has its full length.

    Returns:
        `vision` (patches), `language`, `context` (what the head reads) and `action` (over all noise draws).
    """
    head, backbone = config.model.action_head_config, policy.backbone
    images, text = config.data.max_seq_len * len(config.cameras), config.data.prompt_max_len
    context = backbone.num_context_tokens(images, text)
    return {
        "vision": images * num_image_tokens(backbone.components()["vision tower"].config),
        "language": context if backbone.language_sees_images else text,
        "context": context,
        "action": head.horizon * head.noise_draws_per_sample,
    }


def expected_memory(policy: VLAModel, config: Config, world_size: int = 1) -> dict[str, float]:
    """Bytes by component that a process needs when all of them are there at once, which bounds the peak from above.

    With `training.strategy` fsdp, weights, gradients, moments and averages are spread over the processes.
    """
    parameters = list(policy.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    share = world_size if config.training.strategy == "fsdp" else 1
    memory = {
        "weights": sum(map(_stored_bytes, parameters)) / share,
        "gradients": sum(4 * p.numel() for p in trained) / share,
        f"optimizer ({config.optimizer.type})": sum(_moment_bytes(p, config.optimizer.type) for p in trained) / share,
    }
    if config.training.ema_decay is not None:
        memory["averaged weights"] = sum(4 * p.numel() for p in trained) / share
    if config.model.vlm_config.dtype != "float32":
        memory["16-bit copies of trained matrices (autocast)"] = _copied_bytes(
            policy, [*policy.backbone.vision_parts(), *policy.action_head.exact_parts()]
        )
    return memory | activation_bytes(policy, config, micro_batch_size(config, world_size))


def checkpoint_bytes(policy: VLAModel, config: Config) -> float:
    """Bytes of a checkpoint: weights (without the frozen ones where they are left out), moments and averages."""
    parameters = list(policy.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    saved = trained if config.training.save_adapters_only and policy.base is not None else parameters
    average = 0 if config.training.ema_decay is None else sum(4 * p.numel() for p in trained)
    return sum(map(_stored_bytes, saved)) + sum(_moment_bytes(p, config.optimizer.type) for p in trained) + average


def activation_bytes(policy: VLAModel, config: Config, micro_batch: int) -> dict[str, float]:
    """Bytes that autograd keeps between forward and backward pass, per component.

    A tower through which no gradient flows keeps nothing. With gradient checkpointing a layer keeps its input
    alone, and one layer at a time is recomputed.
    """
    vlm = config.model.vlm_config
    tokens = tokens_per_sample(policy, config)
    memory = {}
    upstream = False  # whether something below asks for a gradient, so that it must flow through frozen layers too
    for name, key in (("vision tower", "vision"), ("language model", "language")):
        tower = policy.components()[name]
        upstream = upstream or any(parameter.requires_grad for parameter in tower.parameters())
        compute = 4 if vlm.dtype == "float32" or tower in policy.backbone.vision_parts() else 2
        layers, layer = tower.config.num_hidden_layers, _layer_bytes(tower, compute)
        if key == "language" and not policy.action_head.wants_tokens:
            layers -= 1  # of the last one only keys and values are computed
        if vlm.gradient_checkpointing:
            residual = 4 * tower.config.hidden_size
            kept = layers * residual + layer
        else:
            kept = layers * layer
        count = micro_batch * tokens[key]
        memory[f"activations, {name}"] = float(kept * count) if upstream else 0.0
        if policy.backbone.language_sees_images:
            upstream = True  # the projector between the two always trains
    memory["activations, action head"] = float(_head_activation_bytes(policy, config, micro_batch))
    return memory


def _head_activation_bytes(policy: VLAModel, config: Config, micro_batch: int) -> int:
    """Bytes that autograd keeps of the action head's loss, the context's tokens included, whatever the head is.

    The loss runs on fake tensors: they have shapes and types but no storage, and record what autograd saves of them.
    Kernels are the CPU's; with attention dropout those of a GPU keep less.
    """
    head, spec, data = _unquantized_head(policy, config), policy.backbone.spec, config.data
    length = policy.backbone.num_context_tokens(data.max_seq_len * len(config.cameras), data.prompt_max_len)
    half = config.model.vlm_config.dtype != "float32"
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):  # a diffusion head has a real table of noise levels
        state = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
            for name, tensor in (*head.named_parameters("head"), *head.named_buffers("head"))
        }
        cached = torch.empty(micro_batch, spec.num_kv_heads, length, spec.head_dim, requires_grad=True)
        context = Context(
            torch.empty(micro_batch, length, spec.width, requires_grad=True),
            torch.empty(micro_batch, length, dtype=torch.bool),
            torch.empty(micro_batch, data.state_dim),
            keys_values=((cached, cached),) * spec.num_layers if head.wants_keys_values else None,
        )
        action_BTA = torch.empty(micro_batch, head.horizon, head.per_action_dim)
        is_pad_BT = torch.empty(micro_batch, head.horizon, dtype=torch.bool)
        own = {tensor.untyped_storage()._cdata for tensor in (*state.values(), action_BTA, is_pad_BT, cached)}
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=half),
        ):
            torch.func.functional_call(_Loss(head), state, (context, action_BTA, is_pad_BT))
    size = sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in own)
    return size - (_copied_bytes(head, head.exact_parts()) if half else 0)


def _unquantized_head(policy: VLAModel, config: Config) -> ActionHeadBase:
    """The policy's head; where it is quantized, one that is not, without storage: autograd keeps the same."""
    settings = config.model.action_head_config
    if settings.expert.quantization == "none":
        return policy.action_head
    settings = dataclasses.replace(settings, expert=dataclasses.replace(settings.expert, quantization="none"))
    with torch.device("meta"):
        head = build_action_head(settings, policy.backbone.spec, config.data.state_dim)
        head.adapt(settings, policy.compute_dtype)
    return head.train()


class _Loss(nn.Module):
    """A head's loss as a forward, which is what `functional_call` calls."""

    def __init__(self, head: ActionHeadBase) -> None:
        super().__init__()
        self.head = head

    def forward(self, *args: Any) -> Tensor:
        return self.head.loss(*args)


def _copied_bytes(module: nn.Module, exact: Iterable[nn.Module]) -> int:
    """Bytes of the 16-bit copies that autocast makes of the matrices that train, those within `exact` apart."""
    outside = {layer for part in exact for layer in part.modules()}
    layers = [layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd))]
    return 2 * sum(layer.weight.numel() for layer in layers if layer.weight.requires_grad and layer not in outside)


def meta_policy(config: Config) -> VLAModel:
    """The policy that `config` describes, without weights and without memory for them, from config.json alone.

    Raises:
        ConfigError: no config.json, or a setting that contradicts it.
    """
    ones = {name: [value] * config.data.state_dim for name, value in _UNIT.items()}
    width = config.model.action_head_config.per_action_dim
    statistics = {"state": ones, "action": {name: [value] * width for name, value in _UNIT.items()}}
    vlm = config.model.vlm_config
    settings = config.model.vision_resampler_config, config.cameras, (0.5,) * 3, (0.5,) * 3
    values = backbone_class(vlm.type).read_config(vlm)
    with torch.device("meta"):
        backbone = backbone_class(vlm.type).from_config(values, vlm, *settings)
        return VLAModel(config, backbone, [statistics] * len(config.datasets))


_UNIT = {"min": -1.0, "max": 1.0, "mean": 0.0, "std": 1.0, "q01": -1.0, "q99": 1.0}


def _layer_bytes(tower: nn.Module, compute: int) -> int:
    """Bytes per token that one layer keeps for its backward pass; residual stream and norms are float32.

    Counted per norm, attention, MLP and adapter. Under autocast (2-byte compute) each linear layer keeps a copy of its
    input of its own; in float32 those of one norm's output share it; where weights are frozen none is kept. Scaled
    dot-product attention keeps queries, keys, values and output, no matrix of weights; keys and values are repeated to
    as many heads as the queries have.
    """
    config = tower.config
    width, inner = config.hidden_size, config.intermediate_size
    head_dim = vars(config).get("head_dim") or width // config.num_attention_heads
    queries = config.num_attention_heads * head_dim
    gated = any("gate_proj" in name for name, _ in tower.named_modules())  # Gemma, Llama; SigLIP's MLP is plain
    adapted = [module.base_layer.in_features for module in tower.modules() if is_adapted(module)]
    attention = 4 * compute * queries
    adapters = compute * sum(adapted) // config.num_hidden_layers
    if adapted or not any(parameter.requires_grad for parameter in tower.parameters()):
        norms, inputs, mlp = 2 * 4 * width, 0, (3 if gated else 1) * compute * inner
    else:
        norms = 2 * (8 if gated else 4) * width  # RMS norms keep input and output, layer norms the input
        inputs = (5 if gated else 4) * compute * width if compute == 2 else 2 * 4 * width
        mlp = (4 if gated else 2) * compute * inner
    return norms + inputs + attention + mlp + adapters


def _is_four_bit(parameter: nn.Parameter) -> bool:
    return type(parameter).__name__ == "Params4bit"


def _values(parameter: nn.Parameter) -> int:
    """Weights that a tensor stands for; two of 4 bits share a byte."""
    packed = _is_four_bit(parameter) and parameter.dtype == torch.uint8
    return parameter.numel() * (2 if packed else 1)


def _stored_bytes(parameter: nn.Parameter) -> float:
    """Bytes of a tensor and its scales, once quantized; on the meta device it is not yet."""
    if _is_four_bit(parameter):
        return _values(parameter) * (0.5 + 4 / 64)  # a float32 scale for every 64
    if type(parameter).__name__ == "Int8Params":
        return parameter.numel() + 4 * parameter.shape[0]  # a float32 scale for every row
    return parameter.numel() * parameter.element_size()


def _moment_bytes(parameter: nn.Parameter, optimizer: str) -> float:
    if optimizer == "AdamW8bit" and parameter.numel() >= 4096:
        return parameter.numel() * (2 + 2 * 4 / 256)  # a byte each, and a float32 scale for every 256
    return parameter.numel() * MOMENTS.get(optimizer, 8)
