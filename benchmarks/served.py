"""A policy server as a process of its own, and a client of it."""

from __future__ import annotations

import pathlib
import re
import runpy
import subprocess
import sys
import threading
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]


def start_server(checkpoint: str, *flags: str) -> tuple[subprocess.Popen, int]:
    """A server process on a free port, and the port; `flags` are further ones of serve_policy.py."""
    command = [sys.executable, "scripts/serve_policy.py", "--checkpoint_path", checkpoint, "--port", "0"]
    server = subprocess.Popen([*command, "--num_threads", "1", *flags], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    for line in server.stderr:
        if found := re.search(r"serving on \S+ port (\d+)", line):
            threading.Thread(target=server.stderr.read, daemon=True).start()  # so that its log never blocks it
            return server, int(found[1])
    raise RuntimeError("the server did not start")


def open_client(port: int) -> Any:
    """A PolicyClient of scripts/client_example.py, as a robot has it."""
    return runpy.run_path(str(ROOT / "scripts/client_example.py"))["PolicyClient"](port=port)
