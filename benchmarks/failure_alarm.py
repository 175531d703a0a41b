"""Will it fail? The alarm on a policy's uncertainty beside two simpler alarms, over closed-loop episodes.

    python benchmarks/failure_alarm.py [--quick] [--json alarm.json] [--demos 5] [--steps 700]

Trains a policy of two Meta-World tasks that is meant to fail often (few demonstrations, few steps), rolls it out, and
asks of four signals how well they foresee failure:

    velocity    how much the velocity changes along the integration of the one draw that is taken
    spread      how far eight draws of the same observation lie apart
    distance    of the state from the nearest state of the training data, in standard deviations
    time        steps so far

Every signal becomes an alarm in the same way (`inference.alarm`: 2 of 3 plans, at most 5 % of successful episodes),
calibrated on the successful ones of one set of seeds and judged on another. A failure lasts until the time is up, so
that whoever waits sees more of it: signals are therefore compared at the same moment, among episodes that are not over
by then, where time itself knows nothing; and the alarm of `time`, which rings when an episode takes longer than 95 % of
the successful ones, says by when the others must have rung to be of use.

What is complete is not repeated, and an interrupted evaluation goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

if not __package__:
    import _repository  # noqa: F401

from benchmarks._recipe import Recipe
from data.processing import collate_fn
from envs import FIRST_EVALUATION_SEED, env_maker
from inference.alarm import Alarm, alarm_score, calibrated
from inference.closed_loop.episode import EpisodeRequest, Plan
from inference.closed_loop.evaluation import evaluate_tasks
from inference.closed_loop.rollout import ModelPolicy
from inference.metrics import wilson_interval
from inference.predictor import VLAPredictor
from utils.arguments import CommandParser
from utils.misc import derive_seed
from utils.text_table import text_table

TASKS = ("button-press-topdown-v3", "window-open-v3")
CALIBRATION_SEED = 20000  # of the first episode that alarms are calibrated on
SIGNALS = ("velocity", "spread", "distance", "time")
RATE, NEEDED, WINDOW, DRAWS = 0.05, 2, 3, 8
MOMENTS = (24, 48, 72, 96)  # steps at which signals are compared
BOOTSTRAPS = 1000

Episode = dict[str, Any]  # success, steps, plan_steps, and of each signal its values, one a plan


class WatchedPolicy(ModelPolicy):
    """A policy that writes down, for every plan, the spread of further draws and the state's distance from training."""

    def __init__(self, checkpoint: pathlib.Path, states: np.ndarray, notes: pathlib.Path) -> None:
        super().__init__(VLAPredictor.from_checkpoint(checkpoint, "cpu"))
        self.several = VLAPredictor.from_checkpoint(checkpoint, "cpu", best_of=DRAWS)
        self.scale = states.std(axis=0) + 1e-6
        self.states, self.notes = states / self.scale, notes

    def plan_many(self, requests: Sequence[EpisodeRequest]) -> list[Plan]:
        with self.notes.open("a", encoding="utf-8") as file:
            for asked in requests:
                batch = collate_fn([self._sample(asked.request)])
                seed = derive_seed("rollout", asked.seed, asked.number)
                spread = self.several.predict_measured(batch, [[seed]]).uncertainty_KB[0, 0]
                distance = np.linalg.norm(self.states - asked.request.history[-1]["state"] / self.scale, axis=1).min()
                place = {"prompt": asked.request.prompt, "seed": asked.seed, "number": asked.number}
                file.write(json.dumps({**place, "spread": float(spread), "distance": float(distance)}) + "\n")
        return super().plan_many(requests)


def roll_out(recipe: Recipe, name: str, first_seed: int, episodes: int) -> tuple[list[Episode], dict[str, Any]]:
    """Closed-loop episodes with all signals, and the summary of rollouts.json."""
    folder = recipe.experiment / name
    folder.mkdir(parents=True, exist_ok=True)
    notes = folder / "notes.jsonl"
    files = sorted((recipe.data / "train").glob("*.parquet"))
    states = np.array([row for file in files for row in pq.read_table(file, columns=["state"])["state"].to_pylist()])
    policy = WatchedPolicy(recipe.checkpoint, states, notes)
    make = env_maker("metaworld", {}, policy.predictor.image_processor.height, policy.predictor.cameras)
    result = evaluate_tasks(
        folder,
        dict.fromkeys(recipe.tasks),
        range(first_seed, first_seed + episodes),
        make,
        policy,
        {"checkpoint": str(recipe.checkpoint), "env": "metaworld"},
        prompts={},
        num_envs=1,
        num_videos=0,
        restart=False,
    )
    lines = [json.loads(line) for line in notes.read_text(encoding="utf-8").splitlines()]
    noted = {(line["prompt"], line["seed"], line["number"]): line for line in lines}  # the last one holds
    found = []
    for line in map(json.loads, (folder / "episodes.jsonl").read_text(encoding="utf-8").splitlines()):
        plans = [noted[line["prompt"], line["seed"], number] for number in range(line["plans"])]
        steps = line["plan_steps"]
        signals = {name: [plan[name] for plan in plans] for name in ("spread", "distance")}
        signals |= {"velocity": [math.nan if u is None else u for u in line["uncertainty"]], "time": steps}
        found.append({"success": line["success"], "steps": line["steps"], "plan_steps": steps, **signals})
    return found, result["summary"]


def auroc(failed: np.ndarray, score: np.ndarray) -> float:
    """The chance that a failure scores higher than a success; ties count half, NaN where there is only one kind."""
    high, low = score[failed][:, None], score[~failed][None]
    return float(((high > low) + 0.5 * (high == low)).mean()) if failed.any() and (~failed).any() else math.nan


def at_moment(episodes: Sequence[Episode], signal: str, step: int, seed: int = 0) -> dict[str, Any]:
    """AUROC of the highest value of two of three plans so far, among the episodes that still run at a step."""
    running = [episode for episode in episodes if episode["steps"] > step]
    failed = np.array([not episode["success"] for episode in running])
    count = step // episodes[0]["plan_steps"][1] + 1
    score = np.array([alarm_score(episode[signal][:count], NEEDED, WINDOW) for episode in running])
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(0, len(running), len(running)) for _ in range(BOOTSTRAPS)]
    low, high = np.nanquantile([auroc(failed[rows], score[rows]) for rows in drawn], (0.025, 0.975))
    return {"auroc": auroc(failed, score), "low": low, "high": high, "failures": int(failed.sum()), "of": len(running)}


def alarms(fitted: Sequence[Episode], judged: Sequence[Episode], signal: str) -> dict[str, Any]:
    """An alarm that is calibrated on some episodes, on others: false ones, found failures, and when."""
    successful = [episode[signal] for episode in fitted if episode["success"]]
    needed, window = (1, 1) if signal == "time" else (NEEDED, WINDOW)
    calibration = calibrated(successful, RATE, needed, window, source="closed loop", settings={})
    first: list[tuple[bool, float]] = []
    for episode in judged:
        alarm = Alarm(calibration)
        rung = [s for s, value in zip(episode["plan_steps"], episode[signal], strict=True) if alarm.add(value)]
        first.append((episode["success"], min(rung, default=math.inf)))
    steps = [step for success, step in first if not success]
    false = sum(step < math.inf for success, step in first if success)
    return {
        "threshold": calibration.threshold,
        "calibrated_on": len(successful),
        "false_alarms": false,
        "successes": len(first) - len(steps),
        "found": sum(step < math.inf for step in steps),
        "failures": len(steps),
        "steps": steps,
    }


def share(count: int, of: int) -> str:
    """ "12/40, 30 % (18 to 46)" """
    low, high = wilson_interval(count, of)
    return f"{count}/{of}, {count / of:.0%} ({100 * low:.0f} to {100 * high:.0f})"


def tables(fitted: Sequence[Episode], judged: Sequence[Episode]) -> tuple[str, dict[str, Any]]:
    """The figures as text and as values."""
    moments = [step for step in MOMENTS if any(episode["steps"] > step for episode in judged)]
    curves = {name: {step: at_moment(judged, name, step) for step in moments} for name in SIGNALS}
    rows = []
    for name, curve in curves.items():
        cells = [f"{at['auroc']:.2f} ({at['low']:.2f} to {at['high']:.2f})" for at in curve.values()]
        rows.append([name, *cells])
    running = [f"step {step}: {at['failures']} of {at['of']} fail" for step, at in curves[SIGNALS[0]].items()]
    text = text_table(["AUROC among those that still run", *running], rows)
    found = {name: alarms(fitted, judged, name) for name in SIGNALS}
    late = min(found["time"]["steps"])
    rows = []
    for name, alarm in found.items():
        rung = [step for step in alarm["steps"] if step < math.inf]
        early = sum(step < late for step in alarm["steps"])
        median = f"{np.median(rung):.0f}" if rung else "none"
        cells = [share(alarm[count], alarm[of]) for count, of in (("false_alarms", "successes"), ("found", "failures"))]
        rows.append([name, *cells, share(early, alarm["failures"]), median])
    header = [
        "alarm at 5 %",
        "false alarms",
        "failures found",
        f"found before time rings (step {late:g})",
        "median step",
    ]
    kept = {name: {**alarm, "steps": [s for s in alarm["steps"] if s < math.inf]} for name, alarm in found.items()}
    return text + "\n\n" + text_table(header, rows), {"auroc": curves, "alarms": kept}


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--quick", action="store_true", help="every stage at a fraction of its size")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    parser.add_argument("--demos", type=int, default=5, help="of each task (default %(default)s)")
    parser.add_argument("--steps", type=int, default=700, help="of training (default %(default)s)")
    parser.add_argument("--calibration", type=int, default=60, help="episodes of each task (default %(default)s)")
    parser.add_argument("--episodes", type=int, default=100, help="judged, of each task (default %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="record and train again, whatever is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = policy_of(args)
    if args.fresh:
        recipe.forget()
    recipe.record(args.demos, 2 if args.quick else 25)
    recipe.train()
    fitted, _ = roll_out(recipe, "calibration", CALIBRATION_SEED, args.calibration)
    judged, summary = roll_out(recipe, "judged", FIRST_EVALUATION_SEED, args.episodes)
    print(f"\n{len(judged)} episodes, {summary['successes']} succeed; {len(fitted)} others calibrate\n")
    if args.quick:
        return
    text, values = tables(fitted, judged)
    print(text)
    if args.json:
        args.json.write_text(json.dumps({"summary": summary, **values}, indent=1), encoding="utf-8")


def policy_of(args: argparse.Namespace) -> Recipe:
    """The recipe of the policy."""
    settings = [f"training.max_steps={args.steps}", "training.val_max_batches=8", "training.epochs=10000"]
    settings += ["training.val_every_n_epochs=40", "training.save_every_n_epochs=10000"]
    name = "failure_alarm"
    if args.quick:
        name, args.demos, args.calibration, args.episodes = "failure_alarm_quick", 2, 1, 1
        settings[0] = "training.max_steps=40"
    return Recipe(name, "configs/quickstart.yaml", "metaworld", TASKS, settings=settings, num_workers=1)


if __name__ == "__main__":
    main()
