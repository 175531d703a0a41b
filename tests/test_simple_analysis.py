"""simple_analysis.py as a user runs it, on a small real backbone and real files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

import simple_analysis
from data.loader import build_datasets, build_sampler
from data.processing import processors_from_config
from tests.helpers import PROMPTS, write_episodes
from utils import calculate_normalization_stats
from utils.config_utils import load_config
from utils.statistics import StatisticsError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def make_config(tmp_path, tiny_paligemma_dir, monkeypatch):
    """Writes a config with this `data` section and calculates its statistics."""

    def make(data: str, cameras: int = 1, statistics: bool = True) -> Path:
        path, stats = tmp_path / "config.yaml", tmp_path / "stats.json"
        path.write_text(
            f"data: {{{data}, normalization_stats_path: {stats}, num_workers: 0}}\n"
            f"model:\n  vlm_config: {{model_name_or_path: {tiny_paligemma_dir}, dtype: float32, "
            f"use_aux_camera: {str(cameras == 2).lower()}}}\n"
            "  action_head_config: {horizon: 4, per_action_dim: 4, hidden_dim: 32, num_layers: 1, num_heads: 2}\n"
        )
        if statistics:
            monkeypatch.setattr(sys, "argv", ["stats", "--config_path", str(path)])
            calculate_normalization_stats.main()
        return path

    return make


def run(config: Path, output: Path, *flags: str) -> dict:
    simple_analysis.main(["--config_path", str(config), "--output_dir", str(output), *flags])
    return json.loads((output / "analysis.json").read_text())


def test_batch_loss_and_split(tmp_path, make_config, capsys):
    a = write_episodes(tmp_path / "a.parquet", [6, 9, 3], cameras=("image_1", "image_2"))
    b = write_episodes(tmp_path / "b.parquet", [7, 5], seed=10, cameras=("image_1", "image_2"))
    config = make_config(f"train_parquet_files: [{a}, {b}], val_fraction: 0.4, state_dim: 4, max_seq_len: 2", cameras=2)
    out = tmp_path / "out"
    result = run(config, out, "--num_samples", "3")

    batch = result["batch"]
    assert (batch["image_1"]["dtype"], batch["image_1"]["shape"]) == ("uint8", [3, 2, 3, 32, 32])
    assert batch["action"]["shape"] == [3, 4, 4] and batch["state"]["shape"] == [3, 4]
    assert batch["image_2"]["max"] > 200 and -1 <= batch["action"]["min"] < 0 < batch["action"]["max"] <= 1
    for sample in result["samples"]:
        assert sample["prompt"] in PROMPTS and sample["decoded"] == f"<bos>{sample['prompt']}\n"
        assert sample["tokens"][0] == "<bos>" and sample["cameras"] == 2
    assert np.isfinite(result["untrained_loss"]) and 0.3 < result["untrained_loss"] < 5

    where = {split: {e["episode"] for e in result["episodes"] if e["split"] == split} for split in ("train", "val")}
    assert len(where["val"]) == 2 and where["train"] | where["val"] == set(range(5))
    assert not where["train"] & where["val"] and result["overlap"] == {"default": []}
    episode = next(e for e in result["episodes"] if e["episode"] == 4)
    assert (episode["file"], episode["row"], episode["steps"], episode["prompt"]) == (str(b), 7, 5, PROMPTS[1])

    normalized = result["normalized"]["train"][0]
    for name in ("state", "action"):
        np.testing.assert_allclose(normalized[name]["min"], -1, atol=1e-5)  # min_max of exactly these rows
        np.testing.assert_allclose(normalized[name]["max"], 1, atol=1e-5)
        assert normalized[name]["outside_bounds"] == [0.0] * 4
    train = result["splits"]["train"][0]
    steps = [e["steps"] for e in result["episodes"] if e["split"] == "train"]
    assert train["samples"] == sum(steps) and train["length"]["max"] == max(steps)
    padded = sum(max(0, 4 - left) for length in steps for left in range(1, length + 1))
    assert train["action_padding"] == pytest.approx(padded / (4 * sum(steps)))

    printed = capsys.readouterr().out
    assert "untrained loss" in printed and "% outside" in printed and "overlap" in printed
    for name in ("batch_images.png", "split.png", "episodes.png", "state.png", "action.png"):
        assert str(out / name) in printed
        pixels = np.asarray(Image.open(out / name).convert("RGB"))
        assert min(pixels.shape[:2]) > 250 and pixels.std() > 15


def test_the_same_samples_and_weights_as_training_starts_with(tmp_path, make_config):
    path = write_episodes(tmp_path / "a.parquet", [6, 9])
    config_path = make_config(f"train_parquet_files: [{path}], state_dim: 4, batch_size: 2")
    first, second = run(config_path, tmp_path / "x"), run(config_path, tmp_path / "y")
    assert first["untrained_loss"] == second["untrained_loss"]
    config = load_config(config_path)
    train, _ = build_datasets(config, *processors_from_config(config))
    batches = iter(build_sampler(config, train))
    places = [train.describe(i) for i in [*next(batches), *next(batches)]]  # more than one training batch
    assert [sample["place"] for sample in first["samples"]] == places


def test_every_episode_is_somewhere(tmp_path, make_config, capsys):
    """Trained on, held out or unused: the same in JSON, in the table and in what the datasets hold."""
    lengths = [6, 9, 3, 7, 5, 8, 4, 6]
    a = write_episodes(tmp_path / "a.parquet", lengths[:5])
    b = write_episodes(tmp_path / "b.parquet", lengths[5:], seed=5)
    data = f"train_parquet_files: [{a}, {b}], val_fraction: 0.4, max_episodes: 5, state_dim: 4"
    config_path = make_config(data)
    result = run(config_path, tmp_path / "out", "--skip_model")
    where = {split: [e for e in result["episodes"] if e["split"] == split] for split in ("train", "val", "unused")}
    assert [len(part) for part in where.values()] == [3, 2, 3]
    assert sorted(e["episode"] for e in result["episodes"]) == list(range(8))
    config = load_config(config_path)
    for split, dataset in zip(("train", "val"), build_datasets(config, *processors_from_config(config)), strict=True):
        assert [e["episode"] for e in where[split]] == dataset.datasets[0].episodes.tolist()
    for episode in result["episodes"]:
        assert episode["steps"] == lengths[episode["episode"]]
        file, row = (a, sum(lengths[: episode["episode"]])) if episode["episode"] < 5 else (b, 0)
        row = row if file == a else sum(lengths[5 : episode["episode"]])
        assert (episode["file"], episode["row"]) == (str(file), row)

    first = result["episodes"][0]
    rows = pq.read_table(first["file"]).slice(first["row"], first["steps"])
    state, action = (np.stack(rows[name].to_numpy()) for name in ("state", "action"))
    assert first["state_path"] == pytest.approx(np.sqrt((np.diff(state, axis=0) ** 2).sum(axis=1)).sum(), rel=1e-5)
    assert first["action_max_abs"] == pytest.approx(np.abs(action).max())
    assert first["action_mean_abs"] == pytest.approx(np.abs(action).mean(), rel=1e-5)
    assert first["action_change"] == pytest.approx(np.abs(np.diff(action, axis=0)).mean(), rel=1e-5)

    for about in result["prompts"]:
        for split, (episodes, steps) in about["splits"].items():
            own = [e["steps"] for e in where[split] if e["prompt"] == about["prompt"]]
            assert (len(own), sum(own)) == (episodes, steps)
    assert sum(about["episodes"] for about in result["prompts"]) == 8
    csv = pd.read_csv(tmp_path / "out" / "episodes.csv")
    assert csv.to_dict("records")[0] == pytest.approx(first) and len(csv) == 8
    assert "default unused" in capsys.readouterr().out


def test_overlap_is_named(tmp_path, make_config, capsys):
    train = write_episodes(tmp_path / "train.parquet", [6, 9, 5])
    val = write_episodes(tmp_path / "val.parquet", [8, 7], seed=50)
    copied = pq.read_table(train).slice(6, 9)
    with pq.ParquetWriter(tmp_path / "both.parquet", copied.schema) as writer:
        writer.write_table(pq.read_table(val))
        writer.write_table(copied)
    config = make_config(
        f"train_parquet_files: [{train}], val_parquet_files: [{tmp_path / 'both.parquet'}], state_dim: 4"
    )
    result = run(config, tmp_path / "out", "--skip_model")
    assert result["overlap"] == {"default": [2]} and result["untrained_loss"] is None
    assert result["normalized"]["val"][0]["state"]["outside_bounds"] != [0.0] * 4
    assert "episodes 2 of validation are training data too" in capsys.readouterr().out


def test_mixture(tmp_path, make_config, capsys):
    wide = write_episodes(tmp_path / "wide.parquet", [6, 9, 5, 5], cameras=("image_1",))
    narrow = write_episodes(tmp_path / "narrow.parquet", [7, 8, 6], seed=20, state_dim=3, action_dim=2)
    config = make_config(
        "state_dim: 4, val_fraction: 0.3, mixture: ["
        f"{{name: wide, path: [{wide}], weight: 1}}, "
        f"{{name: narrow, path: [{narrow}], state_dim: 3, per_action_dim: 2, horizon: 2, weight: 3}}]"
    )
    result = run(config, tmp_path / "out", "--skip_model", "--num_samples", "8")
    assert result["overlap"] == {"wide": [], "narrow": []}
    for split in ("train", "val"):
        assert [one["dataset"] for one in result["splits"][split]] == ["wide", "narrow"]
    narrow_train = result["normalized"]["train"][1]
    assert len(narrow_train["state"]["min"]) == 3 and len(narrow_train["action"]["min"]) == 2
    assert result["splits"]["train"][1]["action_padding"] > 0.5  # two of four steps, and the ends
    assert result["batch"]["dataset_index"]["max"] == 1
    for name in ("narrow_action.png", "wide_state.png", "narrow_split.png", "wide_episodes.png"):
        assert (tmp_path / "out" / name).is_file()


def test_errors_name_the_remedy(tmp_path, make_config):
    path = write_episodes(tmp_path / "a.parquet", [6, 9])
    config = make_config(f"train_parquet_files: [{path}], state_dim: 4", statistics=False)
    with pytest.raises(StatisticsError, match="calculate_normalization_stats.py --config_path"):
        run(config, tmp_path / "out")
    with pytest.raises(SystemExit, match="2"):
        run(config, tmp_path / "out", "--num_samples", "0")
    result = subprocess.run(
        [sys.executable, ROOT / "simple_analysis.py", "--config_path", tmp_path / "none.yaml"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 1 and "none.yaml: no such file" in result.stderr


def test_numbers():
    assert simple_analysis.numbers([0, 1, 2, 3, 7, 9, 10]) == "0-3, 7, 9-10"
    assert simple_analysis.numbers([]) == ""
