"""Pretrained parts that train in part or not at all: frozen storage, quantized storage, LoRA, and merging.

Any backbone calls `adapt` on its pretrained parts; everything else here works on modules that `adapt` has changed.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from utils.checkpoint import CheckpointError
from utils.config_model import AdapterConfig
from utils.config_utils import ConfigError, VLMConfig

ADAPTER = "default"  # peft's name of the only adapter
SAMPLES = 1024  # values of each tensor that a fingerprint reads


def adapt(towers: dict[str, nn.Module], config: VLMConfig) -> None:
    """Freeze, quantize and add LoRA in place, as `config` asks. Modules that it does not mention keep their names.

    A part with LoRA, like one frozen by `freeze_*`, is stored in `config.dtype`, or a vision tower in
    `config.vision_dtype` where that is given; quantization stores the linear layers of such parts in 8 or 4 bits.
    LoRA's own matrices are float32 and the only part of it that trains.

    Args:
        towers: the pretrained parts, `vision` and `language`, holding float32 weights.
        config: `model.vlm_config`.

    Raises:
        ConfigError: quantization with nothing frozen, or LoRA targets that are not there.
        ImportError: peft or bitsandbytes is needed and missing.
    """
    lora = config.lora
    frozen = {
        "vision": config.freeze_vision_tower or (lora is not None and lora.vision),
        "language": config.freeze_language_model or (lora is not None and lora.language),
    }
    for name, tower in towers.items():
        if frozen[name]:
            freeze(tower, getattr(torch, (config.vision_dtype if name == "vision" else None) or config.dtype))
    if config.quantization != "none":
        if not any(frozen.values()):
            raise ConfigError(
                f"model.vlm_config.quantization is {config.quantization}, but nothing is frozen, and quantized weights "
                "cannot train; add model.vlm_config.lora, or freeze a part"
            )
        for name, tower in towers.items():
            if frozen[name]:
                quantize_linears(tower, config.quantization)
    if lora is not None:
        _add_lora({name: tower for name, tower in towers.items() if getattr(lora, name)}, lora, config.quantization)


def adapt_expert(
    expert: nn.Module, matrices: Iterable[nn.Module], lora: AdapterConfig, quantization: str, dtype: torch.dtype
) -> None:
    """Freeze an action expert and add LoRA to its linear layers, in place.

    Args:
        expert: holding float32 weights.
        matrices: the parts of it that are stored in `dtype` and, unless `quantization` is none, in 8 or 4 bits; the
            rest stays float32.
        lora: what to add.
        quantization: `8bit`, `4bit` or `none`.
        dtype: of compute.

    Raises:
        ConfigError: LoRA targets that are not there.
        ImportError: peft or bitsandbytes is needed and missing.
    """
    freeze(expert, torch.float32)
    for part in matrices:
        freeze(part, dtype)
        if quantization != "none":
            quantize_linears(part, quantization, "model.action_head_config.expert.quantization")
    _add_lora({"expert": expert}, lora, quantization)


def freeze(module: nn.Module, dtype: torch.dtype) -> None:
    """Stop a pretrained module from training, and store it in `dtype`."""
    # Parameters only: rotary frequencies are buffers, and rounding them to bfloat16 would move positions.
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)


def merge_adapters(module: nn.Module, dtype: torch.dtype = torch.float32) -> int:
    """Add every adapter to its base weight and put plain linear layers in place of both, here and below.

    Args:
        module: changed in place; its other weights stay as they are.
        dtype: of the merged weights, which sum in float32 before.

    Returns:
        How many linear layers are plain now that were adapted or quantized.
    """
    replaced = 0
    for parent in [child for child in module.modules() if not is_adapted(child)]:
        for name, child in list(parent.named_children()):
            base = child.base_layer if is_adapted(child) else child
            if base is child and not _is_quantized(child):
                continue
            weight = _dequantized(base)
            if base is not child:
                weight = weight + child.get_delta_weight(ADAPTER).float()
            merged = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
            merged.weight = nn.Parameter(weight.to(dtype))
            merged.bias = None if base.bias is None else nn.Parameter(base.bias.detach().to(dtype))
            setattr(parent, name, merged)
            replaced += 1
    return replaced


def load_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """`load_state_dict`, strict, that also fills the scales of quantized layers.

    Args:
        module: quantized already, if `state` is.
        state: exactly the keys and shapes of `module.state_dict()`, which the caller has checked.

    Raises:
        CheckpointError: quantized in another way.
    """
    if not any(_is_quantized(child) for child in module.modules()):
        module.load_state_dict(state, strict=True)
        return
    # bitsandbytes writes scales beside the weights but cannot read those of 4 bits; what state_dict gives is the
    # storage itself, except for the description of the format, which is made anew each time and must be the same.
    for key, current in module.state_dict().items():
        if key.endswith("weight_format") or ".quant_state." in key:
            if not torch.equal(current.cpu(), state[key].cpu()):
                raise CheckpointError(
                    f"{key}: quantized as {bytes(state[key].flatten().tolist())!r}, wanted "
                    f"{bytes(current.flatten().tolist())!r}; give the model.vlm_config.dtype that it was trained with"
                )
        else:
            current.copy_(state[key])


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict without what is frozen (and without its scales): what differs from the pretrained weights."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    tensors = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    return {key: value for key, value in module.state_dict().items() if key in tensors and key not in frozen}


def base_fingerprint(module: nn.Module) -> str:
    """SHA-256 over name, size and evenly spaced values of every frozen tensor: tells one base from another.

    Quantized weights count by name and size alone, since processors round differently when they quantize.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        if not parameter.requires_grad:
            digest.update(f"{name} {parameter.numel()}\n".encode())
            if parameter.is_floating_point():
                values = parameter.detach().flatten()
                picked = torch.linspace(0, len(values) - 1, min(SAMPLES, len(values)), dtype=torch.float64).long()
                digest.update(values[picked.to(values.device)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a linear layer with a LoRA adapter around it."""
    return hasattr(module, "base_layer") and hasattr(module, "lora_A")


def _is_quantized(module: nn.Module) -> bool:
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt") and isinstance(module, nn.Linear)


def _dequantized(linear: nn.Linear) -> Tensor:
    if not _is_quantized(linear):
        return linear.weight.detach().float()
    from bitsandbytes import functional

    state = linear.state_dict()
    if "SCB" in state:  # absolute maximum of each row, which 127 stands for
        return state["weight"].float() * (state["SCB"].float() / 127)[:, None]
    return functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).float()


def quantize_linears(module: nn.Module, quantization: str, setting: str = "model.vlm_config.quantization") -> None:
    """Put bitsandbytes' layers in place of the linear ones (LLM.int8, Dettmers et al. 2022; NF4, Dettmers et al.
    2023, "QLoRA"). The scales of NF4 are kept in float32: quantizing them too would save 0.4 bits a weight.

    Args:
        module: changed in place.
        quantization: `8bit` or `4bit`.
        setting: what asks for it, for the error.

    Raises:
        ImportError: bitsandbytes is missing.
    """
    try:
        from bitsandbytes import nn as bnb
    except ImportError:
        raise ImportError(f"{setting} needs the bitsandbytes package: pip install bitsandbytes") from None
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Linear):
                continue
            sizes, bias, dtype = (child.in_features, child.out_features), child.bias is not None, child.weight.dtype
            device = child.weight.device
            weight = child.weight.data if device.type == "meta" else child.weight.data.cpu()  # 8 bit: only from there
            if quantization == "4bit":
                options = {"compress_statistics": False, "quant_type": "nf4"}
                new = bnb.Linear4bit(*sizes, bias=bias, compute_dtype=dtype, device="meta", **options)
                # On CPUs with AVX512-BF16 a layer repacks its weights in place when it is called in evaluation mode:
                # impossible at some widths, in bfloat16, and its product has no gradient when training goes on.
                new.support_avx512bf16_for_cpu = False
                new.weight = bnb.Params4bit(weight, requires_grad=False, module=new, **options)
            else:
                new = bnb.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False, threshold=6.0, device="meta")
                new.weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            new.bias = child.bias
            setattr(parent, name, new.to(device))  # moving is what makes bitsandbytes quantize


def _add_lora(towers: dict[str, nn.Module], lora: AdapterConfig, quantization: str) -> None:
    """Low-rank adapters (Hu et al. 2021, "LoRA") around the linear layers that `lora.targets` names."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ImportError(f"{lora.PLACE} needs the peft package: pip install peft") from None
    holder = nn.ModuleDict(towers)
    holder.is_loaded_in_8bit, holder.is_loaded_in_4bit = quantization == "8bit", quantization == "4bit"
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_targets(holder, lora),
    )
    inject_adapter_in_model(settings, holder, ADAPTER)
    for name, parameter in holder.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def _targets(holder: nn.ModuleDict, lora: AdapterConfig) -> list[str]:
    """Full names of the linear layers whose last part is among the `targets`; without any, of all of them."""
    targets = lora.targets
    linears = [name for name, module in holder.named_modules() if isinstance(module, nn.Linear)]
    kinds = sorted({name.rsplit(".")[-1] for name in linears})
    for target in targets:
        if target not in kinds:
            near = difflib.get_close_matches(target, kinds, n=1)
            raise ConfigError(
                f"{lora.PLACE}.targets: no linear layer {target!r} in the {' and '.join(holder)} part; "
                f"{f'did you mean {near[0]}? ' if near else ''}there are {', '.join(kinds)}"
            )
    return [name for name in linears if not targets or name.rsplit(".")[-1] in targets]
