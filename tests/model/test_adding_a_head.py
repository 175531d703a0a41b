"""docs/adding_a_head.md says that a fifth head is one new file and one line; here it is added exactly so."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers import write_episodes
from tests.policies import model_section

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("model", "utils", "data", "training", "inference", "envs", "scripts", "tests")


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of this repository's code with the document's file and line added."""
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "fixtures"))
    for file in ("pyproject.toml", "main_train.py", "main_eval.py"):
        shutil.copy(ROOT / file, tmp_path / file)
    add_head(tmp_path)
    return tmp_path


def add_head(checkout: Path) -> None:
    """Do what docs/adding_a_head.md tells its reader to do."""
    page = (ROOT / "docs/adding_a_head.md").read_text()
    file, imported, line = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    path = file.splitlines()[0].removeprefix("# ")
    assert path == "model/action_head/linear.py" and imported.count("\n") == line.count("\n") == 1
    (checkout / path).write_text(file)
    registry = checkout / "model/action_head/__init__.py"
    start, entries = registry.read_text().split("ACTION_HEADS: dict[str, type[ActionHeadBase]] = {\n")
    start = start.replace("from model.context import", f"{imported}from model.context import")
    registry.write_text(f"{start}ACTION_HEADS: dict[str, type[ActionHeadBase]] = {{\n{line}{entries}")


def run(checkout: Path, *command: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "XDG_CACHE_HOME": str(checkout / "cache")}
    result = subprocess.run(
        [sys.executable, *command], cwd=checkout, capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_the_document_s_head_keeps_every_promise(checkout):
    tests = run(checkout, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/model/test_heads.py", "-k", "linear")
    assert re.search(r"1\d passed", tests), tests


@pytest.mark.slow
def test_the_document_s_head_trains_and_is_evaluated(checkout, tiny_paligemma_dir):
    for name, lengths in (("train", [8, 8]), ("val", [6])):
        write_episodes(checkout / f"{name}.parquet", lengths, image_size=32)
    config = {
        "data": {
            "train_parquet_files": "train.parquet",
            "normalization_stats_path": "stats.json",
            "state_dim": 4,
            "batch_size": 4,
            "num_workers": 0,
        },
        "model": model_section(tiny_paligemma_dir, num_heads=2, type="linear"),
        "training": {"max_steps": 3, "experiment_name": "a"},
    }
    (checkout / "config.yaml").write_text(yaml.safe_dump(config))
    run(checkout, "utils/calculate_normalization_stats.py", "--config_path", "config.yaml")
    assert "loss" in run(checkout, "main_train.py", "--config_path", "config.yaml")
    checkpoint = next((checkout / "experiments/a/checkpoints").glob("*.pth.tar"))
    run(checkout, "main_eval.py", "--checkpoint_path", str(checkpoint), "--eval_data_path", "val.parquet")
