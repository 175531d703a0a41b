"""Every head through the entry scripts: statistics, main_train.py, resume, main_eval.py."""

from __future__ import annotations

import json

import pytest
import yaml

import main_eval
import main_train
from model.action_head import ACTION_HEADS
from tests.helpers import write_episodes
from utils.calculate_normalization_stats import calculate_for_config
from utils.checkpoint import load_checkpoint
from utils.config_utils import load_config

SMALL = {"horizon": 5, "per_action_dim": 4, "hidden_dim": 32, "num_layers": 1, "num_heads": 4}
SMALL |= {"mlp_hidden_dims": [32], "num_action_bins": 16, "unet_width": 16, "num_train_timesteps": 20}
SMALL |= {"expert": {"width": 32, "mlp_dim": 48, "num_heads": 4, "max_state_dim": 6, "max_action_dim": 6}}


@pytest.mark.slow
@pytest.mark.parametrize("normalization", ["min_max", "mean_std"])
@pytest.mark.parametrize("name", ACTION_HEADS)
def test_train_resume_and_evaluate(name, normalization, tmp_path, tiny_paligemma_dir, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    train = write_episodes(tmp_path / "train.parquet", [8, 8], image_size=32)
    val = write_episodes(tmp_path / "val.parquet", [6], seed=9, image_size=32)
    config = {
        "data": {
            "train_parquet_files": str(train),
            "val_parquet_files": str(val),
            "normalization_stats_path": str(tmp_path / "stats.json"),
            "normalization_type": normalization,
            "state_dim": 4,
            "batch_size": 4,
            "num_workers": 0,
        },
        "model": {
            "vlm_config": {"model_name_or_path": str(tiny_paligemma_dir), "dtype": "bfloat16"},
            "action_head_config": {**SMALL, "type": name},
        },
        "training": {"epochs": 1, "checkpoint_dir": str(tmp_path / "experiments"), "experiment_name": "a"},
        "inference": {"num_inference_steps": 4},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    (tmp_path / "stats.json").write_text(json.dumps(calculate_for_config(load_config(path))))
    main_train.main(["--config_path", str(path)])
    first = tmp_path / "experiments/a/checkpoints/checkpoint_epoch_1.pth.tar"
    main_train.main(["--config_path", str(path), "--resume_checkpoint", str(first), "--epochs", "2"])
    second = first.with_name("checkpoint_epoch_2.pth.tar")
    assert (load_checkpoint(first)["step"], load_checkpoint(second)["step"]) == (4, 8)
    records = [json.loads(line) for line in (tmp_path / "experiments/a/logs/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "val_loss" in record] == [4, 8]

    output = tmp_path / "results"
    args = ["--checkpoint_path", str(second), "--eval_data_path", str(val), "--output_dir", str(output)]
    main_eval.main([*args, "--device", "cpu", "--num_workers", "0", "--num_samples", "3"])
    policy = json.loads((output / "metrics.json").read_text())["predictors"]["policy"]
    assert policy["samples"] == 6 and policy["overall"]["mse"] > 0
