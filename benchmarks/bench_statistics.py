"""How long normalization statistics take, how much of the files they read, and what they hold in memory.

    python benchmarks/bench_statistics.py [--quick] [--json statistics.json] [--rows 1000000]

Makes rows of 14 state and 14 action values beside 96 px JPEG frames of about 4 KB, the smallest that
record_demos.py makes by default (larger ones only lower the share that is read), in 8 files and row groups of 100
rows. Every measurement is a fresh process: once with the files dropped from the page cache and once with them in it;
on the same files four times over, to show that memory hardly grows with the rows; in delta mode; and the baseline,
pandas.read_parquet of the two columns and numpy on the whole.

"bytes read" is what the operating system counts for the process during the calculation (rchar of /proc/self/io; the
statistics run in threads, so that is all of it), "process" the time from its start to its end, Python and imports
included, "memory" the growth of its peak resident memory during the calculation.

JSON keys: seconds (process, files not in the page cache; below 10), bytes_read, bytes_read_ratio (below 0.05), runs.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import pandas as pd  # here, since pyarrow would import it at its first conversion to numpy, within what is measured

if not __package__:
    import _repository  # noqa: F401

from benchmarks.synthetic import EPISODE_STEPS, jpeg_frames, write_dataset
from data.statistics import calculate_statistics
from utils.arguments import CommandParser
from utils.text_table import text_table

DIMS, FILES, IMAGE_SIZE, HORIZON = 14, 8, 96, 8
LIMITS = {"seconds": 10.0, "bytes_read_ratio": 0.05}


def pandas_statistics(files: list[pathlib.Path]) -> None:
    """What many training scripts do: the columns as a data frame, and numpy on all rows at once."""
    frame = pd.concat([pd.read_parquet(path, columns=["state", "action"]) for path in files])
    for name in ("state", "action"):
        values = np.stack(frame[name].to_numpy())
        for statistic in (np.min, np.max, np.mean, np.std):
            statistic(values, axis=0)
        np.quantile(values, [0.01, 0.99], axis=0)


def probe(kind: str, files: list[pathlib.Path], num_workers: int) -> dict[str, Any]:
    """Run in a fresh process: one calculation."""
    delta = {"action_mode": "delta", "absolute_action_dims": [DIMS - 1], "horizon": HORIZON}
    bytes_before, memory_before, started = _bytes_read(), _peak_memory_mb(), time.perf_counter()
    result: dict[str, Any] = {}
    if kind == "pandas":
        pandas_statistics(files)
    else:
        options = delta if kind == "delta" else {}
        statistics = calculate_statistics(files, DIMS, DIMS, num_workers=num_workers, **options)
        result["quantile_rank_error"] = statistics["action"]["quantile_rank_error"]
    return result | {
        "calculation_seconds": time.perf_counter() - started,
        "bytes_read": _bytes_read() - bytes_before,
        "memory_mb": _peak_memory_mb() - memory_before,
    }


def measure(name: str, kind: str, files: list[pathlib.Path], rows: int, num_workers: int) -> dict[str, Any]:
    """One line of the table."""
    command = [sys.executable, __file__, "--probe", kind, "--num_workers", str(num_workers), "--files"]
    started = time.perf_counter()
    output = subprocess.run([*command, *map(str, files)], check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds = time.perf_counter() - started
    result = json.loads(output.splitlines()[-1])
    ratio = result["bytes_read"] / sum(path.stat().st_size for path in files)
    return {"name": name, "rows": rows, "seconds": seconds, "bytes_read_ratio": ratio, **result}


def drop_from_page_cache(files: list[pathlib.Path]) -> None:
    """Make the next read of these files one from the disk."""
    for path in files:
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _bytes_read() -> int:
    return int(pathlib.Path("/proc/self/io").read_text().split()[1])


def _peak_memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the rows")
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers to this file")
    parser.add_argument(
        "--rows", type=int, default=1_000_000, help="time steps; about 4.4 KB of disk each, for a while"
    )
    parser.add_argument("--num_workers", type=int, default=os.cpu_count())
    parser.add_argument("--probe", choices=["absolute", "delta", "pandas"], help=argparse.SUPPRESS)
    parser.add_argument("--files", nargs="+", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.probe:
        print(json.dumps(probe(args.probe, args.files, args.num_workers)))
        return
    per_file = max(1, args.rows // (20 if args.quick else 1) // FILES // EPISODE_STEPS) * EPISODE_STEPS
    rows, load = per_file * FILES, os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        files = [pathlib.Path(folder) / f"{i}.parquet" for i in range(FILES)]
        frames = jpeg_frames(500, IMAGE_SIZE)
        for path in files:
            write_dataset(path, per_file, frames, dims=DIMS)
        file_bytes = sum(path.stat().st_size for path in files)
        drop_from_page_cache(files)
        cold = measure("statistics, from disk", "absolute", files, rows, args.num_workers)
        runs = [
            measure("pandas and numpy", "pandas", files, rows, args.num_workers),
            cold,
            measure("statistics, from page cache", "absolute", files, rows, args.num_workers),
            measure("four times the rows", "absolute", files * 4, rows * 4, args.num_workers),
            measure(f"delta actions, horizon {HORIZON}", "delta", files, rows, args.num_workers),
        ]
    print(
        f"{rows} rows, {DIMS} state + {DIMS} action values and one JPEG each, {FILES} files, "
        f"{file_bytes / 1e9:.2f} GB; {os.cpu_count()} cores, {args.num_workers} workers, load average before {load:.1f}"
    )
    lines = [
        [
            *(run["name"], run["rows"], run["seconds"], run["calculation_seconds"]),
            f"{run['rows'] / run['calculation_seconds']:.0f}",
            *(run["bytes_read"] / 1e6, f"{run['bytes_read_ratio']:.2%}", run["memory_mb"]),
        ]
        for run in runs
    ]
    header = ["", "rows", "process, s", "calculation, s", "rows/s", "MB read", "of files", "memory, MB"]
    print(text_table(header, lines))
    print(
        f"wanted: process below {LIMITS['seconds']:.0f} s for 1,000,000 rows (here {cold['seconds']:.2f} s), "
        f"read below {LIMITS['bytes_read_ratio']:.0%} (here {cold['bytes_read_ratio']:.2%})"
    )
    if args.json:
        report = {
            "seconds": cold["seconds"],
            "calculation_seconds": cold["calculation_seconds"],
            "rows_per_second": rows / cold["calculation_seconds"],
            "bytes_read": cold["bytes_read"],
            "bytes_read_ratio": cold["bytes_read_ratio"],
            "file_bytes": file_bytes,
            "rows": rows,
            "limits": LIMITS,
            "cores": os.cpu_count(),
            "num_workers": args.num_workers,
            "load_average_before": load,
            "runs": runs,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
