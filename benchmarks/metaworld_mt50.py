"""Meta-World MT50: one policy, 50 tasks, success by tier, beside what replay and a blind policy reach.

    python benchmarks/metaworld_mt50.py [--quick] [--json mt50.json] [--episodes 10] [--demos 20] [--step_limit 200]
    python benchmarks/metaworld_mt50.py --cpu [--demos 50]        # two cores, at most 2.5 hours of training

Records demonstrations of the scripted experts, trains configs/metaworld_mt50.yaml from scratch (with --cpu
configs/metaworld_mt50_cpu.yaml, in two processes), and evaluates in closed loop on seeds from 10000 upwards: the
policy, the same policy with grey images (blind), and one recorded demonstration played back (replay). A number means
something only beside those two. An episode fails at --step_limit control steps: experts take 30 to 120, Meta-World
itself ends an episode at 500. Each evaluation goes on where it was killed; stages that are complete are not repeated
unless --fresh.

Published tier means in per cent, second-hand (quoted from later papers' tables, not checked against the originals;
other cameras, step limits, demonstrations and training budgets): Diffusion Policy 10.5, pi0 from PaliGemma 50.5,
SmolVLA 57.3, Evo-1 80.6.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

if not __package__:
    import _repository  # noqa: F401

from envs import FIRST_EVALUATION_SEED, expand_tasks
from utils.arguments import CommandParser
from utils.text_table import text_table

NAME = "metaworld_mt50"  # of the config too, with "_cpu" behind it where two cores train
BACKBONE = {
    "image_size": 128,
    "patch_size": 16,
    "vision_width": 384,
    "vision_layers": 8,
    "vision_heads": 6,
    "text_width": 512,
    "text_layers": 8,
    "text_heads": 8,
    "text_kv_heads": 2,
}
CPU_BACKBONE = {"image_size": 96, "patch_size": 16}
QUICK_BACKBONE = {"image_size": 64, "patch_size": 16}
PUBLISHED = {"Diffusion Policy": 10.5, "pi0 (PaliGemma)": 50.5, "SmolVLA": 57.3, "Evo-1": 80.6}
RUNS = ("policy", "blind", "replay")


def run(*command: str) -> None:
    """Run one of the repository's scripts, showing the command."""
    print("+ python", " ".join(command), flush=True)
    subprocess.run([sys.executable, *command], check=True)


def record(data: pathlib.Path, tasks: list[str], demos: int, image_size: int) -> None:
    """Training and held-out demonstrations of every task."""
    for split, episodes, seed in (("train", demos, 0), ("val", 1, 5000)):
        missing = [task for task in tasks if not (data / split / f"{task}.parquet").is_file()]
        if missing:
            flags = ["--episodes", str(episodes), "--seed", str(seed), "--image_size", str(image_size)]
            run("scripts/record_demos.py", "--tasks", *missing, *flags, "--output_dir", str(data / split))


def train(data: pathlib.Path, config: str, backbone: dict[str, int], extra: list[str], nproc: int) -> str:
    """Backbone, statistics, training; returns the checkpoint."""
    weights = "weight/" + data.name.replace("_", "-")
    flags = [text for key, value in backbone.items() for text in (f"--{key}", str(value))]
    run("scripts/make_tiny_paligemma.py", "--output_dir", weights, *flags)
    files = ["--train_data_override", str(data / "train")]
    statistics = str(data / "normalization_stats.json")
    run("utils/calculate_normalization_stats.py", "--config_path", config, *files, "--output_path", statistics)
    files += ["--val_data_override", str(data / "val"), "--experiment_name", data.name]
    settings = [f"data.normalization_stats_path={statistics}", *extra]
    command = ["main_train_ddp.py", "--nproc", str(nproc)] if nproc > 1 else ["main_train.py"]
    run(*command, "--config_path", config, *files, "--model_name_or_path", weights, "--set", *settings)
    return f"experiments/{data.name}/checkpoints/model_best.pth.tar"


def evaluate(
    checkpoint: str, data: pathlib.Path, tasks: list[str], episodes: int, num_envs: int, step_limit: int
) -> dict[str, Any]:
    """rollouts.json of the policy and of its controls."""
    results = {}
    for name in RUNS:
        output = pathlib.Path("experiments", data.name, name)
        command = ["main_eval.py", "--env", "metaworld", "--tasks", *tasks, "--episodes", str(episodes)]
        command += ["--output_dir", str(output), "--num_envs", str(num_envs), "--num_videos", "1"]
        command += ["--env_options", f"max_episode_steps={step_limit}"]
        if name == "replay":
            command += ["--control", "replay", "--demos_path", str(data / "train")]
        else:
            command += ["--checkpoint_path", checkpoint, *(["--blind"] if name == "blind" else [])]
        run(*command)
        results[name] = json.loads((output / "rollouts.json").read_text(encoding="utf-8"))
    return results


def print_table(results: dict[str, Any]) -> None:
    """Success by tier and over all, the three runs beside each other."""
    summaries = {name: result["summary"] for name, result in results.items()}
    rows = []
    for tier, policy in summaries["policy"]["tiers"].items():
        tiers = [summaries[name]["tiers"][tier] for name in RUNS]
        cells = [f"{row['successes']}/{row['episodes']} {100 * row['mean_success_rate']:.1f} %" for row in tiers]
        rows.append([tier, policy["tasks"], *cells])
    for label, key in (("mean of tasks", "mean_success_rate"), ("mean of tiers", "tier_mean_success_rate")):
        rows.append([label, None, *(f"{100 * summaries[name][key]:.1f} %" for name in RUNS)])
    print(f"\n{text_table(['', 'tasks', *RUNS], rows)}")
    for name in RUNS:
        low, high = summaries[name]["wilson_95"]
        print(f"{name}: 95 % interval over all episodes {100 * low:.1f} to {100 * high:.1f} %")
    print("published tier means (second-hand): " + ", ".join(f"{name} {value}" for name, value in PUBLISHED.items()))


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--quick", action="store_true", help="four tasks, one of each tier, at a fraction of the size")
    parser.add_argument("--cpu", action="store_true", help="a recipe for two cores: 50 demonstrations, a small model")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    parser.add_argument("--episodes", type=int, default=10, help="per task")
    parser.add_argument("--demos", type=int, help="per task (default 20, with --cpu 50)")
    parser.add_argument("--step_limit", type=int, default=200, help="control steps of an episode (default 200)")
    parser.add_argument("--num_envs", type=int, default=os.cpu_count(), help="simulator processes (default: all cores)")
    parser.add_argument("--fresh", action="store_true", help="record and train again, whatever is there")
    args = parser.parse_args()
    recipe = f"{NAME}_cpu" if args.cpu else NAME
    config, nproc = f"configs/{recipe}.yaml", 2 if args.cpu else 1
    started, name = time.perf_counter(), f"{recipe}_quick" if args.quick else recipe
    tasks, episodes, demos, backbone, extra = (
        expand_tasks("metaworld", ["all"]),
        args.episodes,
        args.demos or (50 if args.cpu else 20),
        CPU_BACKBONE if args.cpu else BACKBONE,
        [],
    )
    if args.quick:
        tasks = ["window-open-v3", "soccer-v3", "push-v3", "stick-push-v3"]
        episodes, demos, backbone = 2, 2, QUICK_BACKBONE
        extra = ["training.max_steps=20", "data.num_workers=1", "data.batch_size=16", "model.vlm_config.dtype=float32"]
        extra += [f"model.action_head_config.{key}" for key in ("hidden_dim=64", "num_layers=1", "num_heads=4")]
    data, experiment = pathlib.Path("demos", name), pathlib.Path("experiments", name)
    if args.fresh:
        shutil.rmtree(data, ignore_errors=True)
        if experiment.exists():
            shutil.move(experiment, experiment.with_name(f"{name}.{time.strftime('%Y%m%d-%H%M%S')}"))
    seconds = {}
    record(data, tasks, demos, backbone["image_size"])
    seconds["record"] = time.perf_counter() - started
    checkpoint = f"experiments/{name}/checkpoints/model_best.pth.tar"
    if not pathlib.Path(checkpoint).is_file():
        checkpoint = train(data, config, backbone, extra, nproc)
    seconds["train"] = time.perf_counter() - started - seconds["record"]
    results = evaluate(checkpoint, data, tasks, episodes, args.num_envs, args.step_limit)
    seconds["evaluate"] = time.perf_counter() - started - seconds["record"] - seconds["train"]
    print_table(results)
    print("seconds: " + ", ".join(f"{stage} {value:.0f}" for stage, value in seconds.items()))
    if args.json:
        content = {
            "seeds": [FIRST_EVALUATION_SEED, FIRST_EVALUATION_SEED + episodes - 1],
            "summaries": {name: result["summary"] for name, result in results.items()},
            "step_limit": args.step_limit,
            "published_tier_means": PUBLISHED,
            "seconds": seconds,
        }
        args.json.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
