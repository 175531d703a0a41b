"""The last step of scripts/quickstart.sh: gather its rollouts into summary.json and print the table."""

from __future__ import annotations

import json
import pathlib
from typing import Any

if not __package__:
    import _repository  # noqa: F401

from utils.arguments import CommandParser, run_command
from utils.text_table import text_table

# name in summary.json -> folder of the rollouts, heading of the column
COLUMNS = {
    "success": ("closed_loop", "policy"),
    "blind": ("blind", "blank images"),
    "swapped_prompt": ("swapped_prompt", "swapped prompt"),
    "replay": ("replay", "replayed demo"),
}


def summarize(experiment_dir: pathlib.Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Successes and episodes per column and task, and the seconds of each stage."""
    summary: dict[str, Any] = {}
    for name, (folder, _) in COLUMNS.items():
        tasks = json.loads((experiment_dir / folder / "rollouts.json").read_text(encoding="utf-8"))["tasks"]
        summary[name] = {task: {key: found[key] for key in ("successes", "episodes")} for task, found in tasks.items()}
    summary["seconds"] = seconds
    return summary


def table(summary: dict[str, Any]) -> str:
    """The success counts, one task a line, and their totals."""
    rows = []
    for task in summary["success"]:
        rows.append([task, *("{successes}/{episodes}".format(**summary[name][task]) for name in COLUMNS)])
    totals = []
    for name in COLUMNS:
        done = sum(task["successes"] for task in summary[name].values())
        totals.append(f"{done}/{sum(task['episodes'] for task in summary[name].values())}")
    rows.append(["all", *totals])
    return text_table(["task", *(heading for _, heading in COLUMNS.values())], rows)


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--experiment_dir", type=pathlib.Path, required=True)
    parser.add_argument("--seconds", nargs="*", default=[], metavar="STAGE=SECONDS")
    args = parser.parse_args()
    seconds = {name: float(value) for name, _, value in (item.partition("=") for item in args.seconds)}
    summary = summarize(args.experiment_dir, seconds)
    path = args.experiment_dir / "summary.json"
    path.write_text(json.dumps(summary, indent=1), encoding="utf-8")
    print(f"\n{table(summary)}\n")
    print("Each task has its own scene, so the picture tells the tasks apart: where swapping the prompts changes")
    print("little, the policy goes by what it sees. benchmarks/language_check.py tests the prompt alone.\n")
    print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    found = [path, args.experiment_dir / "plots/loss_curve.png"]
    for pattern in ("offline/plots/*.png", "closed_loop/videos/*v3.mp4"):
        found += sorted(args.experiment_dir.glob(pattern))
    print("\n".join(map(str, found)))


if __name__ == "__main__":
    run_command(main)
