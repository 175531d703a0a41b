"""What is reported of a loss that is not finite: the files, episodes and frames at fault, and the batch in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.batch import Batch

NAMED = 8  # at most so many samples are named in a message


class NonFiniteLossError(RuntimeError):
    """Loss or gradient became NaN or infinite; the optimizer was not stepped."""


@dataclass
class FailedStep:
    """An optimizer step that can't be taken, because its loss or gradient is not finite.

    Attributes:
        step: the optimizer updates before it.
        batches, losses: this rank's micro-batches, and the loss of each, float32 (B, T).
        loss, grad_norm: over all ranks.
    """

    step: int
    batches: list[Batch]
    losses: list[Tensor]
    loss: float
    grad_norm: float

    def error(
        self, dataset: Any, folder: Path, rank: int, gather_lists: Callable[[list[str]], list[str]]
    ) -> NonFiniteLossError:
        """The error to raise, the same on every rank; a collective.

        Ranks with samples at fault write their batches to `folder`, or all ranks where no sample is at fault.

        Args:
            dataset: of the training data; see `guilty_samples`.
            folder: for the batches.
            rank, gather_lists: of the trainer.
        """
        guilty_here = guilty_samples(dataset, self.batches, self.losses)
        guilty, dumps = gather_lists(guilty_here), []
        if guilty_here or not guilty:
            path = folder / f"step_{self.step}_rank_{rank}.pt"
            dumps = [dump_batches(path, self.step, self.batches, self.losses)]
        return NonFiniteLossError(failure_message(self.step, self.loss, self.grad_norm, guilty, gather_lists(dumps)))


def next_batches(batches: Iterator[Batch], count: int) -> list[Batch] | Exception:
    """So many batches, or the error that came instead: the other ranks must hear of it before this one ends."""
    try:
        return [next(batches) for _ in range(count)]
    except (ValueError, OSError) as error:
        return error


def guilty_samples(dataset: Any, batches: list[Batch], losses: list[Tensor]) -> list[str]:
    """For each sample whose loss is not finite the file, row, episode and step that it comes from.

    Args:
        dataset: its `describe_step(dataset_index, episode_index, frame_index)` names them.
        batches: micro-batches.
        losses: of each, float32 (B, T).
    """
    names = []
    for batch, loss_BT in zip(batches, losses, strict=True):
        for i in (~torch.isfinite(loss_BT).all(dim=-1)).nonzero().flatten().tolist():
            keys = ("dataset_index", "episode_index", "frame_index")
            names.append(dataset.describe_step(*(int(batch[key][i]) for key in keys)))
    return names


def dump_batches(path: Path, step: int, batches: list[Batch], losses: list[Tensor]) -> str:
    """Write micro-batches and their losses, to be read with `torch.load(path, weights_only=True)`.

    Returns:
        The path. If the file can't be written, why, as text: a full disk must not hide the failure itself.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"step": step, "batches": batches, "losses": [loss.cpu() for loss in losses]}, path)
    except (OSError, RuntimeError) as error:  # torch.save raises a RuntimeError on a full disk
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
