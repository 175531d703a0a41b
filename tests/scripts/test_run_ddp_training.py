"""scripts/run_ddp_training.sh: its refusals, and a run of two ranks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.ranks import losses, write_project


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "scripts/run_ddp_training.sh", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: --config is missing"),
        (("--config",), "error: --config needs a value"),
        (("--config", "c.yaml", "--nnodes", "2"), "error: --nnodes 2 needs --rdzv_endpoint HOST:PORT"),
    ],
)
def test_refusals(arguments, message):
    result = run(*arguments)
    assert result.returncode == 2 and message in result.stderr


@pytest.mark.slow
def test_it_trains(tmp_path, tiny_paligemma_dir):
    config = write_project(tmp_path, tiny_paligemma_dir)
    arguments = ("--experiment_name", "script", "--nproc", "2", "--set", "training.max_steps=2")
    result = run("--config", str(config), *arguments)
    assert result.returncode == 0, result.stderr
    assert [line["step"] for line in losses(tmp_path / "experiments/script")] == [1, 2]
