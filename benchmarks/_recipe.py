"""What the recipes of whole simulators share: from nothing to closed-loop results, by the commands that users run.

Stages that are complete are not repeated, and an interrupted evaluation goes on where it was; `fresh` begins again.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from envs import FIRST_EVALUATION_SEED
from inference.metrics import wilson_interval

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
    data_name: str | None = None  # of another recipe, whose demonstrations are taken
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def data(self) -> pathlib.Path:
        return pathlib.Path("demos", self.data_name or self.name)

    @property
    def experiment(self) -> pathlib.Path:
        return pathlib.Path("experiments", self.name)

    @property
    def checkpoint(self) -> pathlib.Path:
        return self.experiment / "checkpoints" / "model_best.pth.tar"

    def forget(self) -> None:
        """Begin again: demonstrations are deleted, the experiment is moved aside."""
        shutil.rmtree(self.data, ignore_errors=True)
        if self.experiment.exists():
            shutil.move(self.experiment, self.experiment.with_name(f"{self.name}.{time.strftime('%Y%m%d-%H%M%S')}"))

    def record(self, demos: int, held_out: int = 2, flags: Sequence[str] = ()) -> None:
        """Demonstrations of the experts: `demos` of each task to train on, and a few to validate."""
        began = time.perf_counter()
        for split, episodes, seed in (("train", demos, 0), ("val", held_out, HELD_OUT_SEED)):
            missing = [task for task in self.tasks if not (self.data / split / f"{task}.parquet").is_file()]
            if missing:
                command = ["scripts/record_demos.py", "--env", self.env, "--tasks", *missing, *flags]
                command += ["--episodes", str(episodes), "--seed", str(seed), "--num_workers", str(self.num_workers)]
                run(*command, "--output_dir", str(self.data / split), *_options(self.env_options))
        self.seconds["record"] = time.perf_counter() - began

    def train(self) -> None:
        """Backbone, statistics and training, unless the checkpoint is there."""
        began = time.perf_counter()
        if not self.checkpoint.is_file():
            weights, statistics = f"weight/{self.name}", str(self.data / "normalization_stats.json")
            sizes = [text for key, value in self.backbone.items() for text in (f"--{key}", str(value))]
            prompts = ["--prompts_from", str(self.data / "train")]
            run("scripts/make_tiny_paligemma.py", "--output_dir", weights, *sizes, *prompts)
            files = ["--config_path", self.config, "--train_data_override", str(self.data / "train")]
            run("utils/calculate_normalization_stats.py", *files, "--output_path", statistics)
            files += ["--val_data_override", str(self.data / "val"), "--experiment_name", self.name]
            files += ["--model_name_or_path", weights]
            settings = ["--set", f"data.normalization_stats_path={statistics}", *self.settings]
            if self.nproc > 1:
                run("main_train_ddp.py", "--nproc", str(self.nproc), *files, *settings)
            else:
                run("main_train.py", *files, *settings)
        self.seconds["train"] = time.perf_counter() - began

    def evaluate(
        self,
        name: str,
        episodes: int,
        flags: Sequence[str] = (),
        *,
        control: str | None = None,
        tasks: Sequence[str] | None = None,
        options: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """rollouts.json of an evaluation on seeds from 10000 upwards.

        Args:
            name: of its folder.
            episodes: of each task.
            flags: further ones of main_eval.py.
            control: "expert" or "replay", in the policy's place.
            tasks, options: instead of the recipe's.
        """
        began, output = time.perf_counter(), self.experiment / name
        command = ["main_eval.py", "--env", self.env, "--tasks", *(tasks or self.tasks), "--episodes", str(episodes)]
        command += ["--seed", str(FIRST_EVALUATION_SEED), "--output_dir", str(output), "--num_videos", "1", *flags]
        command += ["--num_envs", str(self.num_workers)]
        if control is None:
            command += ["--checkpoint_path", str(self.checkpoint)]
        else:
            command += ["--control", control]
        if control == "replay":
            command += ["--demos_path", str(self.data / "train")]
        run(*command, *_options(self.env_options if options is None else options))
        self.seconds[name] = time.perf_counter() - began
        return json.loads((output / "rollouts.json").read_text(encoding="utf-8"))


def run(*command: str) -> None:
    """Run one of the repository's scripts, showing the command."""
    print("+ python", " ".join(command), flush=True)
    subprocess.run([sys.executable, *command], check=True)


def counted(summary: dict[str, Any]) -> str:
    """ "17/20 (64 to 95 %)": successes and their 95 % Wilson interval."""
    successes, episodes = summary["successes"], summary["episodes"]
    low, high = wilson_interval(successes, episodes)
    return f"{successes}/{episodes} ({100 * low:.0f} to {100 * high:.0f} %)"


def _options(options: dict[str, Any]) -> list[str]:
    return ["--env_options", *(f"{key}={value}" for key, value in options.items())] if options else []
