"""Recordings in any common format into this repository's Parquet schema.

    python scripts/convert.py --from hdf5 PATH --inspect
    python scripts/convert.py --from hdf5 PATH --preset libero --strip strip.png
    python scripts/convert.py --from hdf5 PATH --preset libero --output_dir demos/train
    python scripts/convert.py --from rlds PATH --output_dir demos/train --map image_1=steps/observation/image \\
        state=steps/observation/state action=steps/action prompt=steps/language_instruction fps=10

May be interrupted and started again: complete files are kept. Formats, mappings and presets are in docs/convert.md.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

if not __package__:
    import _repository  # noqa: F401

from data.convert.conversion import add_conversion_arguments, encoding_of
from data.convert.convert import convert, open_source
from data.convert.inspection import describe, film_strip
from data.convert.mapping import presets, read_entries
from data.convert.readers import FORMATS, open_reader
from utils.arguments import CommandParser, output_file, run_command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("path", type=Path, metavar="PATH", help="file or folder that was recorded")
    parser.add_argument("--from", dest="format", choices=list(FORMATS), help="format (default: the mapping's)")
    parser.add_argument("--preset", choices=presets(), help="mapping of a known kind of recording (configs/sources/)")
    parser.add_argument(
        "--map",
        nargs="+",
        default=[],
        metavar="MAP",
        help="a YAML file, or column=source ...; both take the place of the preset's entries",
    )
    parser.add_argument("--inspect", action="store_true", help="print what PATH holds, and a mapping to edit")
    parser.add_argument(
        "--strip", type=output_file, metavar="PNG", help="draw first, middle and last frames of some episodes"
    )
    add_conversion_arguments(parser, required=False)
    args = parser.parse_args(argv)
    if not args.inspect and args.output_dir is None and args.strip is None:
        parser.error("give --output_dir, or look first: --inspect, --strip PNG")
    if args.inspect and (args.output_dir is not None or args.strip is not None):
        parser.error("--inspect prints and stops; leave out --output_dir and --strip")
    if args.inspect and (args.map or args.format is None):
        parser.error("--inspect needs --from alone; the mapping that it prints is for --map")
    if not args.inspect and not (args.map or args.preset):
        parser.error("give --map or --preset; --inspect prints a mapping to edit")
    return args


def run(args: argparse.Namespace) -> str:
    """Do what the command line says; the last line for the terminal."""
    if args.inspect:
        return describe(open_reader(args.format, args.path, {}, args.follow_links))
    source = open_source(args.format, args.path, read_entries(args.preset, args.map), follow_links=args.follow_links)
    lines = []
    if args.strip is not None:
        film_strip(source, args.strip, episodes=args.episodes)
        lines.append(f"{args.strip}: first, middle and last frames")
    if args.output_dir is not None:
        summary = convert(
            source,
            args.output_dir,
            episodes=args.episodes,
            encoding=encoding_of(args),
            num_workers=args.num_workers,
            overwrite=args.overwrite,
        )
        lines.append(f"{args.output_dir}: {summary}")
    return "\n".join(lines)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    args = parse_args()
    print(run(args))


if __name__ == "__main__":
    run_command(main)
