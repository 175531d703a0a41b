"""A page as one HTML file that opens from disk and asks nobody for anything.

Style and script stand in the file and are named to the browser by their hashes in a Content-Security-Policy, which
forbids every other script and every request. Text is escaped by the template; values of the viewer are JSON in a block
that is never run.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from utils.misc import atomic_path, writing
from utils.page.charts import drawing, range_bar, rate_bar
from utils.page.content import Page, Viewer

FOLDER = Path(__file__).resolve().parent
MAX_TEXT = 20_000  # characters of one text


def as_html(page: Page) -> str:
    """The page as HTML."""
    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; img-src data:; media-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    return _template().render(page=page, style=Markup(style), script=Markup(script), policy=policy)


def write_page(path: str | Path, page: Page) -> None:
    """Write the page, whole or not at all.

    Raises:
        WriteError: it can't be written there.
    """
    with writing(Path(path), "choose another --html"), atomic_path(path) as temporary:
        temporary.write_text(as_html(page), encoding="utf-8")


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"viewer_data": _viewer_data, "cell": _cell}
    environment.globals |= {"drawing": drawing, "range_bar": range_bar, "rate_bar": rate_bar}
    return environment.get_template("page.html.jinja")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _shown(value: Any) -> Any:
    """A text without control characters and marks that turn its direction; those are written as escapes."""
    if not isinstance(value, str) or isinstance(value, Markup) or value.startswith("data:"):
        return value
    value = value if len(value) <= MAX_TEXT else value[:MAX_TEXT] + " …"
    if value.isprintable():
        return value
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in value)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _viewer_data(viewer: Viewer) -> Markup:
    """The episodes as JSON that can't end the block it stands in."""
    text = json.dumps(_plain([asdict(episode) for episode in viewer.episodes]), separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _plain(value: Any) -> Any:
    """Values for JSON: numbers with four digits, None for those that are not finite, texts fit to be shown."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return _shown(value)
