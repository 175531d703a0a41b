"""The server as a process: signals, its own errors, its start."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from vla_client import PolicyClient
from websockets.exceptions import ConnectionClosed

from inference.serving.wire import pack, unpack
from tests.inference.serving.servers import expected, frame, observation
from utils.config_utils import ConfigError, ServingConfig


@contextlib.contextmanager
def process(checkpoint, *flags, **environment):
    command = [sys.executable, "scripts/serve_policy.py", "--checkpoint_path", str(checkpoint), "--port", "0", *flags]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    try:
        server.log = lines = []
        for line in server.stderr:
            lines.append(line)
            if found := re.search(r"serving on \S+ port (\d+)", line):
                yield server, int(found[1])
                return
        raise AssertionError(f"the server did not start:\n{''.join(lines)}")
    finally:
        server.kill()
        server.wait()
        server.stderr.close()


def test_sigterm_finishes_what_is_in_flight(checkpoint, predictor):
    with process(checkpoint, "--set", "serving.image_1_key=front") as (server, port):
        client = PolicyClient(port=port)
        idle = PolicyClient(port=port)
        request = pack(observation(2, **{"observation/image": None, "front": frame(2)}))
        client._connection.send(request)
        server.send_signal(signal.SIGTERM)
        np.testing.assert_allclose(unpack(client._connection.recv())["actions"], expected(predictor, 2), atol=1e-6)
        for connection in (client, idle):
            with pytest.raises(ConnectionClosed) as closed:
                connection._connection.recv(timeout=10)
            assert closed.value.rcvd.code == 1001
        assert server.wait(timeout=15) == 0


@pytest.mark.slow
def test_the_scripts_own_errors(checkpoint, tmp_path):
    def run(*flags):
        command = [sys.executable, "scripts/serve_policy.py", *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1
        return done.stderr

    assert "NO_SUCH_TOKEN: no such environment variable" in run(
        "--checkpoint_path", str(checkpoint), "--token_env", "NO_SUCH_TOKEN"
    )
    assert "did you mean serving.image_1_key" in run("--checkpoint_path", str(checkpoint), "--set", "serving.image_1=a")
    inference = run("--checkpoint_path", str(checkpoint), "--set", "inference.compile=default")
    assert "--set inference.compile=default: only serving.key=value is read here" in inference
    graph = run("--checkpoint_path", str(checkpoint), "--device", "cpu", "--compile", "cuda_graph")
    assert "error: inference.compile is cuda_graph, but the policy runs on cpu" in graph
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"can't listen on 127.0.0.1 port {port}" in run("--checkpoint_path", str(checkpoint), "--port", port)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile makes C++ on a CPU")
def test_no_client_waits_for_a_compiler(checkpoint, predictor):
    with process(checkpoint, "--compile", "default", "--set", "serving.max_batch_size=2") as (server, port):
        assert all(
            any(f"first prediction of {size}, compile default" in line for line in server.log) for size in (1, 2)
        )
        client = PolicyClient(port=port)
        np.testing.assert_allclose(client.predict(observation(2)), expected(predictor, 2), atol=1e-4)
        client.close()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_2_key": "observation/image"}, "not distinct"),
        ({"prompt_key": "seed"}, "one is 'seed'"),
        ({"timeout_s": 0}, "serving.timeout_s is 0"),
        ({"batch_window_ms": -1}, "batch_window_ms is -1"),
    ],
)
def test_limits_are_checked(fields, message):
    with pytest.raises(ConfigError, match=message):
        ServingConfig(**fields)
