"""VLATrainer: the only training loop.

`step` counts optimizer updates. Everything that can be derived from it is: the epoch, the learning rate, which samples
come next, and the noise. A checkpoint therefore resumes bitwise on a CPU.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from model.vla_model import VLAModel
from training.ema import WeightAverage
from training.failure import FailedStep, NonFiniteLossError, next_batches
from training.optimizer import build_optimizer, what_trains
from training.run_log import LogWindow, RunLog
from training.schedule import RunLength, learning_rate, schedule_warnings
from training.state import TrainState, checkpoint_of, continue_from
from training.stopping import SUCCESS, BestValidation, StopRequest, require_defined
from training.validation import ValidationStopped, validate
from utils.batch import Batch, steps_with_loss, to_device
from utils.checkpoint import link_checkpoint, prune_checkpoints, save_checkpoint
from utils.config_utils import Config, ConfigError
from utils.misc import count_parameters, derive_seed, remove_leftovers, require_compiler, user_message
from utils.parquet_utils import DataError

logger = logging.getLogger(__name__)

__all__ = ["NonFiniteLossError", "VLATrainer"]


class Rollouts(Protocol):
    """Closed-loop episodes of a policy, as `inference.closed_loop.in_training` has them."""

    def run(
        self, policy: VLAModel, step: int, *, rank: int, world_size: int, stopped: Callable[[], bool]
    ) -> Tensor: ...

    def videos(self, step: int) -> dict[str, Path]: ...

    def values(self, counts: Tensor) -> dict[str, Any]: ...


class VLATrainer:
    """Trains a VLAModel in one process; subclasses spread it over several by overriding the hooks below."""

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
            train_loader: micro-batches without end, by a sampler with `num_samples` and `start_step`; closed by `fit`.
            val_loader: one pass over held-out samples in batches of the same size, closed too, or None.
            device: where to train.
            processors: `image_processor` and `tokenizer_files`, as checkpoints carry them.

        Raises:
            ConfigError: nothing trains, or `training` asks for validation values that there will not be.
        """
        training = config.training
        self.config, self.device, self.processors = config, device, processors
        self.train_loader, self.val_loader = train_loader, val_loader
        if self.rank == 0:
            remove_leftovers(config.experiment_dir)  # of a killed run; no rank writes before `wrap`
        self.policy = model
        if training.compile:
            require_compiler("training.compile is true", "set it to false")
            model.compile_layers(training.compile_mode)
        self.model = self.wrap(model)
        optimizer = build_optimizer(model, config.optimizer)
        by_success = training.best_metric == SUCCESS
        if training.early_stopping_patience is not None and val_loader is None and not by_success:
            raise ConfigError("training.early_stopping_patience needs validation data; give data.val_fraction, say")
        if val_loader is not None or by_success:
            require_defined(training.best_metric, config, samples=model.action_head.is_stochastic)
        self.state = TrainState(
            optimizer,
            # Loss scaling keeps float16 gradients from underflowing; in the other precisions it does nothing.
            torch.amp.GradScaler(device.type, enabled=config.model.vlm_config.dtype == "float16"),
            None if training.ema_decay is None else WeightAverage(model, training.ema_decay),
            BestValidation(training.best_metric, training.early_stopping_patience),
            LogWindow(),
        )
        self.length = RunLength.from_config(config, train_loader.batch_sampler.num_samples)
        self.saved_step = 0  # the step of the newest checkpoint of this run
        self.spared: list[Path] = []  # checkpoints that `keep_last_k` does not count
        self.stop = StopRequest(training.max_hours)
        self.rollouts: Rollouts | None = (
            None  # what `training.eval_every_n_epochs` runs; whoever builds the trainer sets it
        )
        self.stopping = False  # whether any rank was asked to stop: the same on all of them
        self.run_log = RunLog(config, is_main=self.rank == 0, rank=self.rank)

    @property
    def step(self) -> int:
        """Optimizer updates so far."""
        return self.state.step

    @property
    def num_validation_batches(self) -> int:
        """This rank's micro-batches of a validation; `val_max_batches` counts batches of `data.batch_size`."""
        limit, split = self.config.training.val_max_batches, self.config.training.gradient_accumulation_steps
        return len(self.val_loader) if limit is None else min(len(self.val_loader), limit * split)

    @property
    def checkpoints(self) -> Path:
        """The folder of this run's checkpoints."""
        return self.config.experiment_dir / "checkpoints"

    def fit(self) -> None:
        """Train from the current step to the end, or until asked to stop; then a checkpoint holds the last step."""
        training, window, total_steps = self.config.training, self.state.window, self.length.total_steps
        first_step, log_interval = self.step + 1, training.log_interval
        self._announce()
        self.run_log.rewind(self.step)
        self.train_loader.batch_sampler.start_step = self.step
        batches = iter(self.train_loader)
        hidden = None if self.rank == 0 else True  # None: tqdm hides the bar where there is no terminal
        progress = tqdm(total=total_steps, initial=self.step, desc="train", disable=hidden)
        held_out = contextlib.nullcontext() if self.val_loader is None else contextlib.closing(self.val_loader)
        with self.stop, logging_redirect_tqdm(), progress, contextlib.closing(self.train_loader), held_out:
            if self.step:
                self.finish_step(resumed=True)
            window.restart_clock()
            while self.step < total_steps and not self.stopping and not self.state.best.exhausted:
                micro_batches = next_batches(batches, training.gradient_accumulation_steps)
                window.waited()
                values = self.train_step(micro_batches)
                window.add(values)
                self.run_log.samples(self.step, micro_batches)
                due = self.step % log_interval == 0 or self.step == total_steps
                if self.step == first_step and not due:  # a sign of life
                    logger.info("step %d: loss %.4g; a line every %d steps", self.step, values["loss"], log_interval)
                progress.update()
                if due:
                    self.log(window.summary(self.config.data.batch_size))
                self.finish_step()
                window.restart_clock()
            if self.saved_step < self.step:
                self.save(f"checkpoint_step_{self.step}.pth.tar")
        self._announce_end()
        self.run_log.finish()

    def train_step(self, micro_batches: list[Batch] | Exception) -> dict[str, float]:
        """One optimizer update; on batches, or on the error that came instead of them.

        The loss is the sum over valid action steps of all micro-batches and ranks, divided by their number.

        Returns:
            `loss`, `lr`, and `grad_norm` before clipping.

        Raises:
            NonFiniteLossError: before the optimizer is stepped, naming the samples.
            DataError: some rank has an error instead of batches; every rank saves before it raises this.
        """
        state, config = self.state, self.config
        self.model.train()
        failed = isinstance(micro_batches, Exception)
        valid = 0 if failed else sum(int(steps_with_loss(batch, config).sum()) for batch in micro_batches)
        flags = torch.tensor([valid, self.stop.reason is not None, failed])
        valid, stop, failures = self.reduce_sum(flags.to(self.device))
        if failures:
            self._save_and_end([user_message(micro_batches)] if failed else [])
        lr = learning_rate(
            self.step, config.optimizer.lr, config.lr_scheduler, self.length.total_steps, self.length.epoch_steps
        )
        for group in state.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        loss, grad_norm = self._backward(micro_batches, valid)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.scaler.update()
        if state.ema is not None:
            state.ema.update()
        state.step += 1
        self.stopping = bool(stop)
        return {"loss": loss, "lr": lr, "grad_norm": grad_norm}

    def _backward(self, micro_batches: list[Batch], valid: Tensor) -> tuple[float, float]:
        """Loss over all ranks, and the gradient's norm before clipping.

        In float16 a gradient may overflow although the loss is finite. The scale is then halved and the same batch
        taken again: no sample is lost, and a step is always an update.
        """
        scaler = self.state.scaler
        while True:
            total = torch.zeros((), device=self.device)
            losses = []
            for i, batch in enumerate(micro_batches):
                batch = to_device(batch, self.device)
                torch.manual_seed(derive_seed("noise", self.config.training.seed, self.step, i, self.rank))
                with self.sync(last=i == len(micro_batches) - 1):
                    loss_BT = self.model(batch)
                    loss = loss_BT.sum() / valid
                    scaler.scale(loss * self.world_size).backward()  # gradients are averaged over ranks
                total += loss.detach()
                losses.append(loss_BT.detach())
            loss = self.reduce_sum(total).item()
            scaler.unscale_(self.state.optimizer)
            grad_norm = self.clip_gradients()
            if math.isfinite(loss) and math.isfinite(grad_norm):
                return loss, grad_norm
            if not math.isfinite(loss) or not scaler.is_enabled() or scaler.get_scale() < 1:
                failed = FailedStep(self.step, micro_batches, losses, loss, grad_norm)
                folder = self.config.experiment_dir / "failures"
                raise failed.error(self.train_loader.dataset, folder, self.rank, self.gather_lists)
            self.state.optimizer.zero_grad(set_to_none=True)
            scaler.update()
            logger.info("step %d: float16 gradients overflowed; loss scale %g", self.step, scaler.get_scale())

    def reduce_any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank, so that all ranks act at the same step; a collective."""
        return bool(self.reduce_sum(torch.tensor(float(flag), device=self.device)))

    def finish_step(self, *, resumed: bool = False) -> None:
        """Validate and save if due at this step; right after a resume, only what the interrupted run had not done."""
        training, best, best_path = self.config.training, self.state.best, None
        values = self.judge() if best.step < self.step else None
        if values is not None and best.update(values, self.step):
            best_path = self.save("model_best.pth.tar")
        if self.length.epoch_ends(self.step, training.save_every_n_epochs):
            name = f"checkpoint_epoch_{self.length.epoch_number(self.step)}.pth.tar"
        elif training.save_every_n_steps is not None and self.step % training.save_every_n_steps == 0:
            name = f"checkpoint_step_{self.step}.pth.tar"
        else:
            return
        if not (resumed and self.reduce_any(self.rank == 0 and (self.checkpoints / name).is_file())):
            self.save(name, same_as=best_path)

    def judge(self) -> dict[str, float] | None:
        """What is due at this step of validation and closed-loop episodes; None: nothing, or a stop was asked for."""
        training, due = self.config.training, []
        if self.val_loader is not None and self.length.validation_due(self.step, training.val_every_n_epochs):
            due.append(self.evaluate)
        if self.rollouts is not None and self.length.validation_due(self.step, training.eval_every_n_epochs):
            due.append(self.roll_out)
        values: dict[str, float] = {}
        for check in due:
            found = check()
            if found is None:
                return None
            values |= found
        return values or None

    @torch.no_grad()
    def roll_out(self) -> dict[str, float] | None:
        """Success of closed-loop episodes, each rank running its share; logged. None as of `evaluate`. Where a rank's
        simulator fails, all save and raise a DataError; a resumed run begins with the episodes."""
        self.model.eval()
        fault = ""
        with contextlib.nullcontext() if self.state.ema is None else self.state.ema.applied():
            share = {"rank": self.rank, "world_size": self.world_size}
            try:
                counts = self.rollouts.run(
                    self.policy, self.step, **share, stopped=lambda: self.stop.reason is not None
                )
            except (RuntimeError, ValueError) as error:
                fault = f"closed-loop episodes: {user_message(error)}"
        if self.reduce_any(bool(fault)):
            self._save_and_end([fault] if fault else [])
        if self.reduce_any(self.stop.reason is not None):
            self.stopping = True
            return None
        values = self.rollouts.values(self.reduce_sum(counts.to(self.device)).cpu())
        self.log(values)
        self.run_log.videos(self.step, self.rollouts.videos(self.step))
        return values

    @torch.no_grad()
    def evaluate(self) -> dict[str, float] | None:
        """Validation loss and errors of sampled actions over the held-out samples, under the padding mask.

        Logs them, and draws the same few samples each time (see `RunLog`). With `training.ema_decay` the averaged
        weights are evaluated.

        Returns:
            `Validation.values`; None when a stop was asked for meanwhile: a resumed run validates this step first.
        """
        self.model.eval()
        try:
            with contextlib.nullcontext() if self.state.ema is None else self.state.ema.applied():
                validation = validate(
                    self.policy,
                    self.validation_batches(),
                    self.num_validation_batches,
                    self.config,
                    self.device,
                    rank=self.rank,
                    reduce_sum=self.reduce_sum,
                )
        except ValidationStopped:
            self.stopping = True
            return None
        self.run_log.write_validation(self.step, validation, self.val_loader.dataset.action_names)
        self.log(validation.values)
        self.run_log.plot()
        return validation.values

    def log(self, values: dict[str, float]) -> None:
        """Write and show values of the current step."""
        self.run_log.write({"step": self.step, "epoch": round(self.step / self.length.epoch_steps, 4), **values})

    def save(self, name: str, same_as: Path | None = None) -> Path:
        """Write `checkpoints/{name}`, which holds everything needed to resume, evaluate or serve. A collective.

        Args:
            name: of the file.
            same_as: a checkpoint of this very step, already written: the file shares its content.
        """
        path, training = self.checkpoints / name, self.config.training
        if same_as is None:
            content = checkpoint_of(self.state, self.policy, self.config, self.length.num_samples, self.processors)
            content = self.write_shards(self.gather_state(content), path)
        if self.rank == 0:
            if same_as is None:
                save_checkpoint(content, path)
            else:
                link_checkpoint(same_as, path)
            logger.info("saved %s", path)
            self.run_log.checkpoint(path, self.step)
            if training.keep_last_k is not None:
                prune_checkpoints(self.checkpoints, training.keep_last_k, training.experiment_name, self.spared)
        self.saved_step = self.step
        return path

    def resume(self, checkpoint: dict[str, Any], path: str) -> None:
        """Continue from a checkpoint whose own weights (not their average) the model already holds.

        The same run continues where it stopped; another one starts anew from the old weights and optimizer moments.
        See `continue_from`.
        """
        continue_from(self.state, checkpoint, path, self.config, self.length, self.own_part)
        self.saved_step = self.step
        if checkpoint["config"]["training"]["keep_last_k"] is None:  # that run kept them all
            self.spared = list(self.checkpoints.glob("checkpoint_*"))

    # Hooks: what a trainer of several processes overrides. Every rank must call a collective, at the same moment.

    def wrap(self, model: VLAModel) -> nn.Module:
        """Move the policy to the device; the module that training calls."""
        return model.to(self.device)

    def sync(self, *, last: bool) -> AbstractContextManager:
        """Context of one micro-batch; a distributed trainer exchanges gradients with the last of a step only."""
        return contextlib.nullcontext()

    def reduce_sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks; a collective."""
        return value

    def gather_lists(self, items: list[str]) -> list[str]:
        """The items of every rank in rank order, the same list on all of them; a collective."""
        return items

    def gather_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """On rank 0 a state dict (nested dicts, lists, tensors) with tensors put together from all ranks' parts.

        What other ranks get has no meaning. A collective.
        """
        return state

    def own_part(self, value: Tensor, parameter: Tensor) -> Tensor:
        """What this rank keeps of a checkpoint's whole tensor that belongs to a parameter."""
        return value

    def write_shards(self, checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
        """Write what does not go into the file `path` beside it; returns the rest. A collective."""
        return checkpoint

    def clip_gradients(self) -> float:
        """Clip to `grad_clip_norm` and return the norm before clipping."""
        limit = self.config.training.grad_clip_norm
        trained = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        return nn.utils.clip_grad_norm_(trained, math.inf if limit is None else limit).item()

    def validation_batches(self) -> Iterator[Batch]:
        """This rank's batches of a validation.

        Raises:
            ValidationStopped: some rank was asked to stop.
        """
        for batch in itertools.islice(self.val_loader, self.num_validation_batches):
            if self.reduce_any(self.stop.reason is not None):
                raise ValidationStopped
            yield batch

    def _save_and_end(self, faults: list[str]) -> NoReturn:
        """Save what was trained, then raise what keeps some ranks from going on. A collective."""
        if self.saved_step < self.step:
            self.save(f"checkpoint_step_{self.step}.pth.tar")
        raise DataError(f"{'; '.join(self.gather_lists(faults))} (step {self.saved_step} is saved)")

    def _announce(self) -> None:
        length, (total, trained) = self.length, count_parameters(self.policy)
        logger.info("%s parameters, %s train: %s", f"{total:,}", f"{trained:,}", what_trains(self.policy))
        span = f"steps {self.step} to {length.total_steps}"
        logger.info("%s, %d samples, %.1f steps per epoch", span, length.num_samples, length.epoch_steps)
        if self.val_loader is None:
            nothing = "nothing is held out (data.val_parquet_files, data.val_fraction)"
            logger.info("%s: no model_best is chosen, the last checkpoint_* is the policy", nothing)
        schedule = self.config.optimizer.lr, self.config.lr_scheduler, length.total_steps, length.epoch_steps
        for warning in schedule_warnings(*schedule):
            logger.warning(warning)

    def _announce_end(self) -> None:
        best = self.state.best
        if best.exhausted:
            logger.info("early stop: %s no better than %.4g for %d validations", best.metric, best.value, best.stale)
        elif self.step < self.length.total_steps:
            reason = self.stop.reason or "a stop of another rank"
            logger.info("stopped after step %d by %s; go on with --resume_checkpoint auto", self.step, reason)
