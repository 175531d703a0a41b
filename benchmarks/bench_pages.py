"""How large the page of 50 episodes is, and how long it takes to make and to open.

    python benchmarks/bench_pages.py [--quick] [--json pages.json] [--cameras 3]

Makes 60 episodes of 100 steps with three cameras of noisy 224 px pictures and 14 state and 14 action values, which is
about the heaviest that a page meets, and runs `inspect_parquet.py --html` on them: the page shows 50 of them. It is
opened from disk in chromium, in fresh windows; "open" is from the address to the end of the load event, after which
every key works, "frame" to the first picture in the viewer.

JSON keys: megabytes (below 20), open_seconds (median; below 2), frame_seconds (median), make_seconds, episodes.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import pyarrow as pa
import pyarrow.parquet as pq

if not __package__:
    import _repository  # noqa: F401

from benchmarks.chromium import browser, opened
from benchmarks.synthetic import EPISODE_STEPS, jpeg_frames, write_dataset
from utils.arguments import CommandParser
from utils.text_table import text_table

ROOT = pathlib.Path(__file__).resolve().parents[1]
EPISODES, DIMS, IMAGE_SIZE, OPENINGS = 60, 14, 224, 7
LIMITS = {"megabytes": 20.0, "open_seconds": 2.0}
PAINTED = """() => { const c = document.querySelector('canvas'); if (!c) return true;
  return c.getContext('2d').getImageData(0, 0, 1, 1).data[3] > 0 }"""


def main() -> None:
    args = parse_args()
    episodes, openings = (6, 2) if args.quick else (EPISODES, OPENINGS)
    with tempfile.TemporaryDirectory() as folder:
        data, page = pathlib.Path(folder) / "demos.parquet", pathlib.Path(folder) / "page.html"
        write_dataset(data, episodes * EPISODE_STEPS, jpeg_frames(50, IMAGE_SIZE), dims=DIMS, unique=True)
        _with_cameras(data, args.cameras)
        started = time.perf_counter()
        program = [sys.executable, str(ROOT / "inspect_parquet.py"), "--data_path", str(data), "--html", str(page)]
        subprocess.run(program, check=True, stdout=subprocess.DEVNULL)
        result = {"make_seconds": time.perf_counter() - started, "megabytes": page.stat().st_size / 1e6}
        result |= open_page(page, openings)
    print(text_table(["", ""], [[name.replace("_", " "), value] for name, value in result.items()]))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    over = [
        f"{name} {result[name]:.3g}, wanted below {limit:g}" for name, limit in LIMITS.items() if result[name] >= limit
    ]
    if over:
        raise SystemExit("; ".join(over))


def open_page(path: pathlib.Path, openings: int) -> dict[str, float]:
    """Medians over several windows."""
    seconds, painted = [], []
    with browser() as running:
        opened(running, path).page.close()  # the browser's own start
        for _ in range(openings):
            started = time.perf_counter()
            view = opened(running, path)
            while not view.page.evaluate(PAINTED):
                time.sleep(0.01)
            painted.append(time.perf_counter() - started)
            seconds.append(view.seconds)
            episodes = view.page.locator(".choose option").count()
            view.page.close()
    medians = {"open_seconds": statistics.median(seconds), "frame_seconds": statistics.median(painted)}
    return {**medians, "episodes": episodes}


def parse_args() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("--quick", action="store_true", help="a few episodes, to see that it runs")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    parser.add_argument("--cameras", type=int, default=3, help="default %(default)s")
    return parser.parse_args()


def _with_cameras(path: pathlib.Path, cameras: int) -> None:
    """Add cameras to a file of one: its pictures, some steps later."""
    table = pq.read_table(path)
    for number in range(2, cameras + 1):
        images = table["image_1"]
        later = pa.chunked_array([*images.slice(7 * number).chunks, *images.slice(0, 7 * number).chunks])
        table = table.append_column(f"image_{number}", later)
    pq.write_table(table, path, compression="none")


if __name__ == "__main__":
    main()
