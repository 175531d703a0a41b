"""Does `main_eval.py --sensitivity` agree with the truth where it is known? Three small policies on made-up data.

    python benchmarks/sensitivity_truth.py [--quick] [--json truth.json] [--steps 500]

The action to be learned is a position. In every recording one part of the observation shows it, and the other parts
hold chance: pictures with a square at some other place, or states that say nothing.

    blank images    all pictures are grey; the first two values of the state are the position
    no state        `use_state_input: false`; a square in image_1 is at the position
    one camera      a square in image_1 is at the position, that in image_2 is anywhere, and so are all states

What is measured has to be large for what shows the position, and small for all else.
"""

from __future__ import annotations

import io
import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

if not __package__:
    import _repository  # noqa: F401

from utils.arguments import CommandParser
from utils.text_table import text_table

SIZE, STATE, STEPS_PER_EPISODE = 32, 4, 8  # pixels; values of the state; steps of an episode
BACKBONE = ["--image_size", str(SIZE), "--patch_size", "8", "--vision_width", "64", "--vision_layers", "2"]
BACKBONE += ["--text_width", "64", "--text_layers", "1"]
HEAD = {"horizon": 1, "per_action_dim": 2, "hidden_dim": 64, "num_layers": 2, "noise_draws_per_sample": 4}
PROMPTS = ("push the red cube", "open the green drawer")
POLICIES = {"blank images": [], "no state": ["model.action_head_config.use_state_input=false"], "one camera": []}
SHOWS = {  # what shows the position, and what of the table therefore has to be large
    "blank images": ("state[0] at its mean", "state[1] at its mean", "whole state at its mean"),
    "no state": ("image_1 blank", "image_1 of another episode"),
    "one camera": ("image_1 blank", "image_1 of another episode"),
}
TWO_SIDED = ("image_1 and image_2 exchanged", "all cameras blank", "image_1 frozen")  # of these either is right


def picture(place: np.ndarray | None) -> bytes:
    """A grey picture with a red square at a place in [-1, 1], or without one, as PNG."""
    pixels = np.full((SIZE, SIZE, 3), 128, np.uint8)
    if place is not None:
        column, row = ((place + 1) / 2 * (SIZE - 8)).round().astype(int)
        pixels[row : row + 8, column : column + 8] = (220, 30, 30)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_recording(path: pathlib.Path, name: str, episodes: int, seed: int) -> None:
    """One Parquet file of what a policy of POLICIES is trained on."""
    rng, rows = np.random.default_rng(seed), []
    for episode in range(episodes):
        for step in range(STEPS_PER_EPISODE):
            position, elsewhere, state = rng.uniform(-1, 1, 2), rng.uniform(-1, 1, 2), rng.uniform(-1, 1, STATE)
            if name == "blank images":
                state[:2] = position
            shown = (None, None) if name == "blank images" else (position, elsewhere)
            rows.append(
                {
                    "image_1": picture(shown[0]),
                    "image_2": picture(shown[1]),
                    "state": state.astype(np.float32).tolist(),
                    "action": position.astype(np.float32).tolist(),
                    "is_first": step == 0,
                    "is_last": step == STEPS_PER_EPISODE - 1,
                    "is_terminal": step == STEPS_PER_EPISODE - 1,
                    "prompt": PROMPTS[episode % len(PROMPTS)],
                }
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    floats = pa.list_(pa.float32())
    columns = {
        key: pa.array([row[key] for row in rows], floats if key in ("state", "action") else None) for key in rows[0]
    }
    pq.write_table(pa.table(columns), path)


def run(*command: str) -> None:
    """Run one of the repository's scripts, showing the command."""
    print("+ python", " ".join(command), flush=True)
    subprocess.run([sys.executable, *command], check=True)


def sensitivity(folder: pathlib.Path, name: str, steps: int, samples: int) -> dict[str, Any]:
    """sensitivity.json of a policy, trained if it is not there."""
    out = folder / name.replace(" ", "_")
    train, val, statistics = out / "train.parquet", out / "val.parquet", out / "statistics.json"
    checkpoints = out / "experiments" / "policy" / "checkpoints"
    if not checkpoints.is_dir():
        shutil.rmtree(out, ignore_errors=True)
        write_recording(train, name, 200, 0)
        write_recording(val, name, 20, 1)
        run("scripts/make_tiny_paligemma.py", "--output_dir", str(out / "backbone"), *BACKBONE)
        data = ["--config_path", "configs/quickstart.yaml", "--train_data_override", str(train)]
        common = ["data.cameras=[image_1, image_2]", f"data.state_dim={STATE}", "data.val_parquet_files=[]"]
        common += [*(f"model.action_head_config.{key}={value}" for key, value in HEAD.items()), *POLICIES[name]]
        common += ["inference.n_action_steps=1", "data.num_workers=0"]
        run("utils/calculate_normalization_stats.py", *data, "--output_path", str(statistics), "--set", *common)
        common += [f"data.normalization_stats_path={statistics}", f"training.checkpoint_dir={out / 'experiments'}"]
        common += [f"training.max_steps={steps}", "training.epochs=10000", "training.save_every_n_epochs=10000"]
        common += ["training.val_every_n_epochs=10000", "data.batch_size=32"]
        weights = ["--model_name_or_path", str(out / "backbone"), "--experiment_name", "policy"]
        run("main_train.py", *data, *weights, "--set", *common)
    (checkpoint,) = checkpoints.glob("checkpoint_epoch_*.pth.tar")
    flags = ["--eval_data_path", str(val), "--sensitivity", str(samples), "--num_maps", "1", "--num_plots", "0"]
    run("main_eval.py", "--checkpoint_path", str(checkpoint), *flags, "--output_dir", str(out / "results"))
    return json.loads((out / "results" / "sensitivity.json").read_text(encoding="utf-8"))


def judged(name: str, result: dict[str, Any]) -> tuple[float, float]:
    """The smallest change, in variations, of what shows the position, and the largest of what does not."""
    moved = {row["change"]: row["in_variation"] for row in result["rows"] if row["change"] not in TWO_SIDED}
    shows = [moved.pop(change) for change in SHOWS[name]]
    return min(shows), max(moved.values())


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--quick", action="store_true", help="every stage at a fraction of its size")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    parser.add_argument("--steps", type=int, default=500, help="of each training (default %(default)s)")
    parser.add_argument("--folder", type=pathlib.Path, help="of everything made (default demos/sensitivity_truth)")
    args = parser.parse_args()
    folder = args.folder or pathlib.Path("demos", f"sensitivity_truth{'_quick' if args.quick else ''}")
    steps, samples = (20, 16) if args.quick else (args.steps, 160)
    results = {name: sensitivity(folder, name, steps, samples) for name in POLICIES}
    changes = list(dict.fromkeys(row["change"] for result in results.values() for row in result["rows"]))
    moved = {name: {row["change"]: row["in_variation"] for row in result["rows"]} for name, result in results.items()}
    rows = []
    for change in changes:
        cells = []
        for name, found in moved.items():
            mark = " *" if change in SHOWS[name] else ""
            cells.append(f"{found[change]:.3f}{mark}" if found.get(change) is not None else "-")
        rows.append([change, *cells])
    verdicts = {name: judged(name, result) for name, result in results.items()}
    rows.append(["least of * / most of the rest", *(f"{low:.3f} / {high:.3f}" for low, high in verdicts.values())])
    print("\n" + text_table(["actions move by, in variations (* shows the position)", *POLICIES], rows))
    if args.json:
        args.json.write_text(json.dumps({"steps": steps, "moved": moved}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
