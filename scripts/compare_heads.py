"""Which head, which backbone? Trains each combination alike, judges it alike, and writes one table.

    python scripts/compare_heads.py --config configs/compare_heads.yaml \\
        --heads flow_matching discrete diffusion regression --backbones paligemma siglip_llm --seeds 0 1 2

Every cell (backbone, head, seed) has the same data, split, steps, data order and, per backbone and seed, the same
initial backbone. It is trained, evaluated over the held-out episodes and rolled out in closed loop, with its images and
with blank ones, on episodes that depend on the seed alone. Cells run side by side, one per core; training speed and
latency are measured at the end, with nothing else running. Demonstrations, statistics and small backbones (folders
called tiny-...) that the config names are made where they are missing.

Output in --output_dir: compare_heads.md, compare_heads.json, compare_heads.png, and one folder per cell with its log.
The same command continues a comparison that was interrupted; finished stages are not repeated, and more heads,
backbones or seeds may be added.
"""

from __future__ import annotations

import sys

if not __package__:
    import _repository  # noqa: F401

import argparse
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from envs import FIRST_EVALUATION_SEED
from inference.report import write_json
from model.action_head import ACTION_HEADS
from scripts._compare_heads_cell import (
    Cell,
    CellError,
    Plan,
    describe,
    is_finished,
    measure_speed,
    results_of,
    run_cell,
    run_script,
)
from scripts._compare_heads_report import markdown, plot, summarize
from utils.arguments import CommandParser, run_command
from utils.backbones import BACKBONE_SPECS
from utils.config_utils import ConfigError, config_to_dict
from utils.misc import atomic_path, set_up_logging
from utils.statistics import load_statistics

logger = logging.getLogger("compare_heads")

# How the data of the config is made where it is missing: the quickstart's recipe. Folder -> episodes, first seed.
DEMONSTRATIONS = {"train_parquet_files": (60, 0), "val_parquet_files": (4, 5000)}


def run_cells(plan: Plan, cells: Sequence[Cell], num_processes: int) -> list[str]:
    """Run what is not finished, `num_processes` cells at a time, and return the names of those that failed."""
    context = multiprocessing.get_context("spawn")
    pending = [cell for cell in cells if not is_finished(plan, cell)]
    failed, finished, started = [], 0, time.monotonic()
    logger.info("%d cells, %d of them finished before", len(cells), len(cells) - len(pending))
    waiting, running = list(pending), {}
    try:
        while waiting or running:
            while waiting and len(running) < num_processes:
                cell = waiting.pop(0)
                process = context.Process(target=run_cell, args=(plan, cell), name=cell.name)
                process.start()
                running[process.sentinel] = (process, cell)
            for sentinel in wait(list(running)):
                process, cell = running.pop(sentinel)
                process.join()
                finished += 1
                seconds = time.monotonic() - started
                left = seconds / finished * (len(pending) - finished) / 60
                progress = f"{finished} of {len(pending)}, {seconds / 60:.0f} min, about {left:.0f} more"
                if process.exitcode:
                    failed.append(cell.name)
                    log = plan.output_dir / cell.name / "log.txt"
                    logger.error("%s failed (exit code %s): see %s [%s]", cell.name, process.exitcode, log, progress)
                else:
                    logger.info("%s: %s [%s]", cell.name, describe(plan, cell), progress)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join()
    return failed


def prepare(plan: Plan, backbones: Sequence[str]) -> None:
    """Make demonstrations, statistics and small backbones where the config's folders are missing.

    Raises:
        ConfigError: a path is missing that can't be made here.
        StatisticsError: statistics of other data or widths.
    """
    config = plan.config
    for key, (episodes, seed) in DEMONSTRATIONS.items():
        missing = [path for path in getattr(config.data, key) if "*" not in path and not Path(path).exists()]
        if missing and len(getattr(config.data, key)) > 1:
            raise ConfigError(f"data.{key}: {missing[0]} does not exist; correct the config or bring the data")
        for path in missing:
            flags = ["--env", plan.env, "--tasks", *plan.tasks, "--episodes", str(episodes), "--seed", str(seed)]
            unfinished = f"{path.rstrip('/')}.part"  # so that half a recording is never taken for the whole
            run_script("scripts/record_demos.py", *flags, "--overwrite", "--output_dir", unfinished)
            os.rename(unfinished, path)
    if not Path(config.data.normalization_stats_path).is_file():
        settings = ["--set", *plan.set_args] if plan.set_args else []
        run_script("utils/calculate_normalization_stats.py", "--config_path", plan.config_path, *settings)
    load_statistics(config.data.normalization_stats_path, config, plan.config_path)
    for backbone in backbones:
        spec = BACKBONE_SPECS[backbone]
        folders = [Path(getattr(config.model.vlm_config, part.key)) for part in spec.parts]
        folder = folders[0] if len(folders) == 1 else folders[0].parent
        if folder.name.startswith("tiny-") and not all(path.is_dir() for path in folders):
            run_script(spec.tiny_maker, "--output_dir", str(folder))


def check_settings(plan: Plan) -> None:
    """Write what the cells share, or compare with what an earlier call wrote.

    Raises:
        ConfigError: a setting is missing that every comparison needs, or the output folder holds a comparison of other
            settings.
    """
    config = plan.config
    data, training = config.data, config.training
    if not (data.val_parquet_files and data.normalization_stats_path and training.max_steps):
        raise ConfigError(
            f"{plan.config_path}: a comparison needs data.val_parquet_files, data.normalization_stats_path and "
            "training.max_steps, so that every cell takes as many steps; see configs/compare_heads.yaml"
        )
    settings = _dotted(config_to_dict(config))
    settings |= {"--tasks": list(plan.tasks), "--episodes": plan.episodes, "--num_samples": plan.num_samples}
    path = plan.output_dir / "settings.json"
    if not path.is_file():
        write_json(path, settings)
        return
    old = json.loads(path.read_text(encoding="utf-8"))
    changed = [f"{key} {old[key]!r} -> {value!r}" for key, value in settings.items() if old.get(key, value) != value]
    if changed:
        raise ConfigError(
            f"{plan.output_dir} holds a comparison with other settings: {'; '.join(changed)}. "
            "Give another --output_dir, or remove that folder"
        )


def _dotted(tree: dict[str, Any], place: str = "") -> dict[str, Any]:
    """Nested sections as one level of `section.key`."""
    flat = {}
    for key, value in tree.items():
        flat |= _dotted(value, f"{place}{key}.") if isinstance(value, dict) else {f"{place}{key}": value}
    return flat


def write_report(plan: Plan, cells: Sequence[Cell]) -> str:
    """compare_heads.json, .md and .png from the finished cells; returns the Markdown."""
    found = [results_of(plan, cell) for cell in cells if is_finished(plan, cell)]
    data, training = plan.config.data, plan.config.training
    settings = {
        "config": plan.config_path,
        "steps": training.max_steps,
        "batch_size": data.batch_size,
        "tasks": list(plan.tasks),
        "episodes": plan.episodes,
        "num_samples": plan.num_samples,
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
    }
    result = {"settings": settings, "rows": summarize(found), "cells": found}
    write_json(plan.output_dir / "compare_heads.json", result)
    text = markdown(result)
    with atomic_path(plan.output_dir / "compare_heads.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    plot(plan.output_dir / "compare_heads.png", result)
    return text


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("--config", required=True, help="YAML that all cells share")
    parser.add_argument("--heads", nargs="+", required=True, choices=sorted(ACTION_HEADS))
    parser.add_argument("--backbones", nargs="+", default=["paligemma"], choices=sorted(BACKBONE_SPECS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="training seeds, one cell each")
    parser.add_argument("--env", default="metaworld", help="simulator of the closed loop (default %(default)s)")
    parser.add_argument("--tasks", nargs="+", default=["button-press-topdown-v3", "window-open-v3"])
    parser.add_argument("--episodes", type=int, default=10, help="per task, seed and column; 0: no closed loop")
    parser.add_argument("--num_samples", type=int, default=8, help="draws per observation offline (default 8)")
    parser.add_argument("--output_dir", type=Path, default=Path("experiments/compare_heads"))
    parser.add_argument("--num_processes", type=int, help="cells at a time; default: one per core, with a GPU one")
    parser.add_argument("--device", default="auto", help="of evaluation: auto, cpu, cuda, ...")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="section.key=value", dest="set_args")
    args = parser.parse_args(argv)
    for name, least in (("episodes", 0), ("num_samples", 1), ("num_processes", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}; give {least} or more")
    if min(args.seeds) < 0:
        parser.error(f"--seeds are {args.seeds}; give 0 or more")
    for name in ("heads", "backbones", "seeds"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            parser.error(f"--{name} names one twice: {getattr(args, name)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    began = time.monotonic()
    plan = Plan(
        args.config,
        tuple(args.set_args),
        args.output_dir,
        args.env,
        tuple(args.tasks),
        args.episodes,
        args.num_samples,
        args.device,
    )
    set_up_logging(args.output_dir / "log.txt")
    check_settings(plan)
    prepare(plan, args.backbones)
    threads = plan.config.training.num_threads
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    cores = max(1, len(os.sched_getaffinity(0)) // (threads or len(os.sched_getaffinity(0))))
    cells = [
        Cell(backbone, head, seed, FIRST_EVALUATION_SEED + seed * args.episodes)
        for seed in args.seeds
        for backbone in args.backbones
        for head in args.heads
    ]
    failed = run_cells(plan, cells, args.num_processes or (1 if torch.cuda.is_available() else cores))
    measured = [cell for cell in cells if cell.seed == args.seeds[0] and is_finished(plan, cell)]
    for cell in measured:
        measure_speed(plan, cell)
    if measured:
        print(f"\n{write_report(plan, cells)}\n\nwrote {args.output_dir}/compare_heads.md, .json and .png")
    logger.info("%.1f minutes", (time.monotonic() - began) / 60)
    if failed:
        raise CellError(
            f"{len(failed)} of {len(cells)} cells failed: {', '.join(failed)}; see log.txt in their folders"
        )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cells end as well
    run_command(main, CellError, subprocess.CalledProcessError)
