"""diagnose_ddp.py: what it finds on this machine, and what it says where something stands in the way."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

import diagnose_ddp


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "diagnose_ddp.py", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        check=False,
        timeout=120,
    )


def test_two_ranks_exchange_and_the_verdict_says_so():
    result = run("--nproc", "2", "--size_mb", "1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all-reduce over 2 ranks (gloo) gives the right sums" in result.stdout
    assert result.stdout.count("GB/s on the bus") == 2
    assert result.stdout.splitlines()[-1].startswith("verdict: ready; python main_train_ddp.py")


def test_a_port_in_use_is_a_problem_with_a_remedy():
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        result = run("--nproc", "2", MASTER_PORT=port)
    assert result.returncode == 1
    assert f"MASTER_PORT is {port}, which is in use" in result.stdout and "unset it or choose" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("verdict: not ready, 1 problem: MASTER_PORT")


def test_a_port_that_is_none(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "http")
    (found,) = diagnose_ddp.ports()
    assert (found.kind, found.text) == ("problem", "MASTER_PORT is 'http'; give a number below 65536, or unset it")


def test_little_shared_memory_is_a_warning_with_a_remedy(tmp_path):
    (found,) = diagnose_ddp.shared_memory(tmp_path, enough=1 << 60)
    assert found.kind == "warning" and "--shm-size=8g" in found.text
    (found,) = diagnose_ddp.shared_memory(tmp_path / "nothing")
    assert found.kind == "warning" and "does not exist" in found.text
    assert diagnose_ddp.shared_memory(tmp_path, enough=1)[0].kind == "ok"


@pytest.mark.parametrize("flags", ["--nproc=0", "--size_mb=-1", "--size_mb=nan", "--timeout_s=-1", "--timeout_s=inf"])
def test_sizes_that_are_none(flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diagnose_ddp.py", flags])
    with pytest.raises(SystemExit):
        diagnose_ddp.main()
    assert f"error: {flags.partition('=')[0]}" in capsys.readouterr().err.replace("argument ", "")
