"""Pages: what any text may do to one, what fits into one, and that a browser shows it."""

from __future__ import annotations

import re
import socket

import numpy as np
import pytest

from tests.browser import chromium, needs_browser, opened, overflow, quiet  # noqa: F401
from utils.misc import WriteError
from utils.page import content
from utils.page.build import as_html, write_page
from utils.page.charts import drawing
from utils.page.episodes import MAX_SAMPLED, curves_of, left_out, sampled_steps
from utils.page.pictures import FILM_BYTES, chosen_steps, film, film_frames, thumbnail

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;{{ 7 * 7 }}\u202e\x00\x1b[31m"


def frames(number: int, size: int = 64) -> list[np.ndarray]:
    """Frames of one brightness each, brighter and brighter."""
    return [np.full((size, size, 3), 20 + 200 * i // number, np.uint8) for i in range(number)]


def hostile_page(text: str = EVIL, steps: int = 30) -> content.Page:
    """Every kind of block, and `text` wherever a text can be."""
    picture = content.Picture(thumbnail(frames(1)[0]), text)
    sampled = list(range(steps))
    values = np.linspace(0, 1, steps)[:, None].repeat(2, axis=1)
    shot = film(text, sampled, [None, *frames(steps - 1)], 1)
    curves = [
        *curves_of(text, [text, "b"], values, sampled, drawn=np.stack([values, values + 0.1]), marked={1: [4]}),
        *curves_of("gaps", ["c"], np.where(values > 0.5, np.nan, values), sampled),
    ]
    marks = [content.Mark(7, "error", text)]
    episodes = [content.Episode(f"{text} {i}", text, steps, 10.0, sampled, [shot], curves, marks) for i in range(2)]
    line = content.Line(text, [0, 1, 2], [1.0, float("nan"), 3.0], [0, 0, 0], [2, 2, 4], marks=[2])
    blocks = [
        content.Findings(text, "error", text, [content.Finding(text, text, [picture], (1, 5))], 3, text),
        content.Viewer(episodes),
        content.Table((text, "number"), [(text, 1.23456), ("none", None)], text, {0: "warning"}),
        content.Ranges([content.Range(text, -0.4, 90.0, 0.5, text)], text),
        content.Charts([content.Chart(text, text, [line, line])], text),
        content.Rates([content.Rate(text, text, 3, 4, 0.3, 0.95, True)], text),
        content.Outcomes([(text, [(True, text), (False, text)])], text),
        content.Videos([content.Video("data:video/mp4;base64,", text, "good")]),
        content.Pictures([picture], wide=True),
        content.Text(text),
        content.Code(text, text),
    ]
    return content.Page(text, text, text, "error", [(text, text)], [content.Section(text, blocks, text)], [text])


def test_no_text_becomes_markup():
    html = as_html(hostile_page())
    assert "<script>alert" not in html and "<img src=x" not in html and "\u202e" not in html and "\x00" not in html
    assert html.count("<script") == 2 == html.count("</script>"), "the viewer's values and the page's own script"
    assert "49" not in re.sub(r"data:[^\"]+", "", html.split("<main")[1].split("<script")[0]), "nor a template"
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", html)


@pytest.mark.parametrize("mark", [pytest.param(None, marks=needs_browser())])
def test_a_browser_shows_it_as_text(chromium, tmp_path, mark):  # noqa: F811
    path = tmp_path / "page.html"
    write_page(path, hostile_page())
    for width in (390, 1280):
        view = opened(chromium, path, width)
        shown = view.page.inner_text("body")
        assert "<script>alert(1)</script>" in shown and "onerror=alert(2)" in shown and "\\u202e" in shown
        assert "</script><script>alert(1)" in view.page.inner_text(".about") and overflow(view.page) == 0
        quiet(view, path)


@pytest.mark.parametrize("mark", [pytest.param(None, marks=needs_browser())])
def test_the_policy_stops_scripts_and_requests(chromium, tmp_path, mark):  # noqa: F811
    """Even if a text became markup: nothing but the page's own script runs, and nothing is fetched."""
    path = tmp_path / "page.html"
    write_page(path, hostile_page())
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        evil = f"<script>window.ran = 1</script><img src='{address}/x'><script src='{address}/y'></script><main"
        path.write_text(path.read_text().replace("<main", evil, 1))
        view = opened(chromium, path)
        tried = f"() => fetch('{address}/z').then(() => 'sent', (error) => error.name)"
        assert view.page.evaluate(tried) == "TypeError" and view.page.evaluate("window.ran") is None
        view.page.wait_for_timeout(200)
        with pytest.raises(BlockingIOError):  # nobody has called
            server.accept()
    assert sum("Content Security Policy" in text for text in view.console) >= 4


@pytest.mark.parametrize("mark", [pytest.param(None, marks=needs_browser())])
def test_the_keyboard_scrubs(chromium, tmp_path, mark):  # noqa: F811
    """Arrows, Page Up and Down, Home and End move frame, value and cursor; focus is seen; buttons and marks jump."""
    path = tmp_path / "page.html"
    write_page(path, hostile_page("plain"))
    page = opened(chromium, path).page
    page.wait_for_timeout(100)
    brightness = "() => document.querySelector('canvas').getContext('2d').getImageData(30, 30, 1, 1).data[0]"

    def at() -> tuple[str, str, str]:
        step = page.get_attribute(".step", "aria-valuetext").split(" of ")[0]
        return step, page.get_attribute("canvas", "data-frame"), page.get_attribute(".cursor >> nth=0", "d")

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.focus(".step")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert at() == ("step 0", "0", "M0 0V40") and abs(page.evaluate(brightness) - 128) < 6, "the first frame is missing"
    seen = []
    for _ in range(3):
        page.keyboard.press("ArrowRight")
        seen.append(page.evaluate(brightness))
    assert at() == ("step 3", "3", "M3 0V40") and seen == sorted(seen) and len(set(seen)) == 3
    for key, step in (("PageUp", 13), ("ArrowLeft", 12), ("PageDown", 2), ("End", 29), ("ArrowRight", 29), ("Home", 0)):
        page.keyboard.press(key)
        assert at() == (f"step {step}", str(step), f"M{step} 0V40"), key
    page.focus(".marks button")
    page.keyboard.press("Enter")
    assert at()[0] == "step 7"
    page.focus(".jump")
    page.keyboard.press("Enter")
    assert at()[0] == "step 5" and page.input_value(".choose") == "1"
    assert page.evaluate("document.activeElement.className") == "step", "and the keys go on from there"


@pytest.mark.parametrize("mark", [pytest.param(None, marks=needs_browser())])
def test_play_print_and_darkness(chromium, tmp_path, mark):  # noqa: F811
    path = tmp_path / "page.html"
    write_page(path, hostile_page("plain"))
    page = opened(chromium, path, dark=True).page
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(paper) == "rgb(21, 24, 27)"
    page.click(".play")
    page.wait_for_timeout(700)
    assert int(page.input_value(".step")) >= 2
    page.click(".play")
    assert page.get_attribute(".play", "aria-pressed") == "false"
    page.emulate_media(media="print")
    assert page.evaluate(paper) == "rgb(255, 255, 255)" and not page.is_visible(".controls")
    assert page.is_visible("canvas") and page.is_visible("table >> nth=0")
    assert len(page.pdf()) > 10_000
    names = page.evaluate(
        "[...document.querySelectorAll('button, select, input')].every((n) => n.labels?.length || n.innerText)"
    )
    assert names, "every control has a name"


def test_films_fit_their_share(tmp_path):
    """Noise, which JPEG can't make small, of 50 episodes with two cameras stays below the page's 20 MB."""
    rng = np.random.default_rng(0)
    steps = chosen_steps(300, film_frames(100))
    noise = [rng.integers(0, 256, (240, 320, 3), dtype=np.uint8) for _ in steps]
    made = film("image_1", steps, noise, 100)
    assert len(made.source) < 1.34 * FILM_BYTES / 100 + 100 and len(steps) >= 8
    easy = film("image_1", list(range(9)), [np.zeros((240, 320, 3), np.uint8)] * 9, 100)
    assert (easy.width, easy.height, easy.columns) == (160, 120, 3) and easy.missing == []
    assert film("image_1", [0, 1], [None, None], 1) is None


def test_what_is_sampled_is_said():
    assert sampled_steps(50) == list(range(50)) and sampled_steps(1) == [0]
    many = sampled_steps(5000, also=[1234, 9999])
    assert 1234 in many and many[0] == 0 and many[-1] == 4999 and len(many) <= MAX_SAMPLED + 1
    texts = " ".join(left_out(50, 120, 36, 5000, 28, "evenly chosen"))
    for part in ("50 of 120 episodes: evenly chosen", "about 36 frames", "longer than 300 steps", "first 16 are drawn"):
        assert part in texts
    assert left_out(3, 3, 120, 80, 4, "") == ["Its frames are made smaller than they were recorded."]


def test_charts_leave_gaps():
    line = content.Line("a", [0, 1, 2, 3], [1.0, float("nan"), 0.0, 100.0])
    plain, log = (drawing(content.Chart("t", "x", [line], log=log)) for log in (False, True))
    assert plain.lines[0].path.count("M") == 2, "one begins after the gap"
    assert log.lines[0].path.count("M") == 2 and len(log.lines[0].points) == 2, "zero has no logarithm"
    assert [text for _, text in log.y_ticks] == ["1", "10", "100"]
    assert drawing(content.Chart("t", "x", [content.Line("a", [], [])])).lines[0].path == ""


def test_a_page_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"page.html: not written \(.*\); choose another --html"):
        write_page(tmp_path / "file" / "page.html", hostile_page("plain"))
