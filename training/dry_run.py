"""`--dry_run`: what `training/fit_estimate.py` expects of a run, and two real steps to compare with."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from training.fit_estimate import GB, checkpoint_bytes, estimate_report
from training.schedule import schedule_warnings
from training.trainer import VLATrainer
from utils.config_utils import Config


@contextlib.contextmanager
def without_traces(config: Config) -> Iterator[Config]:
    """The configuration of a trial run, which writes to a temporary folder and to no tracker."""
    with tempfile.TemporaryDirectory() as folder:
        training = dataclasses.replace(config.training, checkpoint_dir=folder, trackers=())
        yield dataclasses.replace(config, training=training, wandb=dataclasses.replace(config.wandb, enabled=False))


def dry_run(trainer: VLATrainer, folder: Path) -> str:
    """The report of `estimate_report` for a trainer's model, the figures of two real optimizer steps, disk and time.

    Args:
        trainer: of a trial.
        folder: where the run itself would write.
    """
    config, length = trainer.config, trainer.length
    lines = [estimate_report(trainer.policy, config, trainer.world_size)]
    lines.append(
        f"{length.num_samples:,} samples, {length.epoch_steps:,.1f} steps per epoch, {length.total_steps:,} steps"
    )
    schedule = config.optimizer.lr, config.lr_scheduler, length.total_steps, length.epoch_steps
    lines += [f"warning: {warning}" for warning in schedule_warnings(*schedule)]
    per_step = config.training.gradient_accumulation_steps
    batches = list(itertools.islice(trainer.train_loader, 2 * per_step))
    micro_batches = batches[:per_step]
    on_gpu = trainer.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(trainer.device)
    result = trainer.train_step(micro_batches)
    text_tokens = max(int(batch["prompt_mask"].sum(dim=1).max()) for batch in micro_batches)
    lines.append(
        f"one step: loss {result['loss']:.4g}, gradient norm {result['grad_norm']:.4g}, longest prompt {text_tokens} "
        f"tokens (at most {config.data.prompt_max_len})"
    )
    if on_gpu:
        peak, total = torch.cuda.max_memory_allocated(trainer.device), torch.cuda.mem_get_info(trainer.device)[1]
        lines.append(f"measured peak {peak / GB:.2f} GB, of {total / GB:.1f} GB on {torch.cuda.get_device_name()}")
    else:
        lines.append("measured peak: only on a GPU")
    began = time.perf_counter()
    trainer.train_step(batches[per_step:])  # the first one warms up
    seconds = time.perf_counter() - began
    lines.append(
        f"time: {seconds:.3g} s for the second step, so {seconds * length.total_steps / 3600:.2g} h for all of them, "
        "without loading, validation and saving"
    )
    lines.append(disk_needed(trainer, folder))
    return "\n".join(lines)


def disk_needed(trainer: VLATrainer, folder: Path) -> str:
    """A line about the disk that a run's checkpoints take, and what is free where they go."""
    training, length = trainer.config.training, trainer.length
    saves = sum(length.epoch_ends(step, training.save_every_n_epochs) for step in range(1, length.total_steps + 1))
    if training.save_every_n_steps is not None:
        saves += length.total_steps // training.save_every_n_steps
    kept = saves if training.keep_last_k is None else min(saves, training.keep_last_k)
    size = checkpoint_bytes(trainer.policy, trainer.config)
    best = int(trainer.val_loader is not None)
    needed = size * (kept + best + 1)  # one more while it is written
    there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(there).free
    return (
        f"disk: a checkpoint takes about {size / GB:.2f} GB; {kept} of {saves} are kept (training.keep_last_k "
        f"{training.keep_last_k}){', and the best' if best else ''}: {needed / GB:.2f} GB with the one being written, "
        f"{free / GB:.1f} GB are free at {there}{'' if needed < free else ': NOT ENOUGH'}"
    )
