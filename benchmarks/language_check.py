"""Does the policy do what it is told? One policy, one scene, two instructions.

    python benchmarks/language_check.py [--quick] [--json language_check.json]

faucet-open-v3 and faucet-close-v3 share a scene. With goal markers hidden and object positions drawn from one
range (--hide_goal, --layout_of) the same seed gives the same picture and the same state in both, pixel for pixel,
which is checked first: only the prompt can tell the policy what to do. It is trained on both, then rolled out on
unseen seeds under each prompt; `swapped` runs the same episodes under the other prompt, where success of a task
means that the prompt was not obeyed.

Limits (of 20 episodes each): at least 15 under the right prompt.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

import numpy as np

if not __package__:
    import _repository  # noqa: F401

from envs import FIRST_EVALUATION_SEED, make_env
from utils.arguments import CommandParser
from utils.text_table import text_table

TASKS = ("faucet-open-v3", "faucet-close-v3")
SCENE = {"hide_goal": True, "layout_of": TASKS[0]}
CONFIG, NAME = "configs/language_check.yaml", "language_check"
WANTED = 15


def resets_are_identical(seeds: range) -> bool:
    """Whether both tasks start from the same image and state for every seed."""
    observations = []
    for task in TASKS:
        env = make_env("metaworld", task, **SCENE)
        observations.append([env.reset(seed=seed)[0] for seed in seeds])
        env.close()
    pairs = zip(*observations, strict=True)
    return all(np.array_equal(a[key], b[key]) for a, b in pairs for key in ("image_1", "state"))


def run(*command: str) -> None:
    """Run one of the repository's scripts, showing the command."""
    print("+ python", " ".join(command), flush=True)
    subprocess.run([sys.executable, *command], check=True)


def train(data: str, demos: int, extra: list[str]) -> str:
    """Record both tasks, train one policy, return its checkpoint."""
    record = ["scripts/record_demos.py", "--env", "metaworld", "--tasks", *TASKS, "--overwrite"]
    record += ["--hide_goal", "--layout_of", TASKS[0]]
    run(*record, "--episodes", str(demos), "--output_dir", f"{data}/train", "--seed", "0")
    run(*record, "--episodes", "4", "--output_dir", f"{data}/val", "--seed", "5000")
    run("scripts/make_tiny_paligemma.py", "--output_dir", "weight/tiny-paligemma")
    run("utils/calculate_normalization_stats.py", "--config_path", CONFIG)
    experiment = pathlib.Path("experiments", NAME)
    if experiment.exists():
        shutil.move(experiment, experiment.with_name(f"{NAME}.{time.strftime('%Y%m%d-%H%M%S')}"))
    run("main_train.py", "--config_path", CONFIG, *extra)
    return str(experiment / "checkpoints" / "model_best.pth.tar")


def rollouts(checkpoint: str, episodes: int, name: str, *flags: str) -> dict[str, Any]:
    """Closed-loop results per task."""
    output = pathlib.Path("experiments", NAME, name)
    command = ["main_eval.py", "--checkpoint_path", checkpoint, "--env", "metaworld", "--tasks", *TASKS]
    command += ["--episodes", str(episodes), "--output_dir", str(output), "--num_videos", "1"]
    run(*command, "--env_options", *(f"{key}={value}" for key, value in SCENE.items()), *flags)
    return json.loads((output / "rollouts.json").read_text(encoding="utf-8"))["tasks"]


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--quick", action="store_true", help="every stage at a fraction of its size")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    args = parser.parse_args()
    episodes, demos = (2, 3) if args.quick else (20, 60)
    extra = ["--set", "training.max_steps=20"] if args.quick else []
    seeds = range(FIRST_EVALUATION_SEED, FIRST_EVALUATION_SEED + episodes)
    identical = resets_are_identical(seeds)
    if not identical:
        sys.exit("error: the two tasks start from different images or states, so this would not test the prompt")
    started = time.perf_counter()
    checkpoint = train(f"demos/{NAME}", demos, extra)
    own = rollouts(checkpoint, episodes, "own_prompt")
    swapped = rollouts(checkpoint, episodes, "swapped_prompt", "--swap_prompts")
    result = {
        "identical_resets": identical,
        "seeds": [seeds.start, seeds.stop - 1],
        "tasks": {
            task: {
                "prompt": own[task]["prompt"],
                "obeyed": own[task]["successes"],
                "done_under_the_other_prompt": swapped[task]["successes"],
                "episodes": episodes,
            }
            for task in TASKS
        },
        "seconds": time.perf_counter() - started,
    }
    print(f"\nsame image and state at reset in both tasks: {identical} ({len(seeds)} seeds)")
    counts = ("obeyed", "done_under_the_other_prompt")
    rows = [
        [row["prompt"], *(f"{row[count]}/{episodes}" for count in counts), f"{WANTED / 20:.0%}"]
        for row in result["tasks"].values()
    ]
    print(text_table(["prompt", "did it", "did it under the other prompt", "wanted"], rows))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
