"""Normalization statistics: right numbers, images never read, clear errors."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.helpers import episode_rows, write_broken, write_episodes, write_rows
from utils.calculate_normalization_stats import StatisticsError, calculate_statistics, load_statistics
from utils.parquet_utils import DataError


def test_numbers_equal_numpys(tmp_path):
    files = [write_episodes(tmp_path / f"{i}.parquet", [20, 7], seed=10 * i) for i in range(2)]
    statistics = calculate_statistics(files, 4, 4)
    for name in ("state", "action"):
        values = np.concatenate([np.float32(pq.read_table(path)[name].to_pylist()) for path in files])
        got = statistics[name]
        assert got["count"] == 54
        np.testing.assert_array_equal(got["min"], values.min(0))
        np.testing.assert_array_equal(got["max"], values.max(0))
        np.testing.assert_allclose(got["mean"], values.mean(0, dtype=np.float64), rtol=1e-12)
        np.testing.assert_allclose(got["std"], values.std(0, dtype=np.float64), rtol=1e-12)
        np.testing.assert_allclose(got["q01"], np.quantile(values, 0.01, axis=0), rtol=1e-6)
        np.testing.assert_allclose(got["q99"], np.quantile(values, 0.99, axis=0), rtol=1e-6)


def test_constant_dimension(tmp_path):
    rows = episode_rows(9)
    for row in rows:
        row["action"][2] = 0.1
    summary = calculate_statistics([write_rows(tmp_path / "a.parquet", rows)], 4, 4)["action"]
    assert summary["std"][2] == 0 and summary["min"][2] == summary["max"][2] == summary["mean"][2] == np.float32(0.1)


def test_images_are_never_read(tmp_path, monkeypatch):
    rows = episode_rows(5)
    for row in rows:
        row["image_1"] = np.random.default_rng(0).bytes(200_000)
    path = write_rows(tmp_path / "a.parquet", rows, row_group_size=5)
    metadata = pq.ParquetFile(path).metadata.row_group(0)
    spoiled = bytearray(path.read_bytes())
    for i in range(metadata.num_columns):
        column = metadata.column(i)
        if column.path_in_schema == "image_1":  # overwrite the image pages: reading them would fail
            start = min(x for x in (column.dictionary_page_offset, column.data_page_offset) if x)
            spoiled[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(spoiled)
    with pytest.raises(OSError):
        pq.read_table(path, columns=["image_1"])
    assert calculate_statistics([path], 4, 4)["state"]["count"] == 5


def test_bad_rows_are_named(tmp_path):
    path = write_broken(tmp_path / "bad.parquet", lambda rows: rows[7].__setitem__("action", [0.0] * 6))
    with pytest.raises(DataError, match=r"bad\.parquet row 7: action has 6 values, config wants per_action_dim 4"):
        calculate_statistics([path], 4, 4)


def test_loading_fails_with_the_command_that_makes_the_file(tmp_path):
    command = "python utils/calculate_normalization_stats.py --config_path c.yaml --output_path"
    with pytest.raises(StatisticsError, match=f"is not set; set it to stats.json and run: {command} stats.json"):
        load_statistics(None, 4, 4, "c.yaml")
    missing = str(tmp_path / "s.json")
    with pytest.raises(StatisticsError, match=f"does not exist; make it with: {command} {missing}"):
        load_statistics(missing, 4, 4, "c.yaml")


def test_loading_checks_sizes_and_content(tmp_path):
    statistics = calculate_statistics([write_episodes(tmp_path / "a.parquet", [5])], 4, 4)
    path = tmp_path / "s.json"
    path.write_text(json.dumps(statistics))
    assert load_statistics(str(path), 4, 4, "c.yaml") == statistics
    with pytest.raises(StatisticsError, match=r"state\.min has 4 values, config wants data\.state_dim 7"):
        load_statistics(str(path), 7, 4, "c.yaml")
    with pytest.raises(StatisticsError, match=r"action\.min has 4 values, config wants per_action_dim 7"):
        load_statistics(str(path), 4, 7, "c.yaml")
    del statistics["action"]["q99"]
    path.write_text(json.dumps(statistics))
    with pytest.raises(StatisticsError, match=r"no action\.q99"):
        load_statistics(str(path), 4, 4, "c.yaml")
    statistics["action"]["q99"] = [float("nan")] * 4
    path.write_text(json.dumps(statistics))
    with pytest.raises(StatisticsError, match=r"action\.q99 is not finite"):
        load_statistics(str(path), 4, 4, "c.yaml")
    path.write_text("{")
    with pytest.raises(StatisticsError, match="not valid JSON"):
        load_statistics(str(path), 4, 4, "c.yaml")


def test_script(tmp_path):
    data, output = write_episodes(tmp_path / "a.parquet", [6]), tmp_path / "out" / "s.json"
    config = tmp_path / "c.yaml"
    config.write_text("data: {state_dim: 4}\nmodel: {action_head_config: {per_action_dim: 4}}\n")
    command = [sys.executable, "utils/calculate_normalization_stats.py", "--config_path", str(config)]
    command += ["--output_path", str(output), "--train_data_override", str(data)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(output.read_text())["action"]["count"] == 6
    result = subprocess.run([*command[:-1], str(tmp_path / "no")], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and result.stderr.startswith("error: data.train_parquet_files")
