"""What is printed and logged: a closed pipe ends nothing, and no control character gets through."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from utils.misc import end_in_log_file, set_up_logging, user_message

PROGRAM = """
import logging, sys
from pathlib import Path
from tqdm import tqdm
from utils.misc import set_up_logging
set_up_logging()
for i in tqdm(range(3000), mininterval=0):
    print("line", i, flush=True)
    logging.getLogger("x").info("line %d", i)
Path(sys.argv[1]).write_text("done")
"""


def test_a_closed_output_ends_nothing(tmp_path):
    command = f"'{sys.executable}' -c '{PROGRAM}' '{tmp_path / 'done'}' 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "done").read_text() == "done", done.stderr


def test_why_a_program_ended_stands_in_its_log_file(tmp_path, caplog):
    """The user's mistake in one line, anything else with its traceback; and once on the terminal."""
    try:
        for error, wanted in ((ValueError("no such file"), 1), (RuntimeError("a bug"), 4)):
            set_up_logging(tmp_path / "logs" / "train.log")
            with pytest.raises(type(error)), end_in_log_file():
                raise error
            lines = (tmp_path / "logs" / "train.log").read_text().splitlines()
            assert f"ended by {type(error).__name__}: {error}" in "\n".join(lines) and len(lines) >= wanted
    finally:
        logging.basicConfig(force=True)
    assert "Traceback" in lines[2] and not any("Traceback" in line for line in lines[:1])


def test_log_lines_hold_no_control_characters(tmp_path):
    root = logging.getLogger()
    handlers, level, streams = root.handlers[:], root.level, (sys.stdout, sys.stderr)
    try:
        set_up_logging(tmp_path / "train.log")
        logging.getLogger("x").info("a %s\ttable\nrow", "\x1b[2J\r\x07")
        text = (tmp_path / "train.log").read_text()
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers[:], (sys.stdout, sys.stderr) = handlers, streams
        root.setLevel(level)
    assert "a \\x1b[2J\\x0d\\x07\ttable\nrow" in text and "\x1b" not in text


def test_an_error_of_the_system_says_where_and_what_to_do(tmp_path):
    try:
        (tmp_path / "a" / "b").read_text()
    except OSError as error:
        text = user_message(error)
    assert (
        text
        == f"{tmp_path / 'a' / 'b'}: No such file or directory; name another place, or see to its room and permissions"
    )
