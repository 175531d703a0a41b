"""pi0 and pi0.5 here and in the lerobot library: the same weights, inputs and machine, one after the other.

    python benchmarks/compare_lerobot.py --lerobot_python ~/lerobot/bin/python [--quick] [--json compare.json]

--lerobot_python is the Python of an environment with `pip install lerobot` (3.12 or newer). Weights are random, about
120 million of them, and written once, as a LeRobot folder that both libraries load. The two run in processes of their
own, in float32 and one thread, and take turns; times are processor time, the figures medians over the turns. That both
give the same chunks and losses is checked. Rows:

    chunk       a processed observation to 50 actions, 10 steps, three cameras or two of three
    training    two samples: forward, backward, clipping and AdamW by the original's presets
    4 draws     the same here with four noise draws per sample, compared by flow targets per second

`compiled` rows compare torch.compile on both sides (--no_compiled leaves them out; they take minutes to compile).
--quick: tiny weights and few turns, to see that it runs; its figures mean nothing.
"""

from __future__ import annotations

import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not __package__:
    import _repository  # noqa: F401

import numpy as np
import torch

from benchmarks.random_pi import (
    ACTION_DIM,
    CAMERAS,
    MAX_DIM,
    SIZES,
    STATE_DIM,
    lerobot_sizes,
    pi_sizes,
    random_checkpoint,
)
from benchmarks.sides import MARK
from inference.serving.export_published import export_published
from model.tiny.paligemma import make_tiny_paligemma
from utils.arguments import CommandParser, output_file
from utils.text_table import text_table

HERE = Path(__file__).resolve().parent
ABSENT, SAMPLES = "left_wrist_0_rgb", 2
PROMPTS = ("pick up the red block and place it in the bowl", "open the upper drawer and put the cup into it")
# kind, what, compiled -> lerobot's time over ours that is wanted at least
WANTED = {("pi0", "chunk"): 1.17, ("pi05", "chunk"): 1.47, ("pi05", "chunk, 2 of 3 cameras"): 2.08}
WANTED |= {("pi0", "training"): 1.1, ("pi05", "training"): 1.4}


class Process:
    """One side: a program that answers questions."""

    def __init__(self, python: str, script: str, folder: Path) -> None:
        self.name = script
        self.log = (folder / f"{script}.log").open("w")
        self.process = subprocess.Popen(
            [python, str(HERE / script), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(Path.home())},
        )

    def ask(self, question: str, **arguments: Any) -> Any:
        """The answer; RuntimeError with the program's last words where it ended instead."""
        self.process.stdin.write(json.dumps({"ask": question, **arguments}) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        self.process.wait()
        self.log.flush()
        said = Path(self.log.name).read_text(encoding="utf-8").strip().splitlines()
        raise RuntimeError(f"{self.name} ended: {said[-1] if said else 'without a word'}")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def make_folder(folder: Path, size: str) -> int:
    """Policies, tokenizer and inputs for both sides; the number of weights that they read of one policy."""
    *_, image_size, horizon = SIZES[size]
    make_tiny_paligemma(folder / "tiny", prompts=PROMPTS)
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    for path in (folder / "tiny").glob("token*"):
        shutil.copy(path, tokenizer)
    rng = np.random.default_rng(0)
    inputs: dict[str, np.ndarray] = {
        f"image_{name}": rng.integers(0, 256, (SAMPLES, 3, image_size, image_size), dtype=np.uint8) for name in CAMERAS
    }
    normal = {"state": (STATE_DIM,), "action": (horizon, ACTION_DIM), "noise": (horizon, MAX_DIM)}
    inputs |= {name: rng.normal(size=(SAMPLES, *shape)).astype(np.float32) for name, shape in normal.items()}
    inputs["time"] = rng.uniform(0.1, 0.9, SAMPLES).astype(np.float32)
    np.savez(folder / "inputs.npz", **inputs)
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    for kind in ("pi0", "pi05"):
        count = write_policy(folder, kind, size)
    return count


def write_policy(folder: Path, kind: str, size: str) -> int:
    """A policy with random weights as LeRobot writes it, and the sizes that its loader must be told."""
    checkpoint, heads = random_checkpoint(kind, size), SIZES[size][2][1]
    export_published(checkpoint, folder / kind, "lerobot")
    (folder / "sizes.json").write_text(json.dumps(lerobot_sizes(pi_sizes(kind, size), heads)))
    return sum(value.numel() for value in checkpoint["model"].values())


def in_turns(sides: tuple[Process, Process], turns: int, question: str, **arguments: Any) -> list[float]:
    """Median processor seconds of each side, the first turn left out; the sides' values must agree."""
    seconds: list[list[float]] = [[], []]
    for turn in range(turns + 1):
        answers = [side.ask(question, repeats=1, **arguments) for side in sides]
        if turn == 0:
            ours, theirs = (np.array(answer["value"]) for answer in answers)
            assert np.abs(ours - theirs).max() < 1e-3 * max(1, np.abs(theirs).max()), (ours, theirs)
            continue
        for times, answer in zip(seconds, answers, strict=True):
            times += answer["seconds"]
    return [statistics.median(times) for times in seconds]


def compare(sides: tuple[Process, Process], kind: str, turns: int, compiled: bool) -> Iterator[dict[str, Any]]:
    """A row for each thing that is compared of one kind of policy."""
    ours = sides[0]
    for side in sides:
        side.ask("load", kind=kind, compiled=compiled)
    two = [name for name in CAMERAS if name != ABSENT]
    for what, cameras in (("chunk", list(CAMERAS)), ("chunk, 2 of 3 cameras", two)):
        here, there = in_turns(sides, turns, "latency", cameras=cameras)
        yield row(kind, what, compiled, "s", here, there, there / here)
    training = {"cameras": list(CAMERAS), "samples": SAMPLES}
    here, there = in_turns(sides, turns, "train", **training)
    yield row(kind, "training", compiled, "samples/s", SAMPLES / here, SAMPLES / there, there / here)
    many = [ours.ask("train", repeats=1, draws=4, **training)["seconds"][0] for _ in range(turns + 1)][1:]
    targets = 4 * SAMPLES / statistics.median(many)
    yield row(
        kind, "training, 4 draws", compiled, "flow targets/s", targets, SAMPLES / there, targets * there / SAMPLES
    )


def row(kind: str, what: str, compiled: bool, unit: str, here: float, there: float, ratio: float) -> dict[str, Any]:
    wanted = None if compiled else WANTED.get((kind, what))
    return {
        "policy": kind,
        "what": what + (", compiled" if compiled else ""),
        "unit": unit,
        "here": here,
        "lerobot": there,
        "ratio": ratio,
        "wanted": wanted,
    }


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--lerobot_python", required=True, help="Python of an environment that has lerobot")
    parser.add_argument("--turns", type=int, default=5, help="measurements of each row, after one that is not counted")
    parser.add_argument("--no_compiled", action="store_true", help="leave out torch.compile")
    parser.add_argument("--quick", action="store_true", help="tiny weights, one turn")
    parser.add_argument("--json", type=output_file, help="write every figure there as well")
    args = parser.parse_args()
    if shutil.which(args.lerobot_python) is None:
        raise ValueError(f"--lerobot_python {args.lerobot_python}: no such program; give the Python that has lerobot")
    turns, size = (1, "tiny") if args.quick else (args.turns, "mid")
    with tempfile.TemporaryDirectory() as name:
        folder, rows = Path(name), []
        count = make_folder(folder, size)
        sides = tuple(
            Process(python, script, folder)
            for python, script in ((sys.executable, "our_side.py"), (args.lerobot_python, "lerobot_side.py"))
        )
        try:
            for compiled in (False,) if args.no_compiled else (False, True):
                for kind in ("pi0", "pi05"):
                    for one in compare(sides, kind, turns, compiled):
                        rows.append(one)
                        figures = f"{one['here']:.3f} here, {one['lerobot']:.3f} {one['unit']} there"
                        print(f"{kind}, {one['what']}: {one['ratio']:.2f} ({figures})", file=sys.stderr, flush=True)
        finally:
            for side in sides:
                side.close()
    print(f"{count / 1e6:.0f} M weights, {platform.processor() or platform.machine()}, torch {torch.__version__} here")
    print(text_table(list(rows[0]), [list(one.values()) for one in rows]))
    if args.json is not None:
        args.json.write_text(json.dumps({"weights": count, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
