"""The policy and the server that the tests of serving share."""

from __future__ import annotations

import pytest

from inference.predictor import VLAPredictor
from tests.helpers import write_episodes
from tests.inference.checkpoints import train_tiny
from tests.inference.serving.servers import running


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_paligemma_dir):
    folder = tmp_path_factory.mktemp("run")
    demos = write_episodes(folder / "demos.parquet", [6, 5])
    return train_tiny(folder, tiny_paligemma_dir, [demos])


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return VLAPredictor.from_checkpoint(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def server(predictor):
    with running(predictor, max_message_bytes=500_000, max_image_pixels=100_000, timeout_s=4) as server:
        yield server
