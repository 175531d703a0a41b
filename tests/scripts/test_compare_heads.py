"""scripts/compare_heads.py at a tiny size: what it writes, that it continues, and what it says when it can't."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from model.vla_model import VLAModel
from scripts import compare_heads
from scripts._compare_heads_report import OFFLINE, SMOOTHNESS, markdown, plot, summarize
from tests.helpers import write_episodes
from tests.policies import model_section
from utils.calculate_normalization_stats import calculate_statistics
from utils.config_utils import ConfigError, load_config


@pytest.fixture
def config(tmp_path, tiny_paligemma_dir, monkeypatch) -> Path:
    """A config with data, whose backbone exists, and whose statistics do not."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_episodes(tmp_path / "train.parquet", [8, 8], image_size=32)
    write_episodes(tmp_path / "val.parquet", [5], seed=9, image_size=32)
    tree = {
        "data": {
            "train_parquet_files": [str(tmp_path / "train.parquet")],
            "val_parquet_files": [str(tmp_path / "val.parquet")],
            "normalization_stats_path": str(tmp_path / "stats.json"),
            "state_dim": 4,
            "batch_size": 4,
            "num_workers": 0,
        },
        "model": model_section(tiny_paligemma_dir, num_heads=2),
        "training": {"max_steps": 3, "epochs": 100, "num_threads": 1, "log_interval": 1, "val_num_plots": 0},
        "inference": {"num_inference_steps": 2, "n_action_steps": 2},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def compare(config: Path, *flags: str) -> Path:
    output = config.parent / "out"
    common = ["--config", str(config), "--heads", "flow_matching", "--output_dir", str(output), "--device", "cpu"]
    compare_heads.main([*common, "--num_samples", "2", "--num_processes", "2", *flags])
    return output


@pytest.mark.slow
def test_offline_comparison_continues_and_grows(config, capsys):
    output = compare(config, "--seeds", "0", "1", "--episodes", "0")
    result = json.loads((output / "compare_heads.json").read_text())
    (row,) = result["rows"]
    assert row["seeds"] == [0, 1] and row["samples_per_second"] > 0 and row["latency"]["p95_ms"] > 0
    assert row["parameters"] > row["head_parameters"] > 0
    errors = row["offline"]["mse_normalized"]["seeds"]
    assert len(set(errors)) == 2 and row["offline"]["mse_normalized"]["mean"] == pytest.approx(np.mean(errors))
    assert row["offline"]["best_of_k_mse_normalized"]["mean"] < row["offline"]["mse_normalized"]["mean"]
    table = (output / "compare_heads.md").read_text()
    assert table.startswith("| backbone | head |") and "| paligemma | flow_matching |" in table
    assert table.strip() in capsys.readouterr().out
    assert np.asarray(Image.open(output / "compare_heads.png").convert("L")).std() > 5

    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.suffix in (".tar", ".png")}
    kept = (output / "paligemma-flow_matching-seed0" / "trained.json").read_text()
    shutil.rmtree(output / "paligemma-flow_matching-seed1" / "offline")  # as if it had been killed there
    (output / "paligemma-flow_matching-seed1" / "trained.json").unlink()  # and while it trained
    checkpoints = output / "paligemma-flow_matching-seed1" / "checkpoints"
    compare(config, "--seeds", "0", "1", "2", "--episodes", "0")
    again = json.loads((output / "compare_heads.json").read_text())["rows"][0]
    assert again["seeds"] == [0, 1, 2]
    assert again["offline"]["mse_normalized"]["seeds"][:2] == errors, "resumed at its last step, so the same policy"
    assert (output / "paligemma-flow_matching-seed0" / "trained.json").read_text() == kept
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if "seed0/checkpoints" in str(path))
    assert "resumed" in (output / "paligemma-flow_matching-seed1" / "log.txt").read_text() and checkpoints.is_dir()

    with pytest.raises(ConfigError, match="other settings: training.max_steps 3 -> 4. Give another --output_dir"):
        compare(config, "--episodes", "0", "--set", "training.max_steps=4")


@pytest.mark.slow
@pytest.mark.sim
def test_closed_loop_columns(config):
    output = compare(config, "--episodes", "1", "--tasks", "window-open-v3", "--set", "training.max_steps=1")
    (row,) = json.loads((output / "compare_heads.json").read_text())["rows"]
    for column in ("closed_loop", "blind"):
        assert row[column]["episodes"] == 1 and list(row[column]["tasks"]) == ["window-open-v3"]
    rollouts = [
        json.loads((output / f"paligemma-flow_matching-seed0/{c}/rollouts.json").read_text())
        for c in ("closed_loop", "blind")
    ]
    assert [r["settings"]["control"] for r in rollouts] == ["policy", "blind"]
    assert "window-open-v3) x 1 episodes" in (output / "compare_heads.md").read_text()


@pytest.mark.slow
def test_a_failed_cell_is_named_and_the_others_are_reported(config):
    broken = config.parent / "out" / "paligemma-flow_matching-seed1"
    broken.mkdir(parents=True)
    (broken / "checkpoints").mkdir()
    (broken / "checkpoints" / "checkpoint_epoch_1.pth.tar").write_bytes(b"cut off")
    with pytest.raises(
        compare_heads.CellError, match="1 of 2 cells failed: paligemma-flow_matching-seed1; see log.txt"
    ):
        compare(config, "--seeds", "0", "1", "--episodes", "0")
    assert "checkpoint_epoch_1.pth.tar" in (broken / "log.txt").read_text()
    rows = json.loads((config.parent / "out" / "compare_heads.json").read_text())["rows"]
    assert rows[0]["seeds"] == [0]


def test_a_cell_that_another_comparison_runs_is_left_alone(config):
    cell = config.parent / "out" / "paligemma-flow_matching-seed0"
    cell.mkdir(parents=True)
    with (cell / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(compare_heads.CellError, match="1 of 1 cells failed"):
            compare(config, "--episodes", "0")
    assert "is in use by another comparison; wait for it, or end it" in (cell / "log.txt").read_text()
    assert not (cell / "checkpoints").exists()


def test_same_seed_same_initial_backbone_and_another_seed_another_head(config):
    """What "the same initialisation" rests on: the backbone is made before the head, from the same draws."""
    files = [config.parent / "train.parquet"]
    statistics = [calculate_statistics(files, 4, 4)]
    models = []
    for layers in (1, 2):
        settings = [f"model.action_head_config.num_layers={layers}"]
        settings += ["model.vision_resampler_config.type=perceiver", "model.vision_resampler_config.num_heads=4"]
        torch.manual_seed(3)
        models.append(
            VLAModel.from_pretrained(load_config(config, set_args=settings), statistics, [0.5] * 3, [0.5] * 3)
        )
    first, second = (model.backbone.state_dict() for model in models)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert len(models[0].action_head.state_dict()) < len(models[1].action_head.state_dict())


def cell(seed, successes, mse, head="flow_matching"):
    rollouts = {"tasks": {name: {"successes": successes, "episodes": 10} for name in ("a", "b")}}
    blind = {"tasks": {name: {"successes": 1, "episodes": 10} for name in ("a", "b")}}
    overall = dict.fromkeys((*OFFLINE, *SMOOTHNESS), mse) | {"spread_normalized": None}
    return {
        "backbone": "paligemma",
        "head": head,
        "seed": seed,
        "training": {"steps": 9},
        "offline": {"predictors": {"policy": {"overall": overall}}},
        "closed_loop": rollouts,
        "blind": blind,
    }


def test_table_by_hand(tmp_path):
    speed = {"parameters": 1_500_000, "head_parameters": 400_000, "samples_per_second": 100.4}
    speed |= {"latency": {"median_ms": 12.34, "p95_ms": 20.0}}
    rows = summarize([{**cell(0, 9, 0.02), "speed": speed}, cell(1, 8, 0.04), cell(0, 0, 0.5, head="regression")])
    assert [row["head"] for row in rows] == ["flow_matching", "regression"]
    pooled = rows[0]["closed_loop"]
    assert (pooled["successes"], pooled["episodes"]) == (34, 40) and pooled["tasks"]["a"]["successes"] == 17
    assert pooled["wilson_95"] == pytest.approx([0.7093, 0.9294], abs=1e-3)
    assert rows[0]["samples_per_second"] == 100.4
    settings = {"steps": 9, "batch_size": 4, "tasks": ["a", "b"], "episodes": 10, "num_samples": 8, "cores": 2}
    result = {"settings": settings, "rows": rows}
    lines = markdown(result).splitlines()
    assert lines[2] == (
        "| paligemma | flow_matching | 1.50 M (0.40 M) | 100 | 0.0300 | 0.0300 | - | 34/40 (71 to 93 %) "
        "| 4/40 (4 to 23 %) | 12.3 / 20.0 ms |"
    )
    assert lines[3].endswith("| 0/20 (0 to 16 %) | 2/20 (3 to 30 %) | - |")
    plot(tmp_path / "plot.png", result)
    assert Image.open(tmp_path / "plot.png").size[0] > 800


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--heads nosuch", "invalid choice: 'nosuch'"),
        ("--heads flow_matching --backbones nosuch", "invalid choice: 'nosuch'"),
        ("--heads flow_matching --seeds 1 1", "--seeds names one twice"),
        ("--heads flow_matching --seeds -1", "give 0 or more"),
        ("--heads flow_matching --num_processes 0", "--num_processes is 0; give 1 or more"),
    ],
)
def test_bad_flags(flags, message, capsys):
    with pytest.raises(SystemExit):
        compare_heads.parse_args(["--config", "c", *flags.split()])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["data.val_parquet_files=[]", "training.max_steps=null"])
def test_a_comparison_needs_held_out_episodes_and_a_number_of_steps(config, setting):
    with pytest.raises(ConfigError, match="a comparison needs data.val_parquet_files.*training.max_steps"):
        compare(config, "--set", setting)
