"""The optimizer: which parameters train, at which learning rate, and which of them decay."""

from __future__ import annotations

import torch
from torch import nn

from model.vla_model import VLAModel
from utils.config_utils import ConfigError, OptimizerConfig

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)


def build_optimizer(model: VLAModel, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that `config` names over the parameters of `model` that require gradients.

    Parameters form groups by (learning rate, whether they decay). A group's `lr_scale` is its learning rate relative
    to `config.lr`: the trainer sets `lr` to the schedule's value times that, so the schedule keeps the proportions.

    Args:
        model: the policy, on the device where it trains.
        config: the `optimizer` section.

    Raises:
        ConfigError: nothing trains, or bitsandbytes has no 8-bit optimizer for the device.
        ImportError: AdamW8bit without bitsandbytes.
    """
    groups = parameter_groups(model, config)
    if not groups:
        raise ConfigError("nothing trains: every parameter is frozen; check the freeze_* keys of model.vlm_config")
    if config.type == "SGD":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    if config.type == "AdamW8bit":
        return _adamw_8bit(groups, config, devices)
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=devices in ({"cuda"}, {"cpu"})
    )


def what_trains(model: VLAModel) -> str:
    """For each part of a policy whether it trains whole, through adapters alone, in part, or not."""
    told = []
    for part, module in model.components().items():
        names = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
        trained = [name for name, trains in names.items() if trains]
        if not names:
            continue
        if len(trained) == len(names):
            state = "whole"
        elif not trained:
            state = "frozen"
        else:
            state = "adapters alone" if all(".lora_" in name for name in trained) else "in part"
        told.append(f"{part} {state}")
    return ", ".join(told)


def parameter_groups(model: VLAModel, config: OptimizerConfig) -> list[dict]:
    """The parameters that train, as torch's parameter groups.

    There are two groups, with and without weight decay, for each learning rate that `config` gives, or one of all
    with `decay_all`.
    """
    rates = {"vision": config.vision_lr, "language": config.language_lr, "head": config.head_lr}
    kinds = model.parameter_kinds()
    undecayed = undecayed_parameters(model)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = rates[kinds[name]]
            decays = config.decay_all or name not in undecayed
            groups.setdefault((config.lr if rate is None else rate, decays), []).append(parameter)
    # Decaying groups first, then by falling rate: the order does not depend on which module comes first.
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decays else 0.0,
            "lr": rate,
            "lr_scale": rate / config.lr,
        }
        for (rate, decays), parameters in sorted(groups.items(), key=lambda item: (not item[0][1], -item[0][0]))
    ]


def undecayed_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay spares: those of norms, biases, and other vectors and scalars."""
    names = set()
    for module_name, module in model.named_modules():
        # Hugging Face's norms derive from nn.Module directly; only the class's name tells that they are norms.
        is_norm = isinstance(module, NORMS) or type(module).__name__.endswith(("Norm", "LayerNorm"))
        for name, parameter in module.named_parameters(recurse=False):
            if is_norm or name.endswith("bias") or parameter.ndim < 2:
                names.add(f"{module_name}.{name}" if module_name else name)
    return names


def _adamw_8bit(groups: list[dict], config: OptimizerConfig, devices: set[str]) -> torch.optim.Optimizer:
    """AdamW whose moments take a byte each (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization");
    tensors below 4,096 elements keep theirs in float32."""
    try:
        import bitsandbytes
    except ImportError:
        raise ImportError("optimizer.type AdamW8bit needs the bitsandbytes package: pip install bitsandbytes") from None
    missing = sorted(devices - bitsandbytes.supported_torch_devices)
    if missing:
        raise ConfigError(
            f"optimizer.type is AdamW8bit, but bitsandbytes {bitsandbytes.__version__} has no optimizer for device "
            f"{missing[0]} (it has for {', '.join(sorted(bitsandbytes.supported_torch_devices))}); use AdamW"
        )
    return bitsandbytes.optim.AdamW8bit(groups, lr=config.lr, betas=config.betas, eps=config.eps)
