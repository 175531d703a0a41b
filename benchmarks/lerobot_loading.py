"""LeRobot's own loading of a dataset, for `bench_loader.py --video`; runs where lerobot is installed, and only there.

    python benchmarks/lerobot_loading.py FOLDER --batches 60 --batch_size 32 --num_workers 2 --horizon 8

Prints one line of JSON: seconds to the first batch, and frames/s after that.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time

import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from torch.utils.data import DataLoader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--batches", type=int, required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--num_workers", type=int, required=True)
    parser.add_argument("--horizon", type=int, required=True)
    parser.add_argument("--fps", type=float, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    chunk = {"action": [i / args.fps for i in range(args.horizon)]}
    dataset = LeRobotDataset("benchmark/video", root=args.folder, delta_timestamps=chunk)
    loader = DataLoader(
        dataset,
        batch_size=args.batch_size,
        shuffle=True,
        num_workers=args.num_workers,
        prefetch_factor=4,
        drop_last=True,
        worker_init_fn=lambda _: torch.set_num_threads(1),
    )
    stream, warm_up = iter(loader), 2 * args.num_workers * 4 + 1
    next(stream)
    first = time.perf_counter() - started
    done = 1
    while done < warm_up + args.batches:
        batch = next(stream, None)
        if batch is None:
            stream = iter(loader)
            continue
        done += 1
        if done == warm_up:
            started = time.perf_counter()
    seconds = time.perf_counter() - started
    rate = args.batches * args.batch_size / seconds
    backend = getattr(dataset, "_video_backend", None) or getattr(dataset, "video_backend", None)
    print(json.dumps({"first_batch_seconds": first, "frames_per_second": rate, "backend": str(backend)}))


if __name__ == "__main__":
    main()
