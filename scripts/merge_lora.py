"""Merge LoRA adapters into their base weights: a normal checkpoint, of which peft and bitsandbytes know nothing.

    python scripts/merge_lora.py --checkpoint_path experiments/R/checkpoints/model_best.pth.tar --output merged.pth.tar

Takes whole checkpoints and those of training.save_adapters_only, whose base is read from where the run had it or from
--model_name_or_path (of a siglip_llm: --vision_model_name_or_path, --language_model_name_or_path). Quantized weights
become plain ones. The result evaluates, serves and starts other runs (--init_checkpoint); it has no optimizer state,
since what trained is no longer there. Averaged weights (training.ema_decay) are merged where the run had them, as
everything else that evaluates takes them.
"""

from __future__ import annotations

from typing import Any

import torch

if not __package__:
    import _repository  # noqa: F401

from model.adapters import merge_adapters
from model.checkpointing import is_plain
from model.vla_model import VLAModel
from utils.arguments import CommandParser, output_file, run_command
from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from utils.config_utils import config_from_dict, config_to_dict

DROPPED = ("format", "saved_at", "optimizer", "ema", "base")


BASES = ("model_name_or_path", "vision_model_name_or_path", "language_model_name_or_path")  # of model.vlm_config


def merge_checkpoint(
    checkpoint: dict[str, Any], dtype: torch.dtype, bases: dict[str, str | None] | None = None
) -> dict[str, Any]:
    """The same policy without adapters and quantized weights.

    Args:
        checkpoint: as loaded, with LoRA, quantized weights or both.
        dtype: of the merged weights. float32 predicts as before; bfloat16 takes half the space and rounds the sum.
        bases: per key of BASES where that base is; None: where the run had it. For checkpoints without their frozen
            weights.

    Raises:
        CheckpointError: nothing to merge, or another base than the adapters were trained on.
    """
    settings = config_to_dict(config_from_dict(checkpoint["config"], source="checkpoint"))
    vlm = settings["model"]["vlm_config"]
    expert = settings["model"]["action_head_config"]["expert"]
    lora, quantization = vlm["lora"], vlm["quantization"]
    if is_plain(settings):
        raise CheckpointError(
            "nothing to merge: the checkpoint has neither LoRA adapters nor quantized weights; use it as it is"
        )
    vlm |= {key: name_or_path for key, name_or_path in (bases or {}).items() if name_or_path is not None}
    policy = VLAModel.from_checkpoint(checkpoint, config_from_dict(settings))
    merge_adapters(policy, dtype)
    for part, freeze in (("vision", "freeze_vision_tower"), ("language", "freeze_language_model")):
        # Frozen parts are stored in vlm_config.dtype, which would round what float32 was asked for.
        if (lora is not None and lora[part]) or (quantization != "none" and vlm[freeze]):
            vlm[freeze] = dtype == torch.bfloat16
    merged = {"lora": lora, "quantization": quantization}
    if expert["lora"] is not None:
        merged["expert"] = {"lora": expert["lora"], "quantization": expert["quantization"]}
    for part in (vlm, expert):
        part["lora"], part["quantization"] = None, "none"
    settings["training"]["save_adapters_only"] = False
    kept = {key: value for key, value in checkpoint.items() if key not in DROPPED}
    return {**kept, "config": settings, "model": policy.state_dict(), "merged_from": merged}


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--checkpoint_path", required=True)
    parser.add_argument("--output", required=True, type=output_file, help="file to write, such as merged.pth.tar")
    for key in BASES:
        parser.add_argument(f"--{key}", help="base of a checkpoint that does not hold its frozen weights")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the merged weights")
    args = parser.parse_args(arguments)
    checkpoint = load_checkpoint(args.checkpoint_path, for_inference=True)
    if args.output.exists():
        raise CheckpointError(f"{args.output} exists; choose another --output")
    bases = {key: getattr(args, key) for key in BASES}
    save_checkpoint(merge_checkpoint(checkpoint, getattr(torch, args.dtype), bases), args.output)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:,.1f} MB")


if __name__ == "__main__":
    run_command(main)
