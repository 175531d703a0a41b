"""What tests of pages share: when they run, and what must hold for every page."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chromium import Opened, browser, opened

__all__ = ["chromium", "needs_browser", "opened", "overflow", "quiet"]


def needs_browser() -> list[pytest.MarkDecorator]:
    """Marks of tests that open pages: `browser`, and skipped where there is no chromium or playwright.

    .ci/run installs chromium and sets ALL_BROWSERS, so that there such a test fails instead.
    """
    wanted = {"chromium (apt-get install chromium)": shutil.which("chromium")}
    wanted["playwright (requirements-dev.txt)"] = importlib.util.find_spec("playwright")
    missing = [name for name, found in wanted.items() if not found]
    skipped = bool(missing) and not os.environ.get("ALL_BROWSERS")
    return [pytest.mark.browser, pytest.mark.skipif(skipped, reason=f"not installed: {', '.join(missing)}")]


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
