"""What the trainer costs over a bare loop, what each switch costs or gains, and how well a large model uses a GPU.

    python benchmarks/bench_train.py [--quick] [--json train.json] [--size quickstart|paligemma-3b] [--minutes 6.5]

On a CPU: the policy of configs/quickstart.yaml. On a GPU: PaliGemma-3B's shape with random weights (time does not
depend on them), one view, horizon 8, bfloat16 autocast over float32 masters; nothing is downloaded.

Overhead: VLATrainer.fit against forward, backward, clipping and optimizer step in a bare loop, on the same model,
optimizer and batches, in turns of a few steps within one run; then fit with the data loader attached. JSON:
ratio_to_bare_loop (at least 0.95) and ratio_with_loader (rate with the loader over that without, at least 0.95) are
medians over the turns. On a CPU the loader's worker takes processor time that the trainer would have.

Switches: samples/s of the trainer with one setting changed. On a CPU in turns with the unchanged trainer.

On a GPU, per recipe (full fine-tune, LoRA, QLoRA with 8-bit Adam) the batch size with the most samples/s, its peak
memory, and model FLOP utilisation = samples/s x FLOPs per sample / peak FLOP/s. FLOPs per sample are those of one
forward and backward pass without recomputation, counted by torch.utils.flop_counter (2 per multiply-add), with no
gradients of frozen weights; QLoRA counts as LoRA. The peak is the dense bfloat16 rate of the data sheet.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import json
import pathlib
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

if not __package__:
    import _repository  # noqa: F401

import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.random_policy import PEAK_FLOPS, PROMPT, random_policy
from benchmarks.synthetic import jpeg_frames, write_dataset
from data.loader import VLADataset, make_loader
from data.sampler import StepBatchSampler
from training.fit_estimate import GB, expected_memory
from training.trainer import VLATrainer
from utils.arguments import CommandParser
from utils.batch import Batch, example_batch, steps_with_loss, to_device
from utils.config_utils import Config
from utils.text_table import text_table

LIMIT = 0.95
CHECKPOINTING = "model.vlm_config.gradient_checkpointing"
LORA = {"model.vlm_config.lora": {"rank": 16, "vision": True}, "model.vlm_config.freeze_patch_embedding": False}
SWITCHES = {  # name -> settings changed; the first three matter most where time is short
    "gradient checkpointing": {CHECKPOINTING: True},
    "LoRA, both towers": LORA,
    "4 noise draws per sample": {"model.action_head_config.noise_draws_per_sample": 4},
    "2 micro-batches": {"training.gradient_accumulation_steps": 2},
    "frozen vision tower": {"model.vlm_config.freeze_vision_tower": True},
    "frozen towers": {"model.vlm_config.freeze_vision_tower": True, "model.vlm_config.freeze_language_model": True},
    "8-bit AdamW": {"optimizer.type": "AdamW8bit"},
    "averaged weights (EMA)": {"training.ema_decay": 0.999},
    "torch.compile": {"training.compile": True},
}
RECIPES = {  # on a GPU, in the order of what to know first
    "full fine-tune": {CHECKPOINTING: True},
    "LoRA": {CHECKPOINTING: True, **LORA},
    "QLoRA, 8-bit AdamW": {
        CHECKPOINTING: True,
        **LORA,
        "model.vlm_config.quantization": "4bit",
        "optimizer.type": "AdamW8bit",
    },
    "full fine-tune, torch.compile": {CHECKPOINTING: True, "training.compile": True},
    "full fine-tune, no checkpointing": {},
    "full fine-tune, compile, no checkpointing": {"training.compile": True},
    "LoRA, no checkpointing": LORA,
    "LoRA, torch.compile": {CHECKPOINTING: True, "training.compile": True, **LORA},
    "full fine-tune, 4 noise draws per sample": {
        CHECKPOINTING: True,
        "model.action_head_config.noise_draws_per_sample": 4,
    },
    "full fine-tune, 8-bit AdamW": {CHECKPOINTING: True, "optimizer.type": "AdamW8bit"},
    "frozen vision tower": {CHECKPOINTING: True, "model.vlm_config.freeze_vision_tower": True},
}


class UnsavedTrainer(VLATrainer):
    """Writes no checkpoint at the end: that is not what is timed."""

    def save(self, name: str, same_as: pathlib.Path | None = None) -> pathlib.Path:
        """Only say where it would have gone."""
        self.saved_step = self.step
        return pathlib.Path(name)


class Turns:
    """Feeds `fit` batch by batch, times it from without, and runs the bare loop between its turns."""

    def __init__(self, source: Any, fixed: Sequence[Batch], steps: int, skip: int) -> None:
        """
        Args:
            source: endless iterable of batches for the trainer.
            fixed: batches for the bare loop.
            steps: per turn.
            skip: the trainer's steps before its clock starts, which take what a loader has prepared meanwhile.
        """
        self.source, self.fixed, self.steps, self.skip = source, fixed, steps, skip
        self.batch_sampler = SimpleNamespace(num_samples=10**9, start_step=0)
        self.trainer: VLATrainer | None = None
        self.fit_seconds: list[float] = []
        self.bare_seconds: list[float] = []

    def close(self) -> None:
        """Nothing of its own is open."""

    def __iter__(self) -> Iterator[Batch]:
        stream, fixed = iter(self.source), itertools.cycle(self.fixed)
        while True:
            for _ in range(self.skip):
                yield next(stream)
            began = now(self.trainer.device)
            for _ in range(self.steps):
                yield next(stream)  # comes back when the trainer asks for the next batch: its whole step lies between
            self.fit_seconds.append(now(self.trainer.device) - began)
            began = now(self.trainer.device)
            for _ in range(self.steps):
                bare_step(self.trainer, next(fixed))
            self.bare_seconds.append(now(self.trainer.device) - began)

    def ratio(self) -> float:
        """Rate of `fit` relative to the bare loop's: the median over the turns after the first."""
        return statistics.median(b / f for b, f in list(zip(self.bare_seconds, self.fit_seconds, strict=True))[1:])

    def samples_per_second(self, batch_size: int) -> float:
        """Of `fit`, the median over the turns after the first."""
        return batch_size * self.steps / statistics.median(self.fit_seconds[1:])


def release() -> None:
    """Free the memory of the trainer before: it and its loader hold each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def now(device: torch.device) -> float:
    """Seconds, once the GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def bare_step(trainer: VLATrainer, batch: Batch) -> None:
    """The least that an update takes: what a training script of a page does."""
    batch = to_device(batch, trainer.device)
    valid = steps_with_loss(batch, trainer.config).sum()
    (trainer.policy(batch).sum() / valid).backward()
    nn.utils.clip_grad_norm_([p for p in trainer.policy.parameters() if p.requires_grad], 1.0)
    trainer.state.optimizer.step()
    trainer.state.optimizer.zero_grad(set_to_none=True)


class Bench:
    """One device, one size, one folder of synthetic demonstrations."""

    def __init__(self, size: str, device: torch.device, folder: pathlib.Path, batch_size: int) -> None:
        self.size, self.device, self.folder, self.batch_size = size, device, folder, batch_size
        self.dims = 4 if size == "quickstart" else 7
        self.pixels = 96 if size == "quickstart" else 224
        write_dataset(folder / "demos.parquet", 1000, jpeg_frames(200, self.pixels), dims=self.dims)

    def trainer(self, changes: dict[str, Any], loader: Any, **training: Any) -> VLATrainer:
        """A trainer of the size's policy with some settings changed."""
        settings = {
            "data.batch_size": self.batch_size,
            "data.cache_dir": str(self.folder / "cache"),
            "data.num_workers": 1 if self.size == "quickstart" else 8,
            "model.action_head_config.noise_draws_per_sample": 1,
            CHECKPOINTING: False,
            "training.checkpoint_dir": str(self.folder),
            "training.epochs": 1,
            "training.log_interval": 10,
            **{f"training.{key}": value for key, value in training.items()},
            **changes,
        }
        backbone = self.folder / "backbone"
        policy, self.config, self.images, self.tokenizer = random_policy(self.size, 1, self.device, backbone, settings)
        return UnsavedTrainer(self.config, policy, loader, None, self.device, {})

    def loader(self, config: Config) -> Any:
        """The data loader of a training run."""
        data = config.data
        dataset = VLADataset(
            [self.folder / "demos.parquet"],
            data,
            horizon=config.model.action_head_config.horizon,
            per_action_dim=self.dims,
            cameras=config.cameras,
            image_processor=self.images,
            prompt_tokenizer=self.tokenizer,
        )
        sampler = StepBatchSampler(len(dataset), data.batch_size, seed=0)
        return make_loader(dataset, num_workers=data.num_workers, batch_sampler=sampler)

    def batches(self, size: int, count: int = 4) -> list[Batch]:
        """Pre-collated random batches with every step valid and one prompt."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.tensor([self.tokenizer(PROMPT)] * size)
        example = example_batch(self.config, image_size=self.pixels, batch_size=size, text_len=ids.shape[1])
        random = functools.partial(torch.rand, generator=generator)
        return [
            {
                **example,
                "image_1": torch.randint(0, 256, example["image_1"].shape, dtype=torch.uint8, generator=generator),
                "input_ids": ids,
                "state": random(example["state"].shape),
                "action": random(example["action"].shape),
            }
            for _ in range(count)
        ]


def measure_overhead(bench: Bench, changes: dict[str, Any], steps: int, turns: int) -> dict[str, float]:
    """`fit` on pre-collated batches, and with the loader attached, each in turns with the bare loop.

    The pre-collated ones were drawn from the loader: prompts as long, as many steps valid.
    """
    found, drawn = {}, []
    for name in ("pre-collated", "loader"):
        feed = Turns(None, [], steps, skip=0)
        trainer = bench.trainer(changes, feed, max_steps=10**9, experiment_name=name)
        if not drawn:
            config = replaced(trainer.config, "data", num_workers=0)
            drawn = list(itertools.islice(bench.loader(config), 4))
        feed.trainer, feed.fixed = trainer, drawn
        if name == "loader":
            feed.source = bench.loader(trainer.config)
            feed.skip = 2 * trainer.config.data.num_workers + 2
        else:
            feed.source = itertools.cycle(drawn)
        trainer.length = dataclasses.replace(trainer.length, total_steps=turns * (steps + feed.skip) + 1)
        trainer.fit()
        found[name] = {"ratio": feed.ratio(), "samples_per_second": feed.samples_per_second(bench.batch_size)}
        del trainer, feed
        release()
    return {
        "samples_per_second": found["pre-collated"]["samples_per_second"],
        "samples_per_second_with_loader": found["loader"]["samples_per_second"],
        "ratio_to_bare_loop": found["pre-collated"]["ratio"],
        # Both relative to the bare loop of their own run, so that what else the machine does falls out.
        "ratio_with_loader": found["loader"]["ratio"] / found["pre-collated"]["ratio"],
    }


def measure_switches(bench: Bench, names: Sequence[str], steps: int, turns: int) -> list[dict[str, Any]]:
    """The trainer's rate with a switch on, in turns with the trainer without it."""
    rows = []
    plain = bench.trainer({}, Turns(None, [], 0, 0))
    batches = bench.batches(bench.batch_size)
    for name in names:
        trainer = bench.trainer(SWITCHES[name], Turns(None, [], 0, 0))
        count = trainer.config.training.gradient_accumulation_steps
        parts = [split(batch, count) for batch in batches]
        seconds: dict[str, list[float]] = {"with": [], "without": []}
        for turn in range(turns + 1):
            for key, one in (("with", trainer), ("without", plain)):
                began = now(bench.device)
                for step in range(steps):
                    one.train_step(parts[step % 4] if key == "with" else [batches[step % 4]])
                seconds[key] += [now(bench.device) - began] if turn else []  # the first turn warms up, or compiles
        ratios = [b / a for a, b in zip(seconds["with"], seconds["without"], strict=True)]
        rate = bench.batch_size * steps / statistics.median(seconds["with"])
        memory = sum(expected_memory(trainer.policy, trainer.config).values())
        ratio = statistics.median(ratios)
        rows.append({"switch": name, "samples_per_second": rate, "ratio": ratio, "expected_mb": memory / 1e6})
        print(f"{name:<28}{rate:>12.1f}{ratio:>12.3f}{memory / 1e6:>14.1f}", flush=True)
    return rows


def replaced(config: Config, section: str, **values: Any) -> Config:
    """The configuration with other values in one section."""
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def split(batch: Batch, count: int) -> list[Batch]:
    """A batch as `count` micro-batches."""
    size = len(batch["state"]) // count
    return [{key: value[i * size : (i + 1) * size] for key, value in batch.items()} for i in range(count)]


def flops_per_sample(bench: Bench, changes: dict[str, Any]) -> float:
    """Of one forward and backward pass without recomputation; unquantized, since no counter knows bitsandbytes."""
    skipped = {CHECKPOINTING, "model.vlm_config.quantization", "optimizer.type", "training.compile"}
    changes = {key: value for key, value in changes.items() if key not in skipped}
    trainer = bench.trainer(changes, Turns(None, [], 0, 0))
    batch = to_device(bench.batches(2, count=1)[0], bench.device)
    with FlopCounterMode(display=False) as counter:
        trainer.policy.train()(batch).mean().backward()
    return counter.get_total_flops() / 2


def best_batch_size(bench: Bench, changes: dict[str, Any], sizes: Sequence[int], steps: int, deadline: float) -> dict:
    """The batch size with the most samples/s among those that fit; larger ones are tried while they gain 2 %."""
    tried: list[dict[str, float]] = []
    trainer = bench.trainer(changes, Turns(None, [], 0, 0))
    ended = "all sizes tried"
    for size in sizes:
        if time.perf_counter() > deadline:
            ended = "time was up"
            break
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            batches = bench.batches(size, count=2)
            for step in range(3):  # moments are made, kernels chosen, layers compiled
                trainer.train_step([batches[step % 2]])
            began = now(bench.device)
            for step in range(steps):
                trainer.train_step([batches[step % 2]])
            seconds = now(bench.device) - began
        except torch.OutOfMemoryError:
            trainer.state.optimizer.zero_grad(set_to_none=True)
            ended = f"out of memory at {size}"
            break
        peak = torch.cuda.max_memory_allocated() / GB
        tried.append({"batch_size": size, "samples_per_second": size * steps / seconds, "peak_gb": peak})
        print(f"    batch {size:>4}: {tried[-1]['samples_per_second']:>8.1f} samples/s, peak {peak:.1f} GB", flush=True)
        if len(tried) > 1 and tried[-1]["samples_per_second"] < 1.02 * tried[-2]["samples_per_second"]:
            ended = f"no gain at {size}"
            break
    if not tried:
        return {"tried": [], "ended": ended}
    best = max(tried, key=lambda one: one["samples_per_second"])
    trainer.config = replaced(trainer.config, "data", batch_size=best["batch_size"])
    expected = {name: size / GB for name, size in expected_memory(trainer.policy, trainer.config).items()}
    return {**best, "tried": tried, "ended": ended, "expected_gb": sum(expected.values()), "expected": expected}


def measure_recipes(bench: Bench, sizes: Sequence[int], steps: int, minutes: float) -> list[dict[str, Any]]:
    """Samples/s, MFU and peak memory of every recipe, as many as the time allows."""
    deadline = time.perf_counter() + 60 * minutes
    name_of_device = torch.cuda.get_device_name()
    peak_flops = next((rate for name, rate in PEAK_FLOPS.items() if name in name_of_device), None)
    flops: dict[bool, float] = {}
    rows = []
    for name, changes in RECIPES.items():
        if time.perf_counter() > deadline:
            print(f"{name}: not measured, the {minutes:g} minutes were over")
            continue
        print(name, flush=True)
        adapted = "model.vlm_config.lora" in changes
        if adapted not in flops:
            flops[adapted] = flops_per_sample(bench, changes)
        release()
        row = best_batch_size(bench, changes, sizes, steps, deadline)
        if row["tried"]:
            row["tflops_per_sample"] = flops[adapted] / 1e12
            row["mfu"] = row["samples_per_second"] * flops[adapted] / peak_flops if peak_flops else None
        rows.append({"recipe": name, **row})
        release()
    return rows


def print_recipes(rows: Sequence[dict[str, Any]]) -> None:
    """One line per recipe; of one that does not fit, only where the search ended."""
    columns = ("recipe", "batch_size", "samples_per_second", "mfu", "peak_gb", "expected_gb", "ended")
    header = ["recipe", "batch", "samples/s", "MFU", "peak GB", "expected", "search ended"]
    print(f"\n{text_table(header, [[row.get(column) for column in columns] for row in rows])}")


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"commit": commit.stdout.strip(), "device": gpu or "CPU", "threads": torch.get_num_threads(), **versions}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer turns, three switches; two recipes on a GPU")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    parser.add_argument("--size", choices=("quickstart", "paligemma-3b"), help="default: by the device")
    parser.add_argument("--minutes", type=float, default=6.5, help="for the recipes on a GPU (default %(default)s)")
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = args.size or ("paligemma-3b" if device.type == "cuda" else "quickstart")
    if device.type == "cpu":
        torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    large = size == "paligemma-3b"
    result: dict[str, Any] = {"environment": environment(device), "size": size}
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(size, device, pathlib.Path(name), batch_size=32 if large else 16)
        base = {CHECKPOINTING: True} if large else {}
        turns = (5 if large else 8) if args.quick else (7 if large else 25)
        result |= measure_overhead(bench, base, steps=5 if large else 10, turns=turns)
        print(f"{size}, batch {bench.batch_size}: {result['samples_per_second']:.1f} samples/s")
        print(f"of the bare loop: {result['ratio_to_bare_loop']:.3f} (wanted {LIMIT})")
        print(f"with the loader, of without: {result['ratio_with_loader']:.3f} (wanted {LIMIT})")
        if device.type == "cpu":
            names = list(SWITCHES)[:3] if args.quick else list(SWITCHES)
            print(f"\n{'switch':<28}{'samples/s':>12}{'of without':>12}{'expected MB':>14}")
            result["switches"] = measure_switches(bench, names, steps=5, turns=3 if args.quick else 9)
        else:
            result["recipes"] = measure_recipes(
                bench, (8, 16, 32, 64, 128, 256), 6, 2.0 if args.quick else args.minutes
            )
            print_recipes(result["recipes"])
    if args.json:
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
