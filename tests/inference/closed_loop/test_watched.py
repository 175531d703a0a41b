"""What a closed loop keeps of uncertainty, and policies that are not shown everything."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

import main_eval
from inference.alarm import Alarm, Calibration
from inference.closed_loop.episode import Episode, EpisodeRequest, Plan, PlanRequest
from inference.closed_loop.evaluation import evaluate_tasks
from inference.closed_loop.rollout import GREY, ModelPolicy
from inference.predictor import VLAPredictor
from inference.report import rollout_table
from inference.uncertainty import alarm_settings
from model.context import ActionPrefix
from tests.helpers import write_episodes
from tests.inference.checkpoints import train_tiny
from tests.inference.closed_loop.settings import executing
from tests.inference.closed_loop.simple_env import DriftEnv

CALIBRATION = Calibration(1.0, 0.5, 1, 2, 0.05, 40, "test", {})
CAMERAS = ("image_1", "wrist")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_paligemma_dir):
    folder = tmp_path_factory.mktemp("run")
    demos = write_episodes(folder / "two.parquet", [6, 5], cameras=CAMERAS)
    data, head = {"cameras": list(CAMERAS), "action_mode": "delta"}, {"max_clean_prefix": 2}
    return train_tiny(folder, tiny_paligemma_dir, [demos], data=data, head=head)


def observation(seed, state):
    rng = np.random.default_rng(seed)
    pictures = {camera: rng.integers(0, 256, (40, 40, 3), dtype=np.uint8) for camera in CAMERAS}
    return pictures | {"state": np.asarray(state, np.float32)}


def plan(policy, seen, prefix=None):
    return policy.plan_many([EpisodeRequest(3, 0, PlanRequest((seen,), "press the button", prefix))])[0].actions


def test_blind_to_some_cameras_and_to_the_state(checkpoint):
    predictor = VLAPredictor.from_checkpoint(checkpoint, "cpu")
    one, other = observation(1, [0.1, 0.2, 0.3, 0.4]), observation(2, [-0.4, 0.3, 0.0, 0.9])
    without_wrist = ModelPolicy(predictor, blind=["wrist"])
    grey = {**one, "wrist": np.full((40, 40, 3), GREY, np.uint8)}
    np.testing.assert_array_equal(plan(without_wrist, one), plan(ModelPolicy(predictor), grey))
    np.testing.assert_array_equal(plan(without_wrist, one), plan(without_wrist, {**one, "wrist": other["wrist"]}))
    # the policy sees the mean state; its relative actions still begin at the true one
    stateless, mean = ModelPolicy(predictor, blind=["state"]), ModelPolicy(predictor).mean_state
    shift = plan(stateless, one) - plan(stateless, {**one, "state": other["state"]})
    np.testing.assert_allclose(shift, np.broadcast_to(one["state"] - other["state"], shift.shape), atol=1e-5)
    at_mean = plan(ModelPolicy(predictor), {**one, "state": mean})
    np.testing.assert_allclose(plan(stateless, one), at_mean + one["state"] - mean, atol=1e-5)
    assert ModelPolicy(predictor, blind=True).blind == set(CAMERAS)
    with pytest.raises(ValueError, match=r"blind front: this policy reads no such thing; .* image_1, wrist, state"):
        ModelPolicy(predictor, blind=["front"])


def test_a_policy_blind_to_the_state_continues_what_is_committed(checkpoint):
    """Relative actions begin at the mean state for the policy, and at the true one for the robot."""
    policy = ModelPolicy(VLAPredictor.from_checkpoint(checkpoint, "cpu"), blind=["state"])
    committed, later = plan(policy, observation(1, [0.1, 0.2, 0.3, 0.4])), observation(2, [-0.4, 0.3, 0.0, 0.9])
    prefix = ActionPrefix(torch.from_numpy(committed)[None], torch.tensor([[1.0, 1.0, 0.0, 0.0]]), clean=True)
    np.testing.assert_allclose(plan(policy, later, prefix)[:2], committed[:2], atol=1e-5)


def test_a_stateless_policy_has_no_state_to_hide(tmp_path, tiny_paligemma_dir):
    demos = write_episodes(tmp_path / "two.parquet", [4])
    path = train_tiny(tmp_path, tiny_paligemma_dir, [demos], head={"use_state_input": False})
    with pytest.raises(ValueError, match=r"blind state: this policy reads no such thing; give some of image_1$"):
        ModelPolicy(VLAPredictor.from_checkpoint(path, "cpu"), blind=["state"])


@pytest.mark.parametrize(
    ("flags", "blind"), [([], False), (["--blind"], True), (["--blind", "wrist", "state"], ["wrist", "state"])]
)
def test_blind_on_the_command_line(flags, blind):
    command = ["--checkpoint_path", "c", "--env", "metaworld", "--tasks", "t", *flags]
    assert main_eval.parse_args(command, None).blind == blind


def test_the_alarm_of_an_episode_rings_once_and_colours_the_video():
    env = DriftEnv("1")
    episode = Episode(env, executing(1, 1), 0, record=True, alarm=Alarm(CALIBRATION))
    values = iter([0.1, 2.0, math.nan, 0.1, 0.1, 0.1])
    result = episode.run(lambda request: Plan(np.zeros((1, 4), np.float32), next(values, 0.1)))
    assert result.alarm_step == 1 and math.isnan(result.uncertainty[2]) and result.uncertainty[:2] == [0.1, 2.0]
    strips = [tuple(frame[-2, -2]) for frame in result.frames]
    amber = (150, 75, 0)
    assert strips[0] != amber and strips[2] == amber and strips[3] == amber and strips[4] != amber


def test_episodes_keep_uncertainty_and_the_table_counts_alarms(checkpoint, tmp_path, monkeypatch):
    predictor = VLAPredictor.from_checkpoint(checkpoint, "cpu")
    settings = alarm_settings(predictor.model.action_head, predictor.settings, predictor.dataset.name)
    always = Calibration(-1.0, -1.0, 1, 1, 0.05, 40, "test", settings)

    def roll_out(folder, num_envs, **more):
        policy = ModelPolicy(predictor)
        monkeypatch.setattr(policy, "_sample", lambda request: predictor.observation(
            images={"image_1": np.zeros((40, 40, 3), np.uint8)}, prompt="go", state=request.history[-1]["state"]
        ))  # fmt: skip
        return evaluate_tasks(
            folder, {"9": None}, range(2), DriftEnv, policy, {}, prompts={}, num_envs=num_envs, num_videos=0, **more
        )

    result = roll_out(tmp_path / "uncalibrated", 1, restart=False)
    assert result["tasks"]["9"]["alarm_step"] == [None, None] and "alarm" not in result["settings"]
    predictor.calibrations = [always]
    found = {}
    for num_envs in (1, 2):
        folder = tmp_path / str(num_envs)
        result = roll_out(folder, num_envs, restart=False)
        found[num_envs] = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
        assert result["settings"]["alarm"] == asdict(always)
        assert result["tasks"]["9"]["alarm_step"] == [0, 0]
        assert "alarm in " in rollout_table(result) and "(calibrated to 5 %)" in rollout_table(result)
    for line in found[1]:
        assert len(line["uncertainty"]) == line["plans"] > 1 and all(value > 0 for value in line["uncertainty"])
    by_seed = [{line["seed"]: line["uncertainty"] for line in lines} for lines in found.values()]
    for seed in (0, 1):
        np.testing.assert_allclose(by_seed[0][seed], by_seed[1][seed], rtol=1e-3)
    predictor.calibrations = []
    with pytest.raises(ValueError, match="episodes of another evaluation: alarm differs"):
        roll_out(tmp_path / "1", 1, restart=False)
