"""A user's terminal: bash in a copy of this repository, where a page's commands are typed one after the other."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.docs import python_service
from tests.docs.pages import ROOT

LIMIT_S = 300.0  # per command
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "PYTHONUNBUFFERED": "1",
}


@contextlib.contextmanager
def python_on_path() -> Iterator[Path]:
    """A folder whose program `python` starts without importing torch anew; see python_service.py."""
    with tempfile.TemporaryDirectory() as folder:  # not pytest's own: a socket's path must be short
        address, client = Path(folder, "socket"), Path(folder, "bin/python")
        client.parent.mkdir()
        client.write_text(python_service.CLIENT.format(python=sys.executable, address=str(address)))
        client.chmod(0o755)
        service = subprocess.Popen([sys.executable, python_service.__file__, str(address)], env=ENVIRONMENT)
        try:
            wait_until(address.exists, service)
            yield client.parent
        finally:
            service.terminate()
            service.wait()


def wait_until(condition: Callable[[], Any], process: subprocess.Popen, log: Path | None = None) -> None:
    """Wait for something that `process` does."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        said = log.read_text() if log is not None else ""
        assert process.poll() is None, f"ended with status {process.returncode}: {said}"
        assert time.monotonic() < deadline, f"nothing after {LIMIT_S:.0f} s: {said}"
        time.sleep(0.05)


def copy_repository(folder: Path) -> Path:
    """The files that git keeps or would keep, without tests."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in listed:
        if name and not name.startswith("tests/") and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


class Terminal:
    """Bash in a folder; variables last from one command to the next, and a server runs until the next one starts.

    Attributes:
        folder: where commands are run.
        environment: what they find.
    """

    def __init__(self, folder: Path, python_folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **ENVIRONMENT,
            "PATH": os.pathsep.join([str(python_folder), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "XDG_CACHE_HOME": str(folder / ".cache"),
        }
        self._server: subprocess.Popen | None = None

    def run(self, command: str) -> str:
        """Run one command and return what it said; an AssertionError where its exit status is not 0."""
        state = self.folder / ".environment"
        script = f"set -a\n{command}\ncode=$?\nenv -0 > {state}\nexit $code\n"
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, f"{command}\nended with status {done.returncode}:\n{done.stdout}"
        self.environment = dict(item.split("=", 1) for item in state.read_text().split("\0") if item)
        return done.stdout

    def serve(self, command: str, port: int) -> str:
        """Start a policy server, in place of an earlier one, and return what it has said once it answers."""
        self.stop_server()
        log = self.folder / ".server.log"
        with log.open("w") as file:
            self._server = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        wait_until(lambda: is_healthy(port), self._server, log)
        return log.read_text()

    def stop_server(self) -> None:
        """End the server, if one runs, as Ctrl-C would; it must do so in order."""
        server, self._server = self._server, None
        if server is not None:
            server.send_signal(signal.SIGINT)
            assert server.wait(30) == 0, (self.folder / ".server.log").read_text()


def is_healthy(port: int) -> bool:
    """Whether a policy server answers there."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, ConnectionError):
        return False
