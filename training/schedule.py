"""The learning rate as a pure function of the step, so that nothing about it needs saving."""

from __future__ import annotations

import math

from utils.config_utils import LRSchedulerConfig


def unfinished_warmup(config: LRSchedulerConfig, total_steps: int, epoch_steps: float) -> str | None:
    """What to say of a run that ends before its learning rate has risen; None of another."""
    warmup = config.warmup_steps * (epoch_steps if config.interval == "epoch" else 1)
    if warmup < total_steps:
        return None
    return (
        f"lr_scheduler.warmup_steps {config.warmup_steps} take {warmup:.0f} of the run's {total_steps} steps: the "
        "learning rate never reaches its peak; lower them, or train longer"
    )


def learning_rate(step: int, base_lr: float, config: LRSchedulerConfig, total_steps: int, epoch_steps: float) -> float:
    """The learning rate of optimizer step `step`.

    Args:
        step: 0 for the first update.
        base_lr: peak learning rate.
        config: the `lr_scheduler` section; its lengths count steps, or epochs with `interval: epoch`.
        total_steps: optimizer steps of the whole run, where a cosine without `T_max` ends.
        epoch_steps: optimizer steps per epoch, not necessarily whole.

    The first `warmup_steps` rise linearly and end at the peak; the schedule's own clock starts after them.
    `CosineAnnealingLR` and `warmup_cosine` fall along half a cosine to `eta_min` at `T_max` and stay there;
    `StepLR` multiplies by `gamma` every `step_size`.
    """
    unit = epoch_steps if config.interval == "epoch" else 1
    warmup = config.warmup_steps * unit
    if step < warmup:
        return base_lr * (step + 1) / math.ceil(warmup)
    elapsed = step - warmup
    if config.type == "constant":
        return base_lr
    if config.type == "StepLR":
        return base_lr * config.gamma ** (elapsed // (config.step_size * unit))
    length = config.T_max * unit if config.T_max is not None else total_steps - warmup
    progress = min(1.0, elapsed / max(1, length))
    return config.eta_min + (base_lr - config.eta_min) * (1 + math.cos(math.pi * progress)) / 2
