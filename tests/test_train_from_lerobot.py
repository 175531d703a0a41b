"""A run straight from a LeRobot folder, from statistics to evaluation, beside one from its lossless conversion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from data.convert.lerobot import convert_lerobot
from tests.data.convert.lerobot_fixtures import CAMERAS, FIXTURES, PNG
from tests.policies import model_section

ROOT = Path(__file__).resolve().parents[1]


def run(script: str, *arguments: object) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout + found.stderr


def project(folder: Path, data: dict, backbone_dir: Path) -> Path:
    """A config of a tiny policy on some data, and its statistics."""
    config = {
        "data": {
            **data,
            "val_fraction": 0.2,
            "normalization_stats_path": str(folder / "stats.json"),
            "state_dim": 7,
            "batch_size": 16,
            "num_workers": 2,
            "cache_dir": str(folder / "cache"),
        },
        "model": model_section(backbone_dir, {"use_aux_camera": True}, per_action_dim=7, action_dim=28),
        "training": {"epochs": 2, "checkpoint_dir": str(folder / "runs"), "experiment_name": "a", "log_interval": 1},
    }
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    run("utils/calculate_normalization_stats.py", "--config_path", folder / "config.yaml")
    return folder


def losses(folder: Path) -> list[float]:
    lines = (folder / "runs/a/logs/metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("version", ["v21", "v30"])
def test_a_run_in_place_has_the_losses_of_its_conversion(tmp_path, tiny_paligemma_dir, version):
    source = FIXTURES / f"lerobot_{version}_video"
    convert_lerobot(source, tmp_path / "converted", CAMERAS, encoding=PNG)
    data = {"train_parquet_files": f"lerobot:{source}", "lerobot": {"cameras": CAMERAS}}
    in_place = project(tmp_path / "in_place", data, tiny_paligemma_dir)
    converted = project(tmp_path / "plain", {"train_parquet_files": str(tmp_path / "converted")}, tiny_paligemma_dir)
    assert "one step: loss" in run("main_train.py", "--config_path", in_place / "config.yaml", "--dry_run")
    for folder in (in_place, converted):
        run("main_train.py", "--config_path", folder / "config.yaml")
    assert len(losses(in_place)) > 10 and losses(in_place) == losses(converted)
    report = run("inspect_parquet.py", "--config_path", in_place / "config.yaml", "--num_workers", 0)
    assert "image_1" in report and "96x96 video" in report
    checkpoint = in_place / "runs/a/checkpoints/model_best.pth.tar"
    evaluate = ("main_eval.py", "--checkpoint_path", checkpoint, "--output_dir")
    run(*evaluate, tmp_path / "a", "--eval_data_path", f"lerobot:{source}")
    run(*evaluate, tmp_path / "b", "--eval_data_path", tmp_path / "converted")
    seen = [json.loads((tmp_path / name / "metrics.json").read_text())["predictors"] for name in "ab"]
    assert seen[0] == seen[1]
