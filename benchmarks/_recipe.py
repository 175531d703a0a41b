"""What the recipes of whole simulators share: from nothing to closed-loop results, by the commands that users run.

Stages that are complete are not repeated, and one that was interrupted goes on where it was: recording by task,
training from its newest checkpoint, an evaluation after the episodes that it finished. `fresh` begins again. Seconds
of the wall clock and of the processor are kept in experiments/{name}/seconds.json, over all starts together.
"""

from __future__ import annotations

import json
import math
import pathlib
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from envs import FIRST_EVALUATION_SEED
from inference.metrics import wilson_interval
from utils.checkpoint import newest_checkpoint
from utils.cli import config_from_args, train_parser

HELD_OUT_SEED = 5000


@dataclass
class Recipe:
    """One policy, its demonstrations and its evaluations.

    Attributes:
        name: of the folders demos/{name}, experiments/{name} and weight/{name}.
        config: YAML file.
        env, tasks, env_options: of the demonstrations, and of evaluations that do not say otherwise.
        backbone: flags of scripts/make_tiny_paligemma.py.
        settings: "section.key=value", beside the config's.
        num_workers: processes that record, and that simulate in evaluations.
        nproc: processes that train.
        data_name: of another recipe, whose demonstrations are taken.
        splits: folders of demonstrations that are trained on.
        after: the recipe, trained, from whose policy training begins, with its statistics; None: from nothing.
    """

    name: str
    config: str
    env: str
    tasks: Sequence[str]
    env_options: dict[str, Any] = field(default_factory=dict)
    backbone: dict[str, int] = field(default_factory=dict)
    settings: Sequence[str] = ()
    num_workers: int = 2
    nproc: int = 1
    data_name: str | None = None
    splits: Sequence[str] = ("train",)
    after: Recipe | None = None

    @property
    def data(self) -> pathlib.Path:
        return pathlib.Path("demos", self.data_name or self.name)

    @property
    def experiment(self) -> pathlib.Path:
        return pathlib.Path("experiments", self.name)

    @property
    def first(self) -> Recipe:
        """The recipe that training began with, from nothing."""
        return self.after.first if self.after else self

    @property
    def checkpoint(self) -> pathlib.Path:
        return self.experiment / "checkpoints" / "model_best.pth.tar"

    @property
    def kept(self) -> dict[int, pathlib.Path]:
        """Step -> checkpoint, in order, of those that `training.save_every_n_steps` left."""
        found = self.experiment.glob("checkpoints/checkpoint_step_*.pth.tar")
        return dict(sorted((int(path.name.split(".")[0].rpartition("_")[2]), path) for path in found))

    @property
    def step(self) -> int:
        """How far training has come, by its newest checkpoint; 0 before the first."""
        newest = newest_checkpoint(self.experiment / "checkpoints", self.name)
        return torch.load(newest, mmap=True, weights_only=True)["step"] if newest else 0

    @property
    def seconds(self) -> dict[str, dict[str, float]]:
        """Stage -> {"wall", "processor", "complete"}, as far as they have come."""
        path = self.experiment / "seconds.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def demonstrations(self, split: str) -> list[str]:
        """Files of the recipe's tasks; the folder may hold other recipes' tasks too."""
        return [str(self.data / split / f"{task}.parquet") for task in self.tasks]

    def forget(self) -> None:
        """Begin again: demonstrations are deleted, the experiment is moved aside."""
        shutil.rmtree(self.data, ignore_errors=True)
        if self.experiment.exists():
            shutil.move(self.experiment, self.experiment.with_name(f"{self.name}.{time.strftime('%Y%m%d-%H%M%S')}"))

    def record(self, demos: int, held_out: int = 2, flags: Sequence[str] = ()) -> None:
        """Demonstrations of the experts: `demos` of each task to train on, and a few to validate."""
        for split, episodes, seed in (("train", demos, 0), ("val", held_out, HELD_OUT_SEED)):
            self.record_split(split, episodes, seed, flags, self.env_options)

    def record_split(self, split: str, episodes: int, seed: int, flags: Sequence[str], options: dict[str, Any]) -> None:
        """So many demonstrations of each task into a folder, unless they are there."""
        for task in self.tasks:  # one command each, so that an interruption costs no more than a task
            if (self.data / split / f"{task}.parquet").is_file():
                continue
            command = ["scripts/record_demos.py", "--env", self.env, "--tasks", task, *flags]
            command += ["--episodes", str(episodes), "--seed", str(seed), "--num_workers", str(self.num_workers)]
            with self._timed("record"):
                run(*command, "--output_dir", str(self.data / split), *_options(options))

    def train(self) -> None:
        """Backbone, statistics and training, unless done; `training.max_hours` is that of all starts together."""
        if self.seconds.get("train", {}).get("complete"):
            return
        first = self.first
        weights, statistics = pathlib.Path("weight", first.name), first.experiment / "normalization_stats.json"
        demonstrations = [file for split in self.splits for file in self.demonstrations(split)]
        files = ["--config_path", self.config, "--train_data_override", *demonstrations]
        with self._timed("train"):
            if not (weights / "model.safetensors").is_file():
                sizes = [text for key, value in self.backbone.items() for text in (f"--{key}", str(value))]
                prompts = ["--prompts_from", *demonstrations]
                run("scripts/make_tiny_paligemma.py", "--output_dir", str(weights), *sizes, *prompts)
            if not statistics.is_file():
                run("utils/calculate_normalization_stats.py", *files, "--output_path", str(statistics))
            files += ["--val_data_override", *self.demonstrations("val"), "--experiment_name", self.name]
            files += ["--model_name_or_path", str(weights)]
            if self.after and not any(self.experiment.glob("checkpoints/*.pth.tar")):
                files += ["--init_checkpoint", str(self.after.checkpoint), "--statistics", "pretrained"]
            else:
                files += ["--resume_checkpoint", "auto"]
            files += ["--set", f"data.normalization_stats_path={statistics}", *self.settings]
            script = ["main_train_ddp.py", "--nproc", str(self.nproc)] if self.nproc > 1 else ["main_train.py"]
            settings = config_from_args(train_parser(None).parse_args(files)).training
            steps, hours = settings.max_steps or 0, settings.max_hours or math.inf
            hours = max(hours - self.seconds.get("train", {"wall": 0.0})["wall"] / 3600, 1e-9)
            began = time.perf_counter()
            run(*script, *files, *([f"training.max_hours={hours}"] if hours < math.inf else []))
            step = self.step
            if step < steps and time.perf_counter() - began < 3600 * hours:  # a signal: it has saved, its status is 0
                sys.exit(f"error: {self.name}: training stopped after step {step} of {steps}; the same command goes on")

    def evaluate(
        self,
        name: str,
        episodes: int,
        flags: Sequence[str] = (),
        *,
        control: str | None = None,
        checkpoint: pathlib.Path | None = None,
        tasks: Sequence[str] | None = None,
        options: dict[str, Any] | None = None,
        replayed: str = "train",
    ) -> dict[str, Any]:
        """rollouts.json of an evaluation on seeds from 10000 upwards.

        Args:
            name: of its folder.
            episodes: of each task.
            flags: further ones of main_eval.py.
            control: "expert" or "replay", in the policy's place.
            checkpoint, tasks, options: instead of the recipe's.
            replayed: the split whose demonstrations the control "replay" plays back.
        """
        output = self.experiment / name
        command = ["main_eval.py", "--env", self.env, "--tasks", *(tasks or self.tasks), "--episodes", str(episodes)]
        command += ["--seed", str(FIRST_EVALUATION_SEED), "--output_dir", str(output), "--num_videos", "1", *flags]
        command += ["--num_envs", str(self.num_workers)]
        if control is None:
            command += ["--checkpoint_path", str(checkpoint or self.checkpoint)]
        else:
            command += ["--control", control]
        if control == "replay":
            command += ["--demos_path", *self.demonstrations(replayed)]
        with self._timed(name):
            run(*command, *_options(self.env_options if options is None else options))
        return json.loads((output / "rollouts.json").read_text(encoding="utf-8"))

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Add what a stage takes to what it has taken, also where it fails."""
        began, processor, complete = time.perf_counter(), _children_seconds(), False
        try:
            yield
            complete = True
        finally:
            seconds = self.seconds
            before = seconds.get(stage, {"wall": 0.0, "processor": 0.0})
            wall = before["wall"] + time.perf_counter() - began
            spent = before["processor"] + _children_seconds() - processor
            seconds[stage] = {"wall": wall, "processor": spent, "complete": complete}
            self.experiment.mkdir(parents=True, exist_ok=True)
            (self.experiment / "seconds.json").write_text(json.dumps(seconds, indent=1), encoding="utf-8")


def run(*command: str) -> None:
    """Run one of the repository's scripts, showing the command."""
    print("+ python", " ".join(command), flush=True)
    subprocess.run([sys.executable, *command], check=True)


def counted(summary: dict[str, Any]) -> str:
    """ "17/20 (64 to 95 %)": successes and their 95 % Wilson interval."""
    successes, episodes = summary["successes"], summary["episodes"]
    low, high = wilson_interval(successes, episodes)
    return f"{successes}/{episodes} ({100 * low:.0f} to {100 * high:.0f} %)"


def timed(seconds: dict[str, dict[str, float]]) -> str:
    """ "train 3600 s (7100 s of processor time)", for every stage."""
    stages = (f"{stage} {time['wall']:.0f} s ({time['processor']:.0f} s)" for stage, time in seconds.items())
    return "wall clock (processor): " + ", ".join(stages)


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _options(options: dict[str, Any]) -> list[str]:
    return ["--env_options", *(f"{key}={value}" for key, value in options.items())] if options else []
