"""Recorded rollouts: the same outcomes as without recording, in files that are training data like any other."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from data.convert.episode_writer import ImageEncoding
from data.convert.rollouts import RolloutRecorder
from data.doctor.examine import examine
from data.episode_store import EpisodeStore
from inference.closed_loop.evaluation import evaluate_tasks
from inference.closed_loop.policies import ReplayPolicy
from inference.closed_loop.rollout import ModelPolicy
from inference.eval_args import parse_args
from inference.predictor import VLAPredictor
from tests.helpers import write_episodes
from tests.inference.checkpoints import train_tiny
from tests.inference.closed_loop.settings import executing
from tests.inference.closed_loop.simple_env import DriftEnv
from utils.parquet_utils import DataError

TASKS = {"to_3": "easy", "to_100": "hard"}
SEEDS = range(3)


@pytest.fixture(scope="module")
def policy(tmp_path_factory, tiny_paligemma_dir):
    folder = tmp_path_factory.mktemp("run")
    checkpoint = train_tiny(folder, tiny_paligemma_dir, [write_episodes(folder / "demos.parquet", [6, 5])])
    return ModelPolicy(VLAPredictor.from_checkpoint(checkpoint, device="cpu"), executing(4, 2, latency_steps=1))


def roll_out(folder, policy, recorder=None, num_envs=1, seeds=SEEDS, settings=None, restart=False):
    options = {"prompts": {}, "num_videos": 0, "restart": restart, "num_envs": num_envs, "recorder": recorder}
    return evaluate_tasks(folder, TASKS, seeds, DriftEnv, policy, settings or {"checkpoint": "p"}, **options)


def test_recording_changes_no_outcome_and_makes_training_data(policy, tmp_path):
    plain = roll_out(tmp_path / "plain", policy)["tasks"]
    recorder = RolloutRecorder(tmp_path / "rollouts", ImageEncoding("png"))
    recorded = roll_out(tmp_path / "recorded", policy, recorder)["tasks"]
    timings = ("seconds", "plan_seconds")
    for task in TASKS:
        assert {k: v for k, v in recorded[task].items() if k not in timings} == {
            k: v for k, v in plain[task].items() if k not in timings
        }
    files = sorted((tmp_path / "rollouts").glob("*.parquet"))
    assert [path.name for path in files[:2]] == ["to_100_seed000000.parquet", "to_100_seed000001.parquet"]
    store = EpisodeStore(files, state_dim=4, per_action_dim=4, cameras=("image_1",), cache_dir=tmp_path / "cache")
    assert store.num_episodes == len(TASKS) * len(SEEDS)
    assert len(store) == sum(sum(task["steps"]) for task in recorded.values())
    outcomes = store.label("success", otherwise=True)[store.episode_starts[:-1]].tolist()
    assert outcomes == recorded["to_100"]["success"] + recorded["to_3"]["success"]
    seen = examine(files, num_workers=0)
    assert seen.findings.count("error") == 0 and "label_contradicts" not in seen.findings.counts


def test_an_episode_holds_what_was_seen_planned_and_done(tmp_path):
    demo = np.linspace(0, 6, 48, dtype=np.float32).reshape(12, 4)  # beyond the action space from step 10 on
    policies = {task: ReplayPolicy([demo]) for task in TASKS}
    recorder = RolloutRecorder(tmp_path / "rollouts", ImageEncoding("png"))
    result = roll_out(tmp_path / "out", policies, recorder, num_envs=2)
    path = recorder.path("to_100", 1)
    table = pq.read_table(path)
    rows = table.to_pylist()
    assert len(rows) == 12 and not rows[-1]["is_terminal"] and rows[-1]["is_last"]
    np.testing.assert_array_equal([row["action"] for row in rows], demo.clip(-5, 5))
    np.testing.assert_array_equal([row["plan"] for row in rows], demo)
    env = DriftEnv("to_100")
    observation, _ = env.reset(seed=1)
    np.testing.assert_array_equal(rows[0]["state"], observation["state"])
    assert [row["timestamp"] for row in rows[:2]] == pytest.approx([0.0, 0.1])
    assert {row["seed"] for row in rows} == {1} and {row["success"] for row in rows} == {False}
    about = json.loads(table.schema.metadata[b"rollout"])
    assert about["checkpoint"] == "p" and about["execution"]["strategy"] == "synchronous"
    assert table.schema.metadata[b"camera"] == b"none"
    short = pq.read_table(recorder.path("to_3", 0)).to_pylist()
    assert result["tasks"]["to_3"]["success"][0] and short[-1]["is_terminal"] and short[-1]["success"]


class UnclippedEnv(DriftEnv):
    """Executes what it is given, beyond the space that it declares."""

    clips_actions = False


def test_actions_are_recorded_as_they_were_executed(tmp_path):
    demo = np.full((12, 4), 7.0, np.float32)  # beyond the action space
    options = {"prompts": {}, "num_videos": 0, "restart": False, "num_envs": 1}
    recorder = RolloutRecorder(tmp_path / "rollouts")
    args = (range(1), UnclippedEnv, {"to_100": ReplayPolicy([demo])}, {"checkpoint": "p"})
    evaluate_tasks(tmp_path / "out", {"to_100": None}, *args, recorder=recorder, **options)
    rows = pq.read_table(recorder.path("to_100", 0)).to_pylist()
    assert len(rows) == 12 and all(row["action"] == [7.0] * 4 for row in rows)


def test_a_task_whose_name_no_file_could_have(tmp_path):
    assert RolloutRecorder(tmp_path).path("module:name/Env-v0", 3) == tmp_path / "module_name_Env-v0_seed000003.parquet"


def test_plans_stand_where_they_were_asked_for(policy, tmp_path):
    recorder = RolloutRecorder(tmp_path / "rollouts")
    result = roll_out(tmp_path / "out", policy, recorder, seeds=range(1))
    rows = pq.read_table(recorder.path("to_100", 0)).to_pylist()
    planned = [i for i, row in enumerate(rows) if row["plan"] is not None]
    assert len(planned) == result["tasks"]["to_100"]["plans"][0] and planned[0] == 0
    assert {len(rows[i]["plan"]) for i in planned} == {4 * 4}
    assert rows[0]["image_1"][:2] == b"\xff\xd8"


def test_an_evaluation_goes_on_with_its_recordings(policy, tmp_path):
    recorder = RolloutRecorder(tmp_path / "rollouts")
    roll_out(tmp_path / "out", policy, recorder, seeds=range(2))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "rollouts").iterdir()}
    roll_out(tmp_path / "out", policy, recorder, seeds=range(3))
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "rollouts").iterdir()}
    assert before.items() <= after.items() and len(after) == 6
    recorder.path("to_3", 1).unlink()
    with pytest.raises(DataError, match=r"has no to_3_seed000001.parquet, but --output_dir says .* with --restart"):
        roll_out(tmp_path / "out", policy, recorder, seeds=range(3))
    with pytest.raises(DataError, match=r"is not of this evaluation .* choose another --record"):
        roll_out(tmp_path / "other", policy, recorder, settings={"checkpoint": "q"})
    write_episodes(tmp_path / "mixed" / "demos.parquet", [5])
    with pytest.raises(DataError, match=r"demos.parquet is not of this evaluation"):
        roll_out(tmp_path / "third", policy, RolloutRecorder(tmp_path / "mixed"))


def test_a_blind_policy_is_not_recorded(capsys):
    flags = ["--checkpoint_path", "c", "--env", "metaworld", "--tasks", "reach-v3", "--record", "d", "--blind"]
    with pytest.raises(SystemExit):
        parse_args(flags, None)
    assert "--record would keep pictures that the policy of --blind does not see" in capsys.readouterr().err
