"""From a published pi0 or pi0.5 to one for another robot, by the commands of docs/pi0.md: three cameras and a force
sensor under their own names, actions relative by name, evaluated, handed back to LeRobot and served."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from vla_client import PolicyClient

import main_eval
import main_train
from benchmarks.random_pi import lerobot_sizes
from benchmarks.sides import MARK
from inference.predictor import VLAPredictor
from inference.serving.export_published import sizes_of
from scripts import export_policy, import_policy
from tests.helpers import episode_rows, write_rows
from tests.inference.serving.servers import running
from tests.pi_fixtures import KINDS, folder
from tests.policies import merged
from utils import calculate_normalization_stats
from utils.checkpoint import load_checkpoint
from utils.config_utils import config_from_dict

REPOSITORY = Path(__file__).parents[2]
LEROBOT = os.environ.get("LEROBOT_PYTHON")  # of an environment with `pip install lerobot`
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


def fine_tuned(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint of a published policy trained for that robot, beside `demos.parquet` and `stats.json`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base, demos = tmp_path / "base.pth.tar", write_demos(tmp_path / "demos.parquet")
    unsaid = ["--tokenizer_name_or_path", folder(kind) / "tokenizer", "--vision_num_attention_heads", 2]
    run(import_policy, monkeypatch, "--policy_dir", folder(kind) / "policy", "--output", base, *unsaid)
    config = config_of(kind, tmp_path, demos)
    run(calculate_normalization_stats, monkeypatch, "--config_path", config)
    main_train.main(["--config_path", str(config), "--init_checkpoint", str(base)])
    return next((tmp_path / "runs" / "own" / "checkpoints").glob("checkpoint_*.pth.tar"))


@pytest.mark.parametrize("kind", KINDS)
def test_fine_tuned_for_another_robot(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained, demos = fine_tuned(kind, tmp_path, monkeypatch), tmp_path / "demos.parquet"
    assert "statistics: those of this run's data" in capsys.readouterr().err
    statistics = json.loads((tmp_path / "stats.json").read_text())
    assert statistics["absolute_action_dims"] == [4]
    assert statistics["datasets"]["default"]["state_columns"] == {"state": 5, "force": 2}
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


@pytest.mark.skipif(LEROBOT is None, reason="LEROBOT_PYTHON names no Python that has lerobot")
@pytest.mark.parametrize("kind", KINDS)
def test_lerobot_acts_alike_with_what_was_trained_here(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three cameras, 7 and 5 values and 4 steps where the base has 8, 7 and 10; then without the last camera."""
    trained = fine_tuned(kind, tmp_path, monkeypatch)
    out = tmp_path / kind
    run(export_policy, monkeypatch, "--checkpoint_path", trained, "--output_dir", out, "--format", "lerobot")
    checkpoint = load_checkpoint(trained)
    sizes = sizes_of(checkpoint["backbone_config"], config_from_dict(checkpoint["config"]), kind)
    (tmp_path / "sizes.json").write_text(json.dumps(lerobot_sizes(sizes, 2)))
    shutil.copytree(folder(kind) / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "prompts.json").write_text(json.dumps(["press the button"]))
    rng = np.random.default_rng(5)
    frames = {camera: rng.integers(0, 256, (3, 30, 50), dtype=np.uint8) for camera in CAMERAS}
    state, noise = rng.normal(size=7).astype(np.float32), rng.normal(size=(4, 32)).astype(np.float32)
    inputs = {f"image_{camera}": frame[None] for camera, frame in frames.items()}
    np.savez(tmp_path / "inputs.npz", state=state[None], noise=noise[None], **inputs)
    predictor = VLAPredictor.from_checkpoint(trained, device="cpu", use_amp=False)

    shown = [list(CAMERAS), list(CAMERAS[:2])]
    questions = [{"ask": "load", "kind": kind}, *({"ask": "latency", "cameras": one, "repeats": 1} for one in shown)]
    done = subprocess.run(
        [LEROBOT, REPOSITORY / "benchmarks" / "lerobot_side.py", tmp_path],
        input="".join(json.dumps(question) + "\n" for question in questions),
        capture_output=True,
        text=True,
        timeout=600,
    )
    answers = [json.loads(line.removeprefix(MARK)) for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert len(answers) == 3, done.stderr[-2000:]
    for cameras, answer in zip(shown, answers[1:], strict=True):
        images = {camera: frames[camera].transpose(1, 2, 0) for camera in cameras}
        ours = predictor.predict(images=images, prompt="press the button", state=state, noise=noise)
        np.testing.assert_allclose(ours, np.reshape(answer["value"], ours.shape), atol=2e-5, rtol=0)
