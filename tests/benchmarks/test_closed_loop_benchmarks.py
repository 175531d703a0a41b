"""What the closed-loop benchmarks ask of main_eval.py, and how they count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import _recipe, latency, metaworld_mt50
from envs.metaworld_tasks import TIERS
from inference.closed_loop.rollout import summarize_tasks


def test_mt50_evaluates_policy_blind_and_replay_alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = []

    def run(*command: str) -> None:
        output = Path(command[command.index("--output_dir") + 1])
        output.mkdir(parents=True)
        (output / "rollouts.json").write_text(json.dumps({"of": output.name}))
        commands.append(command)

    monkeypatch.setattr(_recipe, "run", run)
    recipe = _recipe.Recipe("mt50", "c.yaml", "metaworld", ["push-v3", "soccer-v3"], num_workers=4)
    results = metaworld_mt50.evaluate(recipe, 10, step_limit=500)
    assert results == {name: {"of": name} for name in ("policy", "blind", "replay")}
    shared = "--env metaworld --tasks push-v3 soccer-v3 --episodes 10"
    for command in commands:
        text = " ".join(command)
        assert shared in text and "--num_envs 4" in text and "--env_options max_episode_steps=500" in text
    policy, blind, replay = commands
    assert "--blind" in blind and "--blind" not in policy
    assert "--checkpoint_path" in policy and "--checkpoint_path" in blind and "--checkpoint_path" not in replay
    assert "--control replay --demos_path demos/mt50/train/push-v3.parquet demos/mt50/train/soccer" in " ".join(replay)


def test_mt50_table_weighs_tiers_alike(capsys):
    successes = {"window-open-v3": 10, "reach-v3": 8, "soccer-v3": 3, "push-v3": 1, "stick-push-v3": 0}
    tasks = {name: {"successes": n, "episodes": 10, "success_rate": n / 10} for name, n in successes.items()}
    summary = summarize_tasks(tasks, {name: TIERS[name] for name in tasks})
    by_tier = {}
    for name, n in successes.items():
        by_tier.setdefault(TIERS[name], []).append(10 * n)
    tier_means = [sum(rates) / len(rates) for rates in by_tier.values()]
    metaworld_mt50.print_table({name: {"summary": summary} for name in metaworld_mt50.RUNS})
    printed = capsys.readouterr().out
    assert f"{sum(tier_means) / len(tier_means):.1f} %" in printed.split("mean of tiers")[1].splitlines()[0]
    assert "44.0 %" in printed.split("mean of tasks")[1].splitlines()[0]  # 22 of 50
    assert "SmolVLA 57.3" in printed and len(by_tier) == 4


def test_latency_counts_by_deadline_and_by_limit():
    def episode(task: str, success: bool, steps: int) -> dict:
        return {
            "task": task,
            "success": success,
            "steps": steps,
            "held_steps": 0,
            "action_change": 0.0,
            "plan_seconds": 0.01,
        }

    longest = {"a": 60, "b": 100}
    zero = [episode("a", True, 90), episode("a", True, 50), episode("b", True, 150), episode("b", True, 149)]
    late = [episode("a", True, 91), episode("a", True, 90), episode("b", False, 200), episode("b", True, 150)]
    row = latency.summarize({"rtc": {0: zero, 4: late}}, longest)["rtc"][4]
    assert row["deadline"]["successes"] == 2 and row["deadline"]["kept"] == pytest.approx(0.5)
    assert row["limit"]["successes"] == 3 and row["limit"]["kept"] == pytest.approx(0.75)
    assert row["kept_by_factor"]["1.1"] == 0.0 and row["kept_by_factor"]["1.75"] == pytest.approx(0.75)
    assert row["steps_to_success"] == pytest.approx((91 + 90 + 150) / 3)
