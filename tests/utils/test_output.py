"""What is printed and logged: a closed pipe ends nothing, and no control character gets through."""

from __future__ import annotations

import logging
import subprocess
import sys

from utils.misc import set_up_logging, user_message

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
