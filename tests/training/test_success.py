"""`training.eval_every_n_epochs`: closed-loop episodes while a policy trains."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import main_train
from data.processing import processors_from_checkpoint
from inference.closed_loop.in_training import TrainingRollouts
from tests.helpers import needs
from tests.inference.closed_loop.simple_env import DriftEnv
from tests.trainers import assert_same_state, make_trainer, metrics_of, resumed_trainer
from tests.training.test_resume import SignalAt
from tests.training.test_trackers import events, local_trackio  # noqa: F401
from training.state import checkpoint_of
from utils.checkpoint import load_checkpoint
from utils.config_utils import ConfigError
from utils.parquet_utils import DataError

TASKS = ("to_3", "to_100")
OFTEN = {"eval_every_n_epochs": 1, "best_metric": "success", "save_every_n_steps": 5, "ema_decay": 0.9}


class Played:
    """Rollouts whose outcome is a function of the weights, as that of real ones is."""

    tasks = TASKS

    def __init__(self):
        self.runs = 0

    def videos(self, step):
        return {}

    def run(self, policy, step, *, rank, world_size, stopped):
        self.runs += 1
        total = sum(float(parameter.double().sum()) for parameter in policy.parameters())
        return torch.tensor([[float(int(abs(total) * 1e6) % 8), 7.0], [1.0, 7.0]])

    values = TrainingRollouts.values


def with_rollouts(trainer):
    trainer.rollouts = Played()
    return trainer


@pytest.fixture
def configure(make_config):
    def make(training=None, **sections):
        loop = {"tasks": TASKS, "episodes": 2, **sections.pop("closed_loop", {})}
        return make_config(training={**OFTEN, **(training or {})}, closed_loop=loop, **sections)

    return make


def processors_of(trainer, config):
    return processors_from_checkpoint(checkpoint_of(trainer.state, trainer.policy, config, 1, trainer.processors))


def successes(trainer):
    return [(line["step"], line["success"]) for line in metrics_of(trainer) if "success" in line]


def test_success_is_logged_with_its_interval_and_keeps_the_best(configure):
    trainer = with_rollouts(make_trainer(configure()))
    trainer.fit()
    found = successes(trainer)
    assert len(found) == trainer.rollouts.runs >= 2 and found[-1][0] == trainer.step
    (line,) = [line for line in metrics_of(trainer) if line["step"] == trainer.step and "success" in line]
    assert line["success_low"] < line["success_high"] and line["success_episodes"] == 14
    assert {"success/to_3", "success/to_100"} <= line.keys()
    best = max(value for _, value in found)
    first_best = next(step for step, value in found if value == best)
    assert trainer.state.best.value == best
    assert load_checkpoint(trainer.checkpoints / "model_best.pth.tar")["step"] == first_best


def test_resume_is_exact(configure):
    """Numbers, weights and the best are those of a run that was never interrupted, and nothing is evaluated twice."""
    whole = with_rollouts(make_trainer(configure({"experiment_name": "whole"})))
    whole.fit()
    first = with_rollouts(make_trainer(configure()))
    first.train_loader = SignalAt(first, 8)
    first.fit()  # past an evaluation that the checkpoint does not know of
    path = first.checkpoints / "checkpoint_step_5.pth.tar"
    resumed = with_rollouts(resumed_trainer(configure(), path))
    resumed.fit()
    assert_same_state(whole, resumed)
    whole_lines = {line["step"]: line for line in metrics_of(whole) if "success" in line}
    resumed_lines = {line["step"]: line for line in metrics_of(resumed) if "success" in line}
    shared = whole_lines.keys() & resumed_lines.keys()
    assert max(shared) == whole.step and all(whole_lines[step] == resumed_lines[step] for step in shared)


def test_the_policy_is_not_changed_and_ranks_share_the_episodes(configure):
    config = configure(closed_loop={"num_envs": 1})
    trainer = make_trainer(config)
    processors = processors_of(trainer, config)
    before = {name: value.clone() for name, value in trainer.policy.state_dict().items()}
    rollouts = TrainingRollouts(config, processors, TASKS, DriftEnv)
    alone = rollouts.run(trainer.policy, 1, rank=0, world_size=1, stopped=lambda: False)
    shares = [rollouts.run(trainer.policy, 1, rank=rank, world_size=2, stopped=lambda: False) for rank in range(2)]
    torch.testing.assert_close(sum(shares), alone)
    assert alone[:, 1].tolist() == [2, 2]
    for name, value in trainer.policy.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.requires_grad for parameter in trainer.policy.action_head.parameters())
    few = rollouts.run(trainer.policy, 1, rank=0, world_size=1, stopped=lambda: True)
    assert few[:, 1].sum() == 1, "a run that is asked to stop does not finish its episodes"


def test_every_tracker_gets_the_videos(configure, local_trackio, monkeypatch, tmp_path):  # noqa: F811
    """The first episode of each task, filmed at each evaluation: in the run's folder and in all three."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    names = ["wandb", "tensorboard", "trackio"]
    config = configure({"trackers": names, "max_steps": 6, "ema_decay": None}, closed_loop={"num_envs": 1})
    trainer = make_trainer(config)
    trainer.rollouts = TrainingRollouts(config, processors_of(trainer, config), TASKS, DriftEnv)
    trainer.fit()
    steps = [step for step, _ in successes(trainer)]
    assert steps and len(trainer.run_log.trackers.running) == 3
    wanted = {f"closed_loop/{task}_seed20000" for task in TASKS}
    paths = [trainer.rollouts.videos(step) for step in steps]
    assert all(found.keys() == wanted for found in paths), "one video of each task an evaluation"
    assert all(path.parent == config.experiment_dir / "videos" for found in paths for path in found.values())
    _, pictures = events(config.experiment_dir / "logs" / "tensorboard")
    assert {name: [image.step for image in pictures[name]] for name in wanted} == dict.fromkeys(wanted, steps)
    stored = list((config.experiment_dir / "wandb").rglob("media/videos/closed_loop/*.mp4"))
    assert len(stored) == len(steps) * len(TASKS)
    assert len(list((tmp_path / "trackio").rglob("*.mp4"))) == len(steps) * len(TASKS)


def test_no_videos(configure, tmp_path):
    config = configure({"max_steps": 2}, closed_loop={"num_envs": 1, "num_videos": 0})
    trainer = make_trainer(config)
    trainer.rollouts = TrainingRollouts(config, processors_of(trainer, config), TASKS, DriftEnv)
    trainer.fit()
    assert successes(trainer) and trainer.rollouts.videos(trainer.step) == {}
    assert not (config.experiment_dir / "videos").exists()


def test_a_simulator_that_fails_costs_no_training(configure, monkeypatch):
    """The step is saved before the run ends, and a resumed run begins with its episodes."""
    whole = with_rollouts(make_trainer(configure()))
    whole.fit()
    trainer = with_rollouts(make_trainer(configure({"experiment_name": "failing"})))

    def fail(*args, **options):
        raise RuntimeError("a simulator process died")

    monkeypatch.setattr(trainer.rollouts, "run", fail)
    first = successes(whole)[0][0]
    with pytest.raises(DataError, match=f"closed-loop episodes: a simulator process died .step {first} is saved"):
        trainer.fit()
    path = trainer.checkpoints / f"checkpoint_step_{first}.pth.tar"
    resumed = with_rollouts(resumed_trainer(configure({"experiment_name": "failing"}), path))
    resumed.fit()
    assert successes(resumed) == successes(whole)
    assert_same_state(whole, resumed)


def test_a_stop_is_not_taken_for_a_result(configure, monkeypatch):
    trainer = with_rollouts(make_trainer(configure()))
    real = trainer.rollouts.run

    def stopped_meanwhile(*args, **options):
        trainer.stop._signal = "SIGTERM"
        return real(*args, **options)

    monkeypatch.setattr(trainer.rollouts, "run", stopped_meanwhile)
    trainer.fit()
    assert successes(trainer) == [] and trainer.step < trainer.length.total_steps
    assert trainer.state.best.step == 0, "the resumed run evaluates this step first"


@pytest.mark.parametrize(
    ("training", "loop", "message"),
    [
        ({"eval_every_n_epochs": None}, {}, "give both \\(how often, and what\\), or none of them"),
        ({}, {"tasks": ()}, "closed_loop.tasks is \\[\\]; give both"),
        ({"strategy": "fsdp"}, {}, "training.strategy fsdp, whose ranks hold a part of the policy each"),
        ({}, {"episodes": 0}, "closed_loop.episodes"),
        ({}, {"num_videos": -1}, "closed_loop.num_videos"),
    ],
)
def test_settings_that_cannot_be(configure, training, loop, message):
    with pytest.raises(ConfigError, match=message):
        configure(training, closed_loop=loop)


def test_success_needs_episodes(make_config):
    with pytest.raises(ConfigError, match="best_metric is success, which closed-loop episodes measure"):
        make_trainer(make_config(training={"best_metric": "success"}))


@pytest.mark.parametrize(
    ("options", "sections", "message"),
    [
        (["max_episode_steps=abc"], {}, "max_episode_steps is 'abc', must be a whole number"),
        (["camera=corner9"], {}, "metaworld has no camera 'corner9'"),
        ([], {"data": {"state_dim": 7}}, "closed_loop: reach-v3 has state_dim 4, the policy 7"),
        (["cameras=front=corner"], {}, "reach-v3 shows front, the policy reads image_1; give closed_loop.env_options"),
    ],
)
@pytest.mark.parametrize("mark", [pytest.param(None, marks=needs("metaworld"))])
def test_what_does_not_fit_is_told_before_the_training(make_config, options, sections, message, mark):
    loop = {"env": "metaworld", "tasks": ["reach-v3"], "env_options": options}
    config = make_config(training=OFTEN, closed_loop=loop, **sections)
    processors = (SimpleNamespace(height=32), None)
    with pytest.raises(ValueError, match=message):
        main_train.build_rollouts(config, processors)


def test_a_simulator_that_cannot_run_here_is_told_before_the_training(configure):
    def make_env(task):
        raise RuntimeError("MuJoCo cannot render off-screen")

    with pytest.raises(ValueError, match="closed_loop: MuJoCo cannot render off-screen"):
        TrainingRollouts(configure(), (None, None), TASKS, make_env).check()


@pytest.mark.parametrize("mark", [pytest.param(None, marks=needs("metaworld"))])
def test_main_train_runs_meta_world(configure, mark):
    """The simulator's real environment, with pictures of the size that the policy takes."""
    options = ["max_episode_steps=3", "camera=corner2"]
    loop = {"env": "metaworld", "tasks": ["reach-v3"], "env_options": options, "episodes": 1}
    config = configure({"max_steps": 1}, closed_loop=loop)
    trainer = make_trainer(config)
    processors = processors_of(trainer, config)
    trainer.rollouts = main_train.build_rollouts(config, processors)
    trainer.fit()
    assert [step for step, _ in successes(trainer)] == [1]
    assert trainer.rollouts._make_env.keywords == {
        "image_size": processors[0].height,
        "max_episode_steps": 3,
        "camera": "corner2",
    }
