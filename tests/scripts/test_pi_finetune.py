"""From a published pi0 or pi0.5 to one for another robot, by the commands of docs/pi0.md: three cameras and a force
sensor under their own names, actions relative by name, evaluated, handed back to LeRobot and served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from vla_client import PolicyClient

import main_eval
import main_train
from inference.predictor import VLAPredictor
from scripts import export_policy, import_policy
from tests.helpers import episode_rows, write_rows
from tests.inference.serving.servers import running
from tests.pi_fixtures import KINDS, folder
from tests.policies import merged
from utils import calculate_normalization_stats

REPOSITORY = Path(__file__).parents[2]
CAMERAS = ("scene", "wrist.left", "wrist.right")  # in the order of pi0's slots
JOINTS = ["shoulder", "elbow", "wrist", "roll", "gripper_opening"]


def run(script: Any, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    monkeypatch.setattr("sys.argv", [script.__name__, *map(str, arguments)])
    script.main()


def write_demos(path: Path) -> Path:
    rows = [row for i in (0, 1) for row in episode_rows(7, seed=i, state_dim=5, action_dim=5, cameras=CAMERAS)]
    for i, row in enumerate(rows):
        row["force"] = [float(i), 0.5]
        row["wrist.right"] = row["wrist.right"] if i % 3 else None  # a camera that drops frames
    return write_rows(path, rows)


def config_of(kind: str, folder: Path, demos: Path) -> Path:
    config = yaml.safe_load((REPOSITORY / "configs" / "pi0_finetune.yaml").read_text())
    if kind == "pi05":
        other = yaml.safe_load((REPOSITORY / "configs" / "pi05_finetune.yaml").read_text())
        config = merged(config, {key: value for key, value in other.items() if key != "base"})
    robot = {
        "data": {
            "train_parquet_files": [str(demos)],
            "val_parquet_files": [str(demos)],
            "normalization_stats_path": str(folder / "stats.json"),
            "cameras": list(CAMERAS),
            "state_columns": ["state", "force"],
            "state_dim": 7,
            "action_mode": "delta",
            "action_names": JOINTS,
            "absolute_joints": ["gripper"],
            "batch_size": 4,
            "num_workers": 0,
        },
        "model": {
            "vlm_config": {"dtype": "float32"},
            "action_head_config": {
                "horizon": 4,
                "per_action_dim": 5,
                "loss_over_padding": True,
                "expert": {"width": 32, "mlp_dim": 64},
            },
        },
        "training": {"max_steps": 2, "checkpoint_dir": str(folder / "runs"), "experiment_name": "own"},
        "inference": {"n_action_steps": 2},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(merged(config, robot)))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_fine_tuned_for_another_robot(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base, demos = tmp_path / "base.pth.tar", write_demos(tmp_path / "demos.parquet")
    unsaid = ["--tokenizer_name_or_path", folder(kind) / "tokenizer", "--vision_num_attention_heads", 2]
    run(import_policy, monkeypatch, "--policy_dir", folder(kind) / "policy", "--output", base, *unsaid)
    config = config_of(kind, tmp_path, demos)
    run(calculate_normalization_stats, monkeypatch, "--config_path", config)
    statistics = json.loads((tmp_path / "stats.json").read_text())
    assert statistics["absolute_action_dims"] == [4]
    assert statistics["datasets"]["default"]["state_columns"] == {"state": 5, "force": 2}

    main_train.main(["--config_path", str(config), "--init_checkpoint", str(base)])
    assert "statistics: those of this run's data" in capsys.readouterr().err
    trained = next((tmp_path / "runs" / "own" / "checkpoints").glob("checkpoint_*.pth.tar"))
    predictor = VLAPredictor.from_checkpoint(trained, device="cpu")
    assert (predictor.cameras, predictor.horizon, predictor.per_action_dim) == (CAMERAS, 4, 5)
    assert predictor.config.data.absolute_action_dims == (4,)

    frames = {camera: np.full((30, 50, 3), 60 * i, np.uint8) for i, camera in enumerate(CAMERAS)}
    state = {"state": [0.1, 0.2, 0.3, 0.4, 0.5], "force": [2.0, 0.5]}
    joined = np.float32([*state["state"], *state["force"]])
    seen = {"images": frames, "prompt": "press the button"}
    actions = predictor.predict(**seen, state=state, seed=3)

    common = ["--checkpoint_path", str(trained), "--device", "cpu"]
    main_eval.main(
        [*common, "--eval_data_path", str(demos), "--output_dir", str(tmp_path / "eval"), "--num_plots", "1"]
    )
    assert (tmp_path / "eval" / "metrics.json").is_file() and list((tmp_path / "eval" / "plots").glob("*.png"))
    for camera, frame in frames.items():
        Image.fromarray(frame).save(tmp_path / f"{camera}.png")
    single = ["--image_paths", *(f"{camera}={tmp_path / camera}.png" for camera in CAMERAS), "--seed", "3"]
    single += ["--prompt", "press the button", "--state_vector", " ".join(map(str, joined)), "--save_predictions"]
    main_eval.main([*common, *single, "--output_dir", str(tmp_path / "single")])
    written = json.loads((tmp_path / "single" / "actions.json").read_text())
    np.testing.assert_allclose(written["actions"], actions, atol=1e-5)

    exported = tmp_path / "lerobot"
    run(export_policy, monkeypatch, "--checkpoint_path", trained, "--output_dir", exported, "--format", "lerobot")
    features = json.loads((exported / "config.json").read_text())
    assert [name for name in features["input_features"] if "images" in name] == [
        f"observation.images.{camera}" for camera in CAMERAS
    ]
    assert (features["action_feature_names"], features["relative_exclude_joints"]) == (JOINTS, ["gripper"])
    settings = {"tokenizer_name_or_path": str(folder(kind) / "tokenizer"), "vision_num_attention_heads": 2}
    back = VLAPredictor.from_pretrained(exported, "cpu", **settings)
    assert back.config.data.action_names == tuple(JOINTS) and back.config.data.absolute_action_dims == (4,)
    np.testing.assert_allclose(back.predict(**seen, state=joined, seed=3), actions, atol=1e-5)

    with running(predictor) as server:
        client = PolicyClient(port=server.port)
        assert client.policy["cameras"]["wrist.right"] == "observation/wrist.right"
        request = {**frames, "state": state, "prompt": "press the button", "seed": 3}
        np.testing.assert_allclose(client.predict(request), actions, atol=1e-5)
        client.close()
