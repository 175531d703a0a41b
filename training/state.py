"""What a run carries from step to step, what of it a checkpoint holds, and how a run continues from a checkpoint.

Only what does not follow from `step` is here: see `training/schedule.py` for what does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.checkpointing import state_to_save
from model.vla_model import VLAModel
from training.ema import WeightAverage
from training.origin import goes_on, position_warnings
from training.run_log import LogWindow
from training.schedule import RunLength
from training.stopping import BestValidation
from utils.config_utils import Config, ConfigError, config_to_dict

logger = logging.getLogger(__name__)

# (whole tensor of a checkpoint, the parameter that it belongs to) -> what this rank keeps of it
OwnPart = Callable[[Tensor, Tensor], Tensor]


@dataclass
class TrainState:
    """All that training changes, besides the policy's weights.

    Attributes:
        optimizer: with its moments.
        scaler: of the loss; does something in float16 alone.
        ema: the average of the weights; None without `training.ema_decay`.
        best: the best validation so far.
        window: what the next log line averages over.
        step: optimizer updates so far.
    """

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: WeightAverage | None
    best: BestValidation
    window: LogWindow
    step: int = 0

    def state_dict(self) -> dict[str, Any]:
        """The entries that a checkpoint has of this; `ema` only where there is an average."""
        return {
            "step": self.step,
            "best": self.best.state_dict(),
            "window": self.window.losses,  # so that the next log line averages over the steps before a resume too
            "scaler": self.scaler.state_dict(),
            **({} if self.ema is None else {"ema": self.ema.state_dict()}),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_position(self, checkpoint: dict[str, Any], own_part: OwnPart) -> None:
        """Take everything but the optimizer from a checkpoint of the same run."""
        self.step = checkpoint["step"]
        self.best.load_state_dict(checkpoint["best"])
        self.window.losses = list(checkpoint["window"])
        if self.scaler.is_enabled() and checkpoint["scaler"]:
            self.scaler.load_state_dict(checkpoint["scaler"])
        if self.ema is None:
            return
        if "ema" not in checkpoint:
            logger.info("the checkpoint has no average of the weights: training.ema_decay starts one here")
            return
        trained, average = self.ema.weights, checkpoint["ema"]
        parts = {name: own_part(value, trained[name]) for name, value in average["weights"].items() if name in trained}
        self.ema.load_state_dict({**average, "weights": parts})

    def load_moments(self, saved: dict[str, Any], own_part: OwnPart) -> None:
        """Take an optimizer's moments from a checkpoint; learning rates and weight decay stay those of the config.

        Raises:
            ValueError: the saved state is of another optimizer or of other parameters.
        """
        groups = self.optimizer.param_groups
        configured = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        parameters = [parameter for group in groups for parameter in group["params"]]
        parts = {
            index: {key: own_part(value, parameters[index]) for key, value in moments.items()}
            for index, moments in saved["state"].items()
            if index < len(parameters)
        }
        self.optimizer.load_state_dict({**saved, "state": parts})
        for group, values in zip(self.optimizer.param_groups, configured, strict=True):
            group.update(values)
        for moments in self.optimizer.state.values():
            for key, value in moments.items():
                if torch.is_tensor(value) and value.device.type == "cpu":
                    moments[key] = value.clone()  # a checkpoint's tensors are mapped from its file


def checkpoint_of(
    state: TrainState, policy: VLAModel, config: Config, num_samples: int, processors: dict[str, Any]
) -> dict[str, Any]:
    """Everything needed to resume, evaluate or serve.

    Args:
        state, policy, config: of the trainer.
        num_samples: of its training data.
        processors: `image_processor` and `tokenizer_files`.
    """
    return {
        **state.state_dict(),
        "config": config_to_dict(config),
        **state_to_save(policy, config.training.save_adapters_only),
        "num_samples": num_samples,
        **processors,
    }


def continue_from(
    state: TrainState, checkpoint: dict[str, Any], path: str, config: Config, length: RunLength, own_part: OwnPart
) -> None:
    """Fill a new state from a checkpoint whose weights the policy already holds, and log what happened.

    The same run (`training.origin.goes_on`) continues where it stopped. Any other starts anew (step 0, its own
    schedule) from the old weights and optimizer moments: the documented way to fine-tune. Values of the new config
    apply either way.

    Args:
        state: of the trainer that continues, as built from its config.
        checkpoint, path: as loaded, and from where.
        config, length: of the trainer.
        own_part: what this rank keeps of a whole tensor.

    Raises:
        ConfigError: the checkpoint holds weights alone, an optimizer state that does not fit what trains now, or a
            position past the end of this run.
    """
    require_train_state(checkpoint, path)
    try:
        state.load_moments(checkpoint["optimizer"], own_part)
    except ValueError as error:
        raise ConfigError(
            f"{path}: the optimizer state does not fit ({error}): another optimizer.type or other frozen parts; "
            "start from the weights alone with --init_checkpoint"
        ) from None
    if goes_on(checkpoint, path, config):
        warnings = position_warnings(checkpoint, path, config, length)
        state.load_position(checkpoint, own_part)
        logger.info("resumed %s at step %d (weights, optimizer, position)", path, state.step)
        for warning in warnings:
            logger.warning(warning)
    else:
        logger.info("new run from %s: weights and optimizer carried over, step and schedule start at 0", path)


def require_train_state(checkpoint: dict[str, Any], path: str) -> None:
    """Raise a ConfigError where a checkpoint holds weights alone."""
    missing = [key for key in ("optimizer", "best", "window", "scaler", "num_samples") if key not in checkpoint]
    if missing:
        raise ConfigError(
            f"{path}: holds weights alone, no {', '.join(missing)} state to go on with; it was merged, or written by "
            "an earlier version: start a run from it with --init_checkpoint"
        )
