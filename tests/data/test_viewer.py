"""Recorded episodes for a page: datasets narrower than the policy, and held-out ones."""

from __future__ import annotations

import numpy as np
import pytest

from data.viewer import DatasetEpisodes
from tests.helpers import episode_rows, write_rows
from tests.policies import dataset_of, policy_config
from utils.calculate_normalization_stats import calculate_statistics
from utils.config_data import MixtureEntry
from utils.page.content import Ranges


@pytest.fixture
def opened(tmp_path, tiny_paligemma_dir):
    """(dataset, config) of episodes with these rows, for a policy with four action values."""

    def call(rows, *, split="all", entry=None, reads_state=True, **data):
        config = policy_config(tiny_paligemma_dir, tmp_path, data=data)
        files = [write_rows(tmp_path / "data.parquet", rows)]
        dataset = dataset_of(config, files, reads_state, entry=entry, split=split)
        return dataset, config

    return call


def test_a_mixture_s_narrower_dataset_has_its_own_width(opened):
    entry = MixtureEntry(path=("x",), name="narrow", state_dim=2, per_action_dim=3)
    dataset, _ = opened(episode_rows(5, state_dim=2, action_dim=3), entry=entry)
    episode = DatasetEpisodes(dataset).show(0, 1, "first", np.zeros((1, 5, 3)), lambda _: [], [])
    assert [curve.name for curve in episode.curves] == [f"action[{d}]" for d in range(3)] + ["state[0]", "state[1]"]


def test_statistics_stand_beside_the_held_out_episodes_alone(opened):
    rows = [row for seed in range(8) for row in episode_rows(5, seed=seed)]
    dataset, config = opened(rows, split="val", val_fraction=0.25)
    statistics = calculate_statistics([dataset.store.files[0]], 4, 4)
    low, high = np.array([[-0.5], [0.5]]).repeat(4, axis=1)
    statistics["action"] |= {"q01": low.tolist(), "q99": high.tolist()}
    section = DatasetEpisodes(dataset).fit("fit", statistics, config)
    (ranges,) = [block for block in section.blocks if isinstance(block, Ranges)]
    outside = (dataset.store.action < low) | (dataset.store.action > high)
    held_out = outside[dataset.rows(np.arange(len(dataset)))].mean(axis=0)
    assert [shown.outside for shown in ranges.ranges[4:]] == pytest.approx(held_out)
    assert not np.isclose(held_out, outside.mean(axis=0)).all()
