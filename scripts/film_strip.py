"""Videos as one picture for a page or a paper: a row for each video, frames spread evenly from its first to its last.

    python scripts/film_strip.py --videos a.mp4 b.mp4 --frames 6 --height 120 --output strip.png

The README's picture has the first filmed episode of each of the quickstart's tasks.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

import numpy as np

if not __package__:
    import _repository  # noqa: F401

from av.error import FFmpegError
from PIL import Image

from inference.closed_loop.video import read_video
from utils.arguments import CommandParser, run_command
from utils.misc import atomic_path

GAP = 4  # pixels between frames


def film_strip(videos: Sequence[Sequence[np.ndarray]], num_frames: int, height: int) -> Image.Image:
    """Frames side by side.

    Args:
        videos: frames, uint8 (H, W, 3); a video shorter than `num_frames` repeats some.
        num_frames: columns, 2 or more.
        height: of each frame in pixels; widths follow.
    """
    rows = []
    for video in videos:
        chosen = np.linspace(0, len(video) - 1, num_frames).round().astype(int)
        width = round(video[0].shape[1] * height / video[0].shape[0])
        rows.append([Image.fromarray(video[i]).resize((width, height), Image.Resampling.LANCZOS) for i in chosen])
    size = max(num_frames * (row[0].width + GAP) - GAP for row in rows), len(rows) * (height + GAP) - GAP
    canvas = Image.new("RGB", size, "white")
    for y, row in enumerate(rows):
        for x, frame in enumerate(row):
            canvas.paste(frame, (x * (frame.width + GAP), y * (height + GAP)))
    return canvas


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--videos", nargs="+", required=True, metavar="MP4", help="one row each")
    parser.add_argument("--frames", type=int, default=6, help="columns (default 6)")
    parser.add_argument("--height", type=int, default=160, help="of a frame in pixels (default 160)")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="*.png")
    args = parser.parse_args(arguments)
    if args.frames < 2 or args.height < 8:
        parser.error(f"--frames {args.frames} --height {args.height}: give at least 2 frames of 8 pixels")
    videos = []
    for path in args.videos:
        try:
            videos.append(read_video(path))
        except (OSError, FFmpegError) as error:
            sys.exit(f"error: --videos {path}: no readable video ({error}); give an MP4 such as main_eval.py writes")
    with atomic_path(args.output) as temporary:
        film_strip(videos, args.frames, args.height).save(temporary, format="PNG")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_command(main)
