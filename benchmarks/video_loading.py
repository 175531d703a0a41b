"""`bench_loader.py --video`: a LeRobot dataset of AV1 read in place, its decoding limit, and LeRobot's own loader."""

from __future__ import annotations

import io
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import time
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.decoding_limit import rate_of_processes
from benchmarks.synthetic import EPISODE_STEPS, write_dataset
from data.convert.lerobot_export import Layout, export_lerobot
from data.convert.video import VideoEncoding
from data.loader import VLADataset, make_loader
from data.processing import PromptTokenizer, VLAImageProcessor
from data.sampler import StepBatchSampler
from utils.config_data import LeRobotConfig
from utils.config_utils import DataConfig
from utils.recordings import LeRobotFolder
from utils.text_table import text_table

SIZE, HORIZON, WORKERS, BATCH, DIMS, FPS = 224, 8, 2, 32, 7, 30
FEATURE = "observation.images.front"
LIMITS = {"ratio": 0.85, "to_lerobot": 2.0}


def scene(count: int, size: int = SIZE) -> list[bytes]:
    """JPEG frames of a fixed camera: a photographic background, two things that move, and the sensor's noise."""
    rng = np.random.default_rng(0)
    background = np.full((size, size, 3), 128.0)
    for scale, spread in ((14, 45), (4, 22), (2, 12), (1, 6)):  # detail of every size, as in a photograph
        layer = rng.normal(0, spread, (size // scale, size // scale, 3)).clip(-127, 127) + 128
        layer = Image.fromarray(layer.astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
        background += np.asarray(layer) - 128.0
    frames = []
    for i in range(count):
        picture = background + rng.normal(0, 2, background.shape)
        for speed, colour, side in ((3, (210, 60, 40), 36), (5, (40, 90, 200), 24)):
            x, y = (speed * i) % (size - side), int((size - side) * (0.5 + 0.4 * np.sin(i / 17 * speed)))
            picture[y : y + side, x : x + side] = colour
        buffer = io.BytesIO()
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=95)
        frames.append(buffer.getvalue())
    return frames


def open_dataset(root: pathlib.Path, folder: pathlib.Path) -> VLADataset:
    """The dataset as training opens it; its cache and tokenizer live in `folder`."""
    return VLADataset(
        [LeRobotFolder(root, LeRobotConfig(cameras=(f"{FEATURE}=image_1",)))],
        DataConfig(state_dim=DIMS, cache_dir=str(folder / "cache")),
        horizon=HORIZON,
        per_action_dim=DIMS,
        cameras=("image_1",),
        image_processor=VLAImageProcessor(SIZE, SIZE, (0.5,) * 3, (0.5,) * 3, 3),
        prompt_tokenizer=PromptTokenizer.from_pretrained(str(folder / "tokenizer"), 48),
    )


def first_batch(root: pathlib.Path, folder: pathlib.Path) -> float:
    """Seconds from opening the dataset to the first batch."""
    started = time.perf_counter()
    dataset = open_dataset(root, folder)
    next(iter(make_loader(dataset, num_workers=WORKERS, batch_sampler=StepBatchSampler(len(dataset), BATCH, seed=0))))
    return time.perf_counter() - started


def decode_worker(dataset: VLADataset, barrier: Any, results: Any, count: int) -> None:
    """Decode `count` frames in random order from their packets, fit them as training does, and nothing else."""
    torch.set_num_threads(1)
    packets, reader = dataset.store._video_rows["image_1"], dataset.store._packets
    order = np.random.default_rng(os.getpid()).integers(len(packets), size=count)
    out = np.empty((SIZE, SIZE, 3), np.uint8)
    barrier.wait()
    started = time.perf_counter()
    for row in order:
        dataset.image_processor.decode_into(reader.frames([int(packets[row])])[0], out)
    results.put((started, time.perf_counter()))


def decode_rate(dataset: VLADataset, count: int) -> float:
    """Frames/s of WORKERS processes that only decode the cache's own packets."""
    return rate_of_processes(decode_worker, dataset, count, WORKERS)


def loader_rate(dataset: VLADataset, batches: int, seed: int) -> float:
    """Frames/s of a running loader, past the batches that were prefetched while nothing was measured."""
    sampler = StepBatchSampler(len(dataset), BATCH, seed=seed)
    stream = iter(make_loader(dataset, num_workers=WORKERS, batch_sampler=sampler))
    for _ in range(2 * WORKERS * 4 + 1):
        next(stream)
    started = time.perf_counter()
    for _ in range(batches):
        next(stream)
    return batches * BATCH / (time.perf_counter() - started)


def lerobot_loading(python: str, root: pathlib.Path, batches: int) -> dict[str, Any]:
    """What `lerobot_loading.py` measures in an environment with lerobot."""
    script = pathlib.Path(__file__).parent / "lerobot_loading.py"
    command = [python, str(script), str(root), "--batches", str(batches), "--batch_size", str(BATCH)]
    command += ["--num_workers", str(WORKERS), "--horizon", str(HORIZON), "--fps", str(FPS)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if found.returncode:
        raise SystemExit(f"error: {python} can't run lerobot: {found.stderr.strip().splitlines()[-1]}")
    return json.loads(found.stdout.splitlines()[-1])


def size_of(path: pathlib.Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def measure(folder: pathlib.Path, quick: bool, lerobot_python: str | None) -> dict[str, Any]:
    """Everything `--video` prints.

    Args:
        folder: temporary; has the tokenizer.
        quick: a few seconds.
        lerobot_python: interpreter of an environment with lerobot; None: it is not measured.
    """
    rows, count, rounds = (4 * EPISODE_STEPS, 960, 1) if quick else (40 * EPISODE_STEPS, 4800, 7)
    write_dataset(folder / "plain.parquet", rows, scene(rows), dims=DIMS)
    root, encoding = folder / "lerobot", VideoEncoding.choose("av1", None)
    export_lerobot([folder / "plain.parquet"], root, Layout(FPS, {"image_1": FEATURE}, video=encoding))
    cold, warm = first_batch(root, folder), first_batch(root, folder)
    dataset = open_dataset(root, folder)
    rates: dict[str, list[float]] = {"decode": [], "loader": []}
    lerobot: list[dict[str, Any]] = []
    for number in range(rounds):
        rates["decode"].append(decode_rate(dataset, count))
        rates["loader"].append(loader_rate(dataset, count // BATCH, number))
        if lerobot_python is not None:
            lerobot.append(lerobot_loading(lerobot_python, root, max(4, count // BATCH // 4)))
    ratios = [a / b for a, b in zip(rates["loader"], rates["decode"], strict=True)]
    result: dict[str, Any] = {
        "frames_per_second": statistics.median(rates["loader"]),
        "decode_frames_per_second": statistics.median(rates["decode"]),
        "ratio_to_decode_limit": statistics.median(ratios),
        "first_batch_seconds": {"new cache": cold, "cache is there": warm},
        "bytes": {
            "LeRobot folder": size_of(root),
            "our cache, beside it": size_of(dataset.store.folder),
            "the same frames as JPEG in Parquet": size_of(folder / "plain.parquet"),
        },
        "packets_per_frame": dataset.store._packets.packets_per_frame(dataset.store._video_rows["image_1"]),
    }
    if lerobot:
        theirs = [found["frames_per_second"] for found in lerobot]
        result["lerobot"] = {
            "frames_per_second": statistics.median(theirs),
            "first_batch_seconds": statistics.median(found["first_batch_seconds"] for found in lerobot),
            "backend": lerobot[0]["backend"],
        }
        result["ratio_to_lerobot"] = statistics.median(a / b for a, b in zip(rates["loader"], theirs, strict=True))
    shutil.rmtree(folder / "cache")
    return result


def report(result: dict[str, Any]) -> str:
    """The tables."""
    decode, ours = result["decode_frames_per_second"], result["frames_per_second"]
    rates = [
        ("decoding the same packets alone (the limit)", decode, 1.0, None),
        ("this loader, in place, to a collated batch", ours, result["ratio_to_decode_limit"], LIMITS["ratio"]),
    ]
    seconds = [(f"this loader, {name}", value) for name, value in result["first_batch_seconds"].items()]
    text = ""
    if "lerobot" in result:
        theirs = result["lerobot"]
        rates.append((f"LeRobotDataset ({theirs['backend']})", theirs["frames_per_second"], None, None))
        seconds.append(("LeRobotDataset", theirs["first_batch_seconds"]))
        wanted = LIMITS["to_lerobot"]
        text = f"\nthis loader over LeRobotDataset: {result['ratio_to_lerobot']:.2f} (wanted {wanted})"
    parts = [
        f"{SIZE} px AV1, a key frame every second frame, random order, horizon {HORIZON}, {WORKERS} workers, batch "
        f"{BATCH}; {result['packets_per_frame']:.2f} packets decoded a frame",
        text_table(["", "frames/s", "of the limit", "wanted"], rates) + text,
        text_table(["", "s to the first batch"], seconds),
        text_table(["", "MB"], [(name, size / 1e6) for name, size in result["bytes"].items()]),
    ]
    return "\n\n".join(parts)
