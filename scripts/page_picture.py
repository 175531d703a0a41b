"""A picture of a page (--html) as a browser shows it, for a paper or a document; needs chromium and playwright.

python scripts/page_picture.py --html report.html --png picture.png --section 2
python scripts/page_picture.py --html report.html --png phone.png --width 390 --height 844 --dark
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    import _repository  # noqa: F401

from PIL import Image

from benchmarks.chromium import browser, opened
from utils.arguments import CommandParser, at_least, output_file, run_command
from utils.misc import atomic_path, writing

COLOURS = 192  # of the picture's palette


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("--html", type=Path, required=True, help="the page")
    parser.add_argument("--png", type=output_file, required=True, help="picture to write")
    parser.add_argument(
        "--width", type=at_least(200), default=1100, help="of the window in pixels; default %(default)s"
    )
    parser.add_argument("--height", type=at_least(200), default=820, help="default %(default)s")
    parser.add_argument("--section", type=at_least(1), help="scroll to this section; default: the top of the page")
    parser.add_argument("--step", type=at_least(0), help="step that the episode viewer shows")
    parser.add_argument("--dark", action="store_true", help="as a browser with a dark design shows it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if not args.html.is_file():
        raise FileNotFoundError(f"--html {args.html} does not exist")
    with browser() as running:
        page = opened(running, args.html, args.width, dark=args.dark).page
        page.set_viewport_size({"width": args.width, "height": args.height})
        if args.step is not None:
            page.locator(".step").first.fill(str(args.step))
        if args.section is not None:
            page.locator(f"#section-{args.section}").evaluate("(section) => section.scrollIntoView()")
        page.wait_for_timeout(500)
        shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(COLOURS)
    with writing(args.png, "choose another --png"), atomic_path(args.png) as temporary:
        shot.save(temporary, "PNG", optimize=True)
    print(f"wrote {args.png}")


if __name__ == "__main__":
    run_command(main)
