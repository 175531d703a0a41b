"""benchmarks/bench_pages.py and scripts/page_picture.py: pages as files that chromium opens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from scripts import page_picture
from tests.browser import needs_browser
from tests.utils.test_page import hostile_page
from utils.page.build import write_page

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("mark", [pytest.param(None, marks=needs_browser())])
@pytest.mark.parametrize(
    ("flags", "episodes"), [(["--quick"], 6), pytest.param([], 50, marks=pytest.mark.slow)], ids=["quick", "whole"]
)
def test_bench_pages(flags, episodes, tmp_path, mark):
    """A page of 50 episodes is smaller than 20 MB and opens in less than 2 s; the script fails otherwise."""
    report = tmp_path / "pages.json"
    command = [sys.executable, "benchmarks/bench_pages.py", *flags, "--json", str(report)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    found = json.loads(report.read_text())
    assert found["episodes"] == episodes and 0 < found["megabytes"] < 20 and 0 < found["open_seconds"] < 2


@pytest.mark.parametrize("mark", [pytest.param(None, marks=needs_browser())])
def test_page_picture(tmp_path, mark):
    html, png = tmp_path / "page.html", tmp_path / "picture.png"
    write_page(html, hostile_page("plain"))
    flags = ["--html", str(html), "--png", str(png), "--width", "390", "--height", "500", "--step", "3"]
    page_picture.main([*flags, "--section", "1"])
    light = Image.open(png).convert("L")
    page_picture.main([*flags, "--dark"])
    dark = Image.open(png).convert("L")
    assert light.size == dark.size == (390, 500)
    assert light.getpixel((2, 2)) > 200 > 60 > dark.getpixel((2, 2))


def test_a_picture_that_can_t_be_written_is_said_before(tmp_path, capsys):
    with pytest.raises(SystemExit):
        page_picture.main(["--html", "page.html", "--png", str(tmp_path)])
    assert "is a folder; give the name of a file in it" in capsys.readouterr().err


def test_a_page_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="--html .*gone.html does not exist"):
        page_picture.main(["--html", str(tmp_path / "gone.html"), "--png", str(tmp_path / "picture.png")])
