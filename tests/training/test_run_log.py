"""Weights & Biases, offline: one run across resumes, and checkpoints as artifacts. Logs on a full disk."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.trainers import make_trainer, resumed_trainer
from training.run_log import RunLog
from training.validation import Validation
from utils.checkpoint import save_checkpoint
from utils.misc import DiskFullError


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Nothing leaves the machine, nor the test's folder."""
    for name, value in {"MODE": "offline", "SILENT": "true", "DATA_DIR": tmp_path, "CACHE_DIR": tmp_path}.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))


def holds(path: Path, text: str, within_s: float = 10.0) -> bool:
    """Whether a W&B file has a text; its process may write the last of it after `finish` has returned."""
    deadline = time.monotonic() + within_s
    while text.encode() not in path.read_bytes():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_a_resumed_run_is_the_same_wandb_run(make_config, offline):
    wandb = {"enabled": True, "log_checkpoints": True}
    first = make_trainer(make_config(training={"max_steps": 2}, wandb=wandb))
    run_id = first.run_log.trackers.running["wandb"].run.id
    first.fit()
    path = first.checkpoints / "checkpoint_epoch_1.pth.tar"
    again = resumed_trainer(make_config(training={"max_steps": 4}, wandb=wandb), path)
    assert again.run_log.trackers.running["wandb"].run.id == run_id
    again.fit()
    assert (again.config.experiment_dir / "wandb_run_id.txt").read_text() == run_id
    stored = sorted((again.config.experiment_dir / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(stored) == 2, "one part per start, of one run, which `wandb sync` puts together"
    for part, steps in zip(stored, ([1, 2], [3, 4]), strict=True):
        assert holds(part, f"checkpoint-{run_id}") and holds(part, "checkpoint_epoch_1.pth.tar")
        assert holds(part, f"step-{steps[-1]}"), "the artifact's alias"
    lines = [json.loads(line) for line in again.run_log.metrics_path.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]

    other = make_trainer(make_config(training={"experiment_name": "other"}, wandb={"enabled": True}))
    assert other.run_log.trackers.running["wandb"].run.id != run_id
    other.run_log.finish()


def test_another_clock_than_wandbs(make_config, offline):
    """Steps that are trained again after a crash are logged again: W&B's own step must not be ours."""
    trainer = make_trainer(make_config(wandb={"enabled": True}))
    for step in (1, 2, 1):
        trainer.run_log.write({"step": step, "loss": float(step)})
    summary = dict(trainer.run_log.trackers.running["wandb"].run.summary)
    assert summary["step"] == 1 and summary["loss"] == 1.0
    trainer.run_log.finish()


def test_an_artifact_holds_the_shards_of_its_checkpoint(make_config, offline):
    trainer = make_trainer(make_config(wandb={"enabled": True, "log_checkpoints": True}))
    path = trainer.checkpoints / "checkpoint_step_1.pth.tar"
    shards = path.with_name(f"{path.name}.step_1.shards")
    save_checkpoint({"step": 1, "shards": {"folder": shards.name, "places": {}, "files": {}}}, path)
    shards.mkdir()
    (shards / "shard-00001.safetensors").write_bytes(b"weights")
    run_id = trainer.run_log.trackers.running["wandb"].run.id
    trainer.run_log.checkpoint(path, 1)
    trainer.run_log.finish()
    (stored,) = (trainer.config.experiment_dir / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")
    assert holds(stored, path.name) and holds(stored, f"{shards.name}/shard-00001.safetensors")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_is_named_wherever_a_log_is_written(make_config):
    log = make_trainer(make_config()).run_log
    log.metrics_path = log.validation_path = Path("/dev/full")
    full = r"/dev/full: not written \(No space left on device\): it needs .* --resume_checkpoint auto"
    with pytest.raises(DiskFullError, match=full):
        log.write({"step": 1})
    with pytest.raises(DiskFullError, match=full):
        log.write_validation(1, Validation({}, {"overall": {}}, None), [])


@pytest.mark.parametrize("key", [None, "0" * 40])
def test_wandb_that_does_not_answer_costs_seconds_and_no_metrics(make_config, monkeypatch, caplog, tmp_path, key):
    """W&B's address is a closed port of this machine; logged in or not, the run is kept offline."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    wandb = pytest.importorskip("wandb")
    wandb.teardown()
    began = time.monotonic()
    log = RunLog(make_config(wandb={"enabled": True}), is_main=True)
    log.write({"step": 1, "loss": 0.5})
    log.finish()
    wandb.teardown()
    assert "W&B at http://127.0.0.1:9 does not answer (no connection): the run is kept in" in caplog.text
    assert list((log.directory / "wandb").glob("offline-run-*/*.wandb")) and time.monotonic() - began < 60
