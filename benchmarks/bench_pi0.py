"""pi0 and pi0.5 of the published size on a GPU: latency for one, two and three views, training samples/s with MFU.

    python benchmarks/bench_pi0.py [--kinds pi0 pi05] [--json pi0.json] [--compile none cuda_graph] [--batch_size 8]

Weights are random (time does not depend on them), compute is bfloat16. Latency is from a processed observation in host
memory to actions there, 10 steps, 50 actions; views that are left out are absent cameras. Training is forward,
backward, clipping and AdamW over three cameras with gradient checkpointing: every weight, or adapters of rank 16 on the
language model and the expert with the vision tower frozen. FLOPs are those of one sample without a second forward pass
(what checkpointing repeats; with LoRA, of the vision tower too, which it does not, so that the figure is a little low);
model FLOP utilisation (MFU) is their rate over the data sheet's dense bfloat16 rate. --quick: tiny weights on a CPU, to
see that it runs; its figures mean nothing.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:
    import _repository  # noqa: F401

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.random_pi import ACTION_DIM, CAMERAS, SIZES, STATE_DIM, image_processor, random_checkpoint
from benchmarks.random_policy import PEAK_FLOPS
from data.processing import PromptTokenizer, collate_fn
from inference.predictor import VLAPredictor
from model.tiny.paligemma import make_tiny_paligemma
from model.vla_model import VLAModel
from training.optimizer import build_optimizer
from utils.arguments import CommandParser, output_file
from utils.batch import Batch, to_device
from utils.config_utils import Config, config_from_dict
from utils.misc import pick_device
from utils.text_table import text_table

PROMPT = "pick up the red block and place it in the bowl"
LORA = {"rank": 16, "alpha": 16.0}
CHECKPOINTING = {
    "model.vlm_config.gradient_checkpointing": True,
    "model.action_head_config.expert.gradient_checkpointing": True,
}
RECIPES = {
    "full": CHECKPOINTING,
    "LoRA": {
        **CHECKPOINTING,
        "model.vlm_config.freeze_vision_tower": True,
        "model.vlm_config.lora": LORA,
        "model.action_head_config.expert.lora": LORA,
    },
}


class Bench:
    """One kind, size and device."""

    def __init__(self, kind: str, size: str, device: torch.device, tokenizer_dir: Path) -> None:
        self.kind, self.size, self.device = kind, size, device
        self.processor = image_processor(size)
        self.checkpoint = random_checkpoint(kind, size, device, {"model.vlm_config.dtype": "bfloat16"})
        self.tokenizer_dir = tokenizer_dir

    def policy(self, changes: dict[str, Any]) -> tuple[VLAModel, Config]:
        """With other settings; adapters and quantization go on top of the weights."""
        tree = json.loads(json.dumps(self.checkpoint["config"]))
        for name, value in changes.items():
            *sections, last = name.split(".")
            inner = tree
            for section in sections:
                inner = inner[section]
            inner[last] = value
        config = config_from_dict(tree)
        with self.device:
            return VLAModel.from_checkpoint(self.checkpoint, config, must_be_finite=False), config

    def predictor(self, **inference: Any) -> VLAPredictor:
        policy, config = self.policy({})
        tokenizer = PromptTokenizer.from_pretrained(str(self.tokenizer_dir), config.data.prompt_max_len)
        tokenizer.read_states(config, self.checkpoint["statistics"])
        return VLAPredictor(policy, config, self.processor, tokenizer, device=self.device, **inference)

    def observations(self, predictor: VLAPredictor, views: int, count: int) -> Batch:
        """Random frames of the first cameras, and actions."""
        rng, pixels, seen = np.random.default_rng(0), self.processor.height, []
        horizon = SIZES[self.size][-1]
        for _ in range(count):
            frames = {name: rng.integers(0, 256, (pixels, pixels, 3), dtype=np.uint8) for name in CAMERAS[:views]}
            one = predictor.observation(images=frames, prompt=PROMPT, state=rng.normal(size=STATE_DIM))
            action = torch.from_numpy(rng.normal(size=(horizon, ACTION_DIM)).astype(np.float32))
            seen.append(one | {"action": action, "action_is_pad": torch.zeros(horizon, dtype=torch.bool)})
        return collate_fn(seen)

    def latency(self, how: str, views: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
        """Milliseconds of a prediction, p50 and p95, for each number of views."""
        predictor, rows = self.predictor(compile=how), []
        for count in views:
            batch = self.observations(predictor, count, 1)

            def predict(batch: Batch = batch) -> None:
                predictor.predict_batch(batch, [0], predictor.num_inference_steps)

            times = sorted(1000 * timed(predict, self.device) for _ in range(rounds + 3))[:-3]  # the first ones compile
            p95 = times[min(len(times) - 1, int(0.95 * len(times)))]
            rows.append(
                {"policy": self.kind, "compile": how, "views": count, "p50_ms": statistics.median(times), "p95_ms": p95}
            )
        return rows

    def training(self, recipe: str, batch_size: int, steps: int) -> dict[str, Any]:
        """Samples/s, MFU and peak memory of a recipe."""
        policy, config = self.policy(RECIPES[recipe])
        policy.train()
        helper = self.predictor_for_text(config)
        batch = to_device(self.observations(helper, len(CAMERAS), batch_size), self.device)
        optimizer = build_optimizer(policy, config.optimizer)
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]

        def step() -> None:
            policy(batch).mean().backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        timed(step, self.device)
        seconds = statistics.median(timed(step, self.device) for _ in range(steps))
        row: dict[str, Any] = {
            "policy": self.kind,
            "recipe": recipe,
            "batch_size": batch_size,
            "samples_per_second": batch_size / seconds,
            "mfu": None,
            "peak_gb": None,
        }
        if self.device.type == "cuda":
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            name = torch.cuda.get_device_name(self.device)
            peak = next((rate for known, rate in PEAK_FLOPS.items() if known in name), None)
            if peak is not None:
                row["mfu"] = self.flops(policy, batch, batch_size) / seconds / peak
        return row

    def flops(self, policy: VLAModel, batch: Batch, batch_size: int) -> float:
        """Of forward and backward passes of a batch, from one sample, without what checkpointing computes again."""
        one = {key: value[:1] for key, value in batch.items()}
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            policy(one)
        with FlopCounterMode(display=False) as both:
            policy(one).mean().backward()
        policy.zero_grad(set_to_none=True)
        return batch_size * (both.get_total_flops() - forward.get_total_flops())  # of which one forward is a repetition

    def predictor_for_text(self, config: Config) -> Any:
        """What makes observations, without a model of its own."""
        tiny = random_checkpoint(self.kind, "tiny")
        tokenizer = PromptTokenizer.from_pretrained(str(self.tokenizer_dir), config.data.prompt_max_len)
        tokenizer.read_states(config, self.checkpoint["statistics"])
        model = VLAModel.from_checkpoint(tiny)
        return VLAPredictor(model, config_from_dict(tiny["config"]), self.processor, tokenizer, device="cpu")


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, with what it left to the GPU."""
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--kinds", nargs="+", choices=("pi0", "pi05"), default=["pi0", "pi05"])
    parser.add_argument("--compile", nargs="+", default=["none", "cuda_graph"], help="ways of inference.compile")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=50, help="predictions of each row")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="tiny weights on the CPU")
    parser.add_argument("--json", type=output_file, help="write every figure there as well")
    args = parser.parse_args()
    device = pick_device("cpu" if args.quick else args.device)
    if device.type != "cuda" and not args.quick:
        raise ValueError(f"the published size on {device} takes hours; give a GPU, or --quick")
    size, batch_size, rounds, steps = ("tiny", 2, 3, 2) if args.quick else ("full", args.batch_size, args.rounds, 10)
    ways = ["none"] if args.quick else args.compile
    latency, training = [], []
    with tempfile.TemporaryDirectory() as folder:
        make_tiny_paligemma(folder, prompts=(PROMPT,))
        for kind in args.kinds:
            bench = Bench(kind, size, device, Path(folder))
            for how in ways:
                latency += bench.latency(how, (1, 2, 3), rounds)
                release()
            for recipe in RECIPES:
                training.append(bench.training(recipe, batch_size, steps))
                release()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}, {size} size")
    for rows in (latency, training):
        print(text_table(list(rows[0]), [list(row.values()) for row in rows]) + "\n")
    if args.json is not None:
        result = {"device": name, "size": size, "latency": latency, "training": training}
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


def release() -> None:
    """Free the memory of the policy before."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
