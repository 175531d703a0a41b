"""One cell of scripts/compare_heads.py: a policy that is trained, evaluated, rolled out and timed.

Each stage leaves a file in the cell's folder, and is not repeated where that file is.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data.loader import collate_fn, open_dataset
from inference.evaluate import measure_latency
from inference.predictor import VLAPredictor
from inference.report import write_json
from utils.checkpoint import newest_checkpoint
from utils.config_utils import Config, load_config
from utils.misc import count_parameters, read_json_lines

logger = logging.getLogger("compare_heads")

LATENCY_REPEATS = 200
SPEED_WINDOWS, SPEED_STEPS = 12, 4  # of the short training that is timed


class CellError(RuntimeError):
    """A cell of the comparison failed; its log says why."""


@dataclass(frozen=True)
class Plan:
    """What all cells share.

    Attributes:
        config_path, set_args: the configuration, as main_train.py takes it.
        output_dir: gets the table and a folder per cell.
        env, tasks: of the closed loop.
        episodes: per task, cell and column; 0: no closed loop.
        num_samples: draws per observation of the offline metrics.
        device: of evaluation, as main_eval.py takes it.
    """

    config_path: str
    set_args: tuple[str, ...]
    output_dir: Path
    env: str
    tasks: tuple[str, ...]
    episodes: int
    num_samples: int
    device: str

    @property
    def config(self) -> Config:
        return load_config(self.config_path, set_args=list(self.set_args))


@dataclass(frozen=True)
class Cell:
    """One policy; `first_episode` is the seed of its first rollout, the same for every head and backbone."""

    backbone: str
    head: str
    seed: int
    first_episode: int

    @property
    def name(self) -> str:
        return f"{self.backbone}-{self.head}-seed{self.seed}"


def run_cell(plan: Plan, cell: Cell) -> None:
    """Train, evaluate and roll out one policy, in a process of its own; each stage that left its result is skipped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the script that is running ends as well
    folder = plan.output_dir / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    log = (folder / "log.txt").open("a")
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log.fileno(), stream.fileno())
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"error: {folder} is in use by another comparison; wait for it, or end it")
        checkpoint = train(plan, cell)
        evaluate(plan, cell, checkpoint)


def train(plan: Plan, cell: Cell) -> Path:
    """Train a cell's policy, from its newest checkpoint if it was interrupted, and return the last checkpoint."""
    folder = plan.output_dir / cell.name
    done, checkpoints = folder / "trained.json", folder / "checkpoints"
    if not done.is_file():
        run_script("main_train.py", *train_flags(plan, cell, plan.output_dir))
        lines = [line for line in read_json_lines(folder / "logs" / "metrics.jsonl") if "samples_per_second" in line]
        steps, wanted = lines[-1]["step"], plan.config.training.max_steps
        if steps < wanted:
            raise CellError(f"{cell.name}: training ended at step {steps} of {wanted}; start again to continue")
        write_json(done, {"checkpoint": newest_checkpoint(checkpoints, cell.name).name, "steps": steps})
    return checkpoints / json.loads(done.read_text(encoding="utf-8"))["checkpoint"]


def train_flags(plan: Plan, cell: Cell, folder: Path) -> list[str]:
    """What main_train.py is given to train a cell below `folder`."""
    settings = (
        f"model.vlm_config.type={cell.backbone}",
        f"model.action_head_config.type={cell.head}",
        f"training.seed={cell.seed}",
        f"training.checkpoint_dir={folder}",
        f"training.experiment_name={cell.name}",
    )
    return ["--config_path", plan.config_path, "--resume_checkpoint", "auto", "--set", *plan.set_args, *settings]


def training_speed(plan: Plan, cell: Cell) -> float:
    """Samples/s of a short training of its own: the median over windows of a few steps, the first two left out."""
    with tempfile.TemporaryDirectory() as folder:
        short = (f"training.max_steps={SPEED_WINDOWS * SPEED_STEPS}", f"training.log_interval={SPEED_STEPS}")
        run_script("main_train.py", *train_flags(plan, cell, Path(folder)), *short, "data.val_parquet_files=[]")
        lines = read_json_lines(Path(folder) / cell.name / "logs" / "metrics.jsonl")
    return statistics.median([line["samples_per_second"] for line in lines if "samples_per_second" in line][2:])


def evaluate(plan: Plan, cell: Cell, checkpoint: Path) -> None:
    """Offline metrics, and rollouts with and without images."""
    folder = plan.output_dir / cell.name
    common = ["--checkpoint_path", str(checkpoint), "--device", plan.device]
    offline = ["--eval_data_path", *plan.config.data.val_parquet_files, "--num_samples", str(plan.num_samples)]
    offline += ["--batch_size", "32"]
    rollouts = ["--env", plan.env, "--tasks", *plan.tasks, "--episodes", str(plan.episodes)]
    rollouts += ["--seed", str(cell.first_episode), "--num_videos", "0"]
    stages = {"offline": (offline, "metrics.json")}
    if plan.episodes:
        stages |= {"closed_loop": (rollouts, "rollouts.json"), "blind": ([*rollouts, "--blind"], "rollouts.json")}
    for name, (arguments, result) in stages.items():
        if not (folder / name / result).is_file():
            run_script("main_eval.py", *common, *arguments, "--output_dir", str(folder / name))


def is_finished(plan: Plan, cell: Cell) -> bool:
    """Whether every stage of a cell has left its result."""
    wanted = ["trained.json", "offline/metrics.json"]
    wanted += ["closed_loop/rollouts.json", "blind/rollouts.json"] if plan.episodes else []
    return all((plan.output_dir / cell.name / path).is_file() for path in wanted)


def describe(plan: Plan, cell: Cell) -> str:
    """A finished cell in a few words."""
    found = results_of(plan, cell)
    text = f"MSE {found['offline']['predictors']['policy']['overall']['mse_normalized']:.4f}"
    if plan.episodes:
        counts = ["{successes}/{episodes}".format(**found[name]["summary"]) for name in ("closed_loop", "blind")]
        text += f", success {counts[0]}, with blank images {counts[1]}"
    return text


def results_of(plan: Plan, cell: Cell) -> dict[str, Any]:
    """What the stages of a finished cell wrote."""
    folder = plan.output_dir / cell.name
    paths = {"training": "trained.json", "offline": "offline/metrics.json", "speed": "speed.json"}
    paths |= {"closed_loop": "closed_loop/rollouts.json", "blind": "blind/rollouts.json"}
    found = {name: folder / path for name, path in paths.items()}
    read = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in found.items() if path.is_file()}
    return {**asdict(cell), **read}


def measure_speed(plan: Plan, cell: Cell) -> None:
    """Parameters of a policy, its training rate, and the latency of a prediction from a collated observation."""
    folder = plan.output_dir / cell.name
    if (folder / "speed.json").is_file():
        return
    predictor = VLAPredictor.from_checkpoint(train(plan, cell), plan.device)
    processors, files = (predictor.image_processor, predictor.prompt_tokenizer), plan.config.data.val_parquet_files
    dataset = open_dataset(predictor.config, *processors, files[0], "data.val_parquet_files")
    parameters, trained = count_parameters(predictor.model)
    speed = {
        "parameters": parameters,
        "trained_parameters": trained,
        "head_parameters": count_parameters(predictor.model.action_head)[0],
        "samples_per_second": training_speed(plan, cell),
        "latency": measure_latency(predictor, collate_fn([dataset[0]]), LATENCY_REPEATS),
        "device": str(predictor.device),
        "threads": torch.get_num_threads(),
    }
    write_json(folder / "speed.json", speed)


def run_script(*command: str) -> None:
    """Run one of the repository's scripts, showing the command."""
    logger.info("python %s", " ".join(command))
    subprocess.run([sys.executable, *command], check=True)
