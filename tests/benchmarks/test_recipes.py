"""The recipes of LIBERO, ALOHA and MT50: every command that they run is one that the scripts take."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import _recipe, aloha_transfer, libero_goal, metaworld_mt50
from inference.eval_args import parse_args
from scripts._recording import recording_parser
from utils.cli import config_from_args, train_parser
from utils.config_utils import load_config

ROOT = Path(__file__).resolve().parents[2]


def outcome(tasks):
    task = {"successes": 1, "episodes": 2, "success_rate": 0.5, "seeds": [10000, 10001]}
    settings = {"env_settings": {"mujoco": "3.3.0", "max_episode_steps": 300}}
    summary = {"successes": len(tasks), "episodes": 2 * len(tasks), "wilson_95": [0.1, 0.9]}
    return {"tasks": dict.fromkeys(tasks, task), "summary": summary, "settings": settings}


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Every command, checked by the parser of its script, with rollouts.json where one would be."""
    found = []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")

    def run(script, *arguments):
        found.append((script, arguments))
        if script == "main_eval.py":
            args = parse_args(arguments, None)
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            (Path(args.output_dir) / "rollouts.json").write_text(json.dumps(outcome(args.tasks)))
        elif script == "scripts/record_demos.py":
            recording_parser().parse_args(arguments)
        elif script in ("main_train.py", "main_train_ddp.py"):
            words = arguments[2:] if script == "main_train_ddp.py" else arguments
            config = config_from_args(train_parser(None).parse_args(words))
            (config.experiment_dir / "checkpoints").mkdir(parents=True)
            (config.experiment_dir / "checkpoints/model_best.pth.tar").touch()

    monkeypatch.setattr(_recipe, "run", run)
    return found


def test_libero(commands, monkeypatch, capsys):
    monkeypatch.setattr(libero_goal, "starts_are_identical", lambda seeds, image_size: True)
    monkeypatch.setattr(sys, "argv", ["libero_goal.py", "--episodes", "2"])
    libero_goal.main()
    recorded = [arguments for script, arguments in commands if script == "scripts/record_demos.py"]
    tasks = recording_parser().parse_args(recorded[0]).tasks
    assert len(tasks) == 16 and set(libero_goal.LANGUAGE) < set(tasks)
    evaluations = [arguments for script, arguments in commands if script == "main_eval.py"]
    assert len(evaluations) == 4 + 1 + 2 * len(libero_goal.RUNS)
    assert sum("--prompt_override" in arguments for arguments in evaluations) == 4
    printed = capsys.readouterr().out
    assert "mean of the diagonal 50 %" in printed and "MuJoCo 3.3.0" in printed and "wide layout" in printed


def test_aloha(commands, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["aloha_transfer.py", "--num_workers", "2"])
    aloha_transfer.main()
    trained = [arguments for script, arguments in commands if script == "main_train_ddp.py"]
    assert len(trained) == 2 and "model.action_head_config.denoiser=unet" in trained[1]
    assert sum(script == "scripts/record_demos.py" for script, _ in commands) >= 2
    printed = capsys.readouterr().out
    assert "unet, blind" in printed and "replay" in printed


@pytest.mark.parametrize("name", ["libero_goal", "aloha_transfer", "metaworld_mt50_cpu"])
def test_configs_are_those_of_their_data(name):
    config = load_config(ROOT / f"configs/{name}.yaml")
    widths = {"libero_goal": (8, 7), "aloha_transfer": (14, 14), "metaworld_mt50_cpu": (4, 4)}[name]
    assert (config.data.state_dim, config.model.action_head_config.per_action_dim) == widths


def test_mt50_on_two_cores_trains_in_two_processes(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(metaworld_mt50, "run", lambda *command: commands.append(command))
    metaworld_mt50.train(tmp_path / "mt50", "configs/metaworld_mt50_cpu.yaml", metaworld_mt50.CPU_BACKBONE, [], 2)
    assert commands[-1][:3] == ("main_train_ddp.py", "--nproc", "2")
