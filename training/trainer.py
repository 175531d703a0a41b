"""VLATrainer: the only training loop.

`step` counts optimizer updates, and everything that can be derived from it is: the epoch, the learning rate,
which samples come next, and the noise. A checkpoint therefore resumes bitwise on a CPU.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from model.vla_model import VLAModel
from training.ema import WeightAverage
from training.failure import NonFiniteLossError, dump_batches, failure_message, guilty_samples
from training.optimizer import build_optimizer
from training.run_log import LogWindow, RunLog
from training.schedule import learning_rate, unfinished_warmup
from training.state import checkpoint_of, continue_from
from training.stopping import BestValidation, StopRequest, require_defined
from training.validation import validate
from utils.checkpoint import link_checkpoint, prune_checkpoints, save_checkpoint
from utils.config_utils import Config, ConfigError
from utils.misc import count_parameters, derive_seed, remove_leftovers

logger = logging.getLogger(__name__)

Batch = dict[str, Any]
ALMOST = 0.1  # an epoch's validation this close to the end of training, in parts of its interval, is left to the end

__all__ = ["NonFiniteLossError", "VLATrainer", "to_device"]


class _ValidationInterrupted(Exception):
    """A stop was asked for while validating."""


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
        if self.rank == 0:
            remove_leftovers(config.experiment_dir)  # of a killed run; no rank writes before `wrap`
        self.policy = model
        if config.training.compile:
            model.compile_layers(config.training.compile_mode)
        self.model = self.wrap(model)
        self.optimizer = build_optimizer(self.policy, config.optimizer)
        self.train_loader, self.val_loader = train_loader, val_loader
        self.num_samples = train_loader.batch_sampler.num_samples
        training = config.training
        if training.early_stopping_patience is not None and val_loader is None:
            raise ConfigError("training.early_stopping_patience needs validation data; give data.val_fraction, say")
        if val_loader is not None:
            require_defined(training.best_metric, config, samples=model.action_head.is_stochastic)
        self.step = 0
        self.saved_step = 0  # where the newest checkpoint of this run was written
        self.best = BestValidation(training.best_metric, training.early_stopping_patience)
        self.ema = None if training.ema_decay is None else WeightAverage(self.policy, training.ema_decay)
        # Loss scaling keeps float16 gradients from underflowing; in the other precisions it does nothing.
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.model.vlm_config.dtype == "float16")
        self.stop = StopRequest(training.max_hours)
        self.stopping = False  # whether some rank was asked to stop: the same on all of them
        self.window = LogWindow()
        self.run_log = RunLog(config, is_main=self.rank == 0, rank=self.rank)

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
        """Train from the current step to the end, or until asked to stop; then a checkpoint holds the last step."""
        self._announce()
        self.run_log.rewind(self.step)
        self.train_loader.batch_sampler.start_step = self.step
        batches = iter(self.train_loader)
        shown = None if self.rank == 0 else True  # None: only on a terminal
        progress = tqdm(total=self.total_steps, initial=self.step, desc="train", disable=shown)
        with self.stop, logging_redirect_tqdm(), progress:
            if self.step:
                self.finish_step(resumed=True)
            self.window.restart_clock()
            while self.step < self.total_steps and not self.stopping and not self.best.exhausted:
                micro_batches = [next(batches) for _ in range(self.config.training.gradient_accumulation_steps)]
                self.window.waited()
                self.window.add(self.train_step(micro_batches))
                self.run_log.samples(self.step, micro_batches)
                progress.update()
                if self.step % self.config.training.log_interval == 0 or self.step == self.total_steps:
                    self.log(self.window.summary(self.config.data.batch_size))
                self.finish_step()
                self.window.restart_clock()
            if self.saved_step < self.step:
                self.save(f"checkpoint_step_{self.step}.pth.tar")
        self._say_why_it_ended()
        self.run_log.finish()

    def train_step(self, micro_batches: list[Batch]) -> dict[str, float]:
        """One optimizer update.

        The loss is the sum over valid action steps of all micro-batches and ranks, divided by their number.

        Raises:
            NonFiniteLossError: before the optimizer is stepped, naming the samples.
        """
        self.model.train()
        valid = sum((~batch["action_is_pad"]).sum() for batch in micro_batches)
        asked = torch.tensor(self.stop.reason is not None)
        valid, asked = self.reduce_sum(torch.stack([valid, asked.to(valid)]).to(self.device))
        lr = learning_rate(
            self.step, self.config.optimizer.lr, self.config.lr_scheduler, self.total_steps, self.epoch_steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        total, grad_norm = self._backward(micro_batches, valid)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update()
        self.step += 1
        self.stopping = bool(asked)
        return {"loss": total, "lr": lr, "grad_norm": grad_norm}

    def _backward(self, micro_batches: list[Batch], valid: Tensor) -> tuple[float, float]:
        """Loss over all ranks, and the gradient's norm before clipping.

        In float16 a gradient may overflow at a loss that is finite. The scale is then halved and the same batch taken
        again: no sample is lost, and a step is always an update.
        """
        while True:
            total = torch.zeros((), device=self.device)
            losses = []
            for i, batch in enumerate(micro_batches):
                batch = to_device(batch, self.device)
                torch.manual_seed(derive_seed("noise", self.config.training.seed, self.step, i, self.rank))
                with self.sync(last=i == len(micro_batches) - 1):
                    loss_BT = self.model(batch)
                    loss = loss_BT.sum() / valid
                    self.scaler.scale(loss * self.world_size).backward()  # gradients are averaged over ranks
                total += loss.detach()
                losses.append(loss_BT.detach())
            loss = self.reduce_sum(total).item()
            self.scaler.unscale_(self.optimizer)
            grad_norm = self.clip_gradients()
            if math.isfinite(loss) and math.isfinite(grad_norm):
                return loss, grad_norm
            if not math.isfinite(loss) or not self.scaler.is_enabled() or self.scaler.get_scale() < 1:
                raise self._failure(micro_batches, losses, loss, grad_norm)
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.update()
            logger.info("step %d: float16 gradients overflowed; loss scale %g", self.step, self.scaler.get_scale())

    def finish_step(self, *, resumed: bool = False) -> None:
        """Validate and save, if due at this step; after a resume, whatever of it the interrupted run left undone."""
        training, best = self.config.training, None
        if self._validation_due() and self.best.step < self.step:
            values = self.evaluate()
            if values is not None and self.log_validation(values):
                best = self.save("model_best.pth.tar")
        if self._epoch_due(training.save_every_n_epochs):
            name = f"checkpoint_epoch_{self._epoch_number()}.pth.tar"
        elif training.save_every_n_steps is not None and self.step % training.save_every_n_steps == 0:
            name = f"checkpoint_step_{self.step}.pth.tar"
        else:
            return
        if not (resumed and self.reduce_any(self.rank == 0 and (self.checkpoints / name).is_file())):
            self.save(name, same_as=best)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float] | None:
        """Validation loss and errors of sampled actions over the held-out samples, under the padding mask.

        Writes the errors per step and dimension, and pictures of the same few samples each time (see `RunLog`).

        With `training.ema_decay` it is the averaged weights that are evaluated.

        Returns:
            `Validation.values`; None when a stop was asked for meanwhile: a resumed run validates this step first.
        """
        self.model.eval()
        limit = self.config.training.val_max_batches
        try:
            with contextlib.nullcontext() if self.ema is None else self.ema.applied():
                found = validate(
                    self.policy,
                    self._unless_stopped(self._validation_batches()),
                    min(len(self.val_loader), limit or len(self.val_loader)),
                    self.config,
                    self.device,
                    rank=self.rank,
                    reduce_sum=self.reduce_sum,
                )
        except _ValidationInterrupted:
            self.stopping = True
            return None
        self.run_log.write_validation(self.step, found)
        return found.values

    def _unless_stopped(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if self.reduce_any(self.stop.reason is not None):
                raise _ValidationInterrupted
            yield batch

    def log(self, values: dict[str, float]) -> None:
        """One line in metrics.jsonl, and one in the log, which leaves out the many `val/` metrics."""
        values = {"step": self.step, "epoch": round(self.epoch, 4), **values}
        self.run_log.write(values)
        shown = {name: value for name, value in values.items() if not name.startswith("val/")}
        logger.info(" ".join(f"{name} {_short(value)}" for name, value in shown.items()))

    def log_validation(self, values: dict[str, float]) -> bool:
        """Log a validation; whether it is the best so far."""
        self.log(values)
        self.run_log.plot()
        return self.best.update(values, self.step)

    @property
    def checkpoints(self) -> Path:
        """The folder of this run's checkpoints."""
        return self.config.experiment_dir / "checkpoints"

    def save(self, name: str, same_as: Path | None = None) -> Path:
        """Write `checkpoints/{name}`; see `training/state.py` for what is in it. A collective.

        Args:
            name: of the file.
            same_as: a checkpoint of this very step, already written: the file shares its content.
        """
        path, training = self.checkpoints / name, self.config.training
        checkpoint = self.set_aside(checkpoint_of(self), path) if same_as is None else None
        if self.rank == 0:
            if checkpoint is None:
                link_checkpoint(same_as, path)
            else:
                save_checkpoint(checkpoint, path)
            logger.info("saved %s", path)
            self.run_log.checkpoint(path, self.step)
            if training.keep_last_k is not None:
                prune_checkpoints(self.checkpoints, training.keep_last_k, training.experiment_name)
        self.saved_step = self.step
        return path

    def resume(self, checkpoint: dict[str, Any], path: str) -> None:
        """Continue from a checkpoint whose own weights (not their average) the model already holds.

        The same `experiment_name` continues the run where it stopped; another one starts a new run from the old
        weights and optimizer moments. See `training/state.py`.
        """
        continue_from(self, checkpoint, path)
        self.saved_step = self.step

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

    def set_aside(self, checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
        """What of a checkpoint goes into the file `path`; a collective. A sharded trainer writes the rest beside it."""
        return checkpoint

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Load an optimizer state of whole tensors, as checkpoints hold it."""
        self.optimizer.load_state_dict(state)

    def load_average(self, state: dict[str, Any]) -> None:
        """Load an average of weights of whole tensors, as checkpoints hold it."""
        self.ema.load_state_dict(state)

    def clip_gradients(self) -> float:
        """Clip to `grad_clip_norm` and return the norm before clipping."""
        limit = self.config.training.grad_clip_norm
        trained = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        return nn.utils.clip_grad_norm_(trained, math.inf if limit is None else limit).item()

    def _validation_due(self) -> bool:
        """Whether to validate at this step: at the end of training, and of epochs that end well before that."""
        if self.val_loader is None:
            return False
        every, left = self.config.training.val_every_n_epochs, self.total_steps - self.step
        return self._epoch_due(every) and not 0 < left < ALMOST * every * self.epoch_steps

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

    def _announce(self) -> None:
        all_count, train_count = count_parameters(self.policy)
        logger.info("%s parameters, %s train", f"{all_count:,}", f"{train_count:,}")
        logger.info(
            "steps %d to %d, %d samples, %.1f steps per epoch",
            self.step,
            self.total_steps,
            self.num_samples,
            self.epoch_steps,
        )
        if (warning := unfinished_warmup(self.config.lr_scheduler, self.total_steps, self.epoch_steps)) is not None:
            logger.warning(warning)

    def _say_why_it_ended(self) -> None:
        if self.best.exhausted:
            best = self.best
            logger.info("early stop: %s no better than %.4g for %d validations", best.metric, best.value, best.stale)
        elif self.step < self.total_steps:
            reason = self.stop.reason or "a stop of another rank"
            logger.info("stopped after step %d by %s; go on with --resume_checkpoint auto", self.step, reason)

    def _failure(self, batches: list[Batch], losses: list[Tensor], total: float, grad_norm: float) -> Exception:
        """The error to raise, the same on every rank; ranks at fault dump their batches, or all where none is."""
        own = guilty_samples(self.train_loader.dataset, batches, losses)
        guilty, dumps = self.gather_lists(own), []
        if own or not guilty:
            path = self.config.experiment_dir / "failures" / f"step_{self.step}_rank_{self.rank}.pt"
            dumps = [dump_batches(path, self.step, batches, losses)]
        return NonFiniteLossError(failure_message(self.step, total, grad_norm, guilty, self.gather_lists(dumps)))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    return {
        key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value for key, value in batch.items()
    }


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"
