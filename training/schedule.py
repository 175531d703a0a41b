"""What follows from the step alone and therefore needs no saving: epochs, the end of the run, the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from utils.config_utils import Config, LRSchedulerConfig

# An epoch's validation is skipped where training ends within this part of the validation interval: the final
# validation follows soon anyway.
NEAR_THE_END = 0.1


@dataclass(frozen=True)
class RunLength:
    """How optimizer steps and epochs of a run relate. Epochs follow each other without a seam: one may end in mid-step.

    Attributes:
        num_samples: samples of an epoch.
        batch_size: samples of an optimizer step, over all micro-batches and ranks.
        total_steps: optimizer steps of the whole run.
    """

    num_samples: int
    batch_size: int
    total_steps: int

    @classmethod
    def from_config(cls, config: Config, num_samples: int) -> RunLength:
        """Of `training.epochs` epochs or `training.max_steps` steps, whichever end first."""
        batch_size, limit = config.data.batch_size, config.training.max_steps
        steps = math.ceil(config.training.epochs * (num_samples / batch_size))
        return cls(num_samples, batch_size, steps if limit is None else min(steps, limit))

    @property
    def epoch_steps(self) -> float:
        """Optimizer steps per epoch, not necessarily whole."""
        return self.num_samples / self.batch_size

    def epoch_ends(self, step: int, every: int) -> bool:
        """Whether `step` finished an epoch whose number `every` divides, or the run."""
        crossed = self._epochs_done(step) // every > self._epochs_done(step - 1) // every
        return crossed or step == self.total_steps

    def epoch_number(self, step: int) -> int:
        """The epoch that `step` finished, or else the one that it lies in; the first is 1."""
        done = self._epochs_done(step)
        return done if done > self._epochs_done(step - 1) else done + 1

    def validation_due(self, step: int, every: int) -> bool:
        """Whether to validate after `step`: at the end, and every so many epochs unless the end is near."""
        left = self.total_steps - step
        return self.epoch_ends(step, every) and not 0 < left < NEAR_THE_END * every * self.epoch_steps

    def _epochs_done(self, step: int) -> int:
        return step * self.batch_size // self.num_samples


def unfinished_warmup(config: LRSchedulerConfig, total_steps: int, epoch_steps: float) -> str | None:
    """A warning where a run ends before its learning rate has risen to the peak; None where it rises in time."""
    warmup = config.warmup_steps * (epoch_steps if config.interval == "epoch" else 1)
    if warmup < total_steps or config.type == "lerobot_cosine":  # which shortens its warm-up with the run
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
    `StepLR` multiplies by `gamma` every `step_size`. `lerobot_cosine` is the schedule of LeRobot's pi0: see there.
    """
    unit = epoch_steps if config.interval == "epoch" else 1
    warmup = config.warmup_steps * unit
    if config.type == "lerobot_cosine":
        return _lerobot_cosine(step, base_lr, config.eta_min, int(warmup), int(config.T_max * unit), total_steps)
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


def _lerobot_cosine(step: int, peak: float, end: float, warmup: int, decay: int, total_steps: int) -> float:
    """LeRobot's `CosineDecayWithWarmupSchedulerConfig`: the first step has peak / (warmup + 1), and the cosine counts
    from step 0, so that it has fallen a little when the warm-up ends. A run shorter than `decay` shortens both."""
    if total_steps < decay:
        warmup, decay = int(warmup * (total_steps / decay)), total_steps
    if step < warmup:
        first = 1 / (warmup + 1)
        return peak * (first if step == 0 else (first - 1) * (1 - step / warmup) + 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(step, decay) / decay))
    share = end / peak
    return peak * ((1 - share) * cosine + share)
