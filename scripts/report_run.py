"""A training run as one HTML page: curves, validation, whether the statistics fit, evaluations of its policy.

python scripts/report_run.py --run experiments/quickstart --html report.html
python scripts/report_run.py --run experiments/quickstart --evaluations results/blind results/policy --html report.html

Closed-loop evaluations that lie in the run's folder are shown without being named.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    import _repository  # noqa: F401

from data.comparison.against import sampled_columns
from data.comparison.fit import statistics_fit
from data.comparison.page import fit_section
from data.loader import build_datasets
from data.processing import processors_from_checkpoint
from inference.closed_loop.page import read_evaluation, rollout_sections, rollout_verdict
from inference.policy_files import read_policy
from training.page import run_page
from utils.arguments import CommandParser, output_file, run_command
from utils.config_utils import config_from_dict
from utils.page.build import write_page
from utils.page.content import Section

BEST = Path("checkpoints") / "model_best.pth.tar"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run, experiments/<name>")
    parser.add_argument("--html", type=output_file, required=True, help="page to write")
    help_text = "--output_dir of closed-loop evaluations elsewhere: of this policy, and of controls"
    parser.add_argument("--evaluations", type=Path, nargs="+", default=[], metavar="DIR", help=help_text)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    inside = sorted(path.parent for path in args.run.glob("*/rollouts.json"))
    folders = {folder.resolve(): folder for folder in [*args.evaluations, *inside]}  # each once
    evaluations = [read_evaluation(folder) for folder in folders.values()]
    fits, missing = statistics_sections(args.run)
    main = next((one for one in evaluations if one.is_main), None)
    if main is None:
        missing.append("Success in closed loop: no evaluation of the policy was found.")
        page = run_page(args.run, fits, missing)
    else:
        tasks = main.result["tasks"].keys()
        beside = [one for one in evaluations if one is not main and tasks & one.result["tasks"].keys()]
        rolled, hidden = rollout_sections(main, beside)
        page = run_page(args.run, [*fits, *rolled], [*missing, *hidden], rollout_verdict(main, beside))
    write_page(args.html, page)
    print(f"wrote {args.html}")


def statistics_sections(run: Path) -> tuple[list[Section], list[str]]:
    """Each training dataset beside the statistics of the run's policy; or why that is not on the page."""
    if not (run / BEST).is_file():
        return [], [f"Whether the statistics fit the data: there is no {run / BEST}."]
    checkpoint = read_policy(run / BEST)
    config = config_from_dict(checkpoint["config"], source=str(run / BEST))
    try:
        train, _ = build_datasets(config, *processors_from_checkpoint(checkpoint))
    except (ValueError, OSError) as error:
        return [], [f"Whether the statistics fit the data: these can't be read now ({error})."]
    sections = []
    for i, dataset in enumerate(train.datasets):
        columns = sampled_columns(dataset, config)
        fit = statistics_fit(columns, checkpoint["statistics"][i], config.data, of_training=True)
        title = "Do the statistics fit?" if len(train.datasets) == 1 else f"Do the statistics fit {dataset.name}?"
        sections.append(fit_section(title, *fit))
    return sections, []


if __name__ == "__main__":
    run_command(main)
