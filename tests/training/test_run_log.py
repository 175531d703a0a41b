"""Weights & Biases, offline: one run across resumes, and checkpoints as artifacts."""

from __future__ import annotations

import json

import pytest

from tests.trainers import make_trainer, resumed_trainer


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Nothing leaves the machine, nor the test's folder."""
    for name, value in {"MODE": "offline", "SILENT": "true", "DATA_DIR": tmp_path, "CACHE_DIR": tmp_path}.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))


def test_a_resumed_run_is_the_same_wandb_run(make_config, offline):
    wandb = {"enabled": True, "log_checkpoints": True}
    first = make_trainer(make_config(training={"max_steps": 2}, wandb=wandb))
    run_id = first.run_log._wandb.id
    first.fit()
    path = first.checkpoints / "checkpoint_epoch_1.pth.tar"
    again = resumed_trainer(make_config(training={"max_steps": 4}, wandb=wandb), path)
    assert again.run_log._wandb.id == run_id
    again.fit()
    assert (again.config.experiment_dir / "wandb_run_id.txt").read_text() == run_id
    stored = sorted((again.config.experiment_dir / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(stored) == 2, "one part per start, of one run, which `wandb sync` puts together"
    for part, steps in zip(stored, ([1, 2], [3, 4]), strict=True):
        content = part.read_bytes()
        assert f"checkpoint-{run_id}".encode() in content and b"checkpoint_epoch_1.pth.tar" in content
        assert f"step-{steps[-1]}".encode() in content, "the artifact's alias"
    lines = [json.loads(line) for line in again.run_log.metrics_path.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]

    other = make_trainer(make_config(training={"experiment_name": "other"}, wandb={"enabled": True}))
    assert other.run_log._wandb.id != run_id
    other.run_log.finish()


def test_another_clock_than_wandbs(make_config, offline):
    """Steps that are trained again after a crash are logged again: W&B's own step must not be ours."""
    trainer = make_trainer(make_config(wandb={"enabled": True}))
    for step in (1, 2, 1):
        trainer.run_log.write({"step": step, "loss": float(step)})
    summary = dict(trainer.run_log._wandb.summary)
    assert summary["step"] == 1 and summary["loss"] == 1.0
    trainer.run_log.finish()
