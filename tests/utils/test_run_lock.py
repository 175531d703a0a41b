"""Two runs in one folder: the second is told who holds it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from utils.config_reader import ConfigError
from utils.run_lock import only_run

HOLD = """
import sys, time
from pathlib import Path
from utils.run_lock import only_run
with only_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_run_is_told_who_holds_the_folder(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"run: a run is writing there \(process {first.pid} on .* since"):
            with only_run(tmp_path / "run"):
                pass
    finally:
        first.kill()  # however it ends, the folder is free again
        first.wait()
        first.stdout.close()
    with only_run(tmp_path / "run"):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with only_run(tmp_path):
        pass
    assert "this file system has no locks" in caplog.text
