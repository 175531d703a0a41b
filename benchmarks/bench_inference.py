"""How long one prediction takes, what each way to run it gains, and how far that is from what the hardware allows.

    python benchmarks/bench_inference.py [--quick] [--json inference.json] [--ways naive cached ...] [--views 1 2]

On a CPU: the policy of configs/quickstart.yaml. On a GPU: PaliGemma-3B's shape with the default action head. Weights
are random (time does not depend on them); horizon 8, 10 integration steps, one observation at a time, from the
collated batch in host memory to actions in host memory. Ways take turns, so that a busy machine slows all alike.

    naive             everything anew at every integration step: images, prompt, context keys and values, time
    naive, float32    the same with float32 weights, which autocast rounds at every use (on a GPU)
    context once      images and prompt once per prediction, the rest at every step
    cached            VLAPredictor with compile none: keys and values once, embedded prompts and time schedules kept
    compiled, int8    the same with those settings
    graph of the loop, graph, max-autotune      the integration, or all of it, as a CUDA graph

The floor is, part by part, the larger of FLOPs over the measured matrix rate and of the weights' bytes over the
measured bandwidth; every integration step reads the head's weights again. `cached_speedup` in the JSON is naive over
cached for one view: of processor time on a CPU, of time on a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

if not __package__:
    import _repository  # noqa: F401

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.random_policy import PROMPT, random_policy
from inference.engine import TensorFunction, Tensors, accelerate
from inference.predictor import VLAPredictor
from model.context import Context
from utils.arguments import CommandParser
from utils.misc import pick_device
from utils.text_table import text_table

STEPS, SEED = 10, 0
GPU_WAYS = ("naive, float32", "graph of the loop", "graph", "max-autotune")
SETTINGS = {  # of VLAPredictor; the naive ways read its model
    "naive, float32": {"weight_dtype": "float32"},
    "naive": {},
    "context once": {},
    "cached": {},
    "compiled": {"compile": "default"},
    "graph of the loop": {},
    "graph": {"compile": "cuda_graph"},
    "max-autotune": {"compile": "max-autotune"},
    "int8": {"quantization": "int8"},
}
Predict = Callable[[], np.ndarray]


def naive(predictor: VLAPredictor, batch: dict[str, Any], context_once: bool = False) -> Predict:
    """The plain loop: nothing is kept from step to step, or the context alone."""
    model, head, device = predictor.model, predictor.model.action_head, predictor.device

    @torch.no_grad()
    def predict() -> np.ndarray:
        there = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
        x_BTA, context = _noise(predictor), None
        with model.autocast():
            for step in range(STEPS):
                context = context if context_once and step else model.encode(there)
                time_B = torch.full((1,), step / STEPS, device=device)
                x_BTA = x_BTA + head.velocity(x_BTA, time_B, head.encode_context(context)).float() / STEPS
        return _physical(predictor, x_BTA, there)

    return predict


def graph_of_the_loop(predictor: VLAPredictor, batch: dict[str, Any]) -> Predict:
    """The context launch by launch, then the integration as one CUDA graph."""
    encode, sample = stages(predictor)["context"], stages(predictor)["action head"]
    run = accelerate(sample, "cuda_graph", predictor.device)

    def predict() -> np.ndarray:
        tensors = predictor.engine.prepared(batch)
        return _physical(predictor, run({**encode(tensors), "noise": _noise(predictor)}), tensors)

    return predict


def stages(predictor: VLAPredictor) -> dict[str, Callable[[Tensors], Any]]:
    """The parts of a prediction as functions of prepared tensors."""
    model = predictor.model
    with torch.no_grad(), model.autocast():
        schedule = model.action_head.schedule(STEPS, predictor.device)

    @torch.no_grad()
    def vision(tensors: Tensors) -> Tensor:
        slot_mask_BSV = tensors["vlm_attention_mask"][:, :, None] & tensors["image_mask"][:, None, :]
        with model.autocast():
            images = model.augmentation([tensors[camera] for camera in model.cameras])
            return model.backbone.encode_images(images, slot_mask_BSV, tensors["image_slots"])

    @torch.no_grad()
    def context(tensors: Tensors) -> Tensors:
        with model.autocast():
            found = model.encode(tensors)
        return {"tokens": found.tokens_BLE, "mask": found.mask_BL, "normalized_state": found.state_BS}

    @torch.no_grad()
    def action_head(tensors: Tensors) -> Tensor:
        found = Context(tensors["tokens"], tensors["mask"], tensors["normalized_state"])
        with model.autocast():
            return model.action_head.sample(found, tensors["noise"], STEPS, schedule)

    return {"vision": vision, "context": context, "action head": action_head}


def _noise(predictor: VLAPredictor) -> Tensor:
    return predictor.model.draw_noise([[SEED]], STEPS)[0]


def _physical(predictor: VLAPredictor, action_BTA: Tensor, tensors: Tensors) -> np.ndarray:
    place = tensors["state"], tensors["dataset_index"]
    return predictor.model.normalizer.denormalize_action(action_BTA, *place).cpu().numpy()


def breakdown(predictor: VLAPredictor, batch: dict[str, Any], peaks: dict[str, float], rounds: int) -> dict[str, Any]:
    """Per part milliseconds (launched one by one, and as a CUDA graph), FLOPs, bytes of weights read, and the floor."""
    parts, on_gpu = stages(predictor), predictor.device.type == "cuda"
    tensors = predictor.engine.prepared(batch)
    inputs = {"vision": tensors, "context": tensors}
    inputs["action head"] = {**parts["context"](tensors), "noise": _noise(predictor)}
    found = {}
    for name, run in parts.items():
        flops, weights = _counted(predictor.model, run, inputs[name])
        found[name] = {"ms": _median_ms(run, inputs[name], rounds), "gflops": flops / 1e9, "weights_mb": weights / 1e6}
        if on_gpu:
            graph = accelerate(_first_output(run), "cuda_graph", predictor.device)
            found[name]["graph_ms"] = _median_ms(graph, inputs[name], rounds)
    whole = found.pop("context")
    found["language"] = {key: max(0.0, whole[key] - found["vision"][key]) for key in whole}
    for part in found.values():
        compute_ms = 1e12 * part["gflops"] / peaks["flops_per_second"]
        memory_ms = 1e9 * part["weights_mb"] / peaks["bytes_per_second"]
        part |= {"floor_ms": max(compute_ms, memory_ms), "bound": "compute" if compute_ms > memory_ms else "memory"}
    return {name: found[name] for name in ("vision", "language", "action head")}


def _first_output(run: Callable[[Tensors], Any]) -> TensorFunction:
    def first(tensors: Tensors) -> Tensor:
        output = run(tensors)
        return output["tokens"] if isinstance(output, dict) else output

    return first


def _counted(model: nn.Module, run: TensorFunction, tensors: Tensors) -> tuple[int, int]:
    """FLOPs of a call, and bytes of all matrices that it multiplies by."""
    read: list[int] = []
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    hooks = [layer.register_forward_hook(lambda layer, *_: read.append(layer.weight.nbytes)) for layer in layers]
    with FlopCounterMode(display=False) as flops:
        run(tensors)
    for hook in hooks:
        hook.remove()
    return flops.get_total_flops(), sum(read)


def _median_ms(run: Callable[[Tensors], Any], tensors: Tensors, rounds: int) -> float:
    seconds = []
    for _ in range(rounds + 2):
        started = time.perf_counter()
        run(tensors)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds[2:])


def measured_peaks(device: torch.device) -> dict[str, float]:
    """Matrix FLOP/s (bf16 on a GPU, float32 on a CPU) and bytes/s of a copy, read and written: medians of many."""
    on_gpu = device.type == "cuda"
    size, dtype, rounds = (8192, torch.bfloat16, 20) if on_gpu else (1024, torch.float32, 10)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.ones(2**31 if on_gpu else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    multiply = _median_ms(lambda _: a @ b, {}, rounds)
    copy = _median_ms(lambda _: target.copy_(source), {}, rounds)
    return {"flops_per_second": 2e3 * size**3 / multiply, "bytes_per_second": 2e3 * source.nbytes / copy}


def bench(size: str, views: int, device: torch.device, names: list[str], rounds: int, peaks: dict[str, float]) -> dict:
    """Every way for one number of cameras: latencies, first calls, differences from the first way, the breakdown."""
    policies: dict[str, tuple] = {}
    predictors: dict[str, VLAPredictor] = {}
    ways: dict[str, Predict] = {}
    first_seconds, actions = {}, {}
    for name in names:
        settings = SETTINGS[name]
        # Only these change weights; all others share one model.
        kind = "float32" if "weight_dtype" in settings else settings.get("quantization", "stored")
        if kind not in policies:
            with tempfile.TemporaryDirectory() as folder:
                policies[kind] = random_policy(size, views, device, pathlib.Path(folder))
        started = time.perf_counter()
        predictor = VLAPredictor(*policies[kind], device=device, num_inference_steps=STEPS, **settings)
        predictors.setdefault(kind, predictor)
        frames = np.random.default_rng(0).integers(0, 256, (views, 96, 96, 3), dtype=np.uint8)
        batch = predictor.observe(*frames, prompt=PROMPT, state=np.zeros(predictor.state_dim))
        if "naive" in name or name == "context once":
            ways[name] = naive(predictor, batch, context_once=name == "context once")
        elif name == "graph of the loop":
            ways[name] = graph_of_the_loop(predictor, batch)
        else:
            ways[name] = lambda predictor=predictor, batch=batch: predictor.predict_batch(batch, [SEED])
        actions[name] = ways[name]()
        first_seconds[name] = time.perf_counter() - started
        ways[name]()
    result = measured(ways, rounds)
    for name, row in result.items():
        row |= {"first_s": first_seconds[name], "difference": float(np.abs(actions[name] - actions[names[0]]).max())}
    plain = predictors["stored"]
    parts = breakdown(plain, batch, peaks, rounds)
    return {"ways": result, "parts": parts, "floor_ms": sum(part["floor_ms"] for part in parts.values())}


def measured(ways: dict[str, Predict], rounds: int) -> dict[str, dict[str, float]]:
    """Per way p50 and p95 of the time and p50 of the processor time of a prediction, milliseconds."""
    wall, cpu = {name: [] for name in ways}, {name: [] for name in ways}
    for _ in range(rounds):
        for name, predict in ways.items():
            started, started_cpu = time.perf_counter(), time.process_time()
            predict()  # ends with actions in host memory: nothing is left running
            wall[name].append(1000 * (time.perf_counter() - started))
            cpu[name].append(1000 * (time.process_time() - started_cpu))
    return {
        name: {
            "p50_ms": statistics.median(wall[name]),
            "p95_ms": float(np.quantile(wall[name], 0.95)),
            "cpu_p50_ms": statistics.median(cpu[name]),
        }
        for name in ways
    }


def print_report(views: int, result: dict[str, Any], wanted: list[str], absent: dict[str, str], on_gpu: bool) -> None:
    """One table of the ways and one of the parts."""
    clock, speedup = ("p50_ms", "speedup") if on_gpu else ("cpu_p50_ms", "CPU speedup")
    base = result["ways"].get("naive", {}).get(clock)
    rows: list[list[Any]] = []
    for name in [name for name in wanted if name not in absent]:
        row = result["ways"][name]
        ratio = base / row[clock] if base else None
        over_floor = row["p50_ms"] / result["floor_ms"]
        rows.append([name, row["p50_ms"], row["p95_ms"], ratio, over_floor, row["first_s"], f"{row['difference']:.1e}"])
    rows.append(["floor", result["floor_ms"], *[None] * 5])
    header = [f"{views} view(s)", "p50 ms", "p95 ms", speedup, "over floor", "first call s", "difference"]
    print(f"\n{text_table(header, rows)}")
    print("".join(f"{name}: {absent[name]}\n" for name in wanted if name in absent))
    columns = ("ms", "graph_ms", "gflops", "weights_mb", "floor_ms", "bound")
    header = ["part (cached)", "ms", "graph ms", "GFLOP", "weights MB", "floor ms", "bound by"]
    parts = result["parts"].items()
    print(text_table(header, [[name, *(part.get(column) for column in columns)] for name, part in parts]))


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--views", type=int, nargs="+", default=[1, 2], choices=(1, 2))
    parser.add_argument("--ways", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="WAY")
    parser.add_argument("--rounds", type=int, help="predictions of each way; default 100, with --quick 20")
    parser.add_argument("--quick", action="store_true", help="fewer predictions, one view; on a CPU no compiler")
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers to this file")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    device = pick_device(args.device)
    on_gpu = device.type == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)  # the quickstart's own setting
    size, rounds = "paligemma-3b" if on_gpu else "quickstart", args.rounds or (20 if args.quick else 100)
    wanted = [way for way in args.ways if not (args.quick and way == "compiled" and not on_gpu)]
    absent = {} if on_gpu else dict.fromkeys(GPU_WAYS, "not available on this device")
    if importlib.util.find_spec("torchao") is None:
        absent["int8"] = "needs the torchao package: pip install torchao"
    names = [way for way in wanted if way not in absent]
    peaks = measured_peaks(device)
    machine = torch.cuda.get_device_name(device) if on_gpu else f"{os.cpu_count()} cores, one thread"
    print(f"{size} on {machine}, torch {torch.__version__}, {STEPS} steps, {rounds} predictions of each way")
    print(f"measured: {peaks['flops_per_second'] / 1e12:.2f} TFLOP/s, {peaks['bytes_per_second'] / 1e9:.1f} GB/s")
    report = {"device": machine, "torch": torch.__version__, "size": size, "steps": STEPS, "rounds": rounds, **peaks}
    report["views"] = {}
    for views in args.views[:1] if args.quick else args.views:
        result = bench(size, views, device, names, rounds, peaks)
        report["views"][str(views)] = result
        print_report(views, result, wanted, absent, on_gpu)
    ways, clock = next(iter(report["views"].values()))["ways"], "p50_ms" if on_gpu else "cpu_p50_ms"
    if {"naive", "cached"} <= ways.keys():
        report["cached_speedup"] = ways["naive"][clock] / ways["cached"][clock]
        print(f"\ncached_speedup {report['cached_speedup']:.2f}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
