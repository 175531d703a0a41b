"""Success against latency: what each way of executing chunks loses when predictions take time.

    python benchmarks/latency.py [--quick] [--json latency.json] [--plot latency.png] [--episodes 10]
    python benchmarks/latency.py --redraw latency.json --plot latency.png     # the picture alone

A prediction is made from the observation of one control step and arrives `delay` control steps later (0, 1, 2, 4, 8;
80 steps are a second). Meanwhile, and at the start, where there is nothing to execute yet:

    synchronous    the robot holds still (no displacement, gripper as before), then runs 4 steps of the plan
    synchronous_12 the same with 12 steps of each plan: fewer pauses, and less looking
    naive_async    it runs on with the old plan, then switches to the new plan's step `delay`
    ensemble       the same, averaging all predictions for a step; it plans every max(1, delay) steps
    rtc            naive_async with real-time chunking: the new plan is guided to continue the old one
    clean_prefix   naive_async with a second policy, trained to continue given actions

The asynchronous ones plan every max(4, delay) steps. Time is counted in control steps and the scene does not wait:
an episode succeeds if it is done before its deadline, 1.5 times the longest training demonstration of its task. The
longer limit of the simulator (200 steps) stands beside it, because on tasks where nothing moves by itself a robot that
pauses is slow rather than wrong. Both policies (configs/latency.yaml) are trained here unless they exist.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import pathlib
import re
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

if not __package__:
    import _repository  # noqa: F401

from data.episode_store import EpisodeStore
from envs import FIRST_EVALUATION_SEED, make_env
from inference.closed_loop.rollout import ModelPolicy, execution_settings, run_episode
from inference.metrics import wilson_interval
from inference.predictor import VLAPredictor
from utils.arguments import CommandParser
from utils.misc import atomic_path
from utils.parquet_utils import resolve_parquet_files
from utils.text_table import text_table

TASKS = ("button-press-topdown-v3", "window-open-v3")
DELAYS = (0, 1, 2, 4, 8)
CONFIG, DEMOS = "configs/latency.yaml", "demos/quickstart"
LONGEST_PREFIX = max(DELAYS)
DEADLINE = 1.5  # of the longest demonstration
KEPT, AT_DELAY = 0.9, 4  # the claim: real-time chunking keeps so much of its success at this delay


@dataclass(frozen=True)
class Variant:
    """What a row of the table executes."""

    strategy: str
    n_action_steps: int = 4
    policy: str = "latency"  # the experiment whose policy it executes


VARIANTS = {
    "synchronous": Variant("synchronous"),
    "synchronous_12": Variant("synchronous", n_action_steps=12),
    "naive_async": Variant("naive_async"),
    "ensemble": Variant("ensemble"),
    "rtc": Variant("rtc"),
    "clean_prefix": Variant("clean_prefix", policy="latency_prefix"),
}
LINES: dict[str, tuple[str, float, float, dict[str, Any]]] = {  # label, shift along the axis, height of counts, style
    "deadline": (
        f"within {DEADLINE} x the longest demonstration",
        -0.08,
        -12.0,
        {"color": "#1f5fa8", "marker": "o", "markersize": 5, "linewidth": 2},
    ),
    "limit": (
        "within the simulator's 200 control steps",
        0.08,
        -24.0,
        {"color": "#d9822b", "marker": "s", "markersize": 5, "linewidth": 1.4, "linestyle": "--", "mfc": "white"},
    ),
}
TRAINING = {"latency": [], "latency_prefix": [f"model.action_head_config.max_clean_prefix={LONGEST_PREFIX}"]}


def run(*command: str) -> None:
    """Run one of the repository's scripts, showing the command."""
    print("+ python", " ".join(command), flush=True)
    subprocess.run([sys.executable, *command], check=True)


def prepare(policies: set[str], demos: int, experiment_suffix: str, settings: list[str]) -> dict[str, pathlib.Path]:
    """Record, train what is missing, and return each policy's checkpoint."""
    folder = f"{experiment_suffix}/checkpoints"
    checkpoints = {name: pathlib.Path(f"experiments/{name}{folder}/model_best.pth.tar") for name in sorted(policies)}
    data = f"{DEMOS}{experiment_suffix}"
    if not pathlib.Path(data, "train").exists():
        record = ["scripts/record_demos.py", "--env", "metaworld", "--tasks", *TASKS]
        run(*record, "--episodes", str(demos), "--output_dir", f"{data}/train", "--seed", "0")
        run(*record, "--episodes", "4", "--output_dir", f"{data}/val", "--seed", "5000")
    if not pathlib.Path("weight/tiny-paligemma").exists():
        run("scripts/make_tiny_paligemma.py", "--output_dir", "weight/tiny-paligemma")
    stats = f"{data}/normalization_stats.json"
    override = ["--train_data_override", f"{data}/train"]
    for name, checkpoint in checkpoints.items():
        if checkpoint.exists():
            print(f"using {checkpoint}, which exists already", flush=True)
            continue
        if not pathlib.Path(stats).exists():
            run("utils/calculate_normalization_stats.py", "--config_path", CONFIG, *override, "--output_path", stats)
        extra = ["--set", f"data.normalization_stats_path={stats}", *TRAINING[name], *settings]
        experiment = ["--experiment_name", f"{name}{experiment_suffix}", "--val_data_override", f"{data}/val"]
        run("main_train.py", "--config_path", CONFIG, *override, *experiment, *extra)
    return checkpoints


def longest_demonstrations(data: str) -> dict[str, int]:
    """Steps of each task's longest training demonstration."""
    longest = {}
    for task in TASKS:
        env = make_env("metaworld", task)
        files = resolve_parquet_files([f"{data}/train"], "demonstrations")
        store = EpisodeStore(files, state_dim=env.state_dim, per_action_dim=env.per_action_dim, cameras=("image_1",))
        bounds = zip(store.episode_starts[:-1], store.episode_starts[1:], strict=True)
        longest[task] = max(int(b - a) for a, b in bounds if store.prompt(a) == env.instruction)
        env.close()
    return longest


@functools.lru_cache(maxsize=2)
def predictor(checkpoint: pathlib.Path) -> VLAPredictor:
    """This process's policy."""
    return VLAPredictor.from_checkpoint(checkpoint, "cpu")


def roll_out(checkpoint: pathlib.Path, variant: Variant, task: str, delay: int, seeds: range) -> list[dict[str, Any]]:
    """One cell's episodes of one task."""
    import torch

    torch.set_num_threads(1)
    policy = predictor(checkpoint)
    env = make_env("metaworld", task, image_size=policy.image_processor.height)
    changes = {"execution": variant.strategy, "latency_steps": delay, "n_action_steps": variant.n_action_steps}
    settings = execution_settings(policy, **changes)
    episodes = []
    for seed in seeds:
        result = run_episode(env, ModelPolicy(policy, settings), seed)
        steps = np.clip(np.stack(result.actions), -1, 1)
        episodes.append(
            {
                "task": task,
                "seed": seed,
                "success": result.success,
                "steps": result.steps,
                "plans": result.plans,
                "held_steps": result.held_steps,
                "action_change": float(np.abs(np.diff(steps, axis=0)).mean()),
                "plan_seconds": result.plan_seconds / result.plans,
            }
        )
    env.close()
    return episodes


def count(episodes: list[dict[str, Any]], longest: dict[str, int], factor: float) -> int:
    """Episodes that were done within `factor` times their task's longest demonstration."""
    return sum(e["success"] and e["steps"] <= factor * longest[e["task"]] for e in episodes)


def summarize(cells: dict[str, dict[int, list[dict[str, Any]]]], longest: dict[str, int]) -> dict[str, Any]:
    """Per variant and delay: successes, intervals, and what is kept of the success without delay."""
    summary: dict[str, Any] = {}
    for name, by_delay in cells.items():
        zero = by_delay[0]
        summary[name] = {}
        for delay, episodes in by_delay.items():
            row: dict[str, Any] = {"episodes": len(episodes)}
            for key, factor in (("deadline", DEADLINE), ("limit", np.inf)):
                successes, first = count(episodes, longest, factor), count(zero, longest, factor)
                row[key] = {
                    "successes": successes,
                    "wilson_95": list(wilson_interval(successes, len(episodes))),
                    "kept": successes / first if first else None,
                }
            row["kept_by_factor"] = {
                str(factor): count(episodes, longest, factor) / max(1, count(zero, longest, factor))
                for factor in (1.1, 1.25, 1.5, 1.75, 2.0)
            }
            done = [e["steps"] for e in episodes if e["success"]]
            row["steps_to_success"] = float(np.mean(done)) if done else None
            row["held_steps"] = float(np.mean([e["held_steps"] for e in episodes]))
            row["action_change"] = float(np.mean([e["action_change"] for e in episodes]))
            row["plan_ms"] = 1000 * float(np.median([e["plan_seconds"] for e in episodes]))
            summary[name][delay] = row
    return summary


def print_tables(summary: dict[str, Any], episodes: int) -> None:
    """Successes by deadline and by limit, then how the motion was."""
    delays = next(iter(summary.values()))
    for key, title in (
        ("deadline", f"successes within {DEADLINE} x the longest demonstration (of {episodes})"),
        ("limit", f"successes within 200 steps (of {episodes})"),
    ):
        rows = []
        for name, by_delay in summary.items():
            cells = []
            for row in by_delay.values():
                low, high = (100 * value for value in row[key]["wilson_95"])
                cells.append(f"{row[key]['successes']} ({low:.0f}-{high:.0f} %)")
            rows.append([name, *cells, by_delay[AT_DELAY][key]["kept"]])
        print(f"\n{title}\n{text_table(['delay', *delays, f'kept at {AT_DELAY}'], rows)}")
    rows = []
    for name, by_delay in summary.items():
        cells = []
        for row in by_delay.values():
            steps = "-" if row["steps_to_success"] is None else f"{row['steps_to_success']:.0f}"
            cells.append(f"{steps}, {1000 * row['action_change']:.0f}")
        rows.append([name, *cells])
    print(f"\nmean steps to success, mean |action change| x 1000\n{text_table(['delay', *delays], rows)}")
    kept = {name: by_delay[AT_DELAY]["kept_by_factor"] for name, by_delay in summary.items()}
    rows = [[name, *by_factor.values()] for name, by_factor in kept.items()]
    print(f"\nkept at delay {AT_DELAY}, for deadlines of so many times the longest demonstration")
    print(text_table(["", *next(iter(kept.values()))], rows))


def plot(summary: dict[str, Any], path: pathlib.Path) -> None:
    """One panel a variant: successes against delay, by deadline and by limit, with Wilson 95 % intervals.

    The other variants stand behind in grey, so that panels can be compared although most lines coincide.

    Args:
        summary: variant -> delay -> row, as `summarize`, `read_json` or `read_published` give it.
        path: the PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(summary))
    rows = -(-len(summary) // columns)
    size = (3.7 * columns, 3.1 * rows + 0.8)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    rates = {
        (name, key): np.array([100 * row[key]["successes"] / row["episodes"] for row in by_delay.values()])
        for name, by_delay in summary.items()
        for key in LINES
    }
    for axis, (name, by_delay) in zip(axes.flat, summary.items(), strict=False):
        x = np.arange(len(by_delay))
        for other in summary:
            label = f"the other strategies, within {DEADLINE} x" if other == name else None
            axis.plot(x, rates[other, "deadline"], color="0.85", linewidth=1.2, zorder=1, label=label)
        for key, (label, shift, height, style) in LINES.items():
            rate = rates[name, key]
            low, high = 100 * np.array([row[key]["wilson_95"] for row in by_delay.values()]).T
            error = np.clip([rate - low, high - rate], 0, None)
            axis.errorbar(x + shift, rate, error, label=label, capsize=2.5, elinewidth=1, zorder=3, **style)
            for at, row in zip(x, by_delay.values(), strict=True):  # counts, below the axis at zero
                axis.text(at, height, row[key]["successes"], color=style["color"], fontsize=9, ha="center", va="center")
        axis.set_title(name, fontsize=11, family="monospace", loc="left")
        axis.set(xticks=x, xticklabels=list(by_delay), ylim=(-32, 106), yticks=range(0, 101, 25))
        axis.grid(axis="y", color="0.92", linewidth=0.8, zorder=0)
        axis.axhline(0, color="0.4", linewidth=0.8, zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(summary) :]:
        axis.set_visible(False)
    episodes = next(iter(next(iter(summary.values())).values()))["episodes"]
    figure.supxlabel("delay of every prediction (control steps)", fontsize=10)
    figure.supylabel(f"success rate, %, with Wilson 95 % intervals; below: successes of {episodes}", fontsize=10)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=3, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0.01, 0.01, 1, 0.95))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The summary in a file that --json wrote."""
    summary = json.loads(path.read_text(encoding="utf-8"))["summary"]
    return {name: {int(delay): row for delay, row in by_delay.items()} for name, by_delay in summary.items()}


def read_published(path: pathlib.Path) -> dict[str, Any]:
    """The same for the published figures: the two tables of RESULTS.md that count successes by delay."""
    tables = re.findall(
        r"^\| successes of (\d+), by delay \|(.*)\n.*\n((?:\|.*\n)+)", path.read_text(encoding="utf-8"), re.M
    )
    if len(tables) != len(LINES):
        raise ValueError(
            f"{path} has {len(tables)} tables of successes by delay; wanted {len(LINES)}: {', '.join(LINES)}"
        )
    summary: dict[str, Any] = {}
    for key, (episodes, head, body) in zip(LINES, tables, strict=True):
        delays = [int(cell) for cell in head.split("|") if cell.strip().isdigit()]
        for name, cells in re.findall(r"^\| `(\w+)` \|(.*)$", body, re.M):
            for delay, cell in zip(delays, cells.split("|"), strict=False):
                successes = int(cell.split()[0])
                row = summary.setdefault(name, {}).setdefault(delay, {"episodes": int(episodes)})
                row[key] = {"successes": successes, "wilson_95": wilson_interval(successes, int(episodes))}
    return summary


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--quick", action="store_true", help="every stage at a fraction of its size")
    parser.add_argument("--episodes", type=int, default=10, help="per task, strategy and delay")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=FIRST_EVALUATION_SEED, help="of the first episode")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    parser.add_argument("--plot", type=pathlib.Path, default=pathlib.Path("experiments/latency/latency.png"))
    parser.add_argument("--redraw", type=pathlib.Path, help="only draw: a --json result, or benchmarks/RESULTS.md")
    args = parser.parse_args()
    if args.redraw:
        plot((read_json if args.redraw.suffix == ".json" else read_published)(args.redraw), args.plot)
        print(f"wrote {args.plot}")
        return
    started = time.perf_counter()
    suffix = "_short" if args.quick else ""
    variants = {name: VARIANTS[name] for name in args.variants}
    policies = {variant.policy for variant in variants.values()}
    checkpoints = prepare(policies, 3 if args.quick else 60, suffix, ["training.max_steps=20"] if args.quick else [])
    longest = longest_demonstrations(f"{DEMOS}{suffix}")
    episodes, delays = (1, (0, AT_DELAY)) if args.quick else (args.episodes, DELAYS)
    seeds = range(args.seed, args.seed + episodes)
    work = [(name, task, delay) for name in variants for delay in delays for task in TASKS]
    cells: dict[str, dict[int, list[dict[str, Any]]]] = {name: {delay: [] for delay in delays} for name in variants}
    # Spawned, so that every process has its own renderer and none inherits torch's threads.
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        futures = [
            pool.submit(roll_out, checkpoints[variants[name].policy], variants[name], task, delay, seeds)
            for name, task, delay in work
        ]
        for (name, task, delay), future in zip(work, futures, strict=True):
            cells[name][delay] += (found := future.result())
            done = sum(e["success"] for e in found)
            print(f"{name:<16}delay {delay}  {task:<26}{done}/{len(found)} within 200 steps", flush=True)
    summary = summarize(cells, longest)
    print_tables(summary, episodes * len(TASKS))
    kept = {name: by_delay[AT_DELAY]["deadline"]["kept"] for name, by_delay in summary.items()}
    print(f"\nkept of the success without delay, at delay {AT_DELAY}; wanted: rtc {KEPT}, synchronous less")
    print(", ".join(f"{name} {value}" for name, value in kept.items()))
    plot(summary, args.plot)
    print(f"wrote {args.plot}")
    if args.json:
        result = {
            "checkpoints": {name: str(path) for name, path in checkpoints.items()},
            "seeds": [seeds.start, seeds.stop - 1],
            "longest_demonstration": longest,
            "deadline_factor": DEADLINE,
            "summary": summary,
            "episodes": cells,
            "seconds": time.perf_counter() - started,
        }
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
        print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
