"""Same in, same out: recorded episodes through a running server and through this process.

    python scripts/replay.py --data sessions/monday --checkpoint C --server ws://127.0.0.1:8000
    python scripts/replay.py --data sessions/monday --checkpoint C --explain
    python scripts/replay.py --data sessions/monday --checkpoint C --swap_channels --crop 0.9 --shift 2

Both answer the same input with the same noise, and have to agree; where they do not, the first difference is shown with
the input that causes it. Beside it stands how far their plans are from what was recorded: from what was planned where
the recording has that (`serve_policy.py --record`, `main_eval.py --record`), else from what was done.

--explain, or some distortions by name, say which single mistake in the input would explain what was recorded. The exit
status is 1 where server and process differ.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

if not __package__:
    import _repository  # noqa: F401

from data.comparison import distortions
from data.comparison.against import held_against
from data.comparison.distortions import Distortion
from inference.policy_files import read_policy
from inference.predictor import VLAPredictor
from scripts._replaying import SENT, InProcess, Replay, Served, cause_of, explained, settings_that_differ
from utils.arguments import CommandParser, at_least, output_file, run_command
from utils.config_utils import ConfigError
from utils.misc import atomic_path, set_up_logging
from utils.recordings import resolve_recordings
from utils.text_table import text_table

MAX_SHOWN = 8  # distortions that the table lists
BETTER, MOST = 0.7, 0.75  # what explains: this much of the distance is left, and most steps come nearer
EXPLAINED = 0.02  # distance, in spreads, below which what was recorded follows from its own input, ...
CERTAIN = 0.1  # ... unless a mistake leaves so little of it that chance is ruled out
MAX_PROMPTS = 8  # other instructions that are tried


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(__doc__)
    parser.add_argument("--data", required=True, help="recorded episodes: files or a folder of the training schema")
    parser.add_argument("--checkpoint", help="*.pth.tar, an exported folder, or a hub id of one: this process")
    parser.add_argument("--server", metavar="ws://HOST:PORT", help="a running scripts/serve_policy.py")
    parser.add_argument("--token", help="that the server asks for (or --token_env)")
    parser.add_argument("--token_env", help="environment variable with the token")
    parser.add_argument("--dataset", help="for a policy trained on a mixture: the dataset whose robot it drives")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--use_amp", action=argparse.BooleanOptionalAction, help="bfloat16; default: as trained")
    parser.add_argument("--num_inference_steps", type=at_least(1), help="of this process; default: the checkpoint's")
    parser.add_argument("--steps", type=at_least(1), default=50, help="that are replayed, spread evenly (default 50)")
    text = "largest distance of plans that agree, in spreads of the recorded actions (default %(default)s)"
    parser.add_argument("--tolerance", type=float, default=1e-3, help=text)
    text = "how frames go to the server: resized, padded: to its image_size, as clients do it; jpeg: of quality 75"
    parser.add_argument("--send", choices=SENT, default=SENT[0], help=text)
    parser.add_argument("--json", type=output_file, help="write the result here")
    add_distortion_flags(parser.add_argument_group("single mistakes that may explain what was recorded"))
    args = parser.parse_args()
    if args.checkpoint is None and args.server is None:
        parser.error("nobody to ask: give --checkpoint, --server, or both, which are compared then")
    for flag, given, needs in (
        ("--token", args.token, args.server),
        ("--token_env", args.token_env, args.server),
        ("--send", args.send != SENT[0], args.server),
        ("--num_inference_steps", args.num_inference_steps, args.checkpoint),
        ("--dataset", args.dataset, args.checkpoint),
    ):
        if given and not needs:
            parser.error(f"{flag} is for {'--server' if needs is args.server else '--checkpoint'}, which is not given")
    if args.token and args.token_env:
        parser.error("--token and --token_env both give the token; give one of them")
    return args


def add_distortion_flags(group: argparse._ArgumentGroup) -> None:
    """One flag a mistake; --explain tries all."""
    group.add_argument("--explain", action="store_true", help="try every mistake that is known")
    group.add_argument("--camera", help="whose pictures the flags below change (default: those of all)")
    group.add_argument("--shift", type=int, metavar="STEPS", help="pictures come late")
    group.add_argument("--state_shift", type=int, metavar="STEPS", help="the state comes late")
    group.add_argument("--swap_channels", action="store_true", help="red and blue exchanged")
    group.add_argument("--swap_cameras", nargs=2, metavar="CAMERA", help="two cameras exchanged")
    group.add_argument("--mirror", action="store_true", help="left and right exchanged")
    group.add_argument("--flip", action="store_true", help="upside down")
    group.add_argument("--rotate", type=int, choices=(90, 180, 270), help="degrees, counterclockwise")
    group.add_argument("--crop", type=float, metavar="SHARE", help="the middle part alone, enlarged")
    group.add_argument("--letterbox", type=float, metavar="SHARE", help="pressed into that share of the height")
    group.add_argument("--brightness", type=float, metavar="FACTOR", help="brighter or darker")
    group.add_argument("--blur", type=float, metavar="PIXELS", help="of 224")
    group.add_argument("--jpeg", type=int, metavar="QUALITY", help="strong compression")
    group.add_argument("--state_scale", type=float, metavar="FACTOR", help="in another unit: 57.3 for degrees")
    group.add_argument("--state_negate", type=int, metavar="DIMENSION", help="with the other sign")
    group.add_argument("--state_order", type=int, nargs="+", metavar="DIMENSION", help="all dimensions in their order")
    group.add_argument("--prompt", help="another instruction was given")


def chosen_distortions(args: argparse.Namespace, replay: Replay, prompts: Sequence[str]) -> list[Distortion]:
    """What the flags ask for.

    Raises:
        ConfigError: a camera or a dimension that is not there, or a number that can't be.
    """
    cameras, width = replay.cameras, int(replay.store.state.shape[1])
    for camera in [*([args.camera] if args.camera else []), *(args.swap_cameras or [])]:
        if camera not in cameras:
            raise ConfigError(f"there is no camera {camera!r}; the recording and the policy have {', '.join(cameras)}")
    if args.camera and not any(args.__dict__[name] for name in PICTURES):
        raise ConfigError(
            f"--camera says whose pictures {', '.join('--' + name for name in PICTURES)} change; give one"
        )
    if args.state_negate is not None and not 0 <= args.state_negate < width:
        raise ConfigError(f"--state_negate {args.state_negate}: the state has {width} values, 0 to {width - 1}")
    if args.state_order is not None and sorted(args.state_order) != list(range(width)):
        found = " ".join(map(str, args.state_order))
        raise ConfigError(f"--state_order {found}: wanted each of 0 to {width - 1} once, in the order they come in")
    for name, (low, high) in LIMITS.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ConfigError(f"--{name} is {value:g}; wanted {low:g} to {high:g}")
    for name in ("shift", "state_shift"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"--{name} is {getattr(args, name)}; wanted by how many steps it is late, 1 or more")
    result = list(_named(args))
    if args.explain:
        takes_state, state = replay.needs.takes_state, np.asarray(replay.store.state)
        result += distortions.every_distortion(cameras, state, prompts[:MAX_PROMPTS], takes_state)
    return result


LIMITS = {
    "crop": (0.05, 1),
    "letterbox": (0.05, 1),
    "brightness": (0, 100),
    "blur": (0, 224),
    "jpeg": (1, 95),
    "state_scale": (-1e6, 1e6),
}
PICTURES = {
    "swap_channels": lambda _: distortions.swapped_channels,
    "mirror": lambda _: lambda frame: frame[:, ::-1],
    "flip": lambda _: lambda frame: frame[::-1],
    "rotate": lambda degrees: distortions.turned(degrees // 90),
    "crop": distortions.cropped,
    "letterbox": distortions.letterboxed,
    "brightness": distortions.brightened,
    "blur": distortions.blurred,
    "jpeg": distortions.compressed,
}
OTHERS = {
    "shift": lambda value: {"images_late": value},
    "state_shift": lambda value: {"state_late": value},
    "swap_cameras": lambda pair: {"exchanged": {pair[0]: pair[1], pair[1]: pair[0]}},
    "state_scale": lambda value: {"state": distortions.scaled(value)},
    "state_negate": lambda value: {"state": distortions.negated(value)},
    "state_order": lambda value: {"state": distortions.reordered(value)},
    "prompt": lambda value: {"prompt": value},
}


def _named(args: argparse.Namespace) -> Iterator[Distortion]:
    """Those that were asked for by a flag of their own."""
    for name in (*PICTURES, *OTHERS):
        value = getattr(args, name)
        if value is None or value is False:
            continue
        text = "" if value is True else " ".join(map(str, value)) if isinstance(value, list) else f"{value}"
        told = " ".join(filter(None, (f"--{name}", text)))
        if name in PICTURES:
            told += f" of {args.camera}" if args.camera else ""
            yield Distortion(told, picture=PICTURES[name](value), camera=args.camera)
        else:
            yield Distortion(told, **OTHERS[name](value))


def answerers(args: argparse.Namespace) -> tuple[InProcess | None, Served | None]:
    """This process and the server, as far as they were asked for.

    Raises:
        ConfigError, CheckpointError: one of them is not there.
    """
    served = None
    if args.server:
        token = args.token
        if args.token_env:
            token = os.environ.get(args.token_env)
            if not token:
                raise ConfigError(f"--token_env {args.token_env}: no such environment variable, or it is empty")
        served = Served(args.server, token, args.send)
    if args.checkpoint is None:
        return None, served
    settings = {"num_inference_steps": args.num_inference_steps, "use_amp": args.use_amp}
    return InProcess(VLAPredictor.from_checkpoint(args.checkpoint, args.device, args.dataset, **settings)), served


def compared(replay: Replay, process: InProcess, server: Served, tolerance: float) -> dict[str, Any]:
    """Whether the two agree, and at the first difference why not; prints it."""
    for line in settings_that_differ(process, server):
        print(f"note: {line}")
    distances, first = [], None
    for row in replay.steps:
        shown = replay.shown(row)
        distances.append(replay.distance(process.answer(shown), server.answer(shown)))
        if first is None and distances[-1] > tolerance:
            first = row
    agree = sum(distance <= tolerance for distance in distances)
    result: dict[str, Any] = {"agree": agree, "of": len(distances), "largest": max(distances)}
    if first is None:
        print(f"server and process agree in all {len(distances)} steps (largest distance {max(distances):.2g})")
        return result
    cause = cause_of(replay, first, process, server, tolerance)
    i = replay.steps.index(first)
    print(
        f"server and process differ, first at {replay.place(first)} by {distances[i]:.3g} spreads; {agree} steps agree"
    )
    print(f"cause: {cause}")
    shown = replay.shown(first)
    rows = [
        (f"action[{d}]", float(here), float(there))
        for d, (here, there) in enumerate(zip(process.answer(shown)[0], server.answer(shown)[0], strict=True))
    ]
    print(text_table(("first action", process.name, server.name), rows))
    return result | {"first": replay.place(first), "cause": cause}


def explain(replay: Replay, answerer: InProcess | Served, tried: list[Distortion]) -> dict[str, Any]:
    """Which single mistake explains what was recorded; prints it."""
    ranked = explained(replay, answerer, tried, lambda name: logging.debug("trying: %s", name))
    (_, plain), best = ranked[0], ranked[1]
    rows = [
        (distortion.name, float(distance.mean()), f"{100 * float((distance < plain).mean()):.0f} %")
        for distortion, distance in ranked[: 1 + MAX_SHOWN]
    ]
    print(f"\n{len(tried)} single mistakes tried on {len(plain)} steps, {answerer.name} answering:")
    print(text_table(("the input", "distance from what was recorded", "nearer at"), rows))
    explains = best[1].mean() < BETTER * plain.mean() and (best[1] < plain).mean() >= MOST
    certain = replay.has_plans and best[1].mean() < CERTAIN * plain.mean()
    if plain.mean() < EXPLAINED and not (explains and certain):
        text = "what was recorded follows from its own input: nothing has to be explained"
        explains = False
    elif explains:
        text = f"best explained by: {best[0].name}"
    else:
        text = "no single mistake that was tried explains it"
    print(text)
    return {"best": best[0].name if explains else None, "table": rows}


def main() -> int:
    args = parse_args()
    set_up_logging()
    for name in ("data.episode_store", "vla_client.client"):  # what neutral inputs are warned of is no news
        logging.getLogger(name).setLevel(logging.ERROR)
    process, server = answerers(args)
    if process and server and (mine := process.needs()) != (theirs := server.needs()):
        for name in ("cameras", "state_columns", "horizon", "per_action_dim", "max_seq_len"):
            if (here := getattr(mine, name)) != (there := getattr(theirs, name)):
                raise ConfigError(
                    f"the server serves another policy: {name} {there}, in --checkpoint {args.checkpoint} {here}; "
                    "compare with the checkpoint that it serves"
                )
    asked = [one for one in (process, server) if one is not None]
    replay = Replay(args.data, asked[0].needs(), args.steps)
    known = process.predictor.training_data["prompts"] if process and process.predictor.training_data else {}
    tried = chosen_distortions(args, replay, [*dict.fromkeys([*replay.store.prompts, *known])])
    what = "planned" if replay.has_plans else "done"
    print(
        f"{args.data}: {len(replay.store)} steps of {replay.store.num_episodes} episodes, {len(replay.steps)} replayed"
    )
    result: dict[str, Any] = {"steps": len(replay.steps)}
    if process and server:
        result["agreement"] = compared(replay, process, server, args.tolerance)
    rows = []
    for one in asked:
        away = [replay.distance(one.answer(replay.shown(row)), replay.recorded(row)) for row in replay.steps]
        rows.append((one.name, what, float(np.mean(away)), float(max(away))))
    print()
    print(text_table(("plans of", "beside what was", "mean distance", "largest"), rows))
    print("distances: root mean squares over a plan, in spreads (standard deviations) of the recorded actions")
    result["recorded"] = [{"plans_of": row[0], "beside": what, "mean": row[2], "largest": row[3]} for row in rows]
    if tried:
        result["explained"] = explain(replay, asked[0], tried)
    if args.explain and process:
        named = held_against(read_policy(args.checkpoint), resolve_recordings([args.data], "--data"), args.dataset)[1]
        print("\nthe recorded pictures and states beside the training data:")
        print("\n".join(f"  {mismatch}" for mismatch in named) or "  nothing differs")
        result["beside_training"] = list(map(str, named))
    if args.json:
        with atomic_path(args.json) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
    agreement = result.get("agreement", {})
    return int(agreement.get("agree", 0) < agreement.get("of", 0))


if __name__ == "__main__":
    sys.exit(run_command(main))
