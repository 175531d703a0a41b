"""docs/adding_a_backbone.md says that a backbone is one new file and one line; here one is added exactly so."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.helpers import write_episodes
from tests.model.test_adding_a_head import FOLDERS, ROOT, run
from tests.policies import model_section


def add_backbone(checkout: Path) -> None:
    """Do what docs/adding_a_backbone.md tells its reader to do."""
    page = (ROOT / "docs/adding_a_backbone.md").read_text()
    file, line = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    path = file.splitlines()[0].removeprefix("# ")
    assert path == "model/two_towers.py" and line.count("\n") == 1
    (checkout / path).write_text(file)
    table = checkout / "utils/backbones.py"
    start, entries = table.read_text().split("BACKBONE_SPECS: dict[str, BackboneSpec] = {\n")
    table.write_text(f"{start}BACKBONE_SPECS: dict[str, BackboneSpec] = {{\n{line}{entries}")


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of this repository's code with the document's file and line added."""
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "fixtures"))
    for file in ("pyproject.toml", "main_train.py", "main_eval.py"):
        shutil.copy(ROOT / file, tmp_path / file)
    add_backbone(tmp_path)
    return tmp_path


def test_the_document_s_backbone_keeps_every_promise(checkout):
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/model/test_backbones.py", "-k", "two_towers"]
    assert re.search(r"8 passed", run(checkout, *command))


@pytest.mark.slow
def test_the_document_s_backbone_trains_and_is_evaluated(checkout):
    run(checkout, "scripts/make_tiny_siglip_llm.py", "--output_dir", "tiny", "--prompts", "press the button")
    for name, lengths in (("train", [8, 8]), ("val", [6])):
        write_episodes(checkout / f"{name}.parquet", lengths, image_size=32)
    vlm = {"type": "two_towers", "vision_model_name_or_path": "./tiny/siglip", "lora": {"rank": 2}}
    vlm["language_model_name_or_path"] = "./tiny/qwen2"
    config = {
        "data": {
            "train_parquet_files": "train.parquet",
            "normalization_stats_path": "stats.json",
            "state_dim": 4,
            "batch_size": 4,
            "num_workers": 0,
        },
        "model": model_section(Path("unused"), vlm=vlm, num_heads=2),
        "training": {"max_steps": 3, "experiment_name": "a"},
    }
    (checkout / "config.yaml").write_text(yaml.safe_dump(config))
    run(checkout, "utils/calculate_normalization_stats.py", "--config_path", "config.yaml")
    assert "expected memory" in run(checkout, "main_train.py", "--config_path", "config.yaml", "--dry_run")
    assert "loss" in run(checkout, "main_train.py", "--config_path", "config.yaml")
    checkpoint = next((checkout / "experiments/a/checkpoints").glob("*.pth.tar"))
    run(checkout, "main_eval.py", "--checkpoint_path", str(checkpoint), "--eval_data_path", "val.parquet")
