"""LeRobot datasets (v2.0, v2.1, v3.0) into this repository's Parquet schema, and back into LeRobot v3.0.

    python scripts/convert_lerobot.py --lerobot_dir D --output_dir demos/train \\
        --cameras observation.images.front=image_1 observation.images.wrist=image_wrist
    python scripts/convert_lerobot.py --to_lerobot --data_path demos/train --output_dir D

The first may be interrupted and started again: complete files are kept. What maps to what, and the limits, are in
docs/lerobot.md.
"""

from __future__ import annotations

import argparse
import logging
import math
import pathlib

if not __package__:
    import _repository  # noqa: F401

from data.convert.columns_left import labels_of, left_behind
from data.convert.conversion import add_conversion_arguments, encoding_of, parse_cameras
from data.convert.lerobot import convert_lerobot
from data.convert.lerobot_export import Layout, export_lerobot, read_facts
from data.convert.lerobot_rows import TERMINAL
from data.convert.video import ENCODERS, VideoEncoding
from data.schema import image_columns
from utils.arguments import CommandParser, run_command
from utils.parquet_utils import DataError, Source, is_uri, open_parquet, resolve_parquet_files

# flags that have a meaning in one direction only
FROM_LEROBOT = (
    "episodes",
    "image_format",
    "jpeg_quality",
    "subsampling",
    "short_side",
    "state_key",
    "action_key",
    "tolerance_s",
    "prompt",
    "empty_prompt",
    "terminal",
    "follow_links",
)
TO_LEROBOT = ("data_path", "state_columns", "fps", "robot_type", "next_done", "labels", "video", "video_codec", "crf")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(__doc__)
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--lerobot_dir", type=pathlib.Path, help="LeRobot dataset to convert")
    direction.add_argument("--to_lerobot", action="store_true", help="the way back: --data_path into LeRobot v3.0")
    parser.add_argument(
        "--cameras",
        nargs="+",
        default=[],
        metavar="FEATURE=COLUMN",
        help="LeRobot's camera = our column of any name, in both directions; with --to_lerobot the default is what the "
        "files came from, or observation.images.<column> for every camera",
    )
    add_conversion_arguments(parser)
    forward = parser.add_argument_group("from LeRobot")
    forward.add_argument(
        "--state_key",
        nargs="+",
        default=["observation.state"],
        metavar="KEY[=COLUMN]",
        help="features that make up state, or with =COLUMN a column of its own (default %(default)s)",
    )
    forward.add_argument(
        "--action_key", nargs="+", default=["action"], help="features that make up action (default %(default)s)"
    )
    forward.add_argument("--prompt", help="instruction of every step, instead of the dataset's tasks")
    forward.add_argument("--empty_prompt", help="instruction of those steps alone whose task is empty")
    forward.add_argument(
        "--terminal",
        choices=TERMINAL,
        default="auto",
        help="whether episodes ended by themselves (is_terminal); auto: what next.done of the last step says, no where "
        "there is none (default %(default)s)",
    )
    forward.add_argument(
        "--tolerance_s",
        type=float,
        default=1e-4,
        help="seconds between a row's time stamp and its video frame's (default %(default)s)",
    )
    back = parser.add_argument_group("to LeRobot")
    back.add_argument("--data_path", nargs="+", help="Parquet files of our schema, folders or globs")
    help_text = "columns that make up the state; default: those that a converter wrote, or state"
    back.add_argument("--state_columns", nargs="+", metavar="COLUMN", help=help_text)
    back.add_argument("--fps", type=float, help="frames per second; default: what the files' metadata say")
    back.add_argument("--robot_type", help="default: what the files' metadata say")
    back.add_argument(
        "--next_done",
        action="store_true",
        help="write is_terminal as next.done; lerobot then can't merge the dataset with its own recordings",
    )
    help_text = "write success and intervention too, as next.success and intervention; as to merging, see --next_done"
    back.add_argument("--labels", action="store_true", help=help_text)
    back.add_argument("--video", action="store_true", help="encode the frames as video instead of keeping the images")
    back.add_argument("--video_codec", choices=list(ENCODERS), help="default: the first that PyAV can encode")
    back.add_argument("--crf", type=int, help="video quality, lower is better (default: av1 30, h264 23)")
    args = parser.parse_args(argv)
    foreign = FROM_LEROBOT if args.to_lerobot else TO_LEROBOT
    for name in foreign:
        if getattr(args, name) != parser.get_default(name):
            parser.error(
                f"--{name} has no meaning {'with --to_lerobot' if args.to_lerobot else 'without --to_lerobot'}"
            )
    if args.to_lerobot and not args.data_path:
        parser.error("--to_lerobot needs --data_path")
    return args


def from_lerobot(args: argparse.Namespace) -> str:
    """Convert --lerobot_dir into our schema; what was done, for the terminal."""
    summary = convert_lerobot(
        args.lerobot_dir,
        args.output_dir,
        args.cameras,
        state_keys=args.state_key,
        action_keys=args.action_key,
        episodes=args.episodes,
        encoding=encoding_of(args),
        tolerance_s=args.tolerance_s,
        prompt=args.prompt,
        empty_prompt=args.empty_prompt,
        terminal=args.terminal,
        num_workers=args.num_workers,
        overwrite=args.overwrite,
        follow_links=args.follow_links,
    )
    return f"{args.output_dir}: {summary}"


def to_lerobot(args: argparse.Namespace) -> str:
    """Convert --data_path into LeRobot v3.0; what was done, for the terminal.

    Raises:
        DataError: the files don't say their rate and --fps is not given; see also `export_lerobot`.
    """
    files = [local(source) for source in resolve_parquet_files(args.data_path, "--data_path")]
    facts = read_facts(files)
    fps = args.fps if args.fps is not None else facts.get("fps")
    if fps is None:
        raise DataError(f"{files[0]} does not say how many frames per second it has; give --fps")
    if not 0 < fps < math.inf:
        raise DataError(f"--fps is {fps}; wanted frames per second, more than 0")
    names = [text.partition("=")[0] for text in args.cameras]
    cameras = parse_cameras(args.cameras, names, "--cameras") if names else facts.get("cameras")
    layout = Layout(
        fps=int(fps) if fps == int(fps) else fps,
        cameras={column: feature for feature, column in cameras.items()} if cameras else default_cameras(files[0]),
        robot_type=args.robot_type or facts.get("robot_type"),
        state_columns=tuple(args.state_columns or facts.get("state_columns") or ("state",)),
        state_names=facts.get("state_names"),
        action_names=facts.get("action_names"),
        next_done=args.next_done,
        labels=labels_of(files) if args.labels else (),
        video=VideoEncoding.choose(args.video_codec, args.crf) if args.video else None,
    )
    episodes, steps = export_lerobot(
        files, args.output_dir, layout, num_workers=args.num_workers, overwrite=args.overwrite
    )
    lines = [f"{args.output_dir}: LeRobot v3.0, {episodes} episodes, {steps} steps"]
    if left := left_behind(files, layout):
        lines.append(
            f"left out: {', '.join(f'{name} ({flag} writes it)' if flag else name for name, flag in left.items())}"
        )
    return "\n".join(lines)


def local(source: Source) -> pathlib.Path:
    """The path of a source; a DataError where it is on another filesystem."""
    if is_uri(source):
        raise DataError(f"--data_path: {source} is not a local file; copy it here before it is exported")
    return pathlib.Path(source)


def default_cameras(path: pathlib.Path) -> dict[str, str]:
    """Names for the cameras of files that don't say where they come from."""
    with open_parquet(path) as file:
        return {camera: f"observation.images.{camera}" for camera in image_columns(file.schema_arrow)}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    args = parse_args()
    print(to_lerobot(args) if args.to_lerobot else from_lerobot(args))


if __name__ == "__main__":
    run_command(main)
