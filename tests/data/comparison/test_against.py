"""From training to a comparison: the checkpoint knows its data, and a recorded session is held against it."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
import yaml

import inspect_parquet
import main_train
from data.statistics import calculate_for_config
from inference.policy_files import read_policy
from inference.predictor import VLAPredictor
from inference.serving.export import export_policy
from tests.data.comparison.synthetic import draw, motion, write_session
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.config_utils import ConfigError, load_config


@pytest.fixture(scope="module")
def policy(tmp_path_factory, tiny_paligemma_dir):
    """A checkpoint of one step on 24 episodes of the blob."""
    folder = tmp_path_factory.mktemp("policy")
    train = write_session(folder / "train.parquet", 24, seed=0, control_hz=20.0)
    config = {
        "data": {
            "train_parquet_files": [str(train)],
            "normalization_stats_path": str(folder / "stats.json"),
            "cameras": ["image_1", "image_2"],
            "state_dim": 3,
            "batch_size": 2,
            "num_workers": 0,
            "cache_dir": str(folder / "cache"),
        },
        "model": {
            "vlm_config": {"model_name_or_path": str(tiny_paligemma_dir), "dtype": "float32"},
            "action_head_config": {
                "horizon": 4,
                "per_action_dim": 3,
                "hidden_dim": 32,
                "num_layers": 1,
                "num_heads": 2,
            },
        },
        "training": {"checkpoint_dir": str(folder), "experiment_name": "run", "max_steps": 1},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    statistics = calculate_for_config(load_config(path))
    (folder / "stats.json").write_text(json.dumps(statistics))
    main_train.main(["--config_path", str(path)])
    (path,) = (folder / "run" / "checkpoints").glob("*.pth.tar")
    return path


def test_a_session_is_held_against_a_checkpoint(policy, tmp_path, capsys):
    session = write_session(tmp_path / "s.parquet", 2, seed=9, frame=lambda p: p[:, ::-1], state=lambda s: s * 1000)
    report = tmp_path / "report.json"
    arguments = ["--data_path", str(session), "--against", str(policy), "--skip_images", "--report", str(report)]
    assert inspect_parquet.main(arguments) == 0 and inspect_parquet.main([*arguments, "--strict"]) == 1
    printed = capsys.readouterr().out
    assert "image_1: mirrored (" in printed and "state: thousandfold (" in printed
    against = json.loads(report.read_text())["against"]
    assert {(m["kind"], m["where"]) for m in against["mismatches"]} >= {
        ("mirrored", "image_1"),
        ("thousandfold", "state"),
    }
    assert [dimension["name"] for dimension in against["dimensions"]][:2] == ["state[0]", "state[1]"]


def test_a_clean_session_has_no_suspected_mistakes(policy, tmp_path, capsys):
    session = write_session(tmp_path / "s.parquet", 3, seed=12, control_hz=20.0)
    assert inspect_parquet.main(["--data_path", str(session), "--against", str(policy), "--skip_images"]) == 0
    assert "0 suspected mistakes" in capsys.readouterr().out


def test_exports_carry_the_profile_and_older_checkpoints_say_that_they_have_none(policy, tmp_path, capsys):
    checkpoint = load_checkpoint(policy, for_inference=True)
    folder = export_policy(checkpoint, tmp_path / "export")
    assert read_policy(folder)["training_data"] == checkpoint["training_data"]
    older = {key: value for key, value in checkpoint.items() if key != "training_data"}
    save_checkpoint(older, tmp_path / "older.pth.tar")
    session = write_session(tmp_path / "s.parquet", 2, seed=9, state=lambda s: s * 1000)
    arguments = ["--data_path", str(session), "--against", str(tmp_path / "older.pth.tar"), "--skip_images"]
    assert inspect_parquet.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "does not know what its training data look like" in printed and "thousandfold" in printed


def test_the_predictor_says_once_what_differs(policy, caplog):
    caplog.set_level(logging.WARNING)
    predictor = VLAPredictor.from_checkpoint(policy, "cpu")
    predictor._monitor.predicted(1e9)  # of which it may then spend as much as it needs
    for state in motion(np.random.default_rng(3), 40):
        frames = {"image_1": draw(0, state)[..., ::-1].copy(), "image_2": torch.from_numpy(draw(1, state))}
        predictor.observe(images=frames, prompt="push the blob", state=state.astype(np.float32))
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1 and warnings[0].startswith("image_1: red and blue exchanged (")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "c.pth.tar"], "give --data_path"),
        (["--data_path", "d", "--dataset", "x"], "--dataset chooses among the training data of an --against policy"),
    ],
)
def test_flags_that_miss_their_partner(arguments, message, capsys):
    with pytest.raises(SystemExit):
        inspect_parquet.main(arguments)
    assert message in capsys.readouterr().err


def test_an_unknown_dataset_is_named(policy, tmp_path):
    session = write_session(tmp_path / "s.parquet", 1, seed=9)
    with pytest.raises(ConfigError, match="trained on default; there is no dataset 'x'"):
        inspect_parquet.main(["--data_path", str(session), "--against", str(policy), "--dataset", "x"])
