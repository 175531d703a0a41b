"""Pages in a real browser: Debian's chromium without a window, which may open nothing but the page."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

QUIET = ("--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
QUIET += ("--disable-component-update", "--disable-sync")


def needs_browser() -> list[pytest.MarkDecorator]:
    """Marks of tests that open pages: skipped where there is no chromium or playwright.

    scripts/run_tests.sh sets ALL_SIMULATORS, and there such a test fails instead.
    """
    wanted = {"chromium (apt-get install chromium)": shutil.which("chromium")}
    wanted["playwright (requirements-dev.txt)"] = importlib.util.find_spec("playwright")
    missing = [name for name, found in wanted.items() if not found]
    skipped = bool(missing) and not os.environ.get("ALL_SIMULATORS")
    return [pytest.mark.skipif(skipped, reason=f"not installed: {', '.join(missing)}")]


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
    """A running chromium, as playwright has it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = {"executable_path": shutil.which("chromium"), "args": QUIET, "chromium_sandbox": False}
        running = playwright.chromium.launch(**options)
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


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A running chromium; of a module alone, since playwright keeps an event loop running meanwhile."""
    with browser() as running:
        yield running


def quiet(view: Opened, path: Path) -> None:
    """Nothing went wrong in a page, and it asked for nothing but itself."""
    assert view.console == [] and view.requests == [path.absolute().as_uri()]


def overflow(page: Any) -> int:
    """Pixels by which a page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
