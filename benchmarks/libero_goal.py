"""LIBERO: does one policy look, and does it listen? Tasks of libero_goal from one picture, beside libero_object.

    python benchmarks/libero_goal.py [--quick] [--json libero.json] [--demos 50] [--episodes 20] [--tasks GROUP ...]

Records the scripted experts in the wide layout, trains configs/libero_goal.yaml from scratch, and evaluates in closed
loop on seeds from 10000 upwards:

* language: four tasks that start from the same picture and state, to the bit (checked first). Each cell of the matrix
  is how often the column's goal was reached under the row's prompt; beside it success under LIBERO-PRO's paraphrases,
  on which nothing was trained.
* every task, in the standard and in the wide layout: policy, grey images (blind), a recorded demonstration played back
  (replay), the next task's prompt (swapped), and the expert.

LIBERO's own layouts vary by about a centimetre, so that replay succeeds there: read the standard columns beside it.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
from typing import Any

import numpy as np

if not __package__:
    import _repository  # noqa: F401

from benchmarks._recipe import Recipe, counted
from envs import FIRST_EVALUATION_SEED, expand_tasks, make_env
from envs.libero_tasks import instructions_of
from utils.arguments import CommandParser
from utils.text_table import text_table

GOAL = [
    f"libero_goal.{name}"
    for name in (
        "put_the_bowl_on_the_plate",
        "put_the_bowl_on_the_stove",
        "put_the_bowl_on_top_of_the_cabinet",
        "put_the_cream_cheese_in_the_bowl",
        "put_the_wine_bottle_on_top_of_the_cabinet",
        "put_the_wine_bottle_on_the_rack",
    )
]
LANGUAGE = GOAL[:4]  # the tasks of the matrix
RUNS = ("policy", "blind", "replay", "swapped", "expert")


def starts_are_identical(seeds: range, image_size: int) -> bool:
    """Whether the tasks of the matrix start from the same images and state for every seed."""
    observations = []
    for task in LANGUAGE:
        env = make_env("libero", task, layout="wide", image_size=image_size)
        observations.append([env.reset(seed=seed)[0] for seed in seeds])
        env.close()
    scenes = zip(*observations, strict=True)
    return all(np.array_equal(first[key], other[key]) for first, *rest in scenes for other in rest for key in first)


def language_matrix(recipe: Recipe, episodes: int) -> dict[str, dict[str, Any]]:
    """Prompt of a task -> goal of a task -> its summary."""
    matrix = {}
    for told in LANGUAGE:
        words = instructions_of(told)[0]
        flags = ["--prompt_override", words]
        name = f"language/{told.partition('.')[2]}"
        matrix[told] = recipe.evaluate(name, episodes, flags, tasks=LANGUAGE)["tasks"]
    return matrix


def layouts(recipe: Recipe, episodes: int) -> dict[str, dict[str, Any]]:
    """Layout -> run -> rollouts.json."""
    results: dict[str, dict[str, Any]] = {}
    for layout in ("standard", "wide"):
        options = {**recipe.env_options, "layout": layout}
        results[layout] = {
            run: recipe.evaluate(
                f"{layout}/{run}",
                episodes,
                {"blind": ["--blind"], "swapped": ["--swap_prompts"]}.get(run, []),
                control=run if run in ("replay", "expert") else None,
                options=options,
            )
            for run in RUNS
        }
    return results


def print_tables(matrix: dict[str, Any], paraphrased: dict[str, Any], results: dict[str, Any]) -> None:
    """The matrix and the two layouts."""
    names = [task.partition(".")[2] for task in LANGUAGE]
    rows = [
        [instructions_of(told)[0], *(f"{goals[task]['successes']}/{goals[task]['episodes']}" for task in LANGUAGE)]
        for told, goals in matrix.items()
    ]
    print("\n" + text_table(["prompt", *names], rows))
    own = [matrix[task][task]["success_rate"] for task in LANGUAGE]
    other = [matrix[told][task]["success_rate"] for told in LANGUAGE for task in LANGUAGE if told != task]
    print(f"mean of the diagonal {100 * np.mean(own):.0f} %, of the rest {100 * np.mean(other):.0f} %")
    print("under paraphrases never trained on: " + counted(paraphrased["summary"]))
    for layout, runs in results.items():
        tasks = runs["policy"]["tasks"]
        rows = [[task, *(counted(runs[run]["tasks"][task]) for run in RUNS)] for task in tasks]
        rows.append(["all", *(counted(runs[run]["summary"]) for run in RUNS)])
        print(f"\n{layout} layout\n" + text_table(["task", *RUNS], rows))
        settings = runs["policy"]["settings"]["env_settings"]
        seeds = tasks[next(iter(tasks))]["seeds"]
        print(f"seeds {seeds[0]} to {seeds[-1]}, MuJoCo {settings['mujoco']}, {settings['max_episode_steps']} steps")


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--quick", action="store_true", help="every stage at a fraction of its size")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    parser.add_argument("--demos", type=int, default=50, help="per task")
    parser.add_argument("--episodes", type=int, default=20, help="per task and column")
    parser.add_argument("--tasks", nargs="+", default=[*GOAL, "libero_object"], help="beside the four of the matrix")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    parser.add_argument("--fresh", action="store_true", help="record and train again, whatever is there")
    args = parser.parse_args()
    name = "libero_goal_quick" if args.quick else "libero_goal"
    tasks = expand_tasks("libero", [*LANGUAGE, *args.tasks])
    demos, episodes, settings, options = args.demos, args.episodes, [], {"image_size": 96, "layout": "wide"}
    if args.quick:
        tasks, demos, episodes = LANGUAGE, 1, 1
        settings = ["training.max_steps=5", "data.batch_size=8", "inference.num_inference_steps=2"]
        options |= {"max_episode_steps": 120}
    if not starts_are_identical(range(FIRST_EVALUATION_SEED, FIRST_EVALUATION_SEED + min(3, episodes)), 96):
        sys.exit("error: the tasks of the matrix start from different images or states; it would not test the prompt")
    recipe = Recipe(name, "configs/libero_goal.yaml", "libero", tasks, options, {}, settings, args.num_workers)
    if args.fresh:
        recipe.forget()
    recipe.record(demos, held_out=1)
    recipe.train()
    matrix = language_matrix(recipe, episodes)
    paraphrased = recipe.evaluate("paraphrased", episodes, ["--paraphrase", "1"], tasks=LANGUAGE)
    results = layouts(recipe, episodes)
    print_tables(matrix, paraphrased, results)
    print("seconds: " + ", ".join(f"{stage} {value:.0f}" for stage, value in recipe.seconds.items()))
    if args.json:
        content = {"matrix": matrix, "paraphrased": paraphrased, "layouts": results, "seconds": recipe.seconds}
        args.json.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
