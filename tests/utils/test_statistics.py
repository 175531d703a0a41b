"""Normalization statistics: right numbers, the training episodes only, images never read, clear errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data.statistics as module
from data.loader import build_datasets
from data.processing import processors_from_config
from tests.helpers import episode_rows, write_broken, write_episodes, write_rows
from utils import calculate_normalization_stats as script
from utils.calculate_normalization_stats import calculate_for_config, calculate_statistics
from utils.config_utils import load_config
from utils.misc import WriteError
from utils.parquet_utils import DataError
from utils.splits import used_episodes, validation_episodes
from utils.statistics import STATISTICS, StatisticsError
from utils.streaming_statistics import StepStatistics


def check(got: dict, values: np.ndarray, rows: int | None = None) -> None:
    """One entry of the statistics against numpy on float32 (rows, dims)."""
    assert got["count"] == (len(values) if rows is None else rows)
    np.testing.assert_array_equal(got["min"], values.min(0))
    np.testing.assert_array_equal(got["max"], values.max(0))
    np.testing.assert_allclose(got["mean"], values.mean(0, dtype=np.float64), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(got["std"], values.std(0, dtype=np.float64), rtol=1e-9)
    slack = got["quantile_rank_error"] * len(values)
    for key, fraction in (("q01", 0.01), ("q99", 0.99)):
        if slack == 0:
            np.testing.assert_allclose(got[key], np.quantile(values.astype(np.float64), fraction, axis=0), rtol=1e-12)
        else:
            assert ((values < got[key]).sum(0) <= fraction * len(values) + slack).all()
            assert ((values <= got[key]).sum(0) >= fraction * len(values) - slack).all()


def write_numbers(
    folder: Path, lengths: list[int], cuts: list[int], row_group_size: int, *, seed: int = 0
) -> tuple[list[Path], np.ndarray, np.ndarray, np.ndarray]:
    """Episodes without images, cut into files at some rows.

    Returns:
        The files, state (rows, 3), action (rows, 4), and each row's episode (rows,).
    """
    rng = np.random.default_rng(seed)
    rows, episode = sum(lengths), np.repeat(np.arange(len(lengths)), lengths)
    state = rng.normal(size=(rows, 3)).astype(np.float32) * np.float32([1, 1e-3, 1e4]) + np.float32([0, 5, -1e3])
    action = rng.standard_cauchy(size=(rows, 4)).astype(np.float32)
    first = np.diff(episode, prepend=-1) > 0
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for i, part in enumerate(np.split(np.arange(rows), cuts)):
        columns = {"state": state[part].tolist(), "action": action[part].tolist()}
        table = {name: pa.array(values, pa.list_(pa.float32())) for name, values in columns.items()}
        files.append(folder / f"{i:03}.parquet")
        pq.write_table(pa.table(table | {"is_first": first[part]}), files[-1], row_group_size=row_group_size)
    return files, state, action, episode


def pairs(state: np.ndarray, action: np.ndarray, episode: np.ndarray, dim: int, horizon: int) -> np.ndarray:
    """Deltas of one dimension, the slow way: float32 (pairs, 1)."""
    found = [
        action[t + k, dim] - state[t, dim]
        for t in range(len(state))
        for k in range(horizon)
        if t + k < len(state) and episode[t + k] == episode[t]
    ]
    return np.float32(found)[:, None]


def one_dim(got: dict, dim: int) -> dict:
    return {key: [values[dim]] if isinstance(values, list) else values for key, values in got.items()}


def test_numbers_equal_numpys(tmp_path):
    files = [write_episodes(tmp_path / f"{i}.parquet", [20, 7], seed=10 * i) for i in range(2)]
    statistics = calculate_statistics(files, 4, 4)
    for name in ("state", "action"):
        values = np.concatenate([np.float32(pq.read_table(path)[name].to_pylist()) for path in files])
        assert statistics[name]["quantile_rank_error"] == 0
        check(statistics[name], values)
    uris = [path.resolve().as_uri() for path in files]
    assert calculate_statistics(uris, 4, 4) == statistics | {"files": uris}
    assert statistics["rows"] == 54 and statistics["files"] == [str(path) for path in files]
    assert statistics["file_bytes"] == sum(path.stat().st_size for path in files)


def test_workers_and_files_and_row_groups_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BYTES_PER_TASK", 1)  # as many tasks as files
    monkeypatch.setattr(module, "ROWS_PER_BATCH", 3000)
    lengths = [100_000, 3, 50_000, 1, 7]
    one, state, action, _ = write_numbers(tmp_path / "one", lengths, [], 10_000)
    many, *_ = write_numbers(tmp_path / "many", lengths, [1, 2, 30_000, 70_001, 100_001, 150_005], 777)
    wanted = calculate_statistics(one, 3, 4, num_workers=1)
    assert 0 < wanted["state"]["quantile_rank_error"] < 4e-5
    for files in (one, many):
        by_workers = [calculate_statistics(files, 3, 4, num_workers=n) for n in (1, 3)]
        assert by_workers[0] == by_workers[1]
        for name, values in (("state", state), ("action", action)):
            check(by_workers[0][name], values)


def test_memory_does_not_grow_with_the_rows():
    """What the statistics hold on to, in delta mode too, is bounded by the sketches' logarithm."""
    statistics = StepStatistics(2, 2, [0, 1], 4)
    rng = np.random.default_rng(0)
    for i in range(40):
        state, action = rng.normal(size=(2, 2, 20_000)).astype(np.float32)
        statistics.add(state, action, np.full(20_000, i))
        window = (statistics._head, statistics._tail)
        assert all(part.state.base is None and part.state.size <= 6 for part in window)
    for summary in (statistics.state, statistics.delta):
        kept = sum(part.shape[1] for part in (*summary.sketch._recent, *summary.sketch._buffers) if part is not None)
        assert kept <= 65536 + 32768 * 7


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts memory as Linux does")
def test_memory_does_not_grow_with_the_row_groups(tmp_path):
    """pyarrow keeps a footer for ever once its schema was asked for: 3 MB for each of these files."""
    (file,), *_ = write_numbers(tmp_path, [1500], [], 1)

    def resident_mb() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    calculate_statistics([file] * 4, 3, 4, num_workers=1)
    before = resident_mb()
    calculate_statistics([file] * 20, 3, 4, num_workers=1)
    assert resident_mb() - before < 20


def test_constant_dimension(tmp_path):
    rows = episode_rows(9)
    for row in rows:
        row["action"][2] = 0.1
    summary = calculate_statistics([write_rows(tmp_path / "a.parquet", rows)], 4, 4)["action"]
    assert summary["std"][2] == 0 and summary["min"][2] == summary["max"][2] == summary["mean"][2] == np.float32(0.1)
    assert summary["q01"][2] == summary["q99"][2] == np.float32(0.1)


def test_images_are_never_read(tmp_path):
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
    statistics = calculate_statistics([path], 4, 4, action_mode="delta", horizon=2, val_fraction=0.5)
    assert statistics["state"]["count"] == 5
    assert statistics["bytes_read"] < 0.05 * statistics["file_bytes"]


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes as Linux does")
def test_bytes_read_are_what_the_system_counts(tmp_path):
    def system_count() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    rows = [row for i in range(4) for row in episode_rows(100, seed=i, state_dim=100, action_dim=100)]
    path = write_rows(tmp_path / "a.parquet", rows, row_group_size=100)
    calculate_statistics([path], 100, 100)  # whatever is imported at first use
    before = system_count()
    statistics = calculate_statistics([path], 100, 100, val_fraction=0.5)
    counted = system_count() - before
    assert statistics["bytes_read"] <= counted <= statistics["bytes_read"] + 3 * 65536
    assert counted < 0.5 * statistics["file_bytes"]


def test_held_out_episodes_never_enter(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BYTES_PER_TASK", 1)
    lengths = [5, 30, 8, 12, 9, 20, 16]
    files, state, action, episode = write_numbers(tmp_path, lengths, [3, 4, 40, 70], 7)
    held_out = validation_episodes("arm", len(lengths), 0.3, 5)
    keep = ~held_out[episode]
    options = {"val_fraction": 0.3, "split_seed": 5, "name": "arm"}
    statistics = calculate_statistics(files, 3, 4, **options)
    limited = calculate_statistics(files, 3, 4, **options, max_episodes=4)
    used = used_episodes("arm", len(lengths), 5, 4) & ~validation_episodes("arm", len(lengths), 0.3, 5, 4)
    assert used.sum() == 3
    check(limited["state"], state[used[episode]])
    check(statistics["state"], state[keep])
    check(statistics["action"], action[keep])
    assert 0 < keep.sum() < len(keep) == statistics["rows"]
    delta = calculate_statistics(files, 3, 4, **options, action_mode="delta", absolute_action_dims=[3], horizon=6)
    found = pairs(state[keep], action[keep], episode[keep], 1, 6)
    check(one_dim(delta["action"], 1), found, rows=keep.sum())


@pytest.mark.parametrize("horizon", [1, 2, 5, 50])
@pytest.mark.parametrize("cuts", [[], [10], [1, 2, 3, 4, 5, 6, 20, 21, 60]])
def test_deltas(tmp_path, monkeypatch, horizon, cuts):
    """Every valid (t, k), across batches, row groups, files shorter than the horizon, and blocks."""
    monkeypatch.setattr(module, "BYTES_PER_TASK", 1)
    monkeypatch.setattr(module, "ROWS_PER_BATCH", 4)
    monkeypatch.setattr("utils.streaming_statistics.PAIRS_PER_BLOCK", 12)
    files, state, action, episode = write_numbers(tmp_path, [30, 1, 2, 40, 7], cuts, 9)
    statistics = calculate_statistics(
        files, 3, 4, action_mode="delta", absolute_action_dims=[1, 3, 9], horizon=horizon, num_workers=2
    )
    got = statistics["action"]
    for dim in (0, 2):
        found = pairs(state, action, episode, dim, horizon)
        check(one_dim(got, dim), found, rows=80)
        assert got["pairs"] == len(found)
    for dim in (1, 3):
        check(one_dim(got, dim), action[:, [dim]])
    check(statistics["state"], state)
    assert statistics["horizon"] == horizon


def test_delta_wants_a_state_for_every_action(tmp_path):
    files, *_ = write_numbers(tmp_path, [5], [], 5)
    message = r"dataset default: .* state_dim 3 has no value for action dimensions \[3\]; list them in data.absolute_ac"
    with pytest.raises(StatisticsError, match=message):
        calculate_statistics(files, 3, 4, action_mode="delta", horizon=2)


def test_statistics_are_of_what_training_sees(mixture):
    """Delta actions of the loader's training samples, padding left out, have these very statistics."""
    train, _ = build_datasets(mixture, *processors_from_config(mixture))
    content = calculate_for_config(mixture)
    for dataset, own in zip(train.datasets, mixture.datasets, strict=True):
        samples = [dataset[i] for i in range(len(dataset))]
        got = content["datasets"][own.name]
        check(got["state"], np.stack([s["state"][: own.state_dim] for s in samples]))
        deltas = np.concatenate([(s["action"][:, :2] - s["state"][:2])[~s["action_is_pad"]] for s in samples])
        assert got["action"]["pairs"] == len(deltas)
        for dim in (0, 1):
            check(one_dim(got["action"], dim), deltas[:, [dim]], rows=len(samples))
    grippers = np.stack([s["action"][0, 3:] for s in (train.datasets[0][i] for i in range(len(train.datasets[0])))])
    check(one_dim(content["datasets"]["wide"]["action"], 3), grippers)


def test_bad_rows_are_named(tmp_path):
    path = write_broken(tmp_path / "bad.parquet", lambda rows: rows[7].__setitem__("action", [0.0] * 6))
    with pytest.raises(DataError, match=r"bad\.parquet row 7: action has 6 values, config wants per_action_dim 4"):
        calculate_statistics([path], 4, 4)


def test_the_first_bad_file_is_named_whichever_worker_is_faster(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BYTES_PER_TASK", 1)
    files = [write_episodes(tmp_path / f"{i}.parquet", [40]) for i in range(6)]
    for i in (2, 3, 5):
        write_broken(files[i], lambda rows: rows[4].__setitem__("state", [float("nan")] * 4))
    with pytest.raises(DataError, match=r"2\.parquet row 4: state\[0\] is nan"):
        calculate_statistics(files, 4, 4, num_workers=4)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rows: rows[0].__setitem__("is_first", False), "row 0: the data begin here but is_first is false"),
        (lambda rows: rows[6].__setitem__("is_first", None), "row 6: is_first is null; wanted true or false"),
        (lambda rows: [row.pop("is_first") for row in rows], "no column 'is_first'"),
    ],
)
def test_flags_are_checked_where_they_matter(tmp_path, spoil, message):
    path = write_broken(tmp_path / "bad.parquet", spoil)
    assert calculate_statistics([path], 4, 4)["rows"] == 9
    for options in ({"val_fraction": 0.5}, {"action_mode": "delta", "horizon": 2}):
        with pytest.raises(DataError, match=rf"bad\.parquet:? {message}"):
            calculate_statistics([path], 4, 4, **options)


def test_flags_of_another_type(tmp_path):
    path = tmp_path / "a.parquet"
    table = pq.read_table(write_episodes(path, [4]))
    pq.write_table(table.set_column(table.schema.get_field_index("is_first"), "is_first", pa.array([1, 0, 0, 0])), path)
    with pytest.raises(DataError, match="column 'is_first' is int64; wanted bool"):
        calculate_statistics([path], 4, 4, val_fraction=0.5)


def test_damaged_pages_are_named(tmp_path):
    path = write_episodes(tmp_path / "a.parquet", [6])
    metadata = pq.ParquetFile(path).metadata.row_group(1)
    column = next(metadata.column(i) for i in range(9) if metadata.column(i).path_in_schema.startswith("action"))
    spoiled = bytearray(path.read_bytes())
    start = min(x for x in (column.dictionary_page_offset, column.data_page_offset) if x)
    spoiled[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(spoiled)
    with pytest.raises(DataError, match=r"a\.parquet: state, action can't be read from row 0 on .*; record or convert"):
        calculate_statistics([path], 4, 4)


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    data = write_episodes(tmp_path / "a.parquet", [6])
    config = tmp_path / "c.yaml"
    config.write_text("data: {state_dim: 4}\nmodel: {action_head_config: {per_action_dim: 4}}\n")
    (tmp_path / "file").write_text("kept")
    for output, message in (
        (tmp_path, "is a folder; give the path of a JSON file"),
        (
            tmp_path / "file/s.json",
            r"s.json: not written \(File exists: \S+file\); it needs [\d,]+ bytes; give another",
        ),
    ):
        monkeypatch.setattr(
            sys,
            "argv",
            ["x", "--config_path", str(config), "--output_path", str(output), "--train_data_override", str(data)],
        )
        with pytest.raises(WriteError, match=message):
            script.main()
    assert (tmp_path / "file").read_text() == "kept"


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write_episodes(tmp_path / "home/demos/a.parquet", [6])
    config = tmp_path / "c.yaml"
    config.write_text(
        'data: {state_dim: 4, train_parquet_files: ["~/demos"], normalization_stats_path: ~/stats.json}\n'
        "model: {action_head_config: {per_action_dim: 4}}\n"
    )
    monkeypatch.setattr(sys, "argv", ["x", "--config_path", str(config), "--set", "data.cache_dir=~/cache"])
    script.main()
    assert (tmp_path / "home/stats.json").is_file() and not (tmp_path / "~").exists()
    assert load_config(config).data.normalization_stats_path == str(tmp_path / "home/stats.json")


def test_script(tmp_path):
    data, output = write_episodes(tmp_path / "a.parquet", [6, 6]), tmp_path / "out" / "s.json"
    config = tmp_path / "c.yaml"
    config.write_text("data: {state_dim: 4}\nmodel: {action_head_config: {per_action_dim: 4}}\n")
    command = [sys.executable, "utils/calculate_normalization_stats.py", "--config_path", str(config)]
    command += ["--output_path", str(output), "--num_workers", "1", "--set", "data.val_fraction=0.5"]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)

    result = run("--train_data_override", str(data))
    assert result.returncode == 0, result.stderr
    content = json.loads(output.read_text())
    assert content["val_fraction"] == 0.5 and list(content["datasets"]) == ["default"]
    statistics = content["datasets"]["default"]
    assert statistics["action"]["count"] == 6 and set(STATISTICS) < set(statistics["state"])
    assert "default state: 6 of 12 rows, 4 dimensions" in result.stderr and "MB read" in result.stderr
    assert result.stdout.strip() == str(output)
    result = run("--train_data_override", str(tmp_path / "no"))
    assert result.returncode == 1 and result.stderr.startswith("error: data.train_parquet_files")
    result = run("--train_data_override", str(data), "--num_workers", "0")
    assert result.returncode == 2 and "--num_workers: 0 is less than 1; give 1 or more" in result.stderr
