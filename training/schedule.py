"""What follows from the step alone and therefore needs no saving: epochs, the end of the run, the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from utils.config_utils import Config, LRSchedulerConfig

# An epoch's validation is skipped where training ends within this part of the validation interval: the final
# validation follows soon anyway.
NEAR_THE_END = 0.1
NOTHING = 1e-3  # of the peak: a learning rate at which nothing is learnt
SCHEDULE_PARTS = 1000  # of a run, at which a schedule is looked at


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


def schedule_warnings(base_lr: float, config: LRSchedulerConfig, total_steps: int, epoch_steps: float) -> list[str]:
    """What is odd about a schedule over this run: it never rises to its peak, never falls, or falls far too early.

    Args:
        base_lr, config, total_steps, epoch_steps: as for `learning_rate`.
    """
    if config.type == "lerobot_cosine":  # shortens itself
        return []
    warmup = _in_steps("warmup_steps", config, epoch_steps)
    if warmup >= total_steps:
        return [
            f"lr_scheduler.warmup_steps {config.warmup_steps} take {warmup:.0f} of the run's {total_steps} steps: the "
            "learning rate never reaches its peak; lower them, or train longer"
        ]
    name = "step_size" if config.type == "StepLR" else "T_max"
    if config.type == "constant" or getattr(config, name) is None:
        return []
    length, unit = _in_steps(name, config, epoch_steps), "epochs" if config.counts_epochs(name) else "steps"
    given = f"lr_scheduler.{name} {getattr(config, name)} ({unit})"
    other = "lr_scheduler.interval: " + ("step counts steps" if unit == "epochs" else "epoch counts epochs")
    if warmup + length > total_steps:
        return [
            f"{given} is {length:.0f} steps, longer than the run of {total_steps} steps: the learning rate "
            f"{'never falls' if name == 'step_size' else 'does not fall to its end'}; {other}"
        ]
    steps = [total_steps * part // SCHEDULE_PARTS for part in range(SCHEDULE_PARTS)]
    rates = [learning_rate(step, base_lr, config, total_steps, epoch_steps) for step in steps]
    idle_from = next(step for step, rate in zip(steps[::-1], rates[::-1], strict=True) if rate >= NOTHING * base_lr)
    if idle_from >= (1 - NEAR_THE_END) * total_steps:
        return []
    last = learning_rate(total_steps - 1, base_lr, config, total_steps, epoch_steps)
    return [
        f"{given} lets the learning rate fall below {NOTHING:g} of its peak at about step {idle_from} of "
        f"{total_steps}: the rest trains at almost nothing (at last {last:.3g}); {other}"
    ]


def learning_rate(step: int, base_lr: float, config: LRSchedulerConfig, total_steps: int, epoch_steps: float) -> float:
    """The learning rate of optimizer step `step`.

    Args:
        step: 0 for the first update.
        base_lr: peak learning rate.
        config: the `lr_scheduler` section; it says which of its lengths count epochs, which steps.
        total_steps: optimizer steps of the whole run, where a cosine without `T_max` ends.
        epoch_steps: optimizer steps per epoch, not necessarily whole.

    The first `warmup_steps` rise linearly and end at the peak; the schedule's own clock starts after them.
    `CosineAnnealingLR` and `warmup_cosine` fall along half a cosine to `eta_min` at `T_max` and stay there;
    `StepLR` multiplies by `gamma` every `step_size`. `lerobot_cosine` is the schedule of LeRobot's pi0: see there.
    """
    warmup = _in_steps("warmup_steps", config, epoch_steps)
    if config.type == "lerobot_cosine":
        decay = _in_steps("T_max", config, epoch_steps)
        return _lerobot_cosine(step, base_lr, config.eta_min, int(warmup), int(decay), total_steps)
    if step < warmup:
        return base_lr * (step + 1) / math.ceil(warmup)
    elapsed = step - warmup
    if config.type == "constant":
        return base_lr
    if config.type == "StepLR":
        return base_lr * config.gamma ** (elapsed // _in_steps("step_size", config, epoch_steps))
    length = total_steps - warmup if config.T_max is None else _in_steps("T_max", config, epoch_steps)
    progress = min(1.0, elapsed / max(1, length))
    return config.eta_min + (base_lr - config.eta_min) * (1 + math.cos(math.pi * progress)) / 2


def _in_steps(name: str, config: LRSchedulerConfig, epoch_steps: float) -> float:
    """A length of the schedule in optimizer steps, not necessarily whole."""
    return getattr(config, name) * (epoch_steps if config.counts_epochs(name) else 1)


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
