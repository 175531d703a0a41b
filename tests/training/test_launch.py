"""The launcher: ranks that succeed, fail, die, hang and are told to stop. Real processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from training.launch import launch, training_place
from utils.config_utils import ConfigError

# A rank that joins the group as main_train_ddp.py does; torch.distributed alone, so that it starts quickly.
JOINED = """
import os, signal, sys, time
import torch, torch.distributed as dist
from training.launch import member_of_group
from utils.config_utils import ConfigError
rank = int(os.environ["RANK"])
with member_of_group(TIMEOUT):
    total = torch.ones(1)
    dist.all_reduce(total)
"""


def script(body: str, timeout_s: float = 60.0) -> list[str]:
    code = JOINED.replace("TIMEOUT", str(timeout_s)) + textwrap.indent(textwrap.dedent(body), "    ")
    return [sys.executable, "-c", code]


def test_ranks_find_each_other_and_their_place(tmp_path, capfd):
    out = tmp_path / "out"
    out.mkdir()
    body = f"open(r'{out}/' + os.environ['LOCAL_RANK'], 'w').write(f'{{int(total)}} {{dist.get_world_size()}}')"
    assert launch(script(body), 2) == 0
    assert {path.name: path.read_text() for path in out.iterdir()} == {"0": "2 2", "1": "2 2"}
    assert "error" not in capfd.readouterr().err


def test_an_error_of_every_rank_is_shown_once(capfd):
    assert launch(script("raise ConfigError('no such thing; give another')"), 2) == 1
    assert capfd.readouterr().err.strip() == "error: no such thing; give another"


def test_a_full_gpu_is_one_line_with_a_remedy(capfd):
    body = """
    if rank == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    dist.all_reduce(total)
    """
    assert launch(script(body), 2) == 1
    shown = capfd.readouterr().err.strip()
    assert shown.startswith("error: CUDA out of memory. Tried to allocate 2.00 GiB. Raise training.gradient_accum")
    assert "--dry_run tells what takes the memory" in shown and "Traceback" not in shown


def test_an_unexpected_error_of_one_rank_is_the_one_shown(capfd):
    body = """
    if rank == 1:
        raise KeyError("the true cause")
    dist.all_reduce(total)
    """
    assert launch(script(body), 2) == 1
    shown = capfd.readouterr().err
    assert shown.count("Traceback") == 1 and "KeyError: 'the true cause'" in shown
    assert shown.strip().endswith("error: rank 1 failed with the traceback above")


def test_a_process_that_nobody_launched_trains_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with training_place(timeout_s=1.0) as place:
        assert (place.rank, place.world_size, place.in_group) == (0, 1, False)


def test_an_error_removes_what_the_run_would_have_removed_at_its_end(tmp_path):
    """A rank that fails ends at once, but finalizers run first: a temporary cache does not stay behind."""
    cache = tmp_path / "cache"
    cache.touch()
    body = f"""
    import weakref
    def work():
        held = torch.nn.Identity()
        weakref.finalize(held, os.remove, r"{cache}")
        raise ValueError("no")
    work()
    """
    assert launch(script(body), 1) == 1
    assert not cache.exists()


def test_a_rank_that_is_killed_ends_the_job(capfd):
    body = """
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(total)
    """
    began = time.monotonic()
    assert launch(script(body), 2) == 128 + signal.SIGKILL
    assert time.monotonic() - began < 40
    shown = capfd.readouterr().err
    assert shown.count("error:") == 1 and "rank 1 was ended by SIGKILL (the kernel does that when memory" in shown


def test_a_rank_that_hangs_is_found_by_the_timeout_and_named(capfd):
    body = """
    if rank == 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    dist.all_reduce(total)
    """
    began = time.monotonic()
    assert launch(script(body, timeout_s=2.0), 2, grace_s=1.0) == 1
    assert time.monotonic() - began < 40
    shown = capfd.readouterr().err
    assert "error: rank 0 lost another rank (" in shown and "raise training.distributed_timeout_s" in shown
    assert "rank 1 did not react and had to be killed" in shown and "Traceback" not in shown


LAUNCHER = "import sys; from training.launch import launch; sys.exit(launch(sys.argv[2:], int(sys.argv[1])))"


def start(command: list[str], nproc: int = 2) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", LAUNCHER, str(nproc), *command], text=True, stderr=subprocess.PIPE)


def wait_for(paths: list[Path]) -> None:
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_rank_which_may_stop_in_order(tmp_path, number):
    code = f"""
import os, signal, sys, time
stop = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: stop.append(1))
place = r"{tmp_path}/" + os.environ["RANK"]
open(place + ".ready", "w").close()
while not stop:
    time.sleep(0.02)
time.sleep(1)  # longer than any poll: saving
open(place + ".saved", "w").close()
"""
    process = start([sys.executable, "-c", code])
    wait_for([tmp_path / f"{rank}.ready" for rank in range(2)])
    process.send_signal(number)
    assert process.wait(30) == 0, process.stderr.read()
    assert {path.name for path in tmp_path.glob("*.saved")} == {"0.saved", "1.saved"}


def test_ranks_do_not_outlive_a_killed_launcher(tmp_path):
    body = f"""
    open(r"{tmp_path}/" + str(rank), "w").write(str(os.getpid()))
    time.sleep(600)
    """
    process = start(script(body))
    pids = [tmp_path / "0", tmp_path / "1"]
    wait_for(pids)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{path.read_text()}").exists() for path in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_master_port_is_honoured(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        free.listen()
        with pytest.raises(ConfigError, match=f"MASTER_PORT is {port}, which can't be opened .*; unset it or choose"):
            launch([sys.executable, "-c", "pass"], 1)
    out = tmp_path / "port"
    code = f"import os; open(r'{out}', 'w').write(os.environ['MASTER_PORT'])"
    assert launch([sys.executable, "-c", code], 1) == 0
    assert out.read_text() == str(port)


def test_a_rank_that_fails_without_a_word(capfd):
    assert launch([sys.executable, "-c", "import sys; sys.exit(7)"], 1) == 7
    assert "rank 0 ended with status 7 and no message" in capfd.readouterr().err
    assert "RANK" not in os.environ


@pytest.mark.parametrize("port", ["http", "70000", "-1"])
def test_a_port_that_is_none(monkeypatch, port):
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(ConfigError, match=f"MASTER_PORT is '{port}'; give a number below 65536, or unset it"):
        launch([sys.executable, "-c", "pass"], 1)


def test_numbers_of_ranks_that_cannot_be(monkeypatch):
    for nproc in (0, -1):
        with pytest.raises(ConfigError, match=f"--nproc is {nproc}; give 1 or more"):
            launch([sys.executable, "-c", "pass"], nproc)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="--nproc is 3, but 2 GPUs are visible; give at most 2"):
        launch([sys.executable, "-c", "pass"], 3)
