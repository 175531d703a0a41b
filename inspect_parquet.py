"""Examine demonstrations before training on them: faults with file, row and remedy, a summary, pictures.

python inspect_parquet.py --data_path demos/train --val_data_path demos/val --report report.json --plots_dir plots
python inspect_parquet.py --config_path configs/vla_config.yaml            # the files and sizes that it names
python inspect_parquet.py --data_path session --against model_best.pth.tar # what differs from what it was trained on
python inspect_parquet.py --data_path demos/train --html report.html       # one page: findings, frames, episodes

Exit code: 0 training may start; 1 errors (with --strict also warnings); 2 the command itself is wrong.
"""

from __future__ import annotations

import argparse
import json
import logging
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from data.comparison.against import held_against
from data.comparison.fit import as_table
from data.doctor.examine import Requirements, examine
from data.doctor.page import doctor_page
from data.doctor.report import as_text, merge_reports, write_plots
from inference.policy_files import read_policy
from utils.arguments import CommandParser, output_file
from utils.config_utils import Config, MixtureEntry, load_config
from utils.misc import atomic_path, user_message, writing
from utils.page.build import write_page
from utils.recordings import Recording, resolve_recordings

logger = logging.getLogger(__name__)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--data_path", nargs="+", help="Parquet files, folders, globs or lerobot:/path; default: the config's"
    )
    parser.add_argument("--val_data_path", nargs="+", help="validation files, checked too, and for overlap")
    parser.add_argument("--config_path", help="YAML config to check widths, horizon, cameras and prompts against")
    parser.add_argument("--against", type=pathlib.Path, help="policy (checkpoint or folder) to hold the data against")
    parser.add_argument("--dataset", help="with --against a policy of several datasets: which of them")
    parser.add_argument("--report", type=output_file, help="JSON to write")
    parser.add_argument("--html", type=output_file, help="page to write: findings with frames, episodes to scrub")
    parser.add_argument("--plots_dir", type=pathlib.Path, help="folder for contact sheet, state and action plots")
    parser.add_argument("--strict", action="store_true", help="warnings count as errors in the exit code")
    parser.add_argument("--skip_images", action="store_true", help="leave image columns unread (no contact sheet)")
    parser.add_argument("--num_workers", type=int, help="decoding processes; default: one per core")
    args = parser.parse_args(argv)
    if args.data_path is None and args.config_path is None:
        parser.error("give --data_path, or --config_path with data.train_parquet_files")
    if args.against and args.data_path is None:
        parser.error("--against compares --data_path with a policy; give it")
    if args.dataset and not args.against:
        parser.error("--dataset chooses among the training data of an --against policy; give both or neither")
    if args.num_workers is not None and args.num_workers < 0:
        parser.error("--num_workers must be 0 (decode in this process) or more")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    config = load_config(args.config_path) if args.config_path else None
    reports, examined, paths = {}, {}, []
    for name, train_files, val_files, requirements, sources in datasets(args, config):
        options = {"skip_images": args.skip_images, "num_workers": args.num_workers, "sources": sources}
        seen = examine(train_files, val_files, requirements, **options)
        reports[name] = seen.to_dict()
        examined |= {name: seen} if args.html else {}
        if args.plots_dir:
            with writing(args.plots_dir, "choose another --plots_dir"):
                paths += write_plots(seen, args.plots_dir / name)
    report = merge_reports(reports)
    print(as_text(report))
    if args.against:
        report["against"] = held_against_policy(args)
    if args.report:
        text = json.dumps(report, indent=1, allow_nan=False) + "\n"
        with writing(args.report, "choose another --report"), atomic_path(args.report) as temporary:
            temporary.write_text(text, encoding="utf-8")
        paths.insert(0, args.report)
    if args.html:
        write_page(args.html, doctor_page(examined, report, ", ".join(args.data_path or [args.config_path])))
        paths.insert(0, args.html)
    print(*paths, sep="\n", end="\n" if paths else "")
    suspected = report.get("against", {}).get("mismatches", [])
    return 1 if report["errors"] or (args.strict and (report["warnings"] or suspected)) else 0


def held_against_policy(args: argparse.Namespace) -> dict[str, Any]:
    """Print what differs between the files and a policy's training data; returns the same for the report."""
    files = resolve_recordings(args.data_path, "--data_path", None)
    table, found, knows_data = held_against(read_policy(args.against), files, args.dataset)
    print(f"\nbeside {args.against}:\n{as_table(table)}\n")
    if not knows_data:
        print("it does not know what its training data look like (an earlier version): only numbers were compared")
    print(*found, sep="\n", end="\n" if found else "")
    print(f"{len(found)} suspected mistake{'' if len(found) == 1 else 's'}")
    return {
        "policy": str(args.against),
        "dimensions": [asdict(dimension) for dimension in table],
        "mismatches": [asdict(mismatch) for mismatch in found],
    }


def datasets(
    args: argparse.Namespace, config: Config | None
) -> Iterator[tuple[str, list[Recording], list[Recording], Requirements, dict[str, Sequence[str]]]]:
    """(name, training files, validation files, requirements, how the files of each split were given): the flags' files,
    or every dataset of the config."""
    mapping = config.datasets[0].lerobot if config else None
    val = resolve_recordings(args.val_data_path, "--val_data_path", mapping) if args.val_data_path else []
    if args.data_path:
        entry = config.datasets[0] if config and not config.data.mixture else None
        train = resolve_recordings(args.data_path, "--data_path", mapping)
        given = {"train": args.data_path, "val": args.val_data_path or []}
        yield "", train, val, requirements_of(config, entry, bool(val)) if config else Requirements(), given
        return
    if not val and config.data.val_parquet_files:
        val = resolve_recordings(config.data.val_parquet_files, "data.val_parquet_files", config.data.lerobot)
    for entry in config.datasets:
        key = f"data.mixture {entry.name}" if config.data.mixture else "data.train_parquet_files"
        name = entry.name if config.data.mixture else ""
        train = resolve_recordings(entry.path, key, entry.lerobot)
        given = {"train": entry.path, "val": args.val_data_path or config.data.val_parquet_files}
        yield name, train, val, requirements_of(config, entry, bool(val)), given


def requirements_of(config: Config, entry: MixtureEntry | None, has_val: bool) -> Requirements:
    """What a configuration asks of one of its datasets, or (`entry` None) of any of them."""
    from utils.splits import validation_episodes  # imports torch, which decoding processes do without

    data = config.data
    widths, held_out = {}, None
    if entry is not None:
        prefix = f"data.mixture {entry.name}: " if data.mixture else ""
        widths["state"] = (f"{prefix}state_dim" if prefix else "data.state_dim", entry.state_dim)
        widths["action"] = (f"{prefix}per_action_dim", entry.per_action_dim)
        if data.val_fraction and not has_val:
            held_out = partial(
                validation_episodes,
                entry.name,
                fraction=data.val_fraction,
                seed=data.split_seed,
                max_episodes=data.max_episodes,
            )
    return Requirements(
        widths=widths,
        horizon=entry.horizon if entry else config.model.action_head_config.horizon,
        cameras=config.cameras,
        state_columns=data.state_columns,
        needs_state=config.reads_state,
        count_tokens=token_counter(config),
        prompt_max_len=data.prompt_max_len,
        held_out=held_out,
    )


def token_counter(config: Config) -> Callable[[str], int] | None:
    """Counts a prompt's tokens, uncut; None, with a warning, where the config's tokenizer is not there."""
    from data.processing import ObservationError, PromptTokenizer, processor_sources

    try:
        tokenizer = PromptTokenizer.from_pretrained(
            processor_sources(config)[1], sys.maxsize, config.model.vlm_config.type
        )
    except ObservationError as error:
        logger.warning("lengths of prompts are not checked: %s", error)
        return None
    return lambda prompt: len(tokenizer(prompt))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"error: {user_message(error)}", file=sys.stderr)
        sys.exit(2)
