"""Closed-loop evaluation in parallel: how much faster than serial, and whether any episode changed.

    python benchmarks/bench_rollout.py --checkpoint_path C [--episodes 100] [--num_envs 4] [--quick] [--json F]

The same seeds are run twice through main_eval.py, with one simulator process and with several; start-up is part of
both, and does not get shorter by processes: a few episodes gain little. A flip is an episode with another outcome
(batches round differently than single samples).

JSON keys: speedup (at least 1.7 on two cores), flips (wanted 0), episodes.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

if not __package__:
    import _repository  # noqa: F401

from utils.arguments import CommandParser
from utils.text_table import text_table

LIMITS = {"speedup": 1.7, "flips": 0}
TASKS = ("button-press-topdown-v3", "window-open-v3")


def evaluate(args: argparse.Namespace, folder: pathlib.Path, num_envs: int) -> tuple[dict[str, Any], float]:
    """rollouts.json of one run, and its seconds."""
    command = ["main_eval.py", "--checkpoint_path", args.checkpoint_path, "--env", "metaworld", "--tasks", *args.tasks]
    command += ["--episodes", str(args.episodes), "--num_videos", "0", "--num_threads", "1"]
    command += ["--num_envs", str(num_envs), "--output_dir", str(folder)]
    root = pathlib.Path(__file__).resolve().parents[1]
    started = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command], check=True, cwd=root, env=environment, capture_output=True)
    seconds = time.perf_counter() - started
    return json.loads((folder / "rollouts.json").read_text(encoding="utf-8"))["tasks"], seconds


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--checkpoint_path", required=True, type=lambda path: str(pathlib.Path(path).resolve()))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--episodes", type=int, default=100, help="per task")
    parser.add_argument("--num_envs", type=int, default=2 * os.cpu_count(), help="default: two for each core")
    parser.add_argument("--quick", action="store_true", help="2 episodes per task")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    args = parser.parse_args()
    args.episodes = 2 if args.quick else args.episodes
    with tempfile.TemporaryDirectory() as name:
        serial, serial_seconds = evaluate(args, pathlib.Path(name, "serial"), 1)
        parallel, parallel_seconds = evaluate(args, pathlib.Path(name, "parallel"), args.num_envs)
    pairs = [
        pair for task in args.tasks for pair in zip(serial[task]["success"], parallel[task]["success"], strict=True)
    ]
    steps = [pair for task in args.tasks for pair in zip(serial[task]["steps"], parallel[task]["steps"], strict=True)]
    result = {
        "episodes": len(pairs),
        "num_envs": args.num_envs,
        "serial_seconds": serial_seconds,
        "parallel_seconds": parallel_seconds,
        "speedup": serial_seconds / parallel_seconds,
        "flips": sum(a != b for a, b in pairs),
        "other_length": sum(a != b for a, b in steps),
        "successes": {"serial": sum(a for a, _ in pairs), "parallel": sum(b for _, b in pairs)},
    }
    rows = [
        ["seconds", serial_seconds, parallel_seconds, None],
        ["speed-up", 1.0, result["speedup"], LIMITS["speedup"]],
        ["successes", *(f"{result['successes'][name]}/{len(pairs)}" for name in ("serial", "parallel")), None],
        ["outcomes that changed", None, result["flips"], LIMITS["flips"]],
        ["episodes of another length", None, result["other_length"], None],
    ]
    print(text_table(["", "serial", f"{args.num_envs} processes", "wanted"], rows))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
