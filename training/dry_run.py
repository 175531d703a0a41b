"""`--dry_run`: what `training/fit_estimate.py` expects of a run, and one real step to compare with."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import tempfile
from collections.abc import Iterator

import torch

from training.fit_estimate import GB, estimate_report
from training.schedule import schedule_warnings
from training.trainer import VLATrainer
from utils.config_utils import Config


@contextlib.contextmanager
def without_traces(config: Config) -> Iterator[Config]:
    """The configuration of a trial run, which writes to a temporary folder and not to W&B."""
    with tempfile.TemporaryDirectory() as folder:
        training = dataclasses.replace(config.training, checkpoint_dir=folder)
        yield dataclasses.replace(config, training=training, wandb=dataclasses.replace(config.wandb, enabled=False))


def dry_run(trainer: VLATrainer) -> str:
    """The report of `estimate_report` for a trainer's model, and the figures of one real optimizer step."""
    config, length = trainer.config, trainer.length
    lines = [estimate_report(trainer.policy, config, trainer.world_size)]
    lines.append(
        f"{length.num_samples:,} samples, {length.epoch_steps:,.1f} steps per epoch, {length.total_steps:,} steps"
    )
    schedule = config.optimizer.lr, config.lr_scheduler, length.total_steps, length.epoch_steps
    lines += [f"warning: {warning}" for warning in schedule_warnings(*schedule)]
    micro_batches = list(itertools.islice(trainer.train_loader, config.training.gradient_accumulation_steps))
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
    return "\n".join(lines)
