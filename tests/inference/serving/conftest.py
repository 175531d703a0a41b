"""The policy that the tests of serving share."""

from __future__ import annotations

import pytest

from inference.predictor import VLAPredictor
from tests.helpers import write_episodes
from tests.inference.checkpoints import train_tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_paligemma_dir):
    folder = tmp_path_factory.mktemp("run")
    demos = write_episodes(folder / "demos.parquet", [6, 5])
    return train_tiny(folder, tiny_paligemma_dir, [demos])


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return VLAPredictor.from_checkpoint(checkpoint, device="cpu")
