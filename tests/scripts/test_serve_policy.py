"""scripts/serve_policy.py: what a user gets wrong about devices, hosts and ports ends it with one line."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts import serve_policy
from utils.config_utils import ConfigError

FLOW = Path(__file__).resolve().parents[1] / "fixtures/policies/flow.pth.tar"


@pytest.fixture
def serve(monkeypatch):
    def run(*flags: str) -> None:
        monkeypatch.setattr(sys, "argv", ["serve_policy.py", "--checkpoint_path", str(FLOW), *flags])
        serve_policy.main()

    return run


def test_a_device_that_is_not_there(serve, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="device is 'cuda', but this machine has 0 GPUs"):
        serve("--device", "cuda", "--port", "0")


@pytest.mark.parametrize("port", ["99999", "-5", "http", "80.5", ""])
def test_a_port_out_of_range(serve, port, capsys):
    with pytest.raises(SystemExit):
        serve(f"--port={port}")
    assert f"--port: '{port}' is no port; give a whole number from 0 to 65535" in capsys.readouterr().err


def test_numbers_that_are_too_small(serve, capsys):
    for flag, least in (("--seed", 0), ("--num_threads", 1)):
        with pytest.raises(SystemExit):
            serve(f"{flag}={least - 1}")
        assert f"{flag}: {least - 1} is less than {least}" in capsys.readouterr().err


def test_a_port_in_use(serve):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(ConfigError, match=f"can't listen on 127.0.0.1 port {port} .*, and a --port that nothing"):
            serve("--device", "cpu", "--port", port)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "a" * 300, "..", "", "[]"])
def test_a_host_that_is_not_this_machine(serve, host):
    with pytest.raises(ConfigError, match="can't listen on .* give an address of this machine as --host"):
        serve("--device", "cpu", "--host", host, "--port", "0")


def test_who_executes_plans(serve, capsys):
    with pytest.raises(SystemExit):
        serve("--n_action_steps", "4")
    assert "--n_action_steps needs --protocol vla-eval; robots get whole plans" in capsys.readouterr().err
    for flags in (["--execution", "naive_async"], ["--latency_steps", "1"]):
        with pytest.raises(ConfigError, match="the harness waits for each plan .* give --execution synchronous"):
            serve("--device", "cpu", "--port", "0", "--protocol", "vla-eval", *flags)


def test_it_ends_with_one_line():
    command = [sys.executable, "scripts/serve_policy.py", "--checkpoint_path", str(FLOW), "--device", "warp"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("error: device is 'warp'; give")
    assert "Traceback" not in done.stderr
