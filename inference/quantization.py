"""Weight-only quantization of a backbone: its matrices are stored in 8 or 4 bits and widened where they are used.

The action head stays whole: it is small, and what it rounds is the action itself.
"""

from __future__ import annotations

from torch import nn

from model.adapters import quantize_linears


def quantize(backbone: nn.Module, mode: str, trained_in: str = "none") -> None:
    """Replace the matrices of every linear layer, in place.

    `int8`: symmetric, one scale per output (torchao). `int4`: NF4, one scale per 64 weights (Dettmers et al. 2023,
    "QLoRA", sec. 3; bitsandbytes). Embeddings, convolutions, norms and biases stay as they are.

    Args:
        backbone: its matrices in the precision that they are multiplied in.
        mode: `int8`, `int4`, or `none`: nothing is done.
        trained_in: `model.vlm_config.quantization`, what the matrices are stored in already.

    Raises:
        ValueError: they are quantized already.
        ImportError: the library is missing.
    """
    if mode == "none":
        return
    if trained_in != "none":
        raise ValueError(
            f"inference.quantization is {mode}, but the policy was trained with its backbone in {trained_in} "
            "(model.vlm_config.quantization) and keeps it so; give none"
        )
    setting = f"inference.quantization {mode}"
    if mode == "int4":
        quantize_linears(backbone, "4bit", setting)
        return
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise ImportError(f"{setting} needs the torchao package: pip install torchao") from None
    quantize_(backbone, Int8WeightOnlyConfig())
