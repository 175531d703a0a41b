"""What a loss that is not finite leaves behind: the files, episodes and frames at fault, and the batch itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Any]
NAMED = 8  # samples that a message names


class NonFiniteLossError(RuntimeError):
    """Loss or gradient became NaN or infinite; the optimizer was not stepped."""


def guilty_samples(dataset: Any, batches: list[Batch], losses: list[Tensor]) -> list[str]:
    """Where the samples whose loss is not finite come from: file, row, episode and step.

    Args:
        dataset: tells by `describe_step(dataset_index, episode_index, frame_index)`.
        batches: micro-batches.
        losses: of each, float32 (B, T).
    """
    found = []
    for batch, loss_BT in zip(batches, losses, strict=True):
        for i in (~torch.isfinite(loss_BT).all(dim=-1)).nonzero().flatten().tolist():
            keys = ("dataset_index", "episode_index", "frame_index")
            found.append(dataset.describe_step(*(int(batch[key][i]) for key in keys)))
    return found


def dump_batches(path: Path, step: int, batches: list[Batch], losses: list[Tensor]) -> str:
    """Write micro-batches and their losses, to be read with `torch.load(path, weights_only=True)`.

    Returns:
        The path; or, so that a full disk does not hide the failure itself, why nothing lies there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"step": step, "batches": batches, "losses": [loss.cpu() for loss in losses]}, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter on a full disk
        if path.is_file():
            path.unlink()
        return f"no file ({path} could not be written: {' '.join(str(error).split())[:200]})"
    return str(path)


def failure_message(step: int, total: float, grad_norm: float, guilty: list[str], dumps: list[str]) -> str:
    """What NonFiniteLossError says; `guilty` and `dumps` are those of all ranks."""
    named = "; ".join(guilty[:NAMED]) + (f"; and {len(guilty) - NAMED} more" if len(guilty) > NAMED else "")
    cause = f"samples with a non-finite loss: {named}" if guilty else "no sample's loss alone: the gradient overflowed"
    remedy = "look at those samples with inspect_parquet.py, or lower optimizer.lr" if guilty else "lower optimizer.lr"
    return (
        f"step {step}: loss is {total}, gradient norm {grad_norm}; {cause}. The optimizer was not stepped and no "
        f"checkpoint was written; the batch is in {', '.join(dumps)} (torch.load with weights_only=True); {remedy}"
    )
