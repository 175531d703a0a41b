"""What a checkpoint holds of a run, and how a run continues from one.

Only what does not follow from `step` is saved: see `VLATrainer` for what does.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from model.checkpointing import state_to_save
from utils.config_utils import ConfigError, config_to_dict

if TYPE_CHECKING:
    from training.trainer import VLATrainer

logger = logging.getLogger(__name__)


def checkpoint_of(trainer: VLATrainer) -> dict[str, Any]:
    """Everything needed to resume, evaluate or serve; a collective, only the first rank's is whole."""
    ema = {} if trainer.ema is None else {"ema": trainer.gather_state(trainer.ema.state_dict())}
    return {
        "step": trainer.step,
        "best": trainer.best.state_dict(),
        "window": trainer.window.losses,  # so that the next log line averages over the steps before a resume too
        "scaler": trainer.scaler.state_dict(),
        "config": config_to_dict(trainer.config),
        **trainer.gather_state(state_to_save(trainer.policy, trainer.config.training.save_adapters_only)),
        **ema,
        "optimizer": trainer.gather_state(trainer.optimizer.state_dict()),
        "num_samples": trainer.num_samples,
        **trainer.processors,
    }


def continue_from(trainer: VLATrainer, checkpoint: dict[str, Any], path: str) -> None:
    """Give a trainer, whose model already holds a checkpoint's weights, the rest of its state.

    The same `experiment_name` continues the run where it stopped. Another one starts a new run (step 0, its own
    schedule) from the old weights and optimizer moments: the documented way to fine-tune. Values of the new config
    apply either way, and what happened is logged.

    Raises:
        ConfigError: it holds weights alone, or an optimizer state that does not fit what trains now.
    """
    missing = [key for key in ("optimizer", "best", "window", "scaler", "num_samples") if key not in checkpoint]
    if missing:
        raise ConfigError(
            f"{path}: holds weights alone, no {', '.join(missing)} state to go on with; it was merged, or written by "
            "an earlier version: start a run from it with --init_checkpoint"
        )
    _continue_optimizer(trainer, checkpoint["optimizer"], path)
    name = trainer.config.training.experiment_name
    if checkpoint["config"]["training"]["experiment_name"] == name:
        trainer.step = checkpoint["step"]
        trainer.best.load_state_dict(checkpoint["best"])
        trainer.window.losses = list(checkpoint["window"])
        if trainer.scaler.is_enabled() and checkpoint["scaler"]:
            trainer.scaler.load_state_dict(checkpoint["scaler"])
        _continue_average(trainer, checkpoint)
        logger.info("resumed %s at step %d (weights, optimizer, position)", path, trainer.step)
        if checkpoint["num_samples"] != trainer.num_samples:
            logger.warning(
                "the training set has %d samples, the checkpoint's had %d: another data order from here on",
                trainer.num_samples,
                checkpoint["num_samples"],
            )
    else:
        logger.info("new run from %s: weights and optimizer carried over, step and schedule start at 0", path)
    changed = changes(checkpoint["config"], config_to_dict(trainer.config))
    if changed:
        logger.info("changed since the checkpoint: %s", "; ".join(changed))


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two resolved configs in the sections that a continued run may change."""
    return [
        f"{section}.{key} {old[section].get(key)!r} -> {value!r}"
        for section in ("data", "training", "optimizer", "lr_scheduler")
        for key, value in new[section].items()
        if old[section].get(key) != value
    ]


def _continue_optimizer(trainer: VLATrainer, state: dict[str, Any], path: str) -> None:
    """Moments from the checkpoint, rates and decay from the new config."""
    groups = trainer.optimizer.param_groups
    fresh = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    try:
        trainer.load_optimizer_state(state)
    except ValueError as error:
        raise ConfigError(
            f"{path}: the optimizer state does not fit ({error}): another optimizer.type or other frozen parts; "
            "start from the weights alone with --init_checkpoint"
        ) from None
    for group, values in zip(trainer.optimizer.param_groups, fresh, strict=True):
        group.update(values)
    for moments in trainer.optimizer.state.values():
        for key, value in moments.items():
            if torch.is_tensor(value) and value.device.type == "cpu":
                moments[key] = value.clone()  # of its own, not the checkpoint file's mapped memory


def _continue_average(trainer: VLATrainer, checkpoint: dict[str, Any]) -> None:
    if trainer.ema is None:
        return
    if "ema" in checkpoint:
        trainer.load_average(checkpoint["ema"])
    else:
        logger.info("the checkpoint has no average of the weights: training.ema_decay starts one here")
