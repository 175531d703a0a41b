"""A small run on real files, which tests change as they need."""

from __future__ import annotations

import pytest

from tests.helpers import write_episodes
from tests.policies import merged, model_section
from utils.config_utils import Config, config_from_dict


@pytest.fixture
def make_config(tmp_path, tiny_paligemma_dir):
    train = write_episodes(tmp_path / "train.parquet", [9, 7, 6], image_size=32)
    val = write_episodes(tmp_path / "val.parquet", [5], seed=50, image_size=32)

    def make(**changes) -> Config:
        base = {
            "data": {
                "train_parquet_files": [str(train)],
                "val_parquet_files": [str(val)],
                "state_dim": 4,
                "batch_size": 4,
                "num_workers": 0,
                "cache_dir": str(tmp_path / "cache"),
            },
            "model": model_section(tiny_paligemma_dir, dropout_prob=0.1),
            "training": {
                "checkpoint_dir": str(tmp_path / "experiments"),
                "experiment_name": "run",
                "max_steps": 12,
                "epochs": 100,
                "log_interval": 1,
                "val_every_n_epochs": 2,
            },
            "optimizer": {"lr": 1e-3},
            "lr_scheduler": {"warmup_steps": 3},
            "inference": {"num_inference_steps": 2},
        }
        return config_from_dict(merged(base, changes))

    return make
