"""Do corrections teach more than as many further demonstrations? From nothing to a table.

    python benchmarks/bench_corrections.py [--quick] [--json corrections.json] [--task window-open-v3] [--seeds 42 43]

A policy of configs/quickstart.yaml is trained on --demos demonstrations of one task. Then, twice: the policy acts, the
scripted expert takes over where it leaves its corridor (scripts/_takeover.py), --episodes such corrections are added,
and a new policy is trained from scratch on everything, --steps steps as before. Of an episode with a correction the
policy's own steps are left out of training (data.sample_weighting.leave_out_before). Beside it, policies of
demonstrations alone, as many of them as there are demonstrations and corrections together.

Every policy is evaluated in closed loop on the same --evaluations scenes, which nothing was recorded on. Intervals are
Wilson's, 95 %. Stages that are complete are not repeated unless --fresh.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

if not __package__:
    import _repository  # noqa: F401

from inference.metrics import wilson_interval
from utils.arguments import CommandParser
from utils.text_table import text_table

CONFIG, NAME = "configs/quickstart.yaml", "corrections"
ROUNDS = 2
FIRST_SEED = {"demos": 0, "further": 1000, "corrections": 2000}  # of scenes; evaluation begins at 10000
EPISODE_STEPS = 500  # leave_out_before: more than any episode has, so all of the policy's own steps


def run(*command: str) -> None:
    """Run one of the repository's scripts, showing the command."""
    print("+ python", " ".join(command), flush=True)
    subprocess.run([sys.executable, *command], check=True)


class Experiment:
    """The stages of one training seed; what is there already is not made again."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args, self.seed = args, seed
        self.data, self.out = args.folder / "demos", args.folder / f"seed{seed}"

    def record(self, folder: pathlib.Path, episodes: int, first_seed: int, *flags: str) -> pathlib.Path:
        """Demonstrations, or with flags corrections, of the task."""
        path = folder / f"{self.args.task}.parquet"
        if not path.is_file():
            flags = ("--episodes", str(episodes), "--seed", str(first_seed), "--num_workers", "1", *flags)
            run("scripts/record_demos.py", "--tasks", self.args.task, "--output_dir", str(folder), *flags)
        return path

    def corrections(self, number: int, checkpoint: pathlib.Path) -> pathlib.Path:
        """Corrections of a policy: round `number`."""
        first = FIRST_SEED["corrections"] + 1000 * number
        flags = ("--policy", str(checkpoint), "--takeover", "--max_attempts_factor", "10")
        return self.record(self.out / f"corrections_{number}", self.args.episodes, first, *flags)

    def train(self, name: str, files: list[pathlib.Path], *settings: str) -> pathlib.Path:
        """A policy from scratch; returns its checkpoint."""
        folder = self.out / name
        done = folder / "trained"
        if not done.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            data = ["--config_path", CONFIG, "--train_data_override", *map(str, files)]
            statistics = str(folder / "normalization_stats.json")
            run("utils/calculate_normalization_stats.py", *data, "--output_path", statistics)
            experiment = pathlib.Path("experiments", f"{NAME}_{self.args.task}_{self.seed}_{name}")
            shutil.rmtree(experiment, ignore_errors=True)
            common = [
                f"training.seed={self.seed}",
                f"training.max_steps={self.args.steps}",
                "data.val_parquet_files=[]",
            ]
            common += [f"data.normalization_stats_path={statistics}", "data.num_workers=0", "training.epochs=10000"]
            common += ["training.save_every_n_epochs=10000", "training.val_every_n_epochs=10000"]
            weights = ["--model_name_or_path", str(self.args.folder / "backbone"), "--experiment_name", experiment.name]
            run("main_train.py", *data, *weights, "--set", *common, *settings)
            (checkpoint,) = experiment.glob("checkpoints/checkpoint_epoch_*.pth.tar")
            shutil.move(checkpoint, folder / "policy.pth.tar")
            done.touch()
        return folder / "policy.pth.tar"

    def evaluate(self, name: str, checkpoint: pathlib.Path) -> dict[str, Any]:
        """Closed-loop successes; an evaluation that was killed goes on where it was."""
        output = self.out / name / "closed_loop"
        if not (output / "rollouts.json").is_file():
            flags = ["--env", "metaworld", "--tasks", self.args.task, "--episodes", str(self.args.evaluations)]
            flags += ["--num_videos", "0", "--output_dir", str(output)]
            run("main_eval.py", "--checkpoint_path", str(checkpoint), *flags)
        task = json.loads((output / "rollouts.json").read_text(encoding="utf-8"))["tasks"][self.args.task]
        return {"successes": task["successes"], "episodes": task["episodes"]}

    def results(self) -> dict[str, dict[str, Any]]:
        """Per policy its closed-loop successes."""
        args = self.args
        demos = self.record(self.data / "demos", args.demos, FIRST_SEED["demos"])
        policies = {"demos": self.train("demos", [demos])}
        files, weighting = [demos], f"data.sample_weighting.leave_out_before={EPISODE_STEPS}"
        for number in range(1, ROUNDS + 1):
            files.append(self.corrections(number, list(policies.values())[-1]))
            policies[f"corrected_{number}"] = self.train(f"corrected_{number}", files, weighting)
        found = {name: self.evaluate(name, policies[name]) for name in reversed(policies)}
        for number in range(ROUNDS, 0, -1):
            name, count = f"demonstrated_{number}", number * args.episodes
            further = self.record(self.data / f"further_{count}", count, FIRST_SEED["further"])
            found[name] = self.evaluate(name, self.train(name, [demos, further]))
        return found


def table(results: dict[int, dict[str, dict[str, Any]]], args: argparse.Namespace) -> str:
    """One line a policy: what it was trained on, successes by training seed, in all, and the interval."""
    trained_on = {"demos": f"{args.demos} demonstrations"}
    for number in range(1, ROUNDS + 1):
        count = number * args.episodes
        trained_on[f"corrected_{number}"] = f"{args.demos} demonstrations, {count} corrections"
        trained_on[f"demonstrated_{number}"] = f"{args.demos + count} demonstrations"
    rows = []
    for name, text in trained_on.items():
        parts = [found[name] for found in results.values()]
        successes, episodes = (sum(part[key] for part in parts) for key in ("successes", "episodes"))
        low, high = wilson_interval(successes, episodes)
        by_seed = ", ".join(f"{part['successes']}/{part['episodes']}" for part in parts)
        rows.append([text, by_seed, f"{successes / episodes:.0%}", f"{low:.0%} to {high:.0%}"])
    return text_table(["trained on", f"training seed {', '.join(map(str, results))}", "success", "95 %"], rows)


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--quick", action="store_true", help="every stage at a fraction of its size")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    parser.add_argument("--task", default="button-press-topdown-v3", help="default %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], help="of training (default %(default)s)")
    parser.add_argument("--demos", type=int, default=10, help="of the first policy (default %(default)s)")
    parser.add_argument("--episodes", type=int, default=10, help="corrections of each round (default %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="of each training (default %(default)s)")
    parser.add_argument("--evaluations", type=int, default=50, help="episodes for each policy (default %(default)s)")
    parser.add_argument("--folder", type=pathlib.Path, help="of everything made (default demos/corrections_<task>)")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run has made")
    args = parser.parse_args()
    if args.quick:
        args.demos, args.episodes, args.steps, args.evaluations = 2, 2, 20, 2
    args.folder = args.folder or pathlib.Path("demos", f"{NAME}_{args.task}{'_quick' if args.quick else ''}")
    if args.fresh:
        shutil.rmtree(args.folder, ignore_errors=True)
    started = time.perf_counter()
    if not (args.folder / "backbone").is_dir():
        run("scripts/make_tiny_paligemma.py", "--output_dir", str(args.folder / "backbone"))
    results = {}
    for seed in args.seeds:
        results[seed] = Experiment(args, seed).results()
        print(f"\n{args.task}\n{table(results, args)}\n", flush=True)
    if args.json:
        about = {name: getattr(args, name) for name in ("task", "demos", "episodes", "steps", "evaluations")}
        text = json.dumps({**about, "results": results, "seconds": time.perf_counter() - started}, indent=1)
        args.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
