"""Videos as one picture for a page or a paper: a row for each video, frames spread evenly from its first to its last.

    python scripts/film_strip.py --videos a.mp4 b.mp4 --frames 6 --height 120 --output strip.png

A grid of several episodes, which main_eval.py writes beside them, is left out where they are given too
(`--videos results/videos/*.mp4`). The README's picture has the first filmed episode of each of the quickstart's tasks.
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
from utils.arguments import CommandParser, output_file, run_command
from utils.misc import atomic_path

GAP = 4  # pixels between frames


def without_grids(videos: Sequence[pathlib.Path]) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """The videos of one episode, and those that show several of the given ones side by side.

    main_eval.py writes `{task}_seed{seed}.mp4`, of several of a task `{task}.mp4`, and of several tasks `grid.mp4`.
    """

    def shows_others(video: pathlib.Path) -> bool:
        siblings = [other for other in videos if other.parent == video.parent and other != video]
        return any(other.name.startswith(f"{video.stem}_seed") or video.stem == "grid" for other in siblings)

    grids = [video for video in videos if shows_others(video)]
    return [video for video in videos if video not in grids], grids


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
    parser.add_argument("--videos", nargs="+", type=pathlib.Path, required=True, metavar="MP4", help="one row each")
    parser.add_argument("--frames", type=int, default=6, help="columns (default 6)")
    parser.add_argument("--height", type=int, default=160, help="of a frame in pixels (default 160)")
    parser.add_argument("--output", type=output_file, required=True, help="*.png")
    args = parser.parse_args(arguments)
    if args.frames < 2 or args.height < 8:
        parser.error(f"--frames {args.frames} --height {args.height}: give at least 2 frames of 8 pixels")
    videos = []
    episodes, grids = without_grids(args.videos)
    for path in episodes:
        try:
            videos.append(read_video(path))
        except (OSError, FFmpegError) as error:
            sys.exit(f"error: --videos {path}: no readable video ({error}); give an MP4 such as main_eval.py writes")
    with atomic_path(args.output) as temporary:
        film_strip(videos, args.frames, args.height).save(temporary, format="PNG")
    left_out = f" without {', '.join(grid.name for grid in grids)}, of several episodes" if grids else ""
    print(f"wrote {args.output}{left_out}")


if __name__ == "__main__":
    run_command(main)
