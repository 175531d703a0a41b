"""Three cameras of a simulator, from recording to the closed loop."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import main_eval
from inference.predictor import VLAPredictor
from scripts._recording import record, recording_parser
from tests.inference.checkpoints import train_tiny

CAMERAS = ["corner4", "wrist", "corner"]
TASK = "reach-v3"


@pytest.mark.slow
def test_three_cameras_are_recorded_trained_on_and_seen_in_closed_loop(
    tmp_path: Path, tiny_paligemma_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = ["--tasks", TASK, "--episodes", "2", "--output_dir", str(tmp_path), "--image_size", "32"]
    args = recording_parser().parse_args(
        [*flags, "--num_workers", "1", "--cameras", "corner4", "wrist=gripperPOV", "corner"]
    )
    args.command = "record_demos.py"
    (summary,) = record(args)
    assert pq.read_schema(summary.path).names[:3] == CAMERAS
    checkpoint = train_tiny(tmp_path, tiny_paligemma_dir, [summary.path], data={"cameras": CAMERAS})
    assert VLAPredictor.from_checkpoint(checkpoint, "cpu").cameras == tuple(CAMERAS)
    common = ["--checkpoint_path", str(checkpoint), "--device", "cpu", "--env", "metaworld", "--tasks", TASK]
    common += ["--episodes", "1", "--num_videos", "1"]
    options = ["max_episode_steps=8"]
    with pytest.raises(ValueError, match="metaworld has no camera 'wrist'"):
        main_eval.main([*common, "--output_dir", str(tmp_path / "a"), "--env_options", *options])
    options += ["cameras=corner4,wrist=gripperPOV,corner"]
    main_eval.main([*common, "--output_dir", str(tmp_path / "b"), "--env_options", *options])
    result = json.loads((tmp_path / "b" / "rollouts.json").read_text())
    assert result["tasks"][TASK]["episodes"] == 1
    assert result["settings"]["env_settings"]["cameras"] == "corner4=corner4,wrist=gripperPOV,corner=corner"
