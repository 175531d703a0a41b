"""main_train.py as its users run it: from a config to a checkpoint, resume, fine-tune, and every refusal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.helpers import episode_rows, write_episodes, write_rows
from tests.policies import model_section
from utils.checkpoint import load_checkpoint


@pytest.fixture
def project(tmp_path, tiny_paligemma_dir):
    write_episodes(tmp_path / "train.parquet", [8, 8], image_size=32)
    write_episodes(tmp_path / "val.parquet", [4], seed=9, image_size=32)
    config = {
        "data": {
            "train_parquet_files": str(tmp_path / "train.parquet"),
            "val_parquet_files": str(tmp_path / "val.parquet"),
            "normalization_stats_path": str(tmp_path / "stats.json"),
            "state_dim": 4,
            "batch_size": 4,
            "num_workers": 1,
            "cache_dir": str(tmp_path / "cache"),
        },
        "model": model_section(tiny_paligemma_dir),
        "training": {"epochs": 2, "checkpoint_dir": str(tmp_path / "experiments"), "experiment_name": "a"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def run(project: Path, *arguments: str, script: str = "main_train.py") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, script, "--config_path", str(project / "config.yaml"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def start(project: Path, *arguments: str) -> subprocess.Popen[str]:
    """The same, in a process group of its own, without waiting."""
    command = [sys.executable, "main_train.py", "--config_path", str(project / "config.yaml"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def statistics(project: Path) -> None:
    result = run(project, script="utils/calculate_normalization_stats.py")
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_train_resume_and_fine_tune(project):
    statistics(project)
    result = run(project)
    assert result.returncode == 0, result.stderr
    folder = project / "experiments/a"
    assert "loss" in (folder / "logs/train.log").read_text()
    last = folder / "checkpoints/checkpoint_epoch_2.pth.tar"
    assert load_checkpoint(last)["step"] == 8 and (folder / "checkpoints/model_best.pth.tar").is_file()

    again = run(project)
    assert again.returncode == 1 and "already holds a run; continue it with --resume_checkpoint auto" in again.stderr

    result = run(project, "--resume_checkpoint", str(last), "--epochs", "3")
    assert result.returncode == 0, result.stderr
    assert "resumed" in result.stderr and "training.epochs 2 -> 3" in result.stderr
    third = folder / "checkpoints/checkpoint_epoch_3.pth.tar"
    assert load_checkpoint(third)["step"] == 12

    result = run(project, "--resume_checkpoint", str(third), "--experiment_name", "tuned", "--lr", "1e-4")
    assert result.returncode == 0, result.stderr
    assert "weights and optimizer carried over, step and schedule start at 0" in result.stderr
    tuned = load_checkpoint(project / "experiments/tuned/checkpoints/checkpoint_epoch_2.pth.tar")
    assert tuned["step"] == 8 and tuned["config"]["optimizer"]["lr"] == 1e-4

    (project / "stats.json").write_text((project / "stats.json").read_text().replace('"count"', '"count_"'))
    result = run(project, "--init_checkpoint", str(third), "--experiment_name", "init", "--set", "training.max_steps=1")
    assert result.returncode == 0, result.stderr
    fresh = load_checkpoint(project / "experiments/init/checkpoints/checkpoint_epoch_1.pth.tar")
    assert fresh["step"] == 1 and next(iter(fresh["optimizer"]["state"].values()))["step"] == 1
    assert "count_" in fresh["statistics"][0]["action"], "weights alone: the statistics are this run's"


@pytest.mark.slow
def test_a_requeued_job(project):
    """The same command each time: a new run, SIGTERM to every process of it, the rest, and then nothing to do."""
    statistics(project)

    def command(steps: int) -> tuple[str, ...]:
        settings = (f"training.max_steps={steps}", "training.epochs=2000", "training.save_every_n_epochs=2000")
        return "--resume_checkpoint", "auto", "--set", *settings, "data.val_parquet_files=[]"

    first = start(project, *command(4000))
    metrics = project / "experiments/a/logs/metrics.jsonl"
    wait_for(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 2, first)
    os.killpg(first.pid, signal.SIGTERM)  # loader workers too, as schedulers do
    log = first.communicate(timeout=60)[1]
    assert first.returncode == 0 and "Traceback" not in log, log
    assert "a new run" in log and "by SIGTERM; go on with --resume_checkpoint auto" in log
    (stopped,) = (project / "experiments/a/checkpoints").iterdir()
    steps = load_checkpoint(stopped)["step"]
    assert stopped.name == f"checkpoint_step_{steps}.pth.tar"

    again = run(project, *command(steps + 10))
    assert again.returncode == 0 and f"resumed {stopped} at step {steps}" in again.stderr, again.stderr
    done = run(project, *command(steps + 10))
    assert done.returncode == 0 and f"at step {steps + 10}" in done.stderr, done.stderr
    logged = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert logged == sorted(set(logged)), "every step once"


@pytest.mark.slow
def test_ctrl_c(project):
    """A terminal sends SIGINT to loader workers as well."""
    statistics(project)
    process = start(project, "--epochs", "5000")
    wait_for(lambda: list((project / "experiments/a/checkpoints").glob("checkpoint_*")), process)
    os.killpg(process.pid, signal.SIGINT)
    log = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and "by SIGINT" in log and "Traceback" not in log, log


@pytest.mark.slow
def test_wandb_offline(project):
    statistics(project)
    result = run(project, "--use_wandb", "--set", "training.max_steps=1")
    assert result.returncode == 0, result.stderr
    assert list((project / "experiments/a/wandb").glob("offline-run-*/*.wandb"))
    pictures = list((project / "experiments/a/wandb").glob("offline-run-*/files/media/images/val/trajectories_*.png"))
    assert len(pictures) == 1


@pytest.mark.slow
def test_one_process_trains_the_same_twice(project):
    statistics(project)
    for name in ("a", "b"):
        assert run(project, "--experiment_name", name, "--set", "training.max_steps=3").returncode == 0
    a, b = (load_checkpoint(project / f"experiments/{n}/checkpoints/checkpoint_epoch_1.pth.tar") for n in "ab")
    assert all(torch.equal(value, b["model"][key]) for key, value in a["model"].items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "stats.json does not exist; make it with: python utils/calculate_normalization_stats.py --config_path"),
        (("--set", "data.state_dims=4"), "unknown key data.state_dims; did you mean data.state_dim?"),
        (("--train_data_override", "/nothing"), "data.train_parquet_files: '/nothing' matches no Parquet file"),
        (("--model_name_or_path", "/nothing"), "/nothing"),
        (("--resume_checkpoint", "/nothing"), "no such checkpoint"),
        (("--batch_size", "5", "--set", "training.gradient_accumulation_steps=2"), "choose a multiple of 2"),
        (("--set", "model.action_head_config.action_dim=17"), "action_dim is 17 but horizon 4 x per_action_dim 4 = 16"),
    ],
)
def test_refusals_are_one_clear_line(project, arguments, message):
    result = run(project, *arguments)
    assert result.returncode == 1 and message in result.stderr
    assert "Traceback" not in result.stderr and result.stderr.strip().splitlines()[-1].startswith("error: ")


def test_an_unreadable_image_met_by_a_worker(project):
    rows = episode_rows(8, image_size=32)
    rows[5]["image_1"] = b"\xff\xd8 torn"
    write_rows(project / "train.parquet", rows)
    statistics(project)
    result = run(project)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert last.startswith("error: ") and "train.parquet row 5 (episode 0, step 5): image_1: " in last


@pytest.mark.slow
def test_a_statistics_file_of_another_size(project):
    statistics(project)
    content = json.loads((project / "stats.json").read_text())
    content["datasets"]["default"]["state"]["mean"].append(0.0)
    (project / "stats.json").write_text(json.dumps(content))
    result = run(project)
    assert result.returncode == 1 and "state.mean has 5 values, config wants data.state_dim 4" in result.stderr
