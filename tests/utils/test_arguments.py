"""Every command reads ~ as the home folder, where no shell has done so."""

from __future__ import annotations

import pathlib
import re
import sys

import pytest

from utils.arguments import CommandParser

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def parser(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    parser = CommandParser("Words.\n\n    as they stand")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--data_path", nargs="+")
    parser.add_argument("--prompt")
    return parser


def test_the_home_folder(parser, monkeypatch):
    words = ["--output=~/out", "--data_path", "~/a", "b/~/c", "~", "--prompt", "put it ~/about/ there"]
    wanted = {
        "output": pathlib.Path("/home/ada/out"),
        "data_path": ["/home/ada/a", "b/~/c", "/home/ada"],
        "prompt": "put it ~/about/ there",
    }
    assert vars(parser.parse_args(words)) == wanted
    monkeypatch.setattr(sys, "argv", ["x.py", *words])
    assert vars(parser.parse_args()) == wanted
    assert parser.parse_known_args(["--other=~/x"])[1] == ["--other=/home/ada/x"]
    assert "\n\n    as they stand" in parser.format_help()


def test_every_command_uses_it():
    folders = ("", "scripts", "benchmarks", "utils", "data", "data/convert", "inference", "training")
    files = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
    others = {path.name for path in files if re.search(r"argparse\.ArgumentParser\(\w", path.read_text("utf-8"))}
    assert others == {"client_example.py"}, "which a robot runs without the rest, and names no path"
    assert sum("CommandParser(" in path.read_text("utf-8") for path in files) > 30
