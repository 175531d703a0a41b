"""Edit recorded episodes into a new folder: leave out, cut, join, split, reword, resample, re-encode. Never in place.

    python scripts/edit_dataset.py --data_path demos/train --output_dir demos/clean --drop_idle 0.01 0.5 --dry_run
    python scripts/edit_dataset.py --data_path demos/train --output_dir demos/clean --delete 3 7-9 --clean_prompts
    python scripts/edit_dataset.py --data_path demos/mo demos/tu --output_dir demos/both --split train=0.9 val=rest

Several edits may be given at once. Episodes and steps are counted from 0 in the source, as the doctor
(inspect_parquet.py) counts them, whose findings name the command that mends them. Every column and all metadata
survive, frames byte by byte unless --reencode is given, and the files' metadata record what was done to them.
Of a LeRobot dataset (lerobot:/path) every episode becomes a file of our schema, frames of video JPEG.
May be interrupted and started again: complete files are kept. docs/editing.md has an example of each edit.
"""

from __future__ import annotations

import argparse
import logging
import pathlib
import sys
from collections.abc import Callable

if not __package__:
    import _repository  # noqa: F401

from data.convert.episode_writer import SUBSAMPLING, ImageEncoding
from data.editing.edits import Edits, numbers, parse_pairs, parse_ranges
from data.editing.plan import make_plan
from data.editing.write import write_edited
from utils.arguments import CommandParser, at_least, run_command
from utils.parquet_utils import DataError
from utils.recordings import resolve_recordings


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(__doc__)
    add = parser.add_argument
    add(
        "--data_path", nargs="+", required=True, help="Parquet files, folders, globs, lerobot:/path; several are merged"
    )
    add("--output_dir", type=pathlib.Path, required=True, help="folder that is written; none of the source's")
    add("--dry_run", action="store_true", help="say what would change, and write nothing")
    add("--num_workers", type=at_least(1), default=1, help="processes (default 1)")
    add("--overwrite", action="store_true", help="make everything again")
    add("--without", nargs="+", action="extend", default=[], metavar="FILE", help="leave these files out, unread")
    episodes = {"nargs": "+", "action": "extend", "metavar": "N"}
    add("--keep", **episodes, help="the only episodes that stay: numbers and ranges such as 3-7")
    add("--delete", **episodes, help="episodes that go")
    add("--join", **episodes, help="episodes that go on from the one before")
    at = {"nargs": "+", "action": "extend"}
    add("--split_at", **at, metavar="N:STEP,...", help="new episodes begin at these steps of episode N")
    add("--split", **at, metavar="NAME=PART", help="folders: a share (0.9), episodes (3,7-9) or rest")
    add("--split_seed", type=int, help="which episodes a share of --split gets (default 0)")
    add("--mend_flags", action="store_true", help="write is_first, is_last, is_terminal anew where they contradict")
    add("--drop_steps", **at, metavar="N:A-B", help="steps of episode N that go")
    add("--trim", nargs=2, type=int, metavar=("HEAD", "TAIL"), help="steps that go at both ends of every episode")
    add(
        "--drop_idle",
        nargs=2,
        type=float,
        metavar=("SPEED", "SECONDS"),
        help="drop steps at which the state moves slower (in its units a second) for longer",
    )
    add("--idle_dims", nargs="+", type=int, metavar="D", help="dimensions of the state that count (default: all)")
    add("--resample", type=float, metavar="HZ", help="bring episodes to this rate, not above their own")
    add("--displacement_dims", nargs="+", type=int, metavar="D", help="of the action: summed up by --resample")
    add("--rate", type=float, metavar="HZ", help="rows a second, where time stamps and metadata do not say")
    add("--rename_prompt", **at, metavar="OLD=NEW", help="give an instruction another wording")
    add("--set_prompt", **at, metavar="N=TEXT", help="the instruction of episode N")
    add("--clean_prompts", action="store_true", help="remove stray whitespace and control characters")
    add("--set_success", **at, metavar="N=true|false", help="the outcome of episodes N (a number or a range)")
    add("--clip_actions", nargs=2, type=float, metavar=("LOW", "HIGH"), help="clip every action value")
    add("--drop_columns", nargs="+", action="extend", default=[], metavar="NAME", help="columns that go, cameras too")
    add("--rename_camera", **at, metavar="OLD=NEW", help="call a camera otherwise")
    add("--add_camera", **at, metavar="NAME=FILES:CAMERA", help="frames from files with the same episodes and steps")
    add("--reencode", choices=("jpeg", "png"), help="encode all frames anew")
    add("--jpeg_quality", type=int, help="of --reencode jpeg: 1 to 95 (default 95)")
    add("--subsampling", choices=tuple(SUBSAMPLING), help="of --reencode jpeg: colours in full, or half (default 444)")
    add("--short_side", type=int, help="of --reencode: pixels to which larger frames are scaled down")
    return parser.parse_args(argv)


def edits_of(args: argparse.Namespace) -> Edits:
    """What the flags ask for.

    Raises:
        DataError: a flag in another form, or one that would change nothing.
    """
    split: dict[str, float | tuple[tuple[int, int], ...] | None] = {}
    for name, part in parse_pairs(args.split, "--split", "NAME=0.9, NAME=3,7-9 or NAME=rest"):
        if not name.isidentifier():
            raise DataError(f"--split {name!r}: wanted a plain name for the folder")
        is_share = part.replace(".", "", 1).isdigit() and "." in part and 0 < float(part) <= 1
        split[name] = None if part == "rest" else float(part) if is_share else parse_ranges([part], "--split")
    if args.split_seed is not None and not any(isinstance(part, float) for part in split.values()):
        raise DataError("--split_seed says which episodes a share of --split gets; give one such as train=0.9")
    for name, ways in (("jpeg_quality", ("jpeg",)), ("subsampling", ("jpeg",)), ("short_side", ("jpeg", "png"))):
        if getattr(args, name) is not None and args.reencode not in ways:
            raise DataError(f"--{name} belongs to --reencode {' or '.join(ways)}")
    steps: dict[int, tuple[tuple[int, int], ...]] = {}
    for episode, part in parse_pairs(args.drop_steps, "--drop_steps", "EPISODE:FIRST-LAST", ":"):
        number = _episode(episode, "--drop_steps")
        steps[number] = steps.get(number, ()) + parse_ranges([part], "--drop_steps")
    begins: dict[int, tuple[int, ...]] = {}
    for episode, part in parse_pairs(args.split_at, "--split_at", "EPISODE:STEP,...", ":"):
        number = _episode(episode, "--split_at")
        begins[number] = begins.get(number, ()) + tuple(numbers(parse_ranges([part], "--split_at")))
    success = {}
    for episode, text in parse_pairs(args.set_success, "--set_success", "EPISODE=true or EPISODE=false"):
        if text not in ("true", "false"):
            raise DataError(f"--set_success {episode}={text}: wanted true or false")
        success |= dict.fromkeys(numbers(parse_ranges([episode], "--set_success")), text == "true")
    cameras = {}
    for name, source in parse_pairs(args.add_camera, "--add_camera", "NAME=FILES:CAMERA"):
        files, colon, camera = source.rpartition(":")
        if not colon:
            raise DataError(f"--add_camera {name}={source}: wanted NAME=FILES:CAMERA")
        cameras[name] = files, camera
    prompts = parse_pairs(args.set_prompt, "--set_prompt", "EPISODE=TEXT")
    return Edits(
        without=tuple(args.without),
        keep=None if args.keep is None else parse_ranges(args.keep, "--keep"),
        delete=parse_ranges(args.delete, "--delete") if args.delete else (),
        join=tuple(numbers(parse_ranges(args.join, "--join"))) if args.join else (),
        split_at=begins,
        split=split,
        split_seed=args.split_seed or 0,
        mend_flags=args.mend_flags,
        drop_steps=steps,
        trim=tuple(args.trim or (0, 0)),
        drop_idle=tuple(args.drop_idle) if args.drop_idle else None,
        idle_dims=tuple(args.idle_dims or ()),
        resample=args.resample,
        displacement_dims=tuple(args.displacement_dims or ()),
        rate=args.rate,
        rename_prompt=dict(parse_pairs(args.rename_prompt, "--rename_prompt", "OLD=NEW")),
        set_prompt={_episode(episode, "--set_prompt"): text for episode, text in prompts},
        clean_prompts=args.clean_prompts,
        set_success=success,
        clip_actions=tuple(args.clip_actions) if args.clip_actions else None,
        drop_columns=tuple(args.drop_columns),
        rename_camera=dict(parse_pairs(args.rename_camera, "--rename_camera", "OLD=NEW")),
        add_camera=cameras,
        encoding=_encoding(args) if args.reencode else None,
    )


def _encoding(args: argparse.Namespace) -> ImageEncoding:
    quality = 95 if args.jpeg_quality is None else args.jpeg_quality
    return ImageEncoding(args.reencode, quality, args.subsampling or "444", args.short_side)


def _episode(text: str, flag: str) -> int:
    if not text.isdigit():
        raise DataError(f"{flag} {text!r}: wanted an episode's number")
    return int(text)


def once() -> Callable[[logging.LogRecord], bool]:
    """A filter of the log that lets a line through once: every episode of a LeRobot dataset is opened by itself."""
    told: set[str] = set()
    return lambda record: record.getMessage() not in told and not told.add(record.getMessage())


def main(argv: list[str] | None = None) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(once())
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", handlers=[handler])
    args = parse_args(argv)
    edits = edits_of(args)
    plan = make_plan(resolve_recordings(args.data_path, "--data_path"), edits)
    print(plan.describe())
    if args.dry_run:
        print("dry run: nothing was written")
        return
    options = {"num_workers": args.num_workers, "overwrite": args.overwrite}
    for folder, summary in write_edited(plan, edits, args.output_dir, **options).items():
        print(f"{args.output_dir / folder}: {summary}")


if __name__ == "__main__":
    run_command(main)
