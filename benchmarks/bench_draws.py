"""What the uncertainty of a prediction costs, and what the best of N draws costs, on one observation.

    python benchmarks/bench_draws.py --checkpoint_path C [--draws 2 4 8 16] [--json draws.json]

Times are from a collated batch to actions in physical units, medians of rounds in which every way takes its turn: on a
CPU processor time of one thread, which other programs hardly change, on a GPU the clock's.
"""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

if not __package__:
    import _repository  # noqa: F401

from inference.predictor import VLAPredictor
from model.action_head import diffusion, flow_matching
from utils.arguments import CommandParser
from utils.batch import example_batch
from utils.text_table import text_table

MODULES = (flow_matching, diffusion)  # that measure what their steps produced


def nothing(values_MNTA: list[Tensor], *_: Tensor) -> Tensor:
    """In place of `wandering`: no measure."""
    return values_MNTA[0][..., 0]


def without_measure(run: Callable[[], object]) -> Callable[[], object]:
    """The same prediction, but nothing is made of what its steps produced."""

    def unmeasured() -> object:
        kept = [module.wandering for module in MODULES]
        for module in MODULES:
            module.wandering = nothing
        try:
            return run()
        finally:
            for module, function in zip(MODULES, kept, strict=True):
                module.wandering = function

    return unmeasured


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--checkpoint_path", required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--draws", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    predictors = {
        count: VLAPredictor.from_checkpoint(args.checkpoint_path, args.device, best_of=count)
        for count in (1, *args.draws)
    }
    batch = example_batch(predictors[1].config, image_size=predictors[1].image_processor.height)
    ways = {
        f"best of {count}": lambda predictor=predictor: predictor.predict_measured(batch, [[0]])
        for count, predictor in predictors.items()
    }
    ways = {"one draw, no measure": without_measure(ways["best of 1"]), **ways}
    times: dict[str, list[float]] = {name: [] for name in ways}
    order = np.random.default_rng(0)
    clock = time.process_time if predictors[1].device.type == "cpu" else time.perf_counter
    for number in range(3 + (10 if args.quick else args.rounds)):
        for name in order.permutation(list(ways)):  # else each would always follow the same one
            run = ways[name]
            started = clock()
            run()
            if number >= 3:  # the first ones warm up
                times[name].append(1000 * (clock() - started))
    medians = {name: float(np.median(values)) for name, values in times.items()}
    ratios = {name: float(np.median(np.array(times[name]) / times["one draw, no measure"])) for name in ways}
    names = {"best of 1": "one draw, with its uncertainty"}
    rows = [[names.get(name, name), f"{medians[name]:.2f}", f"{ratios[name]:.3f}"] for name in ways]
    print(text_table([str(predictors[1].device), "ms", "median of the turns' ratios"], rows))
    if args.json:
        args.json.write_text(json.dumps({"ms": medians, "ratios": ratios}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
