"""How many pictures a second each simulator draws, beside what is wanted of it.

    python benchmarks/bench_simulators.py [--quick] [--json simulators.json] [--env metaworld aloha libero]

One process, 224 px, images asked for camera by camera while the expert moves, so that no two pictures are alike.
Limits, on one core of a quiet machine: 45 frames/s a camera in LIBERO, 85 in ALOHA. Frames per second of processor time
stand beside those of the clock: on a machine that others use they come closer to a quiet one's. A simulator whose
packages are not installed is left out, and said to be.
"""

from __future__ import annotations

import json
import os
import pathlib
import time

if not __package__:
    import _repository  # noqa: F401

from envs import make_env
from utils.arguments import CommandParser
from utils.text_table import text_table

IMAGE_SIZE = 224
SCENES = {  # environment -> task, frames/s wanted
    "metaworld": ("window-open-v3", None),
    "aloha": ("transfer_cube", 85),
    "libero": ("libero_goal.put_the_bowl_on_the_plate", 45),
}


def measure(env_name: str, task: str, frames: int) -> dict[str, float]:
    """Frames/s a camera while rendering, by the clock and by the processor, and steps/s without pictures."""
    env = make_env(env_name, task, image_size=IMAGE_SIZE)
    env.reset(seed=0, options={"images_on_request": True})
    env.images()  # makes the context
    drawing = processor = simulating = drawn = 0.0
    for _ in range(frames):
        began = time.perf_counter()
        env.step(env.expert_action())
        stepped, spent = time.perf_counter(), time.process_time()
        drawn += len(env.images())
        simulating += stepped - began
        drawing += time.perf_counter() - stepped
        processor += time.process_time() - spent
    env.close()
    return {
        "frames_per_second": drawn / drawing,
        "frames_per_processor_second": drawn / processor,
        "steps_per_second": frames / simulating,
    }


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--quick", action="store_true", help="few frames: does it run?")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    parser.add_argument("--env", nargs="+", choices=SCENES, default=list(SCENES))
    args = parser.parse_args()
    results, rows = {}, []
    for name in args.env:
        task, wanted = SCENES[name]
        try:
            result = measure(name, task, 5 if args.quick else 60)
        except ModuleNotFoundError as error:
            print(f"{name} is left out: {error}")
            continue
        results[name] = {**result, "wanted_frames_per_second": wanted}
        rows.append([name, task, *(f"{value:.0f}" for value in result.values()), wanted])
    load = os.getloadavg()[0]
    print(
        text_table(
            ["simulator", "task", "frames/s a camera", "of processor time", "steps/s without pictures", "wanted"], rows
        )
    )
    print(f"load of the machine {load:.1f}")
    if args.json:
        args.json.write_text(json.dumps({"simulators": results, "load": load}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
