"""Text from outside: one line, printable, and never markup or a formula."""

from __future__ import annotations

import pytest

from utils.text import csv_text, markdown_text, printable, shortened


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("open the window", "open the window"),
        ("öffne \u7a97", "öffne \u7a97"),
        ("a\nINFO inference.server: forged line", "a\\nINFO inference.server: forged line"),
        ("\x1b[2J\x07", "\\x1b[2J\\x07"),
        ("\u202eevil", "\\u202eevil"),
        ("\ud800", "\\ud800"),
        ("x" * 300, "x" * 200 + " ..."),
        ("\n" * 150, "\\n" * 100 + " ..."),
        (3.5, "3.5"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [("open it", "open it"), ("open  the\nwindow", "open the…"), ("打开窗户", "打开窗户"), ("打开窗户吧", "打开窗…")],
)
def test_shortened(text, shown):
    assert shortened(text, 9 if text.isascii() else 8) == shown


def test_markup_is_shown_as_written():
    text = markdown_text("<script>alert(1)</script> [a](javascript:b) | # `c`")
    assert "<" not in text and "\\[a\\]\\(javascript:b\\)" in text and "\\|" in text and "\\#" in text and "\\`" in text


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_no_formula_in_a_table(start):
    assert csv_text(f"{start}cmd|' /C calc'!A0").startswith("'")
    assert csv_text("window") == "window" and csv_text(-0.5) == -0.5
