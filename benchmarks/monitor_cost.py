"""What comparing observations with the training data costs: predictions with the monitor and without, in turns.

    python benchmarks/monitor_cost.py --checkpoint_path C [--quick] [--json F]

Processor time of `VLAPredictor.predict` on frames of the policy's size, in blocks that take turns, so that other work
on the machine falls on both. A second row stands in for a policy of pi0's size on a GPU: the same observations, with a
pause of --large_ms in place of the prediction: what the monitor takes is processor time of the machine that serves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch

if not __package__:
    import _repository  # noqa: F401

from inference.monitor import Monitor
from inference.predictor import VLAPredictor
from utils.arguments import CommandParser, at_least, output_file
from utils.misc import atomic_path
from utils.text_table import text_table

WANTED = 0.02


def observations(predictor: VLAPredictor, count: int) -> list[dict[str, Any]]:
    """Frames with a moving spot, and states within the training data's range."""
    random = np.random.default_rng(0)
    height, width = predictor.image_processor.height, predictor.image_processor.width
    low, high = (np.array(predictor.training_data["state"]["quantiles"])[:, i] for i in (1, -2))
    result = []
    for number in range(count):
        frame = np.full((height, width, 3), 90, np.uint8)
        frame[number % height, :, :] = random.integers(0, 255, (width, 3))
        state = low + (high - low) * (0.5 + 0.4 * np.sin(number / 9 + np.arange(len(low))))
        prompt = next(iter(predictor.training_data["prompts"]))
        result.append(
            {"images": dict.fromkeys(predictor.cameras, frame), "state": state.astype(np.float32), "prompt": prompt}
        )
    return result


def in_turns(predictor: VLAPredictor, blocks: int, length: int) -> tuple[list[float], list[float]]:
    """Processor seconds of each block of predictions without and with the monitor."""
    seconds: tuple[list[float], list[float]] = ([], [])
    monitors = None, Monitor(predictor.training_data, predictor.horizon)
    asked = observations(predictor, length)
    for block in range(2 * blocks + 2):
        which = block % 2
        predictor._monitor = monitors[which]
        started = time.process_time()
        for number, observation in enumerate(asked):
            predictor.predict(**observation, seed=number)
        if block >= 2:  # the first of each are warm-up, and the monitor's own: it looks at every observation then
            seconds[which].append(time.process_time() - started)
    return seconds


def beside_a_large_policy(predictor: VLAPredictor, predictions: int, large_s: float) -> float:
    """Share of a large policy's time that its monitor takes."""
    monitor, spent = Monitor(predictor.training_data, predictor.horizon), 0.0
    for observation in observations(predictor, predictions):
        sample = predictor.observation(**observation, warnings={})
        newest = {camera: sample[camera][-1] for camera in predictor.cameras}
        started = time.process_time()
        monitor.look(newest, observation["state"], observation["prompt"])
        spent += time.process_time() - started
        time.sleep(large_s)
        monitor.predicted(large_s)
    return spent / (predictions * large_s)


def main() -> int:
    parser: argparse.ArgumentParser = CommandParser(__doc__)
    parser.add_argument("--checkpoint_path", required=True, help="a policy whose checkpoint knows its training data")
    parser.add_argument("--blocks", type=at_least(2), default=30, help="of predictions, of each way")
    parser.add_argument("--length", type=at_least(16), default=48, help="predictions of a block")
    parser.add_argument("--large_ms", type=float, default=80.0, help="a prediction of the large policy")
    parser.add_argument("--quick", action="store_true", help="a fifth of the blocks")
    parser.add_argument("--json", type=output_file, help="write the result here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    predictor = VLAPredictor.from_checkpoint(args.checkpoint_path, device="cpu")
    if predictor.training_data is None:
        sys.exit("error: this checkpoint does not know its training data, so it has no monitor; train a new one")
    blocks = max(2, args.blocks // (5 if args.quick else 1))
    plain, watched = in_turns(predictor, blocks, args.length)
    quotients = [b / a for a, b in zip(plain, watched, strict=True)]
    small = statistics.median(quotients) - 1
    large = beside_a_large_policy(predictor, 96 if args.quick else 480, args.large_ms / 1000)
    per = 1000 / args.length
    rows = [
        ("this policy", per * statistics.median(plain), per * statistics.median(watched), f"{100 * small:.2f} %"),
        ("a policy of that many ms", args.large_ms, None, f"{100 * large:.2f} %"),
    ]
    print(text_table(("", "ms without", "ms with the monitor", "cost"), rows))
    print(f"wanted: below {100 * WANTED:g} % of a prediction")
    if args.json:
        result = {"small": small, "large": large, "quotients": quotients, "large_ms": args.large_ms}
        with atomic_path(args.json) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
    return int(max(small, large) >= WANTED)


if __name__ == "__main__":
    sys.exit(main())
