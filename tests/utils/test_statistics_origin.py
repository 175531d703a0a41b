"""Statistics know the data that they were made of, and are refused for others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.loader import build_datasets
from data.processing import processors_from_config
from data.statistics import require_statistics_of
from tests.helpers import write_episodes
from tests.utils.test_statistics_loading import change
from utils.calculate_normalization_stats import calculate_for_config
from utils.config_utils import Config, config_from_dict
from utils.parquet_utils import DataError
from utils.statistics import StatisticsError


def scaled(path: Path, factor: float) -> Path:
    table = pq.read_table(path)
    for name in ("state", "action"):
        values = (np.array(table[name].to_pylist(), np.float32) * np.float32(factor)).tolist()
        position = table.column_names.index(name)
        table = table.set_column(position, name, pa.array(values, pa.list_(pa.float32())))
    pq.write_table(table, path)
    return path


def check_of(config: Config, statistics: list[dict]) -> None:
    train, _ = build_datasets(config, *processors_from_config(config))
    require_statistics_of(train, statistics, config.data.action_mode)


def made_for(config: Config) -> list[dict]:
    return list(calculate_for_config(config)["datasets"].values())


@pytest.fixture
def folder_config(tmp_path, tiny_paligemma_dir):
    """A config that trains on a folder of two files."""
    for name, seed in (("a", 0), ("b", 10)):
        write_episodes(tmp_path / f"train/{name}.parquet", [6, 5, 4], seed=seed)
    tree = {
        "data": {"train_parquet_files": str(tmp_path / "train"), "state_dim": 4, "cache_dir": str(tmp_path / "cache")},
        "model": {
            "vlm_config": {"model_name_or_path": str(tiny_paligemma_dir)},
            "action_head_config": {"per_action_dim": 4, "horizon": 3},
        },
    }
    return config_from_dict(tree)


@pytest.mark.parametrize(
    "settings", [{}, {"val_fraction": 0.4}, {"max_episodes": 3}, {"action_mode": "delta", "absolute_action_dims": (3,)}]
)
def test_statistics_of_the_training_data_are_taken(folder_config, settings):
    config = change(folder_config, **settings)
    check_of(config, made_for(config))


def test_moved_data_are_the_same_data(folder_config, tmp_path):
    statistics = made_for(folder_config)
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    check_of(change(folder_config, train_parquet_files=(str(tmp_path / "elsewhere"),)), statistics)


def test_statistics_of_other_data_are_refused(folder_config, tmp_path):
    statistics = made_for(folder_config)
    for factor in (57.3, 0.5):  # degrees where there were radians; values that lie inside
        other = tmp_path / f"other{factor}"
        for path in sorted((tmp_path / "train").iterdir()):
            write = other / path.name
            write.parent.mkdir(exist_ok=True)
            write.write_bytes(path.read_bytes())
            scaled(write, factor)
        message = (
            r"dataset default: its statistics were made of \S+a.parquet, \S+train/b.parquet \(30 rows\), training "
        )
        message += rf"reads \S+other{factor}/a.parquet, \S+ \(30 rows\); min and max of state\[0\], .* differ"
        message += r", [\d.]+ % of the values lie outside; make" if factor > 1 else "; make"
        with pytest.raises(StatisticsError, match=message):
            check_of(change(folder_config, train_parquet_files=(str(other),)), statistics)


def test_statistics_of_fewer_or_more_rows_are_refused(folder_config, tmp_path):
    one = change(folder_config, train_parquet_files=(str(tmp_path / "train/a.parquet"),))
    with pytest.raises(
        StatisticsError, match=r"a.parquet \(15 rows\), training reads \S+a.parquet, \S+b.parquet \(30 r"
    ):
        check_of(folder_config, made_for(one))
    with pytest.raises(StatisticsError, match=r"b.parquet \(30 rows\), training reads \S+a.parquet \(15 rows\)"):
        check_of(one, made_for(folder_config))


def test_statistics_written_by_hand_are_taken_with_a_warning(folder_config, caplog):
    """Joint limits, or those of a released policy: they do not say how many rows they were made of."""
    statistics = made_for(folder_config)
    del statistics[0]["rows"], statistics[0]["files"]
    wide = {"state": {"min": [-9.0] * 4, "max": [9.0] * 4}, "action": {"min": [-9.0] * 4, "max": [9.0] * 4}}
    check_of(folder_config, [{name: statistics[0][name] | wide[name] for name in wide}])
    assert "outside" not in caplog.text
    narrow = {name: statistics[0][name] | {"max": [0.0] * 4} for name in wide}
    check_of(folder_config, [narrow])
    assert "dataset default: up to " in caplog.text and "lie outside of the statistics' min and max" in caplog.text


def test_a_fraction_that_holds_out_nothing(folder_config, tmp_path):
    one = write_episodes(tmp_path / "one.parquet", [9])
    config = change(folder_config, train_parquet_files=(str(one),), val_fraction=0.1)
    message = "dataset default: data.val_fraction 0.1 of 1 episode holds out none, .*; record more, or set it to 0"
    with pytest.raises(DataError, match=message):
        build_datasets(config, *processors_from_config(config))
    two = change(config, train_parquet_files=(str(write_episodes(tmp_path / "two.parquet", [5, 4])),))
    train, val = build_datasets(two, *processors_from_config(two))
    assert len(train) + len(val) == 9 and len(val) > 0
    with pytest.raises(DataError, match="holds out none"):
        build_datasets(change(two, max_episodes=1), *processors_from_config(two))
