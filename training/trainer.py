"""VLATrainer: the only training loop.

`step` counts optimizer updates, and everything that can be derived from it is: the epoch, the learning rate,
which samples come next, and the noise. A checkpoint therefore resumes bitwise on a CPU.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from model.vla_model import VLAModel
from training.optimizer import build_optimizer
from training.run_log import RunLog
from training.schedule import learning_rate
from training.validation import validate
from utils.checkpoint import save_checkpoint
from utils.config_utils import Config, ConfigError, config_to_dict
from utils.misc import count_parameters, derive_seed

logger = logging.getLogger(__name__)

Batch = dict[str, Any]


class NonFiniteLossError(RuntimeError):
    """Loss or gradient became NaN or infinite; the optimizer was not stepped."""


class VLATrainer:
    """Trains a VLAModel; subclasses change how it is spread over processes, by overriding the hooks."""

    rank = 0
    world_size = 1

    def __init__(
        self,
        config: Config,
        model: VLAModel,
        train_loader: Iterable[Batch],
        val_loader: Iterable[Batch] | None,
        device: torch.device,
        processors: dict[str, Any],
    ) -> None:
        """
        Args:
            config: the whole configuration: the trainer writes it into checkpoints.
            model: the policy; `wrap` moves it to `device`.
            train_loader: endless, over a batch sampler with `num_samples` and `start_step`.
            val_loader: one pass over held-out samples, or None.
            device: where to train.
            processors: `image_processor` and `tokenizer_files`, as checkpoints carry them.
        """
        self.config, self.device, self.processors = config, device, processors
        self.policy = model
        self.model = self.wrap(model)
        self.optimizer = build_optimizer(self.policy, config.optimizer)
        self.train_loader, self.val_loader = train_loader, val_loader
        self.num_samples = train_loader.batch_sampler.num_samples
        self.step, self.best = 0, math.inf
        self.run_log = RunLog(config, is_main=self.rank == 0)
        if config.model.vlm_config.dtype == "float16":
            raise ConfigError("model.vlm_config.dtype is float16, whose gradients underflow; train in bfloat16")

    # Position: everything here follows from `step`.

    @property
    def epoch_steps(self) -> float:
        """Optimizer steps per epoch; epochs follow each other without a seam, so this need not be whole."""
        return self.num_samples / self.config.data.batch_size

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        steps = math.ceil(self.config.training.epochs * self.epoch_steps)
        return min(steps, self.config.training.max_steps or steps)

    @property
    def epoch(self) -> float:
        """Epochs completed."""
        return self.step / self.epoch_steps

    def fit(self) -> None:
        """Train from the current step to the end."""
        training = self.config.training
        all_count, train_count = count_parameters(self.policy)
        logger.info("%s parameters, %s train", f"{all_count:,}", f"{train_count:,}")
        logger.info(
            "steps %d to %d, %d samples, %.1f steps per epoch",
            self.step,
            self.total_steps,
            self.num_samples,
            self.epoch_steps,
        )
        self.train_loader.batch_sampler.start_step = self.step
        batches = iter(self.train_loader)
        progress = tqdm(
            total=self.total_steps, initial=self.step, desc="train", disable=None if self.rank == 0 else True
        )
        window = _Window()
        with logging_redirect_tqdm(), progress:
            while self.step < self.total_steps:
                micro_batches = [next(batches) for _ in range(training.gradient_accumulation_steps)]
                window.waited()
                result = self.train_step(micro_batches)
                window.add(result)
                progress.update()
                if self.step % training.log_interval == 0 or self.step == self.total_steps:
                    self.log(window.summary(self.config.data.batch_size))
                if self._epoch_due(training.val_every_n_epochs) and self.val_loader is not None:
                    self.log_validation(self.evaluate())
                if self._epoch_due(training.save_every_n_epochs):
                    self.save(f"checkpoint_epoch_{self._epoch_number()}.pth.tar")
                window.restart_clock()
        self.run_log.finish()

    def train_step(self, micro_batches: list[Batch]) -> dict[str, float]:
        """One optimizer update.

        The loss is the sum over valid action steps of all micro-batches and ranks, divided by their number.

        Raises:
            NonFiniteLossError: before the optimizer is stepped, naming the samples.
        """
        self.model.train()
        valid = sum((~batch["action_is_pad"]).sum() for batch in micro_batches).to(self.device)
        valid = self.reduce_sum(valid)
        lr = learning_rate(
            self.step, self.config.optimizer.lr, self.config.lr_scheduler, self.total_steps, self.epoch_steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        total = torch.zeros((), device=self.device)
        losses = []
        for i, batch in enumerate(micro_batches):
            batch = to_device(batch, self.device)
            torch.manual_seed(derive_seed("noise", self.config.training.seed, self.step, i, self.rank))
            with self.sync(last=i == len(micro_batches) - 1):
                loss_BT = self.model(batch)
                loss = loss_BT.sum() / valid
                (loss * self.world_size).backward()  # gradients are averaged over ranks
            total += loss.detach()
            losses.append(loss_BT.detach())
        total = self.reduce_sum(total)
        grad_norm = self.clip_gradients()
        if not (math.isfinite(total.item()) and math.isfinite(grad_norm)):
            raise NonFiniteLossError(self._describe_failure(micro_batches, losses, total.item(), grad_norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"loss": total.item(), "lr": lr, "grad_norm": grad_norm}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Validation loss and errors of sampled actions over the held-out samples, under the padding mask.

        Writes the errors per step and dimension, and pictures of the same few samples each time (see `RunLog`).

        Returns:
            `Validation.values`.
        """
        self.model.eval()
        limit = self.config.training.val_max_batches
        found = validate(
            self.policy,
            self._validation_batches(),
            min(len(self.val_loader), limit or len(self.val_loader)),
            self.config,
            self.device,
            rank=self.rank,
            reduce_sum=self.reduce_sum,
        )
        self.run_log.write_validation(self.step, found)
        return found.values

    def log(self, values: dict[str, float]) -> None:
        """One line in metrics.jsonl, and one in the log, which leaves out the many `val/` metrics."""
        values = {"step": self.step, "epoch": round(self.epoch, 4), **values}
        self.run_log.write(values)
        shown = {name: value for name, value in values.items() if not name.startswith("val/")}
        logger.info(" ".join(f"{name} {_short(value)}" for name, value in shown.items()))

    def log_validation(self, values: dict[str, float]) -> None:
        """Log a validation and keep the best model so far."""
        self.log(values)
        self.run_log.plot()
        if values["val_loss"] < self.best:
            self.best = values["val_loss"]
            self.save("model_best.pth.tar")

    def save(self, name: str) -> Path:
        """Write `checkpoints/{name}`: everything needed to resume, evaluate or serve."""
        path = self.config.experiment_dir / "checkpoints" / name
        checkpoint = {
            "step": self.step,
            "best": self.best,
            "config": config_to_dict(self.config),
            **self.gather_state(self.policy.state_to_save(self.config.training.save_adapters_only)),
            "optimizer": self.gather_state(self.optimizer.state_dict()),
            "num_samples": self.num_samples,
            **self.processors,
        }
        if self.rank == 0:
            save_checkpoint(checkpoint, path)
            logger.info("saved %s", path)
        return path

    def resume(self, checkpoint: dict[str, Any], path: str) -> None:
        """Continue from a checkpoint whose weights the model already holds.

        The same `experiment_name` continues the run where it stopped. Another one starts a new run (step 0, its
        own schedule) from the old weights and optimizer moments: the documented way to fine-tune. Values of the
        new config apply either way, and what happened is logged.
        """
        old, new = checkpoint["config"], config_to_dict(self.config)
        fresh = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]
        try:
            self.load_optimizer_state(checkpoint["optimizer"])
        except ValueError as error:
            raise ConfigError(
                f"{path}: the optimizer state does not fit ({error}): another optimizer.type or other frozen parts; "
                "start from the weights alone with --init_checkpoint"
            ) from None
        for group, values in zip(self.optimizer.param_groups, fresh, strict=True):
            group.update(values)  # the new config's rates and decay, not the checkpoint's
        changed = [
            f"{section}.{key} {old[section].get(key)!r} -> {value!r}"
            for section in ("data", "training", "optimizer", "lr_scheduler")
            for key, value in new[section].items()
            if old[section].get(key) != value
        ]
        if old["training"]["experiment_name"] == self.config.training.experiment_name:
            self.step, self.best = checkpoint["step"], checkpoint["best"]
            self.run_log.rewind(self.step)
            logger.info("resumed %s at step %d (weights, optimizer, position)", path, self.step)
            if checkpoint["num_samples"] != self.num_samples:
                logger.warning(
                    "the training set has %d samples, the checkpoint's had %d: another data order from here on",
                    self.num_samples,
                    checkpoint["num_samples"],
                )
        else:
            logger.info("new run from %s: weights and optimizer carried over, step and schedule start at 0", path)
        if changed:
            logger.info("changed since the checkpoint: %s", "; ".join(changed))

    # Hooks: what a distributed trainer overrides.

    def wrap(self, model: VLAModel) -> nn.Module:
        """Move the policy to the device; the module that training calls."""
        return model.to(self.device)

    def sync(self, *, last: bool) -> AbstractContextManager:
        """Context of one micro-batch; a distributed trainer holds back gradient exchange until the last."""
        return contextlib.nullcontext()

    def reduce_sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, a collective: every rank must call it."""
        return value

    def reduce_any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; all ranks get the same answer, so that they act at the same step."""
        return bool(self.reduce_sum(torch.tensor(float(flag), device=self.device)))

    def gather_lists(self, items: list[str]) -> list[str]:
        """The items of every rank in rank order, the same list on all of them; a collective."""
        return items

    def gather_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """A state dict (nested dicts, lists, tensors) with whole tensors where ranks hold parts; a collective.

        The first rank gets what one process would hold; what others get has no meaning.
        """
        return state

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Load an optimizer state of whole tensors, as checkpoints hold it."""
        self.optimizer.load_state_dict(state)

    def clip_gradients(self) -> float:
        """Clip to `grad_clip_norm` and return the norm before clipping."""
        limit = self.config.training.grad_clip_norm
        trained = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        return nn.utils.clip_grad_norm_(trained, math.inf if limit is None else limit).item()

    def _epoch_due(self, every: int) -> bool:
        """Whether this step finished the last of `every` epochs, or the run."""
        crossed = self._epochs_done(self.step) // every > self._epochs_done(self.step - 1) // every
        return crossed or self.step == self.total_steps

    def _epoch_number(self) -> int:
        """The epoch that this step finished, or else the one that it lies in, from 1."""
        done = self._epochs_done(self.step)
        return done if done > self._epochs_done(self.step - 1) else done + 1

    def _epochs_done(self, step: int) -> int:
        return step * self.config.data.batch_size // self.num_samples

    def _validation_batches(self) -> Iterable[Batch]:
        limit = self.config.training.val_max_batches
        for i, batch in enumerate(self.val_loader):
            if limit is not None and i >= limit:
                return
            yield batch

    def _describe_failure(self, batches: list[Batch], losses: list[Tensor], total: float, grad_norm: float) -> str:
        worst = []
        for batch, loss_BT in zip(batches, losses, strict=True):
            keys = [batch[key].tolist() for key in ("dataset_index", "episode_index", "frame_index")]
            finite = torch.isfinite(loss_BT).all(dim=-1).tolist()
            worst += [f"dataset {d} episode {e} step {f}" for d, e, f, ok in zip(*keys, finite, strict=True) if not ok]
        worst = self.gather_lists(worst[:8])
        named = "; ".join(worst[:8]) or "none alone: the gradient overflowed"
        return (
            f"step {self.step}: loss is {total}, gradient norm {grad_norm}; samples with a non-finite loss: {named}. "
            "The optimizer was not stepped and no checkpoint was written; look at those samples with "
            "inspect_parquet.py, or lower optimizer.lr"
        )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    return {
        key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value for key, value in batch.items()
    }


class _Window:
    """Averages since the last log line, and where the time went."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.last: dict[str, float] = {}
        self.busy = self.waiting = 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        self.mark = time.perf_counter()

    def waited(self) -> None:
        now = time.perf_counter()
        self.waiting += now - self.mark
        self.busy += now - self.mark
        self.mark = now

    def add(self, result: dict[str, float]) -> None:
        self.losses.append(result["loss"])
        self.last = result
        now = time.perf_counter()
        self.busy += now - self.mark
        self.mark = now

    def summary(self, batch_size: int) -> dict[str, float]:
        """Mean loss over the window, the last step's other values, samples/s, share of time spent on data."""
        values = {
            "loss": sum(self.losses) / len(self.losses),
            "lr": self.last["lr"],
            "grad_norm": self.last["grad_norm"],
            "samples_per_second": len(self.losses) * batch_size / self.busy,
            "data_wait": self.waiting / self.busy,
        }
        self.losses, self.busy, self.waiting = [], 0.0, 0.0
        return values


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"
