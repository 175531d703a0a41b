"""The recipes of LIBERO, ALOHA and MT50: every command that they run is one that the scripts take."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

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
    summary |= {"mean_success_rate": 0.5, "tier_mean_success_rate": 0.5}
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
            (config.experiment_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
            training = config.training
            about = {"step": training.max_steps, "saved_at": 0.0, "config": {"training": {"experiment_name": ""}}}
            about["config"]["training"]["experiment_name"] = training.experiment_name
            for name in ("model_best", "checkpoint_epoch_1"):
                torch.save(about, config.experiment_dir / f"checkpoints/{name}.pth.tar")

    monkeypatch.setattr(_recipe, "run", run)
    return found


def test_libero(commands, monkeypatch, capsys):
    monkeypatch.setattr(libero_goal, "starts_are_identical", lambda seeds, image_size: True)
    counts = {told: dict.fromkeys(libero_goal.LANGUAGE, 0) | {told: 2} for told in libero_goal.LANGUAGE}
    counts[libero_goal.LANGUAGE[0]] |= {libero_goal.LANGUAGE[1]: 4}
    monkeypatch.setattr(libero_goal, "language_matrix", lambda recipe, episodes, paraphrase: counts)
    monkeypatch.setattr(sys, "argv", ["libero_goal.py", "--episodes", "2"])
    libero_goal.main()
    recorded = [arguments for script, arguments in commands if script == "scripts/record_demos.py"]
    tasks = {task for arguments in recorded for task in recording_parser().parse_args(arguments).tasks}
    assert len(tasks) == 16 and set(libero_goal.LANGUAGE) < tasks and len(recorded) == 16 * 7
    corrections = [a for a in recorded if "--takeover" in a]
    assert len(corrections) == 3 * 16
    first, *rounds = (a for script, a in commands if script == "main_train_ddp.py")
    assert "auto" in first and not any("corrections" in word for word in first)
    folders, before = [], "libero_goal"
    names = ("libero_goal_corrected", "libero_goal_corrected_2", "libero_goal_corrected_3")
    for arguments, name, seed in zip(rounds, names, ("2000", "3000", "4000"), strict=True):
        checkpoint = f"experiments/{before}/checkpoints/model_best.pth.tar"
        of_round = [a for a in corrections if checkpoint in a]
        assert len(of_round) == 16 and {a[a.index("--seed") + 1] for a in of_round} == {seed}
        folders.append(f"demos/libero_goal/corrections_{before}/")
        assert all(sum(word.startswith(folder) for word in arguments) == 16 for folder in folders)
        begins = arguments.index("--init_checkpoint")
        assert arguments[begins + 1 : begins + 4] == (checkpoint, "--statistics", "pretrained")
        assert arguments[arguments.index("--experiment_name") + 1] == name
        assert arguments[arguments.index("--model_name_or_path") + 1] == "weight/libero_goal"
        before = name
    evaluations = [arguments for script, arguments in commands if script == "main_eval.py"]
    assert len(evaluations) == 2 * len(libero_goal.RUNS)
    for layout in ("standard", "wide"):  # what is played back lay as it lies now, and was done as it is told
        (replay,) = (a for a in evaluations if "replay" in a and f"layout={layout}" in a)
        folder = f"replay_{layout}"
        assert sum(folder in argument for argument in replay) == 16
        made = [a for a in recorded if any(folder in argument for argument in a)]
        assert len(made) == 16 and all(f"layout={layout}" in a for a in made)
        assert all(a[a.index("--noise_scale") + 1] == "0" for a in made)
    printed = capsys.readouterr().out
    assert "diagonal: 8/8" in printed and "rest: 4/24" in printed and "paraphrases never trained on" in printed
    assert "MuJoCo 3.3.0" in printed and "wide layout" in printed


@pytest.fixture
def no_matrix(monkeypatch):
    """LIBERO's recipe without its simulator."""
    monkeypatch.setattr(libero_goal, "starts_are_identical", lambda seeds, image_size: True)
    counts = {told: dict.fromkeys(libero_goal.LANGUAGE, 0) for told in libero_goal.LANGUAGE}
    monkeypatch.setattr(libero_goal, "language_matrix", lambda recipe, episodes, paraphrase: counts)


def test_fresh_forgets_the_further_trainings_too(commands, no_matrix, monkeypatch):
    for flags in ([], [], ["--fresh"]):
        monkeypatch.setattr(sys, "argv", ["libero_goal.py", "--matrix_only", *flags])
        libero_goal.main()
    trainings = [arguments for script, arguments in commands if script == "main_train_ddp.py"]
    assert ["--init_checkpoint" in arguments for arguments in trainings] == [False, True, True, True] * 2


def test_a_longer_recipe_corrects_on_seeds_that_nothing_else_takes(commands, no_matrix, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["libero_goal.py", "--rounds", "6", "--episodes", "20"])
    libero_goal.main()
    parse = recording_parser().parse_args
    recorded = [parse(arguments) for script, arguments in commands if script == "scripts/record_demos.py"]
    ranges = sorted({(a.seed, a.seed + int(a.episodes * a.max_attempts_factor)) for a in recorded})
    assert len(ranges) == 9  # train, val, six rounds, and what is replayed
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ranges))
    assert ranges[-1][1] <= libero_goal.FIRST_EVALUATION_SEED


class Scene(gymnasium.Env):
    """Reaches the first task's goal at its second step, and the second one's for one step in between."""

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return {"state": np.zeros(8)}, {"success": False}

    def step(self, action):
        self.steps += 1
        return {"state": np.zeros(8)}, 0.0, self.holds(libero_goal.LANGUAGE[0]), self.steps == 4, {"success": True}

    def holds(self, task):
        first, second, *_ = libero_goal.LANGUAGE
        return (task == first and self.steps >= 2) or (task == second and self.steps == 3)


def test_an_episode_of_the_matrix_goes_on_and_counts_every_goal():
    env = libero_goal.AllGoals(Scene())
    env.reset(seed=0)
    ends = []
    for _ in range(4):
        _, _, terminated, truncated, info = env.step(np.zeros(7))
        ends.append((terminated, truncated, info["success"]))
    assert ends == [(False, False, False)] * 3 + [(False, True, False)]
    assert env.reached == set(libero_goal.LANGUAGE[:2])
    env.reset(seed=1)
    assert env.reached == set()


def test_finished_episodes_of_the_matrix_are_not_run_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = _recipe.Recipe("r", "c.yaml", "libero", libero_goal.LANGUAGE)
    recipe.experiment.mkdir(parents=True)
    with (recipe.experiment / "language_0.jsonl").open("w") as file:
        for told in libero_goal.LANGUAGE:
            reached = [told] if told != libero_goal.LANGUAGE[2] else [libero_goal.LANGUAGE[0]]
            file.write(json.dumps({"told": told, "seed": 10_000, "reached": reached}) + "\n")
    matrix = libero_goal.language_matrix(recipe, 1)
    assert [list(goals.values()) for goals in matrix.values()] == [
        [1, 0, 0, 0],
        [0, 1, 0, 0],
        [1, 0, 0, 0],
        [0, 0, 0, 1],
    ]


def test_stages_go_on_where_they_were(commands, monkeypatch, tmp_path):
    """A training that was killed is resumed, not taken for a complete one; a complete one is not repeated."""
    recipe = _recipe.Recipe("r", str(ROOT / "configs/aloha_transfer.yaml"), "aloha", ["transfer_cube"])
    run = _recipe.run

    def killed(script, *arguments):
        run(script, *arguments)
        if script == "main_train.py":
            raise KeyboardInterrupt

    monkeypatch.setattr(_recipe, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        recipe.train()
    assert recipe.checkpoint.is_file() and not recipe.seconds["train"]["complete"]
    monkeypatch.setattr(_recipe, "run", run)
    recipe.train()
    recipe.train()
    trainings = [arguments for script, arguments in commands if script == "main_train.py"]
    assert len(trainings) == 2 and all("--resume_checkpoint auto" in " ".join(words) for words in trainings)
    assert recipe.seconds["train"]["complete"] and recipe.seconds["train"]["wall"] > 0


def test_a_stopped_training_is_not_a_complete_one(commands, monkeypatch):
    """SIGTERM to the training alone: it saves and ends with status 0, and the recipe evaluates nothing."""
    recipe = _recipe.Recipe("r", str(ROOT / "configs/aloha_transfer.yaml"), "aloha", ["transfer_cube"])
    run = _recipe.run

    def stopped(script, *arguments):
        run(script, *arguments)
        for path in recipe.experiment.glob("checkpoints/*.pth.tar"):
            checkpoint = torch.load(path, weights_only=True)
            torch.save(checkpoint | {"step": checkpoint["step"] - 1}, path)

    monkeypatch.setattr(_recipe, "run", stopped)
    with pytest.raises(SystemExit, match="r: training stopped after step 9599 of 9600; the same command goes on"):
        recipe.train()
    assert not recipe.seconds["train"]["complete"]
    recipe._timed = lambda stage: contextlib.nullcontext()
    recipe.settings = ["training.max_hours=2"]
    (recipe.experiment / "seconds.json").write_text('{"train": {"wall": 3600.0}}')
    with pytest.raises(SystemExit):
        recipe.train()
    assert commands[-1][1][-1] == "training.max_hours=1.0"  # of all starts together
    (recipe.experiment / "seconds.json").write_text('{"train": {"wall": 7200.0}}')
    recipe.train()  # a limit that was reached is an end


def test_aloha(commands, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["aloha_transfer.py", "--num_workers", "2", "--set", "training.max_hours=3"])
    aloha_transfer.main()
    trained = [arguments for script, arguments in commands if script == "main_train_ddp.py"]
    assert len(trained) == 2 and "model.action_head_config.denoiser=unet" in trained[1]
    assert all("training.max_hours=3" in arguments for arguments in trained)
    assert sum(script == "scripts/record_demos.py" for script, _ in commands) >= 2
    printed = capsys.readouterr().out
    assert "unet, blind" in printed and "replay" in printed


@pytest.mark.parametrize("name", ["libero_goal", "aloha_transfer", "metaworld_mt50_cpu"])
def test_configs_are_those_of_their_data(name):
    config = load_config(ROOT / f"configs/{name}.yaml")
    widths = {"libero_goal": (8, 7), "aloha_transfer": (14, 14), "metaworld_mt50_cpu": (4, 4)}[name]
    assert (config.data.state_dim, config.model.action_head_config.per_action_dim) == widths


def test_mt50_on_two_cores_trains_in_two_processes(commands, monkeypatch):
    monkeypatch.setattr(metaworld_mt50, "print_table", lambda results: None)
    monkeypatch.setattr(sys, "argv", ["metaworld_mt50.py", "--cpu"])
    metaworld_mt50.main()
    (trained,) = [arguments for script, arguments in commands if script == "main_train_ddp.py"]
    assert trained[:2] == ("--nproc", "2") and "configs/metaworld_mt50_cpu.yaml" in trained
    recorded = [arguments for script, arguments in commands if script == "scripts/record_demos.py"]
    assert len(recorded) == 100 and ("--episodes", "50") == recorded[0][recorded[0].index("--episodes") :][:2]


def test_mt50_shows_success_over_training_time(commands, capsys):
    tasks = ["soccer-v3", "push-v3"]
    recipe = _recipe.Recipe("r", "c.yaml", "metaworld", tasks)
    assert metaworld_mt50.curve(recipe, 3, 200) == {}
    (recipe.experiment / "checkpoints").mkdir(parents=True)
    for step in (4000, 8000, 12000, 16000, 20000, 21500):
        (recipe.experiment / f"checkpoints/checkpoint_step_{step}.pth.tar").touch()
    summaries = metaworld_mt50.curve(recipe, 3, 200)
    assert list(summaries) == [8000, 16000, 21500]
    evaluated = [arguments[arguments.index("--checkpoint_path") + 1] for _, arguments in commands]
    assert evaluated == [f"experiments/r/checkpoints/checkpoint_step_{step}.pth.tar" for step in summaries]
    assert len(metaworld_mt50.curve(recipe, 9, 200)) == 6
    rates = {"mean_success_rate": 0.5, "tier_mean_success_rate": 0.25}
    metaworld_mt50.print_curve({step: summary | rates for step, summary in summaries.items()}, 2.2, 22_000)
    assert "16000 1.60 2/4 (15 to 85 %) 50.0 % 25.0 %" in " ".join(capsys.readouterr().out.split())
