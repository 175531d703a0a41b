"""The training configuration that tests of statistics share."""

from __future__ import annotations

import pytest

from tests.helpers import episode_rows, write_episodes, write_rows
from utils.config_utils import Config, config_from_dict


@pytest.fixture
def mixture(tmp_path, tiny_paligemma_dir) -> Config:
    """A dataset of two files that share an episode, and a narrow one of a shorter horizon, in delta mode."""
    rows = [row for i, n in enumerate((6, 9, 5, 7)) for row in episode_rows(n, seed=i, image_size=32)]
    write_rows(tmp_path / "wide/0.parquet", rows[:11])
    write_rows(tmp_path / "wide/1.parquet", rows[11:])
    write_episodes(tmp_path / "narrow.parquet", [6, 5, 8], seed=20, state_dim=3, action_dim=2, image_size=32)
    narrow = {"path": str(tmp_path / "narrow.parquet"), "name": "narrow", "state_dim": 3, "per_action_dim": 2}
    tree = {
        "data": {
            "mixture": [{"path": str(tmp_path / "wide"), "name": "wide"}, narrow | {"horizon": 2}],
            "state_dim": 4,
            "action_mode": "delta",
            "absolute_action_dims": [3],
            "val_fraction": 0.25,
            "cache_dir": str(tmp_path / "cache"),
        },
        "model": {
            "vlm_config": {"model_name_or_path": str(tiny_paligemma_dir)},
            "action_head_config": {"horizon": 4, "per_action_dim": 4, "hidden_dim": 32, "num_heads": 4},
        },
    }
    return config_from_dict(tree)
