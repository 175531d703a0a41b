"""main_train.py --dry_run: a report and two steps, and no trace of them."""

from __future__ import annotations

import json

import pytest
import yaml

import main_train
from tests.helpers import write_episodes
from tests.policies import policy_config
from utils.calculate_normalization_stats import calculate_for_config
from utils.config_utils import config_to_dict


@pytest.fixture
def config_path(tmp_path, tiny_paligemma_dir):
    write_episodes(tmp_path / "train.parquet", [8, 8], image_size=32)
    data = {
        "train_parquet_files": [str(tmp_path / "train.parquet")],
        "normalization_stats_path": str(tmp_path / "stats.json"),
        "cache_dir": str(tmp_path / "cache"),
    }
    config = policy_config(tiny_paligemma_dir, tmp_path, data=data, training={"epochs": 2, "num_threads": 1})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config_to_dict(config)))
    (tmp_path / "stats.json").write_text(json.dumps(calculate_for_config(config)))
    return tmp_path / "config.yaml"


def test_reports_and_leaves_nothing_behind(config_path, capsys):
    main_train.main(["--config_path", str(config_path), "--dry_run", "--set", "lr_scheduler.warmup_steps=50"])
    output = capsys.readouterr().out
    for expected in (
        "language model",
        "gradients",
        "optimizer (AdamW)",
        "sum (calculated, not measured)",
        "micro-batch 4 of batch 4; tokens per sample: 16 in the vision tower, 64 in the language model",
        "16 samples, 4.0 steps per epoch, 8 steps",
        "warning: lr_scheduler.warmup_steps 50 take 50 of the run's 8 steps: the learning rate never reaches its peak",
        "one step: loss ",
        "measured peak: only on a GPU",
        "h for all of them, without loading, validation and saving",
        "GB; 2 of 2 are kept (training.keep_last_k 3): ",
    ):
        assert expected in output
    assert not (config_path.parent / "experiments").exists()


def test_does_not_touch_the_run_whose_name_it_bears(config_path, capsys):
    main_train.main(["--config_path", str(config_path), "--set", "training.max_steps=1"])
    folder = config_path.parent / "experiments/run"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    main_train.main(["--config_path", str(config_path), "--dry_run", "--set", "model.vlm_config.lora.rank=2"])
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    output = capsys.readouterr().out
    row = next(line for line in output.splitlines() if line.startswith("language model"))
    assert 0 < int(row.split()[3].replace(",", "")) < int(row.split()[2].replace(",", ""))
