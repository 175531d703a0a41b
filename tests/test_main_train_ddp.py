"""main_train_ddp.py as its users start it: alone, under torchrun, and when a rank dies or hangs in mid-run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.ranks import DETERMINISTIC, losses, run_training, write_project
from utils.checkpoint import load_checkpoint

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ENDLESS = ("--set", "training.max_steps=100000", "training.epochs=100000")


@pytest.fixture
def config_path(tmp_path, tiny_paligemma_dir):
    return write_project(tmp_path, tiny_paligemma_dir)


def command(config_path: Path, *arguments: str, nproc: int = 2) -> list[str]:
    flags = ["--config_path", str(config_path), "--nproc", str(nproc), *arguments]
    return [sys.executable, "main_train_ddp.py", *flags]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=300)


def start(config_path: Path, *arguments: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A run of two ranks that has trained for some steps, and the ranks' process ids."""
    process = subprocess.Popen(
        command(config_path, *arguments), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
    )
    metrics = config_path.parent / "experiments/run/logs/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 3):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return process, [int(child) for child in children]


def finish(process: subprocess.Popen[str], within_s: float) -> tuple[int, str]:
    """Exit status and error lines."""
    began = time.monotonic()
    _, text = process.communicate(timeout=120)
    assert time.monotonic() - began < within_s
    return process.returncode, text


@pytest.mark.slow
def test_alone_and_under_torchrun_it_trains_as_one_process_does(config_path):
    settings = ("--set", "training.max_steps=3", *DETERMINISTIC)
    one = run_training(config_path, "one", 3, *DETERMINISTIC)
    result = run(command(config_path, "--experiment_name", "alone", *settings))
    assert result.returncode == 0, result.stderr
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = ["--config_path", str(config_path), "--experiment_name", "torchrun", *settings]
    result = run([*torchrun, "main_train_ddp.py", *flags])
    assert result.returncode == 0, result.stderr
    flags = ["--config_path", str(config_path), "--experiment_name", "as_rank", *settings]
    result = run([*torchrun, "main_train.py", *flags])
    assert result.returncode == 0, result.stderr
    for name in ("alone", "torchrun", "as_rank"):
        for a, b in zip(losses(one), losses(one.parent / name), strict=True):
            assert a == pytest.approx(b, rel=1e-6, abs=1e-6)
        assert load_checkpoint(one.parent / name / "checkpoints/model_best.pth.tar")["step"] == 3
    assert (one.parent / "alone/logs/train.log").read_text().count("ddp over 2 ranks (gloo)") == 1


@pytest.mark.slow
def test_a_user_error_is_one_line(config_path):
    (config_path.parent / "stats.json").unlink()
    result = run(command(config_path))
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1 and len(errors) == 1 and "Traceback" not in result.stderr
    assert errors[0] == result.stderr.splitlines()[-1] and "stats.json does not exist; make it with" in errors[0]


def test_a_misspelt_key_is_refused_before_any_rank_starts(config_path):
    result = run(command(config_path, "--set", "training.strateg=ddp"))
    assert result.returncode == 1 and result.stderr.count("error: ") == 1
    assert "unknown key training.strateg; did you mean training.strategy?" in result.stderr


@pytest.mark.slow
def test_under_torchrun_too_an_error_of_all_ranks_is_shown_once(config_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = run([*torchrun, "main_train_ddp.py", "--config_path", str(config_path), "--batch_size", "5"])
    assert result.returncode == 1
    assert result.stderr.count("choose a multiple of 2") == 1 and result.stderr.count("error: ") == 1


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_run(config_path):
    process, ranks = start(config_path, *ENDLESS)
    os.kill(ranks[1], signal.SIGKILL)
    code, text = finish(process, within_s=30)
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    assert code == 128 + signal.SIGKILL and errors == [line for line in errors if "rank 1 was ended by SIGKILL" in line]
    assert len(errors) == 1 and "Traceback" not in text


@pytest.mark.slow
def test_killed_ranks_go_on_bitwise(config_path):
    """SIGKILL mid-epoch, some steps past a checkpoint: as if nothing had happened, noise and dropout included."""
    settings = ("training.save_every_n_steps=3", "training.ema_decay=0.9", "training.log_samples=true")
    settings += ("model.action_head_config.dropout_prob=0.1",)
    process, ranks = start(config_path, *ENDLESS, *settings)
    os.kill(ranks[0], signal.SIGKILL)
    finish(process, within_s=30)
    run_folder = config_path.parent / "experiments/run"
    steps = losses(run_folder)[-1]["step"] + 5
    again = ("--resume_checkpoint", "auto", "--set", f"training.max_steps={steps}", *settings)
    result = run(command(config_path, *again))
    assert result.returncode == 0, result.stderr
    whole = run_training(config_path, "whole", steps, *settings, ranks=2)
    assert losses(run_folder) == losses(whole) and len(losses(whole)) == steps
    for rank in (0, 1):
        taken = (folder / f"logs/samples_rank_{rank}.jsonl" for folder in (run_folder, whole))
        assert len({path.read_text() for path in taken}) == 1, "no sample repeated, none skipped"
    (a,), (b,) = (list(folder.glob("checkpoints/checkpoint_epoch_*")) for folder in (run_folder, whole))
    a, b = load_checkpoint(a), load_checkpoint(b)
    for part in (lambda c: c["model"], lambda c: c["ema"]["weights"]):
        assert all(torch.equal(value, part(b)[name]) for name, value in part(a).items())


@pytest.mark.slow
def test_a_rank_that_hangs_is_found_and_ends_the_run(config_path):
    process, ranks = start(config_path, *ENDLESS, "training.distributed_timeout_s=8")
    os.kill(ranks[1], signal.SIGSTOP)
    code, text = finish(process, within_s=60)
    assert code == 1 and "rank 0 lost another rank (" in text and "rank 1 did not react and had to be killed" in text
    assert "Traceback" not in text


@pytest.mark.slow
def test_sigterm_stops_all_ranks_at_one_step_and_auto_goes_on(config_path):
    process, _ = start(config_path, *ENDLESS)
    process.send_signal(signal.SIGTERM)
    code, text = finish(process, within_s=60)
    assert code == 0, text
    steps = len(losses(config_path.parent / "experiments/run"))
    saved = config_path.parent / f"experiments/run/checkpoints/checkpoint_step_{steps}.pth.tar"
    assert load_checkpoint(saved)["step"] == steps
    more = ("--set", f"training.max_steps={steps + 2}", "training.epochs=100000")
    result = run(command(config_path, "--resume_checkpoint", "auto", *more))
    assert result.returncode == 0, result.stderr
    assert [line["step"] for line in losses(config_path.parent / "experiments/run")] == list(range(1, steps + 3))
