"""Several simulator processes and one policy: the episodes of a serial run, resumed without repeating any."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import av
import numpy as np
import pytest

from envs import expand_tasks
from inference.closed_loop.episode import Episode
from inference.closed_loop.evaluation import _swapped, evaluate_tasks
from inference.closed_loop.parallel import run_episodes, start_simulator
from inference.closed_loop.policies import ReplayPolicy
from inference.closed_loop.record import RolloutRecord
from inference.closed_loop.rollout import ModelPolicy, summarize_tasks
from inference.closed_loop.simulator import Job
from inference.closed_loop.video import read_video
from inference.predictor import VLAPredictor
from inference.report import rollout_table
from tests.helpers import write_episodes
from tests.inference.checkpoints import train_tiny
from tests.inference.closed_loop.settings import executing
from tests.inference.closed_loop.simple_env import DriftEnv

JOBS = [Job(task, seed) for task in ("to_3", "to_100") for seed in range(3)]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory, tiny_paligemma_dir):
    folder = tmp_path_factory.mktemp("run")
    checkpoint = train_tiny(folder, tiny_paligemma_dir, [write_episodes(folder / "demos.parquet", [6, 5])])
    return VLAPredictor.from_checkpoint(checkpoint, device="cpu")


def run(policy, jobs=JOBS, num_envs=1):
    found = {}
    run_episodes(jobs, DriftEnv, policy, lambda e: found.update({(e.job.task, e.job.seed): e}), num_envs=num_envs)
    return found


def outcome(episode):
    result = episode.result
    return result.success, result.steps, result.plans, result.held_steps, result.total_reward


@pytest.mark.parametrize("execution", ["synchronous", "rtc"])
def test_processes_change_no_episode(predictor, execution):
    settings = executing(4, 2, execution, latency_steps=1)
    policy = ModelPolicy(predictor, settings)
    serial, parallel = run(policy), run(policy, num_envs=2)
    assert serial.keys() == parallel.keys() == {(job.task, job.seed) for job in JOBS}
    for key in serial:
        assert outcome(parallel[key]) == outcome(serial[key])
    rewards = {key: episode.result.total_reward for key, episode in serial.items()}
    assert len({rewards["to_3", seed] for seed in range(3)}) == 3, "the episodes differ from each other"


def test_requests_that_wait_are_planned_together(predictor, monkeypatch):
    policy, sizes, real = ModelPolicy(predictor), [1], ModelPolicy.plan_many

    def slow_plan_many(self, asked):
        if max(sizes) == 1:
            time.sleep(0.5)  # processes start one after the other: the later ones ask while this one plans
        sizes.append(len(asked))
        return real(self, asked)

    monkeypatch.setattr(ModelPolicy, "plan_many", slow_plan_many)
    run(policy, num_envs=3)
    assert max(sizes) > 1


def test_policies_that_run_beside_their_simulator(tmp_path):
    policies = {task: ReplayPolicy([np.full((2, 4), 0.5, np.float32)]) for task in ("to_3", "to_100")}
    film = str(tmp_path / "film.mp4")
    jobs = [Job("to_3", 0, video=film), Job("to_100", 1, prompt="stay")]
    serial, parallel = run(policies, jobs), run(policies, jobs, num_envs=2)
    assert [outcome(parallel[key]) for key in serial] == [outcome(episode) for episode in serial.values()]
    assert len(read_video(film)) == serial["to_3", 0].result.steps + 1


def test_simulator_processes_start_without_torch():
    code = "import sys, inference.closed_loop.simulator as _; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_simulator_ends_with_whoever_started_it(capfd):
    process, connection = start_simulator()
    connection.close()
    assert process.wait(timeout=30) == 1
    assert capfd.readouterr().err == ""


def test_what_goes_wrong_in_a_process_is_told(predictor):
    with pytest.raises(RuntimeError, match="simulator process of crash seed 4 died"):
        run(ModelPolicy(predictor), [Job("crash", 4)] * 2, num_envs=2)
    policies = {"to_3": ReplayPolicy([np.full((2, 4), np.nan, np.float32)])}
    with pytest.raises(ValueError, match="to_3: seed . step 0: .*not finite"):
        run(policies, [Job("to_3", 0), Job("to_3", 1)], num_envs=2)


def finished_episodes(tmp_path):
    policies = {task: ReplayPolicy([np.full((2, 4), 0.5, np.float32)]) for task in ("to_3", "to_100")}
    return list(run(policies).values())


def test_a_record_goes_on_where_it_was(tmp_path):
    episodes, settings = finished_episodes(tmp_path), {"seed": 1, "path": ("a",)}
    record = RolloutRecord(tmp_path / "out", settings)
    for episode in episodes[:4]:
        record.add(episode)
    with (tmp_path / "out" / "episodes.jsonl").open("a") as file:
        file.write('{"task": "to_1')  # what a kill leaves
    again = RolloutRecord(tmp_path / "out", settings)
    assert again.done == {(e.job.task, e.job.seed) for e in episodes[:4]}
    for episode in episodes[4:]:
        again.add(episode)
    lines = (tmp_path / "out" / "episodes.jsonl").read_text().splitlines()
    assert len(lines) == 6 and all(json.loads(line) for line in lines)
    summary = again.task("to_3", range(3))
    assert summary["seeds"] == [0, 1, 2] and summary["episodes"] == 3
    assert summary["successes"] == sum(e.result.success for e in episodes if e.job.task == "to_3")


def test_another_evaluation_is_not_continued(tmp_path):
    record = RolloutRecord(tmp_path, {"checkpoint": "a"})
    record.add(finished_episodes(tmp_path)[0])
    with pytest.raises(ValueError, match="checkpoint differs .there 'a', now 'b'.; .*--restart"):
        RolloutRecord(tmp_path, {"checkpoint": "b"})
    assert not RolloutRecord(tmp_path, {"checkpoint": "b"}, restart=True).done
    record.add(finished_episodes(tmp_path)[0])
    (tmp_path / "rollout_settings.json").unlink()
    with pytest.raises(ValueError, match="holds episodes.jsonl, but no rollout_settings.json that says of which"):
        RolloutRecord(tmp_path, {"checkpoint": "b"})


def test_what_a_rate_depends_on_stands_under_it(tmp_path):
    """Seeds, step limits, which may be a task's own, and the simulator's version."""
    record = RolloutRecord(tmp_path, {})
    for episode in finished_episodes(tmp_path):
        limit = {"to_3": 220, "to_100": 280}[episode.job.task]
        record.add(replace(episode, env_settings={"mujoco": "3.3.0", "max_episode_steps": limit}))
    tasks = {task: record.task(task, range(3)) for task in ("to_3", "to_100")}
    own = {task: about["env_settings"] for task, about in tasks.items() if "env_settings" in about}
    assert len(own) == 1 and own in ({"to_3": {"max_episode_steps": 220}}, {"to_100": {"max_episode_steps": 280}})
    settings = {"env_settings": record.env_settings}
    table = rollout_table({"settings": settings, "tasks": tasks, "summary": summarize_tasks(tasks, None)})
    assert table.splitlines()[-1] == "seeds 0 to 2, 220 or 280 steps at most, MuJoCo 3.3.0"


def test_episodes_that_were_told_something_else_are_not_continued(tmp_path):
    record = RolloutRecord(tmp_path, {"checkpoint": "a"})
    record.add(finished_episodes(tmp_path)[0])
    task, told = record.lines[0]["task"], record.lines[0]["prompt"]
    record.require_prompts({task: told, "other": "x"})
    with pytest.raises(
        ValueError, match=f"episodes of {task} that were told '{told}', now it is told 'stop'; .*--rest"
    ):
        record.require_prompts({task: "stop"})


def test_another_version_of_the_simulator_is_not_mixed_in(tmp_path):
    first, second, *_ = finished_episodes(tmp_path)
    record = RolloutRecord(tmp_path, {"checkpoint": "a"})
    record.add(replace(first, env_settings={"mujoco": "3.3.0"}))
    record.add(replace(second, env_settings={"mujoco": "3.3.0", "named_since": 1}))
    with pytest.raises(ValueError, match=f"{second.job.task} with mujoco '3.3.0', now it is '3.4.0'; .*--restart"):
        record.add(replace(second, env_settings={"mujoco": "3.4.0"}))
    assert len(record.lines) == 2


def test_swapped_instructions_are_others():
    assert _swapped({"a": "x", "b": "y", "c": "z"}) == {"a": "y", "b": "z", "c": "x"}
    assert _swapped({"a": "x", "b": "x", "c": "z"}) == {"a": "z", "b": "z", "c": "x"}
    with pytest.raises(ValueError, match="--swap_prompts needs tasks with different instructions; found a, b"):
        _swapped({"a": "x", "b": "x"})


def test_grids_are_as_fast_as_the_videos_in_them(tmp_path):
    policies = {task: ReplayPolicy([np.zeros((2, 4), np.float32)]) for task in ("to_3", "to_100")}
    options = {"prompts": {}, "num_envs": 1, "num_videos": 2, "restart": False}
    evaluate_tasks(tmp_path, dict.fromkeys(policies), range(2), DriftEnv, policies, {}, **options)
    for name in ("to_100_seed0", "to_100", "grid"):
        with av.open(str(tmp_path / "videos" / f"{name}.mp4")) as video:
            assert video.streams.video[0].average_rate == DriftEnv.control_hz


def test_tiers_are_means_of_their_tasks():
    def task(successes, episodes):
        return {"successes": successes, "episodes": episodes, "success_rate": successes / episodes}

    tasks = {"a": task(10, 10), "b": task(0, 10), "c": task(1, 10)}
    summary = summarize_tasks(tasks, {"a": "easy", "b": "easy", "c": "hard", "unused": "medium"})
    assert summary["tiers"]["easy"]["mean_success_rate"] == 0.5 and summary["tiers"]["easy"]["tasks"] == 2
    assert summary["tiers"].keys() == {"easy", "hard"}
    assert summary["tier_mean_success_rate"] == pytest.approx((0.5 + 0.1) / 2)
    assert summary["mean_success_rate"] == pytest.approx(1.1 / 3)


def test_all_and_tiers_stand_for_their_tasks():
    assert len(expand_tasks("metaworld", ["all"])) == 50
    assert expand_tasks("metaworld", ["very_hard", "window-open-v3"])[-1] == "window-open-v3"
    assert len(expand_tasks("metaworld", ["easy", "medium", "hard", "very hard", "all"])) == 50
    with pytest.raises(ValueError, match="did you mean 'window-open-v3'"):
        expand_tasks("metaworld", ["window-opn-v3"])


def test_ctrl_c_in_the_terminal_is_not_for_simulator_processes():
    process, connection = start_simulator()
    assert os.getpgid(process.pid) != os.getpgid(0)
    connection.close()
    process.wait(timeout=30)


@pytest.mark.parametrize("outcome", ["success", "failure"])
def test_a_video_says_who_acts_and_how_it_ended(monkeypatch, outcome):
    lines = []
    monkeypatch.setattr("inference.closed_loop.episode.captioned", lambda frame, text, **colours: lines.append(text[1]))
    env = DriftEnv("1")
    real = env.step

    def step(action):
        observation, reward, _, _, _ = real(action)
        ended = env._steps == 3
        return observation, reward, False, ended, {"success": ended and outcome == "success"}

    env.step = step
    episode = Episode(env, executing(1, 1), 7, record=True, label="blind")
    episode.run(lambda request: np.zeros((1, 4), np.float32))
    assert lines[0] == "blind  step 0  seed 7" and lines[-1] == f"blind  step 3  {outcome}  seed 7"
