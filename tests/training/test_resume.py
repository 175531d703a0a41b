"""Going on after an interruption: exactly, or as a new run."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from data.sampler import StepBatchSampler
from tests.trainers import assert_same_state, make_trainer, metrics_of, resumed_trainer
from training.trainer import VLATrainer
from utils.checkpoint import load_checkpoint, newest_checkpoint
from utils.config_utils import ConfigError
from utils.misc import read_json_lines
from utils.parquet_utils import DataError

EXACT = {"ema_decay": 0.9, "log_interval": 2, "log_samples": True}


class SignalAt:
    """A training loader that signals this process when it hands out the batch of one step."""

    def __init__(self, trainer: VLATrainer, step: int, number: int = signal.SIGTERM) -> None:
        self.loader, self.step, self.number = trainer.train_loader, step, number
        self.dataset = self.loader.dataset

    @property
    def batch_sampler(self) -> StepBatchSampler:
        return self.loader.batch_sampler

    def close(self) -> None:
        self.loader.close()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for step, batch in enumerate(self.loader, start=self.batch_sampler.start_step + 1):
            if step == self.step:
                os.kill(os.getpid(), self.number)
            yield batch


@pytest.mark.parametrize(("workers", "later"), [(0, 0), (1, 2)])
def test_resume_is_bitwise(make_config, workers, later):
    """12 steps = 5 (mid-epoch) + resume + 7, in weights, optimizer, average and every logged number, whoever loads."""
    whole = make_trainer(make_config(training={"experiment_name": "whole", **EXACT}, data={"num_workers": workers}))
    whole.fit()

    first = make_trainer(make_config(training={"save_every_n_steps": 5, **EXACT}, data={"num_workers": workers}))
    first.train_loader = SignalAt(first, 7)
    first.fit()  # two more steps than the checkpoint has: a crash would lose them
    path = first.checkpoints / "checkpoint_step_5.pth.tar"
    assert first.step == 7 and load_checkpoint(path)["step"] == 5

    resumed = resumed_trainer(make_config(training=EXACT, data={"num_workers": later}), path)
    assert resumed.step == 5 and resumed.state.ema.updates == 5
    resumed.fit()
    assert_same_state(whole, resumed)
    assert metrics_of(whole) == metrics_of(resumed), "also the lines after the checkpoint are not there twice"
    taken = [read_json_lines(trainer.run_log.samples_path) for trainer in (whole, resumed)]
    assert taken[0] == taken[1] and [line["step"] for line in taken[0]] == list(range(1, 13))
    each = [tuple(sample) for line in taken[0] for sample in line["samples"]]
    assert len(set(each[:22])) == 22, "an epoch takes every sample once"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_finishes_the_step_and_saves(make_config, caplog, number):
    trainer = make_trainer(make_config(data={"num_workers": 1}))
    trainer.train_loader = SignalAt(trainer, 3, number)
    given = signal.getsignal(number)
    before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    signal.signal(number, before)  # nohup has SIGHUP ignored, and then training goes on
    try:
        with caplog.at_level("INFO"):
            trainer.fit()
        assert signal.getsignal(number) == before
    finally:
        signal.signal(number, given)
    name = signal.Signals(number).name
    assert f"stopped after step 3 by {name}; go on with --resume_checkpoint auto" in caplog.text
    assert [path.name for path in trainer.checkpoints.iterdir()] == ["checkpoint_step_3.pth.tar"]


class WorkerKilledAt(SignalAt):
    """A training loader one of whose workers is killed when it hands out the batch of one step."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        before = multiprocessing.active_children()  # of earlier tests
        for step, batch in enumerate(self.loader, start=self.batch_sampler.start_step + 1):
            if step == self.step:
                (worker,) = set(multiprocessing.active_children()) - set(before)
                os.kill(worker.pid, signal.SIGKILL)
            yield batch


def test_a_killed_loader_worker_saves_first(make_config):
    """Batches made ahead are trained on; then the run ends, and nothing of it is lost."""
    trainer = make_trainer(make_config(data={"num_workers": 1}, training={"max_steps": 50}))
    trainer.train_loader = WorkerKilledAt(trainer, 3)
    with pytest.raises(DataError, match=r"a loader worker died .* \(step \d+ is saved\)"):
        trainer.fit()
    assert 3 <= trainer.step < 50
    assert load_checkpoint(newest_checkpoint(trainer.checkpoints, "run"))["step"] == trainer.step


def test_workers_end_with_the_run(make_config):
    before = set(multiprocessing.active_children())
    trainer = make_trainer(make_config(data={"num_workers": 1}, training={"max_steps": 2}))
    trainer.fit()
    assert trainer.val_loader is not None and set(multiprocessing.active_children()) == before
    assert next(iter(trainer.train_loader)), "iterating again starts new ones"
    trainer.train_loader.close()
    assert set(multiprocessing.active_children()) == before


def test_old_checkpoints_survive_the_default_of_keep_last_k(make_config):
    """A run that kept every checkpoint goes on with a config that keeps three: the old ones are not removed."""
    trainer = make_trainer(make_config(training={"max_steps": 4, "save_every_n_steps": 1, "keep_last_k": None}))
    trainer.fit()
    before = set(trainer.checkpoints.iterdir())
    settings = {"max_steps": 9, "save_every_n_steps": 1}
    resumed = resumed_trainer(make_config(training=settings), trainer.checkpoints / "checkpoint_step_3.pth.tar")
    resumed.fit()
    kept = {path.name for path in resumed.checkpoints.iterdir() if path.name.startswith("checkpoint_step_")}
    assert before <= set(resumed.checkpoints.iterdir()) and "checkpoint_step_5.pth.tar" not in kept
    assert {"checkpoint_step_7.pth.tar", "checkpoint_step_8.pth.tar"} <= kept


def test_max_hours_stops_cleanly(make_config, caplog):
    trainer = make_trainer(make_config(training={"max_hours": 1e-6}))
    with caplog.at_level("INFO"):
        trainer.fit()
    assert trainer.step == 1 and (trainer.checkpoints / "checkpoint_step_1.pth.tar").is_file()
    assert "stopped after step 1 by training.max_hours 1e-06 reached" in caplog.text


def test_a_validation_that_was_interrupted_comes_first_after_the_resume(make_config):
    """SIGTERM while validating: the step is saved at once, and its validation and best model are not lost."""
    settings = {"val_every_n_epochs": 1, "max_steps": 9}
    whole = make_trainer(make_config(training={"experiment_name": "whole", **settings}))
    whole.fit()

    trainer = make_trainer(make_config(training=settings))
    loader = trainer.val_loader

    class SignallingLoader:
        close = loader.close

        def __len__(self):
            return len(loader)

        def __iter__(self):
            for batch in loader:
                os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    trainer.val_loader = SignallingLoader()
    trainer.fit()
    path = trainer.checkpoints / "checkpoint_epoch_1.pth.tar"
    assert trainer.step == 6 and [p.name for p in trainer.checkpoints.iterdir()] == [path.name]
    assert not any("val_loss" in line for line in metrics_of(trainer))

    resumed = resumed_trainer(make_config(training=settings), path)
    resumed.fit()
    assert metrics_of(resumed) == metrics_of(whole)
    assert_same_state(whole, resumed)
    assert (resumed.checkpoints / "model_best.pth.tar").is_file()
    again = resumed_trainer(make_config(training=settings), resumed.checkpoints / "checkpoint_epoch_2.pth.tar")
    again.fit()
    assert metrics_of(again) == metrics_of(whole), "a finished run is not validated again"


def test_a_checkpoint_that_the_crash_kept_from_being_written_is_written_after_the_resume(make_config):
    """A kill between model_best and the epoch's checkpoint."""
    trainer = make_trainer(make_config(training={"max_steps": 6}))
    trainer.fit()
    epoch, best = (trainer.checkpoints / name for name in ("checkpoint_epoch_1.pth.tar", "model_best.pth.tar"))
    assert os.path.samefile(epoch, best), "one step's checkpoints share their bytes on the disk"
    epoch.unlink()
    resumed_trainer(make_config(training={"max_steps": 6}), best).fit()
    assert load_checkpoint(epoch)["step"] == load_checkpoint(best)["step"] == 6


def test_leftovers_of_killed_saves_are_removed(make_config):
    trainer = make_trainer(make_config(training={"max_steps": 1}))
    trainer.fit()
    leftover = trainer.checkpoints / ".model_best.pth.tar.4711.tmp"
    leftover.write_bytes(b"half")
    resumed_trainer(make_config(training={"max_steps": 1}), trainer.checkpoints / "checkpoint_epoch_1.pth.tar")
    assert not leftover.exists()
    (trainer.checkpoints / "checkpoint_epoch_1.pth.tar").unlink()
    leftover.write_bytes(b"half")  # killed during the very first save: the same command starts anew
    make_trainer(make_config(training={"max_steps": 1}))
    assert not leftover.exists()


def test_fine_tuning_starts_anew_and_says_so(make_config, caplog):
    trainer = make_trainer(make_config(training={"max_steps": 4}))
    trainer.fit()
    path = trainer.checkpoints / "checkpoint_epoch_1.pth.tar"

    with caplog.at_level("INFO"):
        tuned = resumed_trainer(make_config(training={"experiment_name": "tuned"}, optimizer={"lr": 5e-4}), path)
    assert tuned.step == 0 and "weights and optimizer carried over, step and schedule start at 0" in caplog.text
    assert "optimizer.lr 0.001 -> 0.0005" in caplog.text
    for (name, x), y in zip(trainer.policy.state_dict().items(), tuned.policy.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    assert tuned.state.optimizer.state_dict()["state"][0]["step"] == 4
    batch = next(iter(tuned.train_loader))
    assert tuned.train_step([batch])["lr"] == pytest.approx(5e-4 / 3)

    caplog.clear()
    with caplog.at_level("INFO"):
        faster = resumed_trainer(make_config(optimizer={"lr": 7e-4}), path)
    assert faster.step == 4 and "resumed" in caplog.text and "optimizer.lr 0.001 -> 0.0007" in caplog.text


def test_another_training_set_is_warned_of(make_config, caplog):
    trainer = make_trainer(make_config(training={"max_steps": 1}))
    trainer.fit()
    path = trainer.checkpoints / "checkpoint_epoch_1.pth.tar"
    resumed_trainer(make_config(data={"max_episodes": 2}), path)
    assert "samples, the checkpoint's had 22: another data order from here on" in caplog.text


def test_a_rewound_log_keeps_what_came_before(make_config):
    trainer = make_trainer(make_config())
    for step in (1, 2, 3):
        trainer.run_log.write({"step": step})
    with open(trainer.run_log.metrics_path, "a") as file:
        file.write('{"step": 4, "lo')  # a crash in the middle of a line
    trainer.run_log.rewind(2)
    assert [line["step"] for line in read_json_lines(trainer.run_log.metrics_path)] == [1, 2]


def test_weights_alone_cannot_be_gone_on_with(make_config):
    trainer = make_trainer(make_config())
    checkpoint = load_checkpoint(trainer.save("merged.pth.tar"), for_inference=True)
    del checkpoint["window"]
    message = "merged.pth.tar: holds weights alone, no optimizer, window state to go on with; .*--init_checkpoint"
    with pytest.raises(ConfigError, match=message):
        make_trainer(make_config(), checkpoint).resume(checkpoint, "merged.pth.tar")
