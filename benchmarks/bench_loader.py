"""How close loading comes to the limit that decoding sets, and what it costs in memory.

    python benchmarks/bench_loader.py [--quick] [--json loader.json] [--sizes_gb 1 8]
    python benchmarks/bench_loader.py --video [--quick] [--lerobot_python PATH]

Rate: frames/s of the full path to a collated batch (random order, 224 px JPEG frames, horizon 8, 2 workers). The
limit is the raw decode rate of the same bytes by the same decoder in as many processes, the baseline a dataset that
keeps a pandas frame in memory and decodes with PIL. The three are measured in turns, several times, in one run.

Memory: anonymous (not file-backed) memory of a loader worker on datasets of two sizes, which should not differ, and
the time from opening a dataset whose cache exists to the first batch.

`--video`: a LeRobot dataset of 224 px AV1 that is read in place, with decoding the same packets as its limit, and
beside it LeRobot's own dataset and DataLoader, where an interpreter with lerobot is given; disk, and time to the first
batch.

JSON keys: frames_per_second, decode_frames_per_second, ratio_to_decode_limit (at least 0.85), memory;
with --video also ratio_to_lerobot (at least 2), first_batch_seconds, bytes.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

if not __package__:
    import _repository  # noqa: F401

from benchmarks import video_loading
from benchmarks.decoding_limit import rate_of_processes
from benchmarks.synthetic import EPISODE_STEPS, jpeg_frames, write_dataset
from data.loader import VLADataset, make_loader
from data.processing import PromptTokenizer, VLAImageProcessor
from data.sampler import StepBatchSampler
from model.tiny.paligemma import make_tiny_paligemma
from utils.arguments import CommandParser
from utils.config_utils import DataConfig
from utils.text_table import text_table

SIZE, HORIZON, WORKERS, BATCH, DIMS = 224, 8, 2, 32, 7
LIMITS = {"ratio": 0.85, "memory": 1.05, "first_batch": 2.0}


def open_dataset(path: pathlib.Path, folder: pathlib.Path) -> VLADataset:
    """The dataset as training opens it; its cache and tokenizer live in `folder`."""
    return VLADataset(
        [path],
        DataConfig(state_dim=DIMS, cache_dir=str(folder / "cache")),
        horizon=HORIZON,
        per_action_dim=DIMS,
        cameras=("image_1",),
        image_processor=VLAImageProcessor(SIZE, SIZE, (0.5,) * 3, (0.5,) * 3, 3),
        prompt_tokenizer=PromptTokenizer.from_pretrained(str(folder / "tokenizer"), 48),
    )


class NaiveDataset(Dataset):
    """What many training scripts do: the whole table in memory, one pandas row and one PIL decode per sample."""

    def __init__(self, path: pathlib.Path) -> None:
        self.frame = pd.read_parquet(path)

    def __len__(self) -> int:
        return len(self.frame)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.frame.iloc[index]
        image = Image.open(io.BytesIO(row["image_1"])).convert("RGB").resize((SIZE, SIZE))
        actions = np.stack(self.frame["action"].iloc[index : index + HORIZON].to_list())
        padded = np.zeros((HORIZON, DIMS), np.float32)
        padded[: len(actions)] = actions
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return {"image": pixels, "state": torch.tensor(row["state"]), "action": torch.from_numpy(padded)}


def decode_worker(frames: list[bytes], barrier: Any, results: Any, count: int) -> None:
    """Decode `count` frames in random order as the dataset's processor does, and nothing else."""
    torch.set_num_threads(1)
    process = VLAImageProcessor(SIZE, SIZE, (0.5,) * 3, (0.5,) * 3, 3)
    order = np.random.default_rng(os.getpid()).integers(len(frames), size=count)
    barrier.wait()
    started = time.perf_counter()
    for i in order:
        process(frames[i])
    results.put((started, time.perf_counter()))


def decode_rate(path: pathlib.Path, count: int) -> float:
    """Frames/s of WORKERS processes that only decode the file's own frames, every one of them in memory."""
    frames = pq.read_table(path, columns=["image_1"])["image_1"].to_pylist()
    return rate_of_processes(decode_worker, frames, count, WORKERS)


def loader_rate(loader: Iterable[dict[str, Any]], batches: int) -> float:
    """Frames/s of a running loader, from its first batches on; it is drained, as a fast GPU would."""
    stream = iter(loader)
    for _ in range(2 * WORKERS * 4 + 1):  # past the batches that were prefetched while nothing was measured
        next(stream)
    started = time.perf_counter()
    for _ in range(batches):
        frames = len(next(stream)["state"])
    return batches * frames / (time.perf_counter() - started)


def measure_rates(path: pathlib.Path, folder: pathlib.Path, count: int, rounds: int) -> dict[str, float]:
    """Median frames/s of loading, decoding alone and the naive dataset, measured in turns."""
    ours, naive = open_dataset(path, folder), NaiveDataset(path)
    rates: dict[str, list[float]] = {"loader": [], "decode": [], "naive": []}
    for round_number in range(rounds):
        rates["decode"].append(decode_rate(path, count))
        sampler = StepBatchSampler(len(ours), BATCH, seed=round_number)
        rates["loader"].append(
            loader_rate(make_loader(ours, num_workers=WORKERS, batch_sampler=sampler), count // BATCH)
        )
        sampler = StepBatchSampler(len(naive), BATCH, seed=round_number)
        slow = DataLoader(naive, num_workers=WORKERS, batch_sampler=sampler)
        rates["naive"].append(loader_rate(slow, count // BATCH // 4))
    ratios = [a / b for a, b in zip(rates["loader"], rates["decode"], strict=True)]
    return {name: statistics.median(values) for name, values in rates.items()} | {"ratio": statistics.median(ratios)}


def anonymous_kb(pid: int) -> int:
    """Resident anonymous memory of a process, in kB: what can't be dropped or shared through the page cache."""
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    raise RuntimeError(f"no RssAnon in /proc/{pid}/status")


def probe(path: pathlib.Path, folder: pathlib.Path, batches: int) -> dict[str, float]:
    """Run in a fresh process: seconds to the first batch, and the workers' peak anonymous memory."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    dataset = open_dataset(path, folder)
    loader = make_loader(dataset, num_workers=WORKERS, batch_sampler=StepBatchSampler(len(dataset), BATCH, seed=0))
    stream = iter(loader)
    next(stream)
    first = time.perf_counter() - started
    pids, peak = [worker.pid for worker in multiprocessing.active_children()], 0
    for _ in range(batches):
        next(stream)
        peak = max(peak, *(anonymous_kb(pid) for pid in pids))
    return {"first_batch_seconds": first, "worker_peak_anonymous_mb": peak / 1024, "rows": len(dataset)}


def measure_memory(
    folder: pathlib.Path, sizes_gb: list[float], frames: list[bytes], batches: int
) -> list[dict[str, float]]:
    """Probe a dataset of each size in a process of its own; the cache is built before."""
    found = []
    frame_bytes = sum(map(len, frames)) / len(frames)
    for size in sizes_gb:
        path = folder / f"{size}gb.parquet"
        rows = max(1, int(size * 1e9 / frame_bytes / EPISODE_STEPS)) * EPISODE_STEPS
        write_dataset(path, rows, frames, dims=DIMS, unique=True)
        started = time.perf_counter()
        open_dataset(path, folder)
        build = time.perf_counter() - started
        command = [sys.executable, __file__, "--probe", str(path), str(folder), str(batches)]
        started = time.perf_counter()
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        result = json.loads(output.splitlines()[-1])
        found.append({"gb": size, "build_seconds": build, **result})
        path.unlink()
        shutil.rmtree(folder / "cache")
    return found


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--quick", action="store_true", help="a few seconds, sizes of 0.02 and 0.1 GB")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    parser.add_argument("--sizes_gb", type=float, nargs="+", default=[1.0, 8.0], help="of the memory measurement")
    parser.add_argument("--video", action="store_true", help="a LeRobot dataset of videos instead, read in place")
    parser.add_argument("--lerobot_python", help="interpreter with lerobot, to measure its loader beside (--video)")
    parser.add_argument("--probe", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.probe:
        path, folder, batches = args.probe
        print(json.dumps(probe(pathlib.Path(path), pathlib.Path(folder), int(batches))))
        return
    if args.lerobot_python and not args.video:
        parser.error("--lerobot_python belongs to --video")
    if args.video:
        with tempfile.TemporaryDirectory() as name:
            make_tiny_paligemma(pathlib.Path(name) / "tokenizer", prompts=["pick up the red block"])
            result = video_loading.measure(pathlib.Path(name), args.quick, args.lerobot_python)
        print(video_loading.report(result))
        if args.json:
            args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
        return
    sizes = [0.02, 0.1] if args.quick else args.sizes_gb
    rows, count, rounds, batches = (2000, 1920, 1, 20) if args.quick else (6000, 9600, 9, 200)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make_tiny_paligemma(folder / "tokenizer", prompts=["pick up the red block"])
        frames = jpeg_frames(500, SIZE)
        path = folder / "rate.parquet"
        write_dataset(path, rows, frames, dims=DIMS)
        rates = measure_rates(path, folder, count, rounds)
        memory = measure_memory(folder, sizes, frames, batches)
    growth = memory[-1]["worker_peak_anonymous_mb"] / memory[0]["worker_peak_anonymous_mb"]
    result = {
        "frames_per_second": rates["loader"],
        "decode_frames_per_second": rates["decode"],
        "naive_frames_per_second": rates["naive"],
        "ratio_to_decode_limit": rates["ratio"],
        "memory": memory,
        "memory_growth": growth,
    }
    print(f"{SIZE} px JPEG frames, random order, horizon {HORIZON}, {WORKERS} workers, batch {BATCH}")
    lines = [
        ("decode alone (the limit)", rates["decode"], 1.0, None),
        ("this loader, to a collated batch", rates["loader"], rates["ratio"], LIMITS["ratio"]),
        ("pandas in memory, PIL", rates["naive"], rates["naive"] / rates["decode"], None),
    ]
    print(text_table(["", "frames/s", "of the limit", "wanted"], lines))
    columns = ("gb", "rows", "worker_peak_anonymous_mb", "first_batch_seconds", "build_seconds")
    header = ["dataset, GB", "rows", "anonymous MB / worker", "s to first batch", "s to build cache"]
    print(f"\n{text_table(header, [[row[column] for column in columns] for row in memory])}")
    print(f"largest over smallest: {growth:.3f} (wanted below {LIMITS['memory']}); first batch wanted below 2 s")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
