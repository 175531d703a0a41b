"""Signals, patience and the best model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.trainers import make_trainer, metrics_of
from training.stopping import BestValidation, StopRequest
from utils.checkpoint import load_checkpoint
from utils.config_utils import ConfigError


def test_lower_and_higher_are_better():
    loss, accuracy = BestValidation("val_loss", 2), BestValidation("val/threshold_accuracy", None)
    assert [loss.update({"val_loss": value}, i) for i, value in enumerate([3.0, 2.0, 2.0, 2.5])] == [1, 1, 0, 0]
    assert loss.value == 2.0 and loss.stale == 2 and loss.exhausted
    found = [accuracy.update({"val/threshold_accuracy": value}, i) for i, value in enumerate([0.1, 0.3, 0.2])]
    assert found == [True, True, False] and accuracy.value == 0.3 and not accuracy.exhausted


def test_state_of_another_metric_is_forgotten(caplog):
    old = BestValidation("val_loss", 1)
    old.update({"val_loss": 1.0}, 5)
    same, other = BestValidation("val_loss", 1), BestValidation("val_action_mse", 1)
    same.load_state_dict(old.state_dict())
    with caplog.at_level("INFO"):
        other.load_state_dict(old.state_dict())
    assert same == old and other.value is None and other.step == 5
    assert "training.best_metric val_loss -> val_action_mse: the best starts anew" in caplog.text


def test_an_unknown_metric_is_named():
    with pytest.raises(ConfigError, match="is 'val_action_mes'; did you mean val_action_mse. Choose one of"):
        BestValidation("val_action_mes", None)


def test_a_metric_that_validation_would_not_have_is_refused_before_training(make_config):
    training = {"best_metric": "val/best_of_k_mse", "val_num_samples": 2, "max_steps": 1}
    trainer = make_trainer(make_config(training=training))
    trainer.fit()
    assert load_checkpoint(trainer.checkpoints / "model_best.pth.tar")["best"]["metric"] == "val/best_of_k_mse"
    message = r"best_metric is val/best_of_k_mse, .*val_num_samples 2 or more \(now 1\).*\(now flow_matching\)"
    with pytest.raises(ConfigError, match=message):
        make_trainer(make_config(training={**training, "val_num_samples": 1}))
    with pytest.raises(ConfigError, match=r"a head that samples \(now regression\), or another metric"):
        make_trainer(make_config(training=training, model={"action_head_config": {"type": "regression"}}))


def test_early_stopping(make_config, caplog):
    """With a learning rate of nothing the first validation stays the best, up to the noise's draw of each."""
    settings = {"early_stopping_patience": 2, "val_every_n_epochs": 1, "max_steps": 60, "best_metric": "val_loss"}
    trainer = make_trainer(make_config(training=settings, optimizer={"lr": 1e-12}))
    with caplog.at_level("INFO"):
        trainer.fit()
    steps = [line["step"] for line in metrics_of(trainer) if "val_loss" in line]
    assert len(steps) < 11 and trainer.step == steps[-1] < 60, "it stopped right after a validation"
    assert "early stop: val_loss no better than" in caplog.text
    last = load_checkpoint(max(trainer.checkpoints.glob("checkpoint_*"), key=lambda path: path.stat().st_mtime))
    assert last["step"] == trainer.step and last["best"]["stale"] == 2
    with pytest.raises(ConfigError, match="early_stopping_patience needs validation data"):
        make_trainer(make_config(training=settings, data={"val_parquet_files": []}))


def test_files_that_are_kept(make_config):
    settings = {"save_every_n_steps": 2, "keep_last_k": 2, "max_steps": 9, "val_every_n_epochs": 1}
    trainer = make_trainer(make_config(training=settings))
    trainer.fit()
    names = {path.name for path in trainer.checkpoints.iterdir()}
    # Epoch 1 ends at step 6 and takes the place of checkpoint_step_6; step 9 ends training within epoch 2.
    assert names == {"model_best.pth.tar", "checkpoint_step_8.pth.tar", "checkpoint_epoch_2.pth.tar"}
    assert load_checkpoint(trainer.checkpoints / "checkpoint_epoch_2.pth.tar")["step"] == 9


def test_signals_within_two_seconds_are_one():
    with StopRequest(None) as stop:
        assert stop.reason is None
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGINT"


def test_a_second_signal_ends_the_process_at_once():
    code = "import time; from training.stopping import StopRequest\nwith StopRequest(None):\n print(flush=True)\n"
    process = subprocess.Popen([sys.executable, "-c", f"{code} time.sleep(60)"], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.terminate()
    time.sleep(StopRequest.FORWARDED_S + 0.5)
    assert process.poll() is None, "the first only asks"
    process.terminate()
    assert process.wait(5) == -signal.SIGTERM
