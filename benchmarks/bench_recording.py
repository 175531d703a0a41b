"""How many frames a second demonstrations are recorded at.

    python benchmarks/bench_recording.py [--quick] [--json recording.json]

Measures, on one Meta-World task: gymnasium's own renderer (the baseline), this repository's renderer alone (the
limit of one process), and scripts/record_demos.py as a whole (simulate, expert, render, encode, write) with one
process and with two. "sustained" counts from the first finished episode of every process, "with start" from the
call, so it includes about two seconds of imports and loading. `frames_per_second` in the JSON is the sustained rate
of the largest number of processes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

if not __package__:
    import _repository  # noqa: F401

from envs import make_env
from envs.mujoco_rendering import import_mujoco
from scripts._recording import record, recording_parser
from utils.arguments import CommandParser
from utils.text_table import text_table

CAMERA = "corner4"


def gymnasium_renderer(task: str, image_size: int, frames: int) -> float:
    """Frames a second of Meta-World's environment with gymnasium's renderer, its defaults untouched."""
    import_mujoco()
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    env = ALL_V3_ENVIRONMENTS[task](render_mode="rgb_array", camera_name=CAMERA, width=image_size, height=image_size)
    env.render()
    rate = frames / _seconds_of(env.render, frames)
    env.close()
    return rate


def our_renderer(task: str, image_size: int, frames: int) -> float:
    """Frames a second of rendering alone."""
    env = make_env("metaworld", task, camera=CAMERA, image_size=image_size)
    env.reset(seed=0)
    rate = frames / _seconds_of(env.render, frames)
    env.close()
    return rate


def recording(task: str, image_size: int, episodes: int, num_workers: int) -> dict[str, float]:
    """Frames a second of the whole recording script with so many processes."""
    finished: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--tasks {task} --episodes {episodes} --num_workers {num_workers} --image_size {image_size}"
        args = recording_parser().parse_args([*flags.split(), "--camera", CAMERA, "--output_dir", folder])
        args.command = "benchmarks/bench_recording.py"
        started = time.perf_counter()
        record(args, lambda episode: finished.append((time.perf_counter(), len(episode.actions))))
        seconds = time.perf_counter() - started
    warm = finished[num_workers - 1][0]
    return {
        "processes": num_workers,
        "frames": sum(frames for _, frames in finished),
        "sustained": sum(frames for _, frames in finished[num_workers:]) / (finished[-1][0] - warm),
        "with_start": sum(frames for _, frames in finished) / seconds,
    }


def _seconds_of(function: Callable[[], Any], times: int) -> float:
    started = time.perf_counter()
    for _ in range(times):
        function()
    return time.perf_counter() - started


def _in_fresh_process(function: Callable[..., float], *args: Any) -> float:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *args).result()


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--task", default="window-open-v3")
    parser.add_argument("--image_size", type=int, default=96)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="a quarter of the episodes and frames")
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers to this file")
    args = parser.parse_args()
    scale = 1 if args.quick else 4
    load = os.getloadavg()[0]

    baseline = _in_fresh_process(gymnasium_renderer, args.task, args.image_size, 10 * scale)
    limit = _in_fresh_process(our_renderer, args.task, args.image_size, 100 * scale)
    runs = [recording(args.task, args.image_size, 8 * n * scale, n) for n in args.processes]

    print(f"{args.task}, {args.image_size} px, {os.cpu_count()} cores, load average before {load:.1f}")
    rows: list[list[Any]] = [
        ["gymnasium renderer, 1 process", baseline, None],
        ["our renderer, 1 process", limit, None],
    ]
    rows += [[f"record_demos.py, {run['processes']} process(es)", run["sustained"], run["with_start"]] for run in runs]
    print(text_table(["frames/s", "sustained", "with start"], rows))
    if args.json:
        report = {
            "frames_per_second": max(runs, key=lambda run: run["processes"])["sustained"],
            "task": args.task,
            "image_size": args.image_size,
            "cores": os.cpu_count(),
            "load_average_before": load,
            "gymnasium_renderer_frames_per_second": baseline,
            "render_only_frames_per_second": limit,
            "recording": runs,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
