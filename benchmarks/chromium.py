"""Pages in a real browser: Debian's chromium without a window, driven by playwright. Tests open pages with it too."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

QUIET = ("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
QUIET += ("--disable-component-update", "--disable-sync")


@dataclass
class Opened:
    """A page in the browser.

    Attributes:
        page: playwright's.
        seconds: from the address to the end of its load event.
        console: errors and warnings of the console, exceptions of scripts, dialogs.
        requests: addresses that the page asked for, without the `data:` ones.
    """

    page: Any
    seconds: float
    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A running chromium, as playwright has it.

    Raises:
        FileNotFoundError: chromium is not installed.
    """
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium")
    if program is None:
        raise FileNotFoundError("chromium is not installed; apt-get install chromium")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=QUIET, chromium_sandbox=False)
        try:
            yield running
        finally:
            running.close()


def opened(running: Any, path: Path, width: int = 1280, *, dark: bool = False) -> Opened:
    """Open a file in a new window of this width and wait until it is loaded."""
    scheme = "dark" if dark else "light"
    page = running.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    result = Opened(page, 0.0)
    page.on("console", lambda m: result.console.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: result.console.append(str(error)))
    page.on("dialog", lambda dialog: (result.console.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda r: None if r.url.startswith("data:") else result.requests.append(r.url))
    started = time.perf_counter()
    page.goto(path.absolute().as_uri(), wait_until="load")
    result.seconds = time.perf_counter() - started
    return result
