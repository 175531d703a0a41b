"""Meta-World MT50: one policy, 50 tasks, success by tier, beside what replay and a blind policy reach.

    python benchmarks/metaworld_mt50.py [--quick] [--json mt50.json] [--episodes 10] [--demos 20] [--step_limit 200]
    python benchmarks/metaworld_mt50.py --cpu [--demos 50]        # two cores, at most 2.2 hours of training

Records demonstrations of the scripted experts, trains configs/metaworld_mt50.yaml from scratch (with --cpu
configs/metaworld_mt50_cpu.yaml, in two processes), and evaluates in closed loop on seeds from 10000 upwards: the
policy, the same policy with grey images (blind), and one recorded demonstration played back (replay). A number means
something only beside those two. An episode fails at --step_limit control steps: experts take 30 to 120, Meta-World
itself ends an episode at 500. Beside them --curve checkpoints spread over the training, on the first two of the seeds:
how success grows with training time. Every stage goes on where it was interrupted; --fresh begins again.

Published tier means in per cent, second-hand (quoted from later papers' tables, not checked against the originals;
other cameras, step limits, demonstrations and training budgets): Diffusion Policy 10.5, pi0 from PaliGemma 50.5, pi0
fine-tuned 50.8, SmolVLA 57.3, SmolVLA with 2.25 billion parameters 68, Evo-1 80.6.
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

if not __package__:
    import _repository  # noqa: F401

from benchmarks._recipe import Recipe, counted, timed
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
PUBLISHED = {"Diffusion Policy": 10.5, "pi0 (PaliGemma)": 50.5, "pi0 (fine-tuned)": 50.8, "SmolVLA": 57.3}
PUBLISHED |= {"SmolVLA-2.25B": 68, "Evo-1": 80.6}
RUNS = ("policy", "blind", "replay")
CURVE_EPISODES = 2  # of each task at each point


def evaluate(recipe: Recipe, episodes: int, step_limit: int) -> dict[str, Any]:
    """rollouts.json of the policy and of its controls."""
    options = {"max_episode_steps": step_limit}
    return {
        "policy": recipe.evaluate("policy", episodes, options=options),
        "blind": recipe.evaluate("blind", episodes, ["--blind"], options=options),
        "replay": recipe.evaluate("replay", episodes, control="replay", options=options),
    }


def curve(recipe: Recipe, points: int, step_limit: int) -> dict[int, dict[str, Any]]:
    """Step -> summary of its policy, for so many of the checkpoints that training kept, evenly, up to the last."""
    kept, summaries = list(recipe.kept.items()), {}
    points = min(points, len(kept))
    for step, checkpoint in (kept[(i + 1) * len(kept) // points - 1] for i in range(points)):
        where = {"checkpoint": checkpoint, "options": {"max_episode_steps": step_limit}}
        summaries[step] = recipe.evaluate(f"curve/step_{step}", CURVE_EPISODES, **where)["summary"]
    return summaries


def print_curve(summaries: dict[int, dict[str, Any]], hours: float, steps: int) -> None:
    """Success beside the step and the hours that training had taken by then, of so many for all `steps`."""
    rows = [
        [step, f"{hours * step / steps:.2f}", counted(summary)]
        + [f"{100 * summary[key]:.1f} %" for key in ("mean_success_rate", "tier_mean_success_rate")]
        for step, summary in summaries.items()
    ]
    print(f"\n{text_table(['step', 'hours', 'success', 'mean of tasks', 'mean of tiers'], rows)}")


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
    parser.add_argument("--curve", type=int, default=5, metavar="N", help="points of success over training (default 5)")
    parser.add_argument("--step_limit", type=int, default=200, help="control steps of an episode (default 200)")
    parser.add_argument("--num_envs", type=int, default=os.cpu_count(), help="simulator processes (default: all cores)")
    parser.add_argument("--nproc", type=int, help="processes that train (default 1, with --cpu 2)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of the training")
    parser.add_argument("--fresh", action="store_true", help="record and train again, whatever is there")
    args = parser.parse_args()
    name = f"{NAME}_cpu" if args.cpu else NAME
    tasks, episodes, demos = expand_tasks("metaworld", ["all"]), args.episodes, args.demos or (50 if args.cpu else 20)
    config, backbone, extra = f"configs/{name}.yaml", CPU_BACKBONE if args.cpu else BACKBONE, []
    if args.quick:
        name, tasks = f"{name}_quick", ["window-open-v3", "soccer-v3", "push-v3", "stick-push-v3"]
        episodes, demos, backbone = 2, 2, QUICK_BACKBONE
        extra = ["training.max_steps=20", "data.num_workers=1", "data.batch_size=16", "model.vlm_config.dtype=float32"]
        extra += [f"model.action_head_config.{key}" for key in ("hidden_dim=64", "num_layers=1", "num_heads=4")]
    options = {"image_size": backbone["image_size"]}
    where = {"num_workers": args.num_envs, "nproc": args.nproc or 1 + args.cpu}
    extra += args.set
    recipe = Recipe(name, config, "metaworld", tasks, options, backbone, extra, **where)
    if args.fresh:
        recipe.forget()
    recipe.record(demos, held_out=1)
    recipe.train()
    results = evaluate(recipe, episodes, args.step_limit)
    print_table(results)
    grown = curve(recipe, args.curve, args.step_limit)
    if grown:
        print_curve(grown, recipe.seconds["train"]["wall"] / 3600, recipe.step)
    print(timed(recipe.seconds))
    if args.json:
        content = {
            "seeds": [FIRST_EVALUATION_SEED, FIRST_EVALUATION_SEED + episodes - 1],
            "summaries": {name: result["summary"] for name, result in results.items()},
            "curve": grown,
            "step_limit": args.step_limit,
            "published_tier_means": PUBLISHED,
            "seconds": recipe.seconds,
        }
        args.json.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
