"""Text of other people's in pictures: instructions in any script, and names with any characters.

matplotlib's own font has Latin, Greek and Cyrillic letters, and draws a box for each character of Chinese, Japanese,
Korean and many other scripts. Here a font of this machine that has them is used beside it; where there is none, words
take the characters' place. Nothing is read as mathematics, which a single `$` in a name would make matplotlib do.
"""

from __future__ import annotations

import functools
import logging
import re
import textwrap
import unicodedata
from itertools import groupby
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

from utils.misc import atomic_path

logger = logging.getLogger(__name__)

OWN_FONT = "DejaVu Sans"
UNSUITABLE = re.compile(
    "Last Resort|Emoji|Color"
)  # a box for every character; pictures that can't be drawn as outlines
LABEL_COLUMNS = 18  # characters of a line beside a plot of one dimension


def drawable(text: str) -> str:
    """A text as matplotlib can draw it: boxes become words, such as "(4 CJK characters)", and `$` stays a `$`.

    Give it everything in a picture that a user or a dataset wrote, and save the picture by `save_figure`.
    """
    return in_words(text).replace("$", r"\$")


def in_words(text: str) -> str:
    """A text in which words stand for the characters that no font of this machine has; said once in the log."""
    missing = _lacked(text)
    font = font_beside(text)
    if font is not None:
        missing -= _characters(font.fname)
    if not missing:
        return text
    _warn_of_missing_font(_script(min(missing)))
    parts = groupby(text, key=lambda character: _script(character) if character in missing else "")
    return "".join("".join(run) if not script else _words(script, len(list(run))) for script, run in parts)


def font_beside(text: str) -> FontEntry | None:
    """The font here that has most of the characters that matplotlib's own lacks; None without need, or without one."""
    return _best_font(_lacked(text))


def axis_label(name: str) -> str:
    """The name of a state's or action's dimension, in lines that fit beside its plot."""
    return drawable("\n".join(textwrap.wrap(name, LABEL_COLUMNS)) or name)


def save_figure(figure: Figure, path: str | Path, dpi: int = 110) -> None:
    """Write a figure as PNG, whole or not at all, every text of it in fonts that have its characters."""
    for text in figure.findobj(Text):
        font = font_beside(text.get_text())
        if font is not None:
            text.set_fontfamily([OWN_FONT, font.name])
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)


def _lacked(text: str) -> frozenset[str]:
    """The characters of a text that matplotlib's own font does not have."""
    if text.isascii():
        return frozenset()
    return frozenset(character for character in text if not character.isspace()) - _characters(usual_font_file())


@functools.lru_cache(maxsize=1)
def usual_font_file() -> str:
    """The font that matplotlib brings and uses."""
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


@functools.lru_cache(maxsize=64)
def _characters(font_file: str) -> frozenset[str]:
    """The characters that a font draws; none for a file that can't be read."""
    try:
        return frozenset(map(chr, FT2Font(font_file).get_charmap()))
    except (OSError, RuntimeError):
        return frozenset()


@functools.lru_cache(maxsize=256)
def _best_font(wanted: frozenset[str]) -> FontEntry | None:
    """The font with most of these characters, upright and of usual weight where there is a choice."""
    if not wanted:
        return None
    best, most = None, (0, 0)
    for font in fontManager.ttflist:
        if UNSUITABLE.search(font.name):
            continue
        found = len(wanted & _characters(font.fname))
        looks = -abs(_weight(font.weight) - 400) - 1000 * (font.style != "normal") - 100 * ("Mono" in font.name)
        if found and (found, looks) > most or found > most[0]:
            best, most = font, (found, looks)
    return best


def _weight(weight: int | str) -> int:
    return weight if isinstance(weight, int) else {"normal": 400, "regular": 400, "bold": 700}.get(weight, 500)


def _script(character: str) -> str:
    """The first word of a character's name in Unicode: CJK, HIRAGANA, HANGUL, THAI, ..."""
    return unicodedata.name(character, "UNKNOWN").split()[0]


def _words(script: str, count: int) -> str:
    name = script if script == "CJK" else script.capitalize()
    return f"({count} {name} character{'' if count == 1 else 's'})"


@functools.lru_cache(maxsize=16)
def _warn_of_missing_font(script: str) -> None:
    """Say it once for each script."""
    logger.warning(
        "no font on this machine draws %s characters: pictures say in words where they stand. A font such as Noto Sans "
        "CJK mends it (Debian: apt-get install fonts-noto-cjk; then remove matplotlib's font cache, %s)",
        script if script == "CJK" else script.capitalize(),
        matplotlib.get_cachedir(),
    )
