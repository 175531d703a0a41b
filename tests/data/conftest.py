"""LeRobot datasets for all tests of this folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from data.convert.lerobot import convert_lerobot
from tests.data.convert.lerobot_fixtures import CAMERAS, DATASETS, FIXTURES, PNG


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """(version, kind) -> folder, frames from video as PNG."""
    folders = {}
    for version, kind in DATASETS:
        folders[version, kind] = tmp_path_factory.mktemp(f"{version}_{kind}") / "out"
        convert_lerobot(FIXTURES / f"lerobot_{version}_{kind}", folders[version, kind], CAMERAS, encoding=PNG)
    return folders


@pytest.fixture
def dataset(tmp_path):
    """Copies a fixture, to be damaged."""

    def copy(version: str, kind: str) -> Path:
        return Path(shutil.copytree(FIXTURES / f"lerobot_{version}_{kind}", tmp_path / f"{version}_{kind}"))

    return copy
