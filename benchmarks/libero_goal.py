"""LIBERO: does one policy look, and does it listen? Tasks of libero_goal from one picture, beside libero_object.

    python benchmarks/libero_goal.py [--quick] [--json libero.json] [--demos 100] [--corrections 60] [--rounds 3]
                                     [--episodes 20] [--tasks GROUP ...]

Records the scripted experts in the wide layout and trains configs/libero_goal.yaml from scratch. Demonstrations never
show a grip that was missed: so the policy then acts, the expert takes over where it leaves its corridor
(scripts/_takeover.py), and training goes on with such corrections (configs/libero_goal_corrected.yaml), a round after
another. Evaluated in closed loop on seeds from 10000 upwards:

* language: four tasks that start from the same picture and state, to the bit (checked first). Each cell of the matrix
  is how often the column's goal was reached, at any step, under the row's prompt: an episode goes on to the step limit
  whatever is reached, and one episode fills a row. Beside it LIBERO-PRO's paraphrases, on which nothing was trained.
* every task, in the standard and in the wide layout: policy, grey images (blind), a recorded demonstration played back
  (replay), the next task's prompt (swapped), and the expert.

LIBERO's own layouts vary by about a centimetre, so that replay succeeds there: read the standard columns beside it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import sys
from typing import Any

import gymnasium
import numpy as np
import torch

if not __package__:
    import _repository  # noqa: F401

from benchmarks._recipe import Recipe, counted, timed
from envs import FIRST_EVALUATION_SEED, expand_tasks, make_env
from envs.libero_tasks import instructions_of
from inference.closed_loop.episode import Episode
from inference.closed_loop.policies import local_planner
from inference.closed_loop.rollout import ModelPolicy
from inference.predictor import VLAPredictor
from inference.report import conditions
from utils.arguments import CommandParser, at_least
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
CORRECTIONS_SEEDS, SEEDS_A_ROUND = (2000, 3000, 4000, 6000, 7000, 8000), 1000  # 5000 is validation's, 9000 replay's
# Bowls can be taken anywhere along their rim, and the policy need not take them where the expert would: so long a mean
# of the distance tells another grip, after which the expert agrees again, from a grip that was missed.
CORRIDOR = ["--corridor", "0.45", "--corridor_steps", "24"]
MOST_ATTEMPTS = 20  # for each correction: the better the policy, the fewer episodes are corrected
REPLAYED, REPLAY_SEED = 5, 9000  # demonstrations of each task that are played back in turn, and their first seed


def starts_are_identical(seeds: range, image_size: int) -> bool:
    """Whether the tasks of the matrix start from the same images and state for every seed."""
    observations = []
    for task in LANGUAGE:
        env = make_env("libero", task, layout="wide", image_size=image_size)
        observations.append([env.reset(seed=seed)[0] for seed in seeds])
        env.close()
    scenes = zip(*observations, strict=True)
    return all(np.array_equal(first[key], other[key]) for first, *rest in scenes for other in rest for key in first)


class AllGoals(gymnasium.Wrapper):
    """Goes on to the step limit, and notes which tasks' goals were reached at any step."""

    def reset(self, **options: Any) -> Any:
        self.reached: set[str] = set()
        return self.env.reset(**options)

    def step(self, action: np.ndarray) -> Any:
        observation, reward, _, truncated, info = self.env.step(action)
        self.reached |= {task for task in LANGUAGE if self.env.unwrapped.holds(task)}
        return observation, reward, False, truncated, {**info, "success": False}


def language_matrix(recipe: Recipe, episodes: int, paraphrase: int = 0) -> dict[str, dict[str, int]]:
    """Prompt of a task -> goal of a task -> in how many episodes it was reached.

    Args:
        recipe: a trained one. Finished episodes are kept in its folder, and not run again.
        episodes: of each prompt, with seeds from 10000 upwards.
        paraphrase: which of a task's instructions is told; 0 is the one trained on.
    """
    path = recipe.experiment / f"language_{paraphrase}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    done = {(line["told"], line["seed"]): line["reached"] for line in map(json.loads, lines)}
    seeds = range(FIRST_EVALUATION_SEED, FIRST_EVALUATION_SEED + episodes)
    missing = [(told, seed) for told in LANGUAGE for seed in seeds if (told, seed) not in done]
    if missing:
        torch.set_num_threads(1)
        policy = ModelPolicy(VLAPredictor.from_checkpoint(str(recipe.checkpoint)))
        env = AllGoals(make_env("libero", LANGUAGE[0], **recipe.env_options))
        for told, seed in missing:
            words = instructions_of(told)[paraphrase]
            episode = Episode(env, policy.execution, seed, prompt=words, max_seq_len=policy.max_seq_len)
            episode.run(local_planner(policy, env, seed))
            done[told, seed] = sorted(env.reached)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"told": told, "words": words, "seed": seed, "reached": done[told, seed]}) + "\n")
        env.close()
    return {told: {goal: sum(goal in done[told, seed] for seed in seeds) for goal in LANGUAGE} for told in LANGUAGE}


def layouts(recipe: Recipe, episodes: int) -> dict[str, dict[str, Any]]:
    """Layout -> run -> rollouts.json.

    What is replayed was recorded in the layout itself and without noise, whose labels are not what was done.
    """
    results: dict[str, dict[str, Any]] = {}
    for layout in ("standard", "wide"):
        options, replayed = {**recipe.env_options, "layout": layout}, f"replay_{layout}"
        recipe.record_split(replayed, min(REPLAYED, episodes), REPLAY_SEED, ["--noise_scale", "0"], options)
        results[layout] = {
            run: recipe.evaluate(
                f"{layout}/{run}",
                episodes,
                {"blind": ["--blind"], "swapped": ["--swap_prompts"]}.get(run, []),
                control=run if run in ("replay", "expert") else None,
                options=options,
                replayed=replayed,
            )
            for run in RUNS
        }
    return results


def rounds(recipe: Recipe, count: int) -> list[Recipe]:
    """The recipes that go on from this one in turn, each with corrections of the one before it."""
    recipes = [recipe]
    for number in range(1, count + 1):
        name = f"{recipe.name}_corrected" + ("" if number == 1 else f"_{number}")
        config, after = "configs/libero_goal_corrected.yaml", recipes[-1]
        splits = (*after.splits, f"corrections_{after.name}")
        recipes.append(dataclasses.replace(recipe, name=name, config=config, splits=splits, after=after))
    return recipes[1:]


def corrected(recipe: Recipe, corrections: int, count: int) -> Recipe:
    """The recipe, trained on `count` times, each time with so many more corrections of each task by the expert."""
    # --quick's episodes are too short for a policy and an expert after it
    options = {key: value for key, value in recipe.env_options.items() if key != "max_episode_steps"}
    attempts = ["--max_attempts_factor", str(min(MOST_ATTEMPTS, SEEDS_A_ROUND // corrections))]
    for number, after in enumerate(rounds(recipe, count)):
        flags = ["--policy", str(recipe.checkpoint), "--takeover", *CORRIDOR, *attempts]
        after.record_split(after.splits[-1], corrections, CORRECTIONS_SEEDS[number], flags, options)
        after.train()
        recipe = after
    return recipe


def print_matrix(matrix: dict[str, dict[str, int]], episodes: int, paraphrase: int = 0) -> None:
    """The matrix, its means, and what it was measured on."""
    names = [task.partition(".")[2] for task in LANGUAGE]
    rows = [[instructions_of(told)[paraphrase], *goals.values()] for told, goals in matrix.items()]
    print(f"\ngoals reached in {episodes} episodes\n" + text_table(["prompt", *names], rows))
    own = [goals[told] for told, goals in matrix.items()]
    other = [count for told, goals in matrix.items() for goal, count in goals.items() if goal != told]
    for name, counts in (("diagonal", own), ("rest", other)):
        print(f"{name}: " + counted({"successes": sum(counts), "episodes": episodes * len(counts)}))
    last = FIRST_EVALUATION_SEED + episodes - 1
    print(f"seeds {FIRST_EVALUATION_SEED} to {last}, wide layout, MuJoCo {importlib.metadata.version('mujoco')}")


def print_layouts(results: dict[str, Any]) -> None:
    """The policy beside its controls, in both layouts."""
    for layout, runs in results.items():
        tasks = runs["policy"]["tasks"]
        rows = [[task, *(counted(runs[run]["tasks"][task]) for run in RUNS)] for task in tasks]
        rows.append(["all", *(counted(runs[run]["summary"]) for run in RUNS)])
        print(f"\n{layout} layout\n" + text_table(["task", *RUNS], rows))
        print(conditions(runs["policy"]))


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--quick", action="store_true", help="every stage at a fraction of its size")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    parser.add_argument("--demos", type=int, default=100, help="per task")
    parser.add_argument("--corrections", type=at_least(1), default=60, help="per task and round; none: --rounds 0")
    help_text = "of corrections and further training (default %(default)s; 0: none)"
    parser.add_argument("--rounds", type=int, default=3, choices=range(len(CORRECTIONS_SEEDS) + 1), help=help_text)
    parser.add_argument("--episodes", type=int, default=20, help="per task and column")
    parser.add_argument("--tasks", nargs="+", default=[*GOAL, "libero_object"], help="beside the four of the matrix")
    help_text = "the four tasks of the matrix alone, and no table of layouts"
    parser.add_argument("--matrix_only", action="store_true", help=help_text)
    parser.add_argument("--noise_scale", type=float, default=0.1, help="of the recording (default %(default)s)")
    parser.add_argument("--nproc", type=int, default=2, help="processes that train")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of the training")
    parser.add_argument("--fresh", action="store_true", help="record and train again, whatever is there")
    args = parser.parse_args()
    data = "libero_goal_quick" if args.quick else "libero_goal"
    name = f"{data}_matrix" if args.matrix_only else data
    tasks = LANGUAGE if args.matrix_only else expand_tasks("libero", [*LANGUAGE, *args.tasks])
    demos, episodes, settings, options = args.demos, args.episodes, [], {"image_size": 96, "layout": "wide"}
    corrections, count = args.corrections, args.rounds
    if args.quick:
        tasks, demos, episodes, corrections, count = LANGUAGE, 1, 1, 1, min(count, 1)
        settings = ["training.max_steps=5", "data.batch_size=8", "inference.num_inference_steps=2"]
        options |= {"max_episode_steps": 120}
    if not starts_are_identical(range(FIRST_EVALUATION_SEED, FIRST_EVALUATION_SEED + episodes), 96):
        sys.exit("error: the tasks of the matrix start from different images or states; it would not test the prompt")
    config = "configs/libero_goal.yaml"
    settings += args.set
    where = {"num_workers": args.num_workers, "nproc": args.nproc, "data_name": data}
    recipe = Recipe(name, config, "libero", tasks, options, {}, settings, **where)
    if args.fresh:
        for each in (recipe, *rounds(recipe, len(CORRECTIONS_SEEDS))):
            each.forget()
    recipe.record(demos, held_out=1, flags=["--noise_scale", str(args.noise_scale)])
    recipe.train()
    recipe = corrected(recipe, corrections, count)
    matrices = {}
    for name, paraphrase in (("own words", 0), ("paraphrases never trained on", 1)):
        matrices[name] = language_matrix(recipe, episodes, paraphrase)
        print(f"\n{name}", end="")
        print_matrix(matrices[name], episodes, paraphrase)
    results = {} if args.matrix_only else layouts(recipe, episodes)
    print_layouts(results)
    trainings = [recipe.first, *rounds(recipe.first, count)]
    seconds = {f"{each.name}: {stage}": spent for each in trainings for stage, spent in each.seconds.items()}
    print(timed(seconds))
    if args.json:
        content = {"matrices": matrices, "layouts": results, "seconds": seconds}
        args.json.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
