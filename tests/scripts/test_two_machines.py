"""Two machines, as two network namespaces joined by a cable: the same run as two ranks of one machine; and what happens
when one of them dies or the cable is cut."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.ranks import losses, write_project
from utils.checkpoint import load_checkpoint

TIMEOUT_S, LEAVE_AFTER_S = 15, 5
ADDRESSES = ("10.77.31.1", "10.77.31.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two namespaces, each with one end of a cable."""
    names = [f"vla{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable0", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable0")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable0", "up")
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        pytest.skip(f"network namespaces can't be made here ({error})")
    yield names
    for name in names:
        for process in members(name):
            subprocess.run(["kill", "-9", process], check=False)
        ip("netns", "del", name)


def members(name: str) -> list[str]:
    return subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True).stdout.split()


def start(machines: list[str], config: Path, experiment: str, *settings: str) -> list[subprocess.Popen[bytes]]:
    """One rank on each machine; their output is in {experiment}_{rank}.log beside the config."""
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["LEAVE_AFTER_S"] = str(LEAVE_AFTER_S)
    common = ["bash", "scripts/run_ddp_training.sh", "--config", str(config), "--experiment_name", experiment]
    common += ["--nproc", "1", "--nnodes", "2", "--rdzv_endpoint", f"{ADDRESSES[0]}:29555"]
    running = []
    for rank, name in enumerate(machines):
        command = ["ip", "netns", "exec", name, *common, "--node_rank", str(rank)]
        command += ["--set", f"training.distributed_timeout_s={TIMEOUT_S}", *settings]
        with open(config.parent / f"{experiment}_{rank}.log", "wb") as log:
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    return running


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(next((folder / "checkpoints").glob("checkpoint_epoch_*")))["model"]


@pytest.mark.slow
def test_two_machines_are_two_ranks(machines, tmp_path, tiny_paligemma_dir):
    config = write_project(tmp_path, tiny_paligemma_dir)
    running = start(machines, config, "two", "training.max_steps=4")
    assert [process.wait(240) for process in running] == [0, 0], (tmp_path / "two_0.log").read_text()
    command = [sys.executable, "main_train_ddp.py", "--config_path", str(config), "--experiment_name", "one"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*command, "--nproc", "2", "--set", "training.max_steps=4"], env=environment, check=True)
    one, two = (tmp_path / "experiments" / name for name in ("one", "two"))
    assert losses(one) == losses(two)
    weights = final_weights(two)
    assert all(torch.equal(value, weights[name]) for name, value in final_weights(one).items())


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["killed", "cut"])
def test_a_lost_machine_ends_the_run_in_time(machines, tmp_path, tiny_paligemma_dir, fault):
    """And on one machine it goes on from the last checkpoint as if nothing had happened."""
    config = write_project(tmp_path, tiny_paligemma_dir)
    settings = ("training.max_steps=100000", "training.epochs=100000", "training.save_every_n_steps=5")
    running = start(machines, config, fault, *settings)
    log = tmp_path / f"{fault}_0.log"
    deadline = time.monotonic() + 240
    while "checkpoint_step_10." not in log.read_text():
        assert time.monotonic() < deadline and running[0].poll() is None, log.read_text()
        time.sleep(0.2)
    began = time.monotonic()
    if fault == "killed":
        for process in members(machines[1]):
            subprocess.run(["kill", "-9", process], check=False)
    else:
        ip("-n", machines[1], "link", "set", "cable0", "down")
    assert all(process.wait(TIMEOUT_S + LEAVE_AFTER_S + 60) for process in running), "both end, and not with 0"
    assert time.monotonic() - began < TIMEOUT_S + LEAVE_AFTER_S + 60
    assert "lost another rank" in log.read_text()

    command = [sys.executable, "main_train_ddp.py", "--config_path", str(config), "--experiment_name", fault]
    done = max(line["step"] for line in losses(tmp_path / "experiments" / fault)) // 5 * 5
    flags = ["--nproc", "2", "--resume_checkpoint", "auto", "--set", *settings, f"training.max_steps={done + 3}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*command, *flags], env=environment, check=True)
    flags = ["--nproc", "2", "--set", *settings[1:], f"training.max_steps={done + 3}"]
    command[-1] = "whole"
    subprocess.run([*command, *flags], env=environment, check=True)
    interrupted, whole = (losses(tmp_path / "experiments" / name) for name in (fault, "whole"))
    assert [line["loss"] for line in interrupted] == [line["loss"] for line in whole]
