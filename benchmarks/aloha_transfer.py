"""ALOHA's cube transfer: 100 demonstrations, two cores, two action heads.

    python benchmarks/aloha_transfer.py [--quick] [--json aloha.json] [--episodes 50] [--heads flow unet]

Records the scripted expert from above and from the right wrist, trains configs/aloha_transfer.yaml from scratch with
the flow head and with ProVLA's diffusion U-Net, and evaluates in closed loop on seeds from 10000 upwards: each policy,
the same on grey images (blind), a recorded demonstration played back (replay), and the expert. Success is as published:
the left gripper touches the lifted cube.
"""

from __future__ import annotations

import json
import os
import pathlib

if not __package__:
    import _repository  # noqa: F401

from benchmarks._recipe import Recipe, counted, timed
from inference.report import conditions
from utils.arguments import CommandParser
from utils.text_table import text_table

CONFIG, TASK = "configs/aloha_transfer.yaml", "transfer_cube"
BACKBONE = {"image_size": 96, "patch_size": 16}
CAMERAS = {"image_1": "top", "image_2": "right_wrist"}
NOISE = ["--noise_scale", "0.05"]  # 5 mrad on every joint, 100 of 103 attempts succeed: recoveries are shown
HEADS = {
    "flow": [],
    # Of predicted noise, what is left at the last steps is jitter: 0.12 from step to step, where the expert has 0.009.
    "unet": [
        f"model.action_head_config.{setting}" for setting in ("type=diffusion", "denoiser=unet", "prediction_type=v")
    ],
}


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--quick", action="store_true", help="every stage at a fraction of its size")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    parser.add_argument("--demos", type=int, default=100)
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--nproc", type=int, default=2, help="processes that train")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of the training")
    parser.add_argument("--fresh", action="store_true", help="record and train again, whatever is there")
    args = parser.parse_args()
    name, demos, episodes, extra = "aloha_transfer", args.demos, args.episodes, []
    options = {"image_size": BACKBONE["image_size"], **CAMERAS}
    if args.quick:
        name, demos, episodes, extra = "aloha_transfer_quick", 2, 1, ["training.max_steps=5", "data.batch_size=8"]
        options |= {"max_episode_steps": 130}
    results, seconds = {}, {}
    for number, head in enumerate(args.heads):
        settings = [*HEADS[head], *extra, *args.set]
        where = {"num_workers": args.num_workers, "nproc": args.nproc, "data_name": name}
        recipe = Recipe(f"{name}_{head}", CONFIG, "aloha", [TASK], options, BACKBONE, settings, **where)
        if args.fresh and number == 0:
            recipe.forget()
        recipe.record(demos, flags=NOISE)
        recipe.train()
        results[head] = recipe.evaluate("policy", episodes)
        results[f"{head}, blind"] = recipe.evaluate("blind", episodes, ["--blind"])
        if number == 0:
            results |= {run: recipe.evaluate(run, episodes, control=run) for run in ("replay", "expert")}
        seconds |= {f"{head} {stage}": value for stage, value in recipe.seconds.items()}
    rows = [[run, counted(result["summary"])] for run, result in results.items()]
    print("\n" + text_table(["", f"{TASK}, success of {episodes}"], rows))
    print(conditions(next(iter(results.values()))))
    print(timed(seconds))
    if args.json:
        args.json.write_text(json.dumps({"results": results, "seconds": seconds}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
