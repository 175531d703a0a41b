"""Training runs in processes of their own, over one or several gloo ranks, without the cost of importing torch anew."""

from __future__ import annotations

import functools
import json
import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import main_train
from model.vla_model import VLAModel
from tests.helpers import write_episodes
from tests.policies import model_section
from training.launch import Place
from training.trainer_ddp import VLATrainerDDP
from utils.calculate_normalization_stats import calculate_for_config
from utils.cli import config_from_args, train_parser
from utils.config_utils import load_config
from utils.misc import read_json_lines

# Losses without noise and updates without Adam's division by tiny numbers: what is left is rounding.
DETERMINISTIC = ("model.action_head_config.type=regression", "optimizer.type=SGD", "optimizer.lr=1e-2")
TIMINGS = ("samples_per_second", "data_wait")


def write_project(folder: Path, backbone: Path) -> Path:
    """Data, statistics and the config of a tiny run; episodes shorter than two chunks, so that ranks pad unevenly."""
    write_episodes(folder / "train.parquet", [9, 7, 6], image_size=32)
    write_episodes(folder / "val.parquet", [5, 4], seed=50, image_size=32)
    config = {
        "data": {
            "train_parquet_files": str(folder / "train.parquet"),
            "val_parquet_files": str(folder / "val.parquet"),
            "normalization_stats_path": str(folder / "stats.json"),
            "state_dim": 4,
            "batch_size": 4,
            "num_workers": 0,
            "cache_dir": str(folder / "cache"),
        },
        "model": model_section(backbone),
        "training": {
            "checkpoint_dir": str(folder / "experiments"),
            "experiment_name": "run",
            "epochs": 100,
            "log_interval": 1,
            "val_every_n_epochs": 100,
            "save_every_n_epochs": 100,
            "val_num_plots": 0,
        },
        "lr_scheduler": {"warmup_steps": 3, "T_max": 20},
        "inference": {"num_inference_steps": 2},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    statistics = calculate_for_config(load_config(path), num_workers=1)
    (folder / "stats.json").write_text(json.dumps(statistics), encoding="utf-8")
    return path


def run_training(config_path: Path, name: str, steps: int, *settings: str, ranks: int = 0, resume: Path | None = None):
    """Train up to optimizer step `steps` as experiment `name`; its folder.

    Args:
        settings: `--set` values.
        ranks: gloo ranks of VLATrainerDDP; 0: one process of VLATrainer.
        resume: checkpoint to go on from.
    """
    flags = ["--config_path", str(config_path), "--experiment_name", name]
    flags += ["--set", f"training.max_steps={steps}", *settings]
    if resume is not None:
        flags += ["--resume_checkpoint", str(resume)]
    run_ranks(functools.partial(train_rank, flags, ranks > 0), max(1, ranks), config_path.parent)
    return config_path.parent / "experiments" / name


def train_rank(flags: list[str], distributed: bool) -> None:
    """One rank of a run."""
    args = train_parser(None).parse_args(flags)
    place = Place(torch.device("cpu"), dist.get_rank(), dist.get_world_size(), in_group=distributed)
    main_train.build_trainer(args, config_from_args(args), place).fit()


def run_ranks(work: Callable[[], Any], world_size: int, folder: Path, timeout_s: float = 120.0) -> None:
    """Run `work` (picklable) on every rank of a gloo group; raises with the tracebacks of ranks that fail."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ranks", "model.action_head.regression"])
    meeting = folder / "meeting"
    meeting.unlink(missing_ok=True)
    failures = context.Queue()
    processes = [
        context.Process(target=_rank, args=(work, rank, world_size, str(meeting), failures))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout_s)
        if process.is_alive():
            process.kill()
    texts = [failures.get() for process in processes if process.exitcode == 1]
    assert not texts, "\n".join(texts)
    assert all(process.exitcode == 0 for process in processes), [process.exitcode for process in processes]


def _rank(work: Callable[[], Any], rank: int, world_size: int, meeting: str, failures: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    try:
        work()
        dist.barrier()
    except BaseException:
        failures.put(f"rank {rank}: {traceback.format_exc()}")
        raise
    dist.destroy_process_group()


def losses(folder: Path) -> list[dict[str, float]]:
    """The logged training steps, without timings."""
    lines = read_json_lines(folder / "logs/metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines if "loss" in line]


def validations(folder: Path) -> list[dict[str, float]]:
    """The logged validations."""
    return [line for line in read_json_lines(folder / "logs/metrics.jsonl") if "val_loss" in line]


class IdleParameterTrainer(VLATrainerDDP):
    """Its model has a parameter that the loss does not reach."""

    def wrap(self, model: VLAModel) -> nn.Module:
        model.action_head.idle = nn.Parameter(torch.ones(3))
        wrapped = super().wrap(model)
        assert model.action_head.idle.requires_grad
        return wrapped


class CountingTrainer(VLATrainerDDP):
    """Counts how often gradients are exchanged, bucket by bucket, and writes it beside the run's logs."""

    def wrap(self, model: VLAModel) -> nn.Module:
        wrapped, self.exchanges = super().wrap(model), 0

        def exchange(trainer, bucket):  # without annotations: DDP compares them with types, and would find strings
            trainer.exchanges += 1
            return allreduce_hook(None, bucket)

        wrapped.register_comm_hook(self, exchange)
        return wrapped

    def fit(self) -> None:
        super().fit()
        (self.config.experiment_dir / f"exchanges_{self.rank}").write_text(str(self.exchanges))


def train_counted(flags: list[str]) -> None:
    """One rank of such a run."""
    main_train.TRAINERS["ddp"] = CountingTrainer
    train_rank(flags, distributed=True)


def train_idle(flags: list[str]) -> None:
    """One rank of such a run."""
    main_train.TRAINERS["ddp"] = IdleParameterTrainer
    train_rank(flags, distributed=True)
