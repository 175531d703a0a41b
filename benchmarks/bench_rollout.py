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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    print(f"{'':<28}{'serial':>10}{f'{args.num_envs} processes':>16}{'wanted':>10}")
    print(f"{'seconds':<28}{serial_seconds:>10.1f}{parallel_seconds:>16.1f}")
    print(f"{'speed-up':<28}{1.0:>10.2f}{result['speedup']:>16.2f}{LIMITS['speedup']:>10.2f}")
    counts = [f"{result['successes'][name]}/{len(pairs)}" for name in ("serial", "parallel")]
    print(f"{'successes':<28}{counts[0]:>10}{counts[1]:>16}")
    print(f"{'outcomes that changed':<28}{'':>10}{result['flips']:>16}{LIMITS['flips']:>10}")
    print(f"{'episodes of another length':<28}{'':>10}{result['other_length']:>16}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
