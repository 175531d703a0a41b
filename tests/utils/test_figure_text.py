"""Texts in pictures: another font where one is needed and there, words where there is none; never boxes."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from PIL import Image

from utils import figure_text
from utils.figure_text import axis_label, drawable, font_beside, in_words, save_figure

PROMPT = "打开窗户"


@pytest.fixture
def no_fonts(monkeypatch):
    """A machine that has matplotlib's own fonts alone."""
    monkeypatch.setattr(fontManager, "ttflist", [f for f in fontManager.ttflist if f.name.startswith("DejaVu")])
    forget()
    yield
    forget()


@pytest.fixture
def small_font(no_fonts, tmp_path):
    """A font that has the prompt's characters, each a filled square."""
    pen = TTGlyphPen(None)
    pen.moveTo((50, 0))
    for corner in ((50, 800), (850, 800), (850, 0)):
        pen.lineTo(corner)
    pen.closePath()
    names = [".notdef", *(f"uni{ord(character):04X}" for character in PROMPT)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(character): name for character, name in zip(PROMPT, names[1:], strict=True)})
    builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (900, 50)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Small Hanzi", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800, sTypoDescender=-200)
    builder.setupPost()
    builder.save(tmp_path / "small.ttf")
    fontManager.addfont(tmp_path / "small.ttf")
    forget()


def forget():
    for cached in (figure_text._best_font, figure_text._warn_of_missing_font):
        cached.cache_clear()


def test_text_that_the_usual_font_draws_stays_as_it_is(no_fonts):
    for text in ("open the window", "Öffne das Fenster · 3 → 4 …", "открой окно"):
        assert in_words(text) == text
        assert font_beside(text) is None


def test_words_take_the_place_of_what_no_font_draws(no_fonts, caplog):
    with caplog.at_level(logging.WARNING):
        assert in_words(f"task 1: {PROMPT}, 창문 열어!") == (
            "task 1: (4 CJK characters), (2 Hangul characters) (2 Hangul characters)!"
        )
        in_words(PROMPT)
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == [
        "no font on this machine draws CJK characters"
    ]
    assert "fonts-noto-cjk" in caplog.text


def test_a_font_with_the_characters_is_used(small_font, tmp_path):
    assert in_words(PROMPT) == PROMPT
    assert font_beside(PROMPT).name == "Small Hanzi"
    assert in_words(PROMPT + "锅") == PROMPT + "(1 CJK character)"
    ink = []
    for name, text in (("a", PROMPT), ("b", "----")):
        figure = Figure(figsize=(2, 1))
        figure.text(0.1, 0.3, drawable(text), fontsize=20)
        save_figure(figure, tmp_path / f"{name}.png")
        assert [t.get_fontfamily() for t in figure.texts] == [
            ["DejaVu Sans", "Small Hanzi"] if text == PROMPT else ["sans-serif"]
        ]
        ink.append((np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")) < 128).sum())
    assert ink[0] > 10 * ink[1] > 0  # four filled squares, no outlines of boxes


def test_a_dollar_is_a_dollar(tmp_path):
    figure = Figure(figsize=(2, 1))
    figure.text(0.1, 0.3, drawable(r"costs 3$ or $\frac{"))
    save_figure(figure, tmp_path / "a.png")  # as mathematics it is wrong, and drawing it an error
    assert (tmp_path / "a.png").is_file()


def test_labels_fit_beside_their_plots():
    assert axis_label("gripper") == "gripper"
    assert axis_label("left arm shoulder pan position") == "left arm shoulder\npan position"
    assert axis_label("main_left_shoulder_pan.pos") == "main_left_shoulder\n_pan.pos"
