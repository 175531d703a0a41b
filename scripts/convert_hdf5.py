"""HDF5 episodes in the ALOHA layout into this repository's Parquet schema.

    python scripts/convert_hdf5.py --hdf5_dir D --output_dir demos/train \\
        --cameras cam_high=image_1 cam_left_wrist=image_2 --prompt "insert the battery"

May be interrupted and started again: complete files are kept. What maps to what is in docs/lerobot.md.
"""

from __future__ import annotations

import argparse
import logging
import pathlib

if not __package__:
    import _repository  # noqa: F401

from data.convert.conversion import add_conversion_arguments, encoding_of
from data.convert.hdf5 import convert_hdf5
from utils.arguments import CommandParser, run_command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("--hdf5_dir", type=pathlib.Path, required=True, help="folder of episodes, one file each")
    parser.add_argument(
        "--cameras", nargs="+", default=[], metavar="CAMERA=COLUMN", help="camera of the files = our column of any name"
    )
    parser.add_argument("--prompt", help="instruction of every episode")
    parser.add_argument("--prompt_attribute", help="attribute of the file with its instruction, where it has one")
    add_conversion_arguments(parser)
    parser.add_argument(
        "--state_key",
        nargs="+",
        default=["observations/qpos"],
        metavar="KEY[=COLUMN]",
        help="arrays that make up state, or with =COLUMN a column of its own (default %(default)s)",
    )
    parser.add_argument("--action_key", default="action", help="array that is action (default %(default)s)")
    parser.add_argument("--fps", type=float, default=50, help="control rate, not in the files (default %(default)s)")
    parser.add_argument(
        "--channel_order",
        choices=("rgb", "bgr"),
        default="rgb",
        help="of the pixels; bgr: red and blue are exchanged, and compressed frames encoded again (default rgb)",
    )
    parser.add_argument(
        "--terminal",
        action="store_true",
        help="the episodes ended by themselves; without it, by a time limit, as ALOHA's do (is_terminal)",
    )
    return parser.parse_args(argv)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    args = parse_args()
    summary = convert_hdf5(
        args.hdf5_dir,
        args.output_dir,
        args.cameras,
        prompt=args.prompt,
        prompt_attribute=args.prompt_attribute,
        state_keys=args.state_key,
        action_key=args.action_key,
        episodes=args.episodes,
        encoding=encoding_of(args),
        fps=args.fps,
        channel_order=args.channel_order,
        terminal=args.terminal,
        num_workers=args.num_workers,
        overwrite=args.overwrite,
        follow_links=args.follow_links,
    )
    print(f"{args.output_dir}: {summary}")


if __name__ == "__main__":
    run_command(main)
