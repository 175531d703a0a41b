"""The tiny backbones of the tests of models."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(params=["paligemma", "paligemma2"])
def directory(request: pytest.FixtureRequest, tiny_paligemma_dir: Path, tiny_paligemma2_dir: Path) -> Path:
    return tiny_paligemma_dir if request.param == "paligemma" else tiny_paligemma2_dir
