"""Corrections and failures in training data: which steps are drawn, how often, and settings that would do nothing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from data.loader import build_datasets, build_sampler
from data.processing import processors_from_config
from data.statistics import calculate_statistics, require_statistics_of
from tests.helpers import episode_rows, write_rows
from tests.policies import model_section
from utils.config_utils import ConfigError, config_from_dict, config_to_dict
from utils.parquet_utils import DataError

LENGTHS = (6, 10, 7)
TAKEN_OVER_AT = 5  # in the second episode


def labelled_rows():
    """Three episodes: plain, corrected from a step on, failed."""
    rows = []
    for episode, length in enumerate(LENGTHS):
        for step, row in enumerate(episode_rows(length, seed=2 * episode)):
            row |= {"intervention": episode == 1 and step >= TAKEN_OVER_AT, "success": episode != 2}
            rows.append(row)
    return rows


@pytest.fixture
def make_config(tmp_path, tiny_paligemma_dir):
    def make(weighting, rows=None):
        path = write_rows(tmp_path / "labelled.parquet", rows or labelled_rows())
        data = {"train_parquet_files": [str(path)], "state_dim": 4, "batch_size": 4, "sample_weighting": weighting}
        data["cache_dir"] = str(tmp_path / "cache")
        return config_from_dict({"data": data, "model": model_section(tiny_paligemma_dir)})

    return make


def training_data(config):
    train, _ = build_datasets(config, *processors_from_config(config))
    return train


def drawn(config, train, steps=500):
    sampler = build_sampler(config, train)
    samples = np.array(list(itertools.chain.from_iterable(itertools.islice(sampler, steps))))
    return train.datasets[0].rows(samples)


def test_failures_and_steps_before_an_intervention_make_no_sample(make_config):
    config = make_config({"leave_out_failures": True, "leave_out_before": 2})
    train = training_data(config)
    expected = [*range(6), *range(6, 9), *range(11, 16)]
    assert train.datasets[0].rows(np.arange(len(train))).tolist() == expected
    assert sorted(set(drawn(config, train))) == expected
    epoch = drawn(config, train, steps=7)
    assert sorted(epoch) == sorted(expected * 2), "without weights an epoch is still every sample once"


def test_a_chunk_ends_where_left_out_steps_begin(make_config):
    dataset = training_data(make_config({"leave_out_before": 2})).datasets[0]
    sample = dataset[7]  # second episode, step 1: steps 3 and 4 are left out
    assert (sample["frame_index"], sample["action_is_pad"].tolist()) == (1, [False, False, True, True])
    assert not sample["action"][2:].any() and sample["action"][:2].all()
    whole = training_data(make_config("step")).datasets[0]
    assert not whole[7]["action_is_pad"].any()


def test_corrections_are_drawn_as_often_as_asked(make_config):
    config = make_config({"corrections": 4})
    rows = drawn(config, training_data(config), steps=5000)
    corrected = (rows >= 11) & (rows < 16)
    share = 4 * 5 / (4 * 5 + 18)
    assert abs(corrected.mean() - share) < 4 * np.sqrt(share * (1 - share) / len(rows))
    by_episode = make_config({"by": "episode", "corrections": 2})
    rows = drawn(by_episode, training_data(by_episode), steps=5000)
    share = 1 / 3 / (1 + 1 / 3 * 0.5)  # of the first episode: the second weighs 1.5 times as much as the others
    assert abs((rows < 6).mean() - share) < 4 * np.sqrt(share * (1 - share) / len(rows))


def test_a_resumed_run_draws_what_the_whole_run_draws(make_config):
    config = make_config({"corrections": 3, "leave_out_failures": True})
    train = training_data(config)
    whole = list(itertools.islice(build_sampler(config, train), 40))
    resumed = build_sampler(config, train)
    resumed.start_step = 17
    assert list(itertools.islice(resumed, 23)) == whole[17:]


def test_statistics_are_of_all_steps(make_config):
    config = make_config({"leave_out_failures": True, "leave_out_before": 5})
    train = training_data(config)
    statistics = calculate_statistics(train.datasets[0].store.files, 4, 4)
    require_statistics_of(train, [statistics], "absolute")


def test_the_short_spelling_stays(make_config):
    assert make_config("task").data.sample_weighting == make_config({"by": "task"}).data.sample_weighting
    assert config_from_dict(config_to_dict(make_config("episode"))).data.sample_weighting.by == "episode"
    with pytest.raises(ConfigError, match=r"data\.sample_weighting\.by is 'often'; choose from step, episode, task"):
        make_config("often")
    with pytest.raises(ConfigError, match=r"data\.sample_weighting\.corrections is 0\.0; it must be positive"):
        make_config({"corrections": 0})
    with pytest.raises(ConfigError, match=r"leave_out_before is -1; give a number of steps, or 0"):
        make_config({"leave_out_before": -1})


@pytest.mark.parametrize(
    ("weighting", "error"),
    [
        ({"corrections": 2}, r"corrections is 2, but no dataset has steps with intervention true beside others"),
        ({"leave_out_failures": True}, r"leave_out_failures is True, but no episode has success false"),
        ({"leave_out_before": 3}, r"leave_out_before is 3, but no step comes before one with intervention true"),
    ],
)
def test_a_setting_that_changes_nothing_is_refused(make_config, weighting, error):
    with pytest.raises(DataError, match=error):
        training_data(make_config(weighting, [row for i in range(2) for row in episode_rows(5, seed=i)]))


def test_faults_of_the_columns_name_place_and_remedy(make_config):
    failures = [row | {"success": False} for row in labelled_rows()]
    with pytest.raises(DataError, match=r"dataset default: data\.sample_weighting leaves out every step"):
        training_data(make_config({"leave_out_failures": True}, failures))
    changing = labelled_rows()
    changing[8]["success"] = False
    with pytest.raises(DataError, match=r"row 8 \(episode 1, step 2\): success changes within the episode"):
        training_data(make_config({"leave_out_failures": True}, changing))
    numbers = [row | {"success": 1.0} for row in labelled_rows()]
    with pytest.raises(DataError, match=r"column 'success' is double; wanted bool"):
        training_data(make_config({"leave_out_failures": True}, numbers))
    assert len(training_data(make_config("step", numbers))) == 23, "columns that nobody asked for are ignored"
