"""FSDP2 on a VLAModel: what is sharded as a unit, in which precision, and how parts become whole tensors again.

https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html; the units follow torchtitan's: one per
transformer block, so that a block's weights are gathered while the one before it computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from model.vla_model import VLAModel
from utils.config_utils import Config, ConfigError


def shard_model(model: VLAModel, config: Config, device: torch.device, world_size: int) -> VLAModel:
    """Shard a policy in place over all ranks and move it to the device.

    Every transformer block of the backbone is a unit. The rest (embeddings, projector, resampler, action head) is the
    last unit: a head encodes its context once and calls its blocks many times, also by other methods than forward. So
    is a block of which only a part is computed (`Backbone.unread_parameters`): FSDP gathers a unit for its forward.
    The weights of blocks are gathered in the compute precision, in which autocast would use their matrices anyway.
    Master weights, the reduction of gradients and everything outside of the blocks stay float32.

    Raises:
        ConfigError: float16 (for its loss scaling), quantized weights or 8-bit moments, none of which can be sharded.
    """
    for key, value, refused in (
        ("model.vlm_config.dtype", config.model.vlm_config.dtype, ("float16",)),
        ("model.vlm_config.quantization", config.model.vlm_config.quantization, ("4bit", "8bit")),
        (
            "model.action_head_config.expert.quantization",
            config.model.action_head_config.expert.quantization,
            ("4bit", "8bit"),
        ),
        ("optimizer.type", config.optimizer.type, ("AdamW8bit",)),
    ):
        if value in refused:
            raise ConfigError(f"training.strategy is fsdp and {key} {value}, which it cannot shard; change one of them")
    mesh = init_device_mesh(device.type, (world_size,))
    compute = model.compute_dtype if model.compute_dtype != torch.float32 else None
    blocks = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    unread = set() if model.action_head.wants_tokens else {id(p) for p in model.backbone.unread_parameters()}
    for block in transformer_blocks(model.backbone):
        if not any(id(parameter) in unread for parameter in block.parameters()):
            fully_shard(block, mesh=mesh, mp_policy=blocks)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    register_fsdp_forward_method(model, "act")  # the other way into the model, besides its forward
    return model.to(device)


def transformer_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The blocks of every stack (`layers`) of transformers inside a module, outermost stacks first."""
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and name.rpartition(".")[2] == "layers":
            yield from child


def whole(value: Any, *, keep: bool) -> Any:
    """A state dict with every sharded tensor gathered onto the CPU, one after another; a collective.

    Args:
        value: nested dicts, lists and tensors, of the same structure on all ranks.
        keep: False on ranks that only take part: each gathered tensor is dropped at once there.
    """
    if isinstance(value, DTensor):
        tensor = value.detach().full_tensor()
        return tensor.cpu() if keep else None
    if isinstance(value, dict):
        return {key: whole(item, keep=keep) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole(item, keep=keep) for item in value)
    return value


def shard_like(value: Any, parameter: Tensor) -> Any:
    """This rank's part of a whole tensor (a weight, an optimizer moment) of the same size as a sharded parameter.

    Anything else, such as an optimizer's step counter, is returned as it is.
    """
    if not (torch.is_tensor(value) and isinstance(parameter, DTensor) and value.shape == parameter.shape):
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
