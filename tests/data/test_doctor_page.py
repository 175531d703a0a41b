"""`inspect_parquet.py --html`: findings with their frames, and nothing that data hold can act in the page."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

import inspect_parquet
from data.doctor.examine import examine
from data.doctor.images import pictures_of
from data.doctor.page import doctor_page
from tests.browser import chromium, needs_browser, opened, overflow, quiet  # noqa: F401
from tests.data.planted_faults import FAULTS
from tests.data.spoiling import TRAIN, clean_files, write
from tests.helpers import write_broken, write_episodes
from tests.inference.checkpoints import train_tiny
from utils.page.content import Findings, Viewer

EVIL = "</script><script>alert(1)</script>"


def planted(folder, *kinds, spoil=None):
    """The clean files of tests/data/spoiling.py with some faults; (training files, validation files)."""
    files = clean_files()
    for kind in kinds:
        next(fault for fault in FAULTS if fault.kind == kind).spoil(files)
    if spoil is not None:
        spoil(files)
    return write(folder, files)


def run(*args):
    return inspect_parquet.main([*map(str, args), "--num_workers", "0"])


def blocks(page, kind):
    return [block for section in page.sections for block in section.blocks if isinstance(block, kind)]


def test_findings_have_frames_and_lead_to_the_viewer(tmp_path):
    train, val = planted(tmp_path, "nan", "undecodable_image", "state_outlier")
    seen = examine(train, val, num_workers=0)
    page = doctor_page({"": seen}, seen.to_dict(), "demos")
    assert page.tone == "error" and page.verdict.startswith("Training may not start: nan (1), undecodable image (1)")
    (viewer,) = blocks(page, Viewer)
    found = {block.name: block for block in blocks(page, Findings)}
    assert list(found)[:2] == ["nan", "undecodable image"] and found["nan"].tone == "error"
    for block in found.values():
        for finding in block.findings:
            number, step = finding.jump
            (mark,) = [m for m in viewer.episodes[number].marks if m.step == step and m.text.endswith(finding.message)]
            assert finding.pictures and mark.tone == block.tone
    (broken,) = found["undecodable image"].findings
    assert [picture.caption.split(",")[0] for picture in broken.pictures] == ["image_2"], "image_1 has none"
    episode = viewer.episodes[broken.jump[0]]
    film = next(film for film in episode.films if film.name == "image_1")
    assert [film.steps[i] for i in film.missing] == [broken.jump[1]]
    (outlier,) = [f for f in found["state outlier"].findings]
    marked = [curve for curve in viewer.episodes[outlier.jump[0]].curves if curve.marked]
    assert any(curve.marked == [outlier.jump[1]] for curve in marked if curve.group == "state")


def test_pictures_are_those_of_their_rows(tmp_path):
    train, val = planted(tmp_path)
    seen = examine(train, val, num_workers=0)
    wanted = np.array([3, 70, 205, 210])
    shown = pictures_of(seen.rows, wanted, 64)
    assert {camera: sorted(rows) for camera, rows in shown.items()} == dict.fromkeys(shown, wanted.tolist())
    kept = seen.frames.pictures["image_1"]
    again = pictures_of(seen.rows, np.array(sorted(kept)), 160)["image_1"]
    assert again.keys() == kept.keys()
    for row, picture in kept.items():
        np.testing.assert_array_equal(again[row], picture)


def test_clean_data_say_so(tmp_path):
    train, val = planted(tmp_path)
    assert run("--data_path", *train, "--val_data_path", *val, "--html", tmp_path / "page.html") == 0
    text = (tmp_path / "page.html").read_text()
    assert "Nothing wrong was found in 10 episodes." in text and "None of the" in text


def test_without_pictures(tmp_path):
    train, _ = planted(tmp_path, "nan")
    assert run("--data_path", *train, "--skip_images", "--html", tmp_path / "page.html") == 1
    text = (tmp_path / "page.html").read_text()
    assert "they were not looked at (--skip_images)" in text and "data:image/jpeg" not in text


def test_beside_a_policy(tmp_path, tiny_paligemma_dir):
    """The table of data/comparison/fit.py and the suspected mistakes, of data that are ten times as large."""
    train = write_episodes(tmp_path / "train.parquet", [12, 12])
    policy = train_tiny(tmp_path, tiny_paligemma_dir, [train])

    def in_other_units(rows):
        for row in rows:
            row["state"] = [10 * value for value in row["state"]]

    other = write_broken(tmp_path / "other.parquet", in_other_units, [12, 12])
    html, report = tmp_path / "page.html", tmp_path / "report.json"
    run("--data_path", other, "--against", policy, "--html", html, "--report", report)
    text, about = html.read_text(), json.loads(report.read_text())["against"]
    assert about["mismatches"] and "The policy was trained on something else: state" in text
    assert text.count('class="usual"') == len(about["dimensions"]) == 8


@pytest.mark.parametrize("mark", [pytest.param(None, marks=needs_browser())])
def test_a_hostile_data_set_is_text(chromium, tmp_path, mark):  # noqa: F811
    """Instruction, camera and file names that would run if they became markup; both widths; keys move the frame."""
    camera = 'x"><img src=x onerror=alert(2)>'

    def spoil(files):
        for rows in files.values():
            for row in rows:
                row["prompt"] = f"press {EVIL}" if row["prompt"].startswith("press") else row["prompt"]
                row[camera] = row["image_2"]

    folder = tmp_path / "<img src=x onerror=alert(3)>"
    train, val = planted(folder, "nan", "frozen_camera", spoil=spoil)
    page = tmp_path / "page.html"
    assert run("--data_path", *train, "--val_data_path", *val, "--html", page) == 1
    for width in (390, 1280):
        view = opened(chromium, page, width)
        shown = view.page.inner_text("body")
        assert f"press {EVIL}" in shown and camera in shown and "<img src=x onerror=alert(3)>" in shown
        assert overflow(view.page) == 0
        view.page.focus(".step")
        before = view.page.screenshot(clip=view.page.locator(".films canvas").first.bounding_box())
        for _ in range(6):
            view.page.keyboard.press("ArrowRight")
        after = view.page.screenshot(clip=view.page.locator(".films canvas").first.bounding_box())
        assert before != after and re.match("step 6 of", view.page.inner_text(".readout"))
        assert view.page.locator(".thumbnails img").first.evaluate("(image) => image.naturalWidth") == 40
        quiet(view, page)


def test_many_findings_stay_few(tmp_path):
    """Of each kind some are listed; the page says how many are not."""

    def spoil(files):
        for row in files[TRAIN[1]][::3]:
            row["state"] = [float("nan"), *row["state"][1:]]

    train, val = planted(tmp_path, spoil=spoil)
    seen = examine(train, val, num_workers=0)
    page = doctor_page({"": seen}, seen.to_dict(), "demos")
    nan = next(block for block in blocks(page, Findings) if block.name == "nan")
    assert len(nan.findings) == 6 and nan.more == seen.findings.counts["nan"] - 6 > 0
    assert any("findings are counted and not listed" in text for text in page.left_out)
