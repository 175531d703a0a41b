"""Mistakes planted between a policy and its robot: how many does one command name from a recorded session?

    python benchmarks/planted_mistakes.py --checkpoint_path C --tasks button-press-topdown-v3 [--quick] [--json F]
    python benchmarks/planted_mistakes.py --env aloha --expert --checkpoint_path C --tasks transfer_cube

A session is 200 steps or more of the policy in closed loop, recorded as `main_eval.py --record` records it, with one
mistake between the simulator and the policy. What `inspect_parquet.py --data_path SESSION --against C` names is
compared with what was planted. Clean sessions on other seeds count false alarms.

With --expert the simulator's scripted expert acts instead of the policy, whose checkpoint then only says what its
training data look like: mistakes show in what is recorded, and mislead nobody.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from PIL import Image, ImageFilter

if not __package__:
    import _repository  # noqa: F401

from data.comparison.against import held_against
from data.convert.rollouts import RolloutRecorder
from envs import make_env
from inference.closed_loop.episode import Episode
from inference.closed_loop.policies import ExpertPolicy
from inference.closed_loop.rollout import ModelPolicy
from inference.policy_files import read_policy
from inference.predictor import VLAPredictor
from utils.arguments import CommandParser, output_file
from utils.cli import key_values
from utils.comparison.kinds import Mismatch
from utils.misc import atomic_path
from utils.recordings import resolve_recordings
from utils.text_table import text_table

Observation = dict[str, np.ndarray]
Picture = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Mistake:
    """One mistake, and the kinds that name it rightly.

    Attributes:
        kinds: any of them counts.
        picture: what the first camera's frames become.
        state: what the state becomes.
        state_late, images_late: by how many steps they lag behind.
        exchanged: the first two cameras are.
        repeat: how many simulator steps each action lasts.
        frozen: the first camera shows its first frame throughout.
        prompt: what becomes of the instruction.
        statistics: what becomes of the policy's statistics.
    """

    kinds: tuple[str, ...]
    picture: Picture | None = None
    state: Picture | None = None
    state_late: int = 0
    images_late: int = 0
    exchanged: bool = False
    repeat: int = 1
    frozen: bool = False
    prompt: Callable[[str], str] | None = None
    statistics: Callable[[dict[str, Any]], dict[str, Any]] | None = None


def with_pillow(change: Callable[[Image.Image], Image.Image]) -> Picture:
    """A change of a Pillow image as one of an array."""
    return lambda frame: np.asarray(change(Image.fromarray(frame)))


def compressed(frame: np.ndarray) -> np.ndarray:
    """JPEG at quality 10."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=10)
    return np.asarray(Image.open(buffer))


def cropped(image: Image.Image) -> Image.Image:
    """The middle 80 %, enlarged."""
    width, height = image.size
    return image.crop((width // 10, height // 10, width - width // 10, height - height // 10)).resize(image.size)


def letterboxed(image: Image.Image) -> Image.Image:
    """Pressed into three quarters of the height, between black bars."""
    width, height = image.size
    canvas = Image.new("RGB", image.size)
    canvas.paste(image.resize((width, height * 3 // 4)), (0, height // 8))
    return canvas


def noisy(frame: np.ndarray) -> np.ndarray:
    """With sensor noise of 18 grey levels."""
    noise = np.random.default_rng(int(frame.sum())).normal(0, 18, frame.shape)
    return np.clip(frame + noise, 0, 255).astype(np.uint8)


def one(dimension: int, change: Callable[[float], float]) -> Picture:
    """A change of one dimension of the state."""

    def changed(state: np.ndarray) -> np.ndarray:
        state = state.copy()
        state[dimension] = change(state[dimension])
        return state

    return changed


def of_another_robot(statistics: dict[str, Any]) -> dict[str, Any]:
    """Statistics of a robot whose state ranges twice as far around another zero."""
    state = {name: [2 * value + 0.3 for value in values] for name, values in statistics["state"].items()
             if isinstance(values, list)}  # fmt: skip
    state["std"] = [2 * value for value in statistics["state"]["std"]]
    return {**statistics, "state": {**statistics["state"], **state}}


@dataclasses.dataclass(frozen=True)
class Body:
    """Which dimensions of a simulator's state the mistakes are planted in.

    Attributes:
        order: of the state, three joints in a cycle.
        sign: a dimension that gets the other sign.
        gripper: its dimension, and the sum of open and closed.
        hangs: a dimension that stays where it is, and there.
        cameras: how many are looked at.
    """

    order: tuple[int, int, int]
    sign: int
    gripper: tuple[int, float]
    hangs: tuple[int, float]
    cameras: int = 1


BODIES = {
    "metaworld": Body((1, 2, 0), 0, (3, 1.0), (2, 0.2)),
    "aloha": Body((1, 2, 0), 1, (6, 1.0), (2, 1.0), cameras=2),
    "libero": Body((1, 2, 0), 1, (6, 0.04), (2, 1.1), cameras=2),
}


def in_order(order: tuple[int, ...]) -> Picture:
    """The first dimensions of the state in another order."""
    return lambda state: np.concatenate([state[list(order)], state[len(order) :]])


def mistakes_of(body: Body) -> dict[str, Mistake]:
    """Every mistake that is planted in a robot."""
    gripper, ends = body.gripper
    two = {"cameras exchanged": Mistake(("cameras_exchanged",), exchanged=True)} if body.cameras > 1 else {}
    return {
        **IN_PICTURES,
        **two,
        "degrees for radians": Mistake(("degrees_for_radians",), state=np.degrees),
        "millimetres for metres": Mistake(("thousandfold",), state=lambda s: s * np.float32(1000)),
        "permuted joints": Mistake(("dimensions_exchanged",), state=in_order(body.order)),
        "a joint with the other sign": Mistake(("sign_reversed", "inverted"), state=one(body.sign, lambda v: -v)),
        "gripper inverted": Mistake(("inverted",), state=one(gripper, lambda v: ends - v)),
        "a joint that hangs": Mistake(("stuck",), state=one(body.hangs[0], lambda v: body.hangs[1])),
        **OTHERS,
    }


IN_PICTURES: dict[str, Mistake] = {
    "colours exchanged": Mistake(("red_and_blue_exchanged",), picture=lambda f: f[..., ::-1]),
    "mirrored": Mistake(("mirrored",), picture=lambda f: f[:, ::-1]),
    "upside down": Mistake(("upside_down", "turned_by_180_degrees"), picture=lambda f: f[::-1]),
    "camera turned by 90 degrees": Mistake(("turned_by_90_degrees",), picture=lambda f: np.rot90(f)),
    "another crop (80 %)": Mistake(("cropped",), picture=with_pillow(cropped)),
    "letterbox instead of stretch": Mistake(("letterboxed",), picture=with_pillow(letterboxed)),
    "JPEG at quality 10": Mistake(("strong_compression",), picture=compressed),
    "blurred lens": Mistake(
        ("blurred",), picture=with_pillow(lambda image: image.filter(ImageFilter.GaussianBlur(1.5)))
    ),
    "sensor noise": Mistake(("noisy_or_sharpened",), picture=noisy),
    "darker light (60 %)": Mistake(("darker",), picture=lambda f: (f * 0.6).astype(np.uint8)),
    "overexposed (150 %)": Mistake(("brighter",), picture=lambda f: np.minimum(f * 1.5, 255).astype(np.uint8)),
    "black camera": Mistake(("camera_black",), picture=np.zeros_like),
    "frozen camera": Mistake(("camera_frozen",), frozen=True),
}
OTHERS: dict[str, Mistake] = {
    "state one step late": Mistake(("state_late",), state_late=1),
    "images two steps late": Mistake(("images_late",), images_late=2),
    "half the control rate": Mistake(("another_rate",), repeat=2),
    "another wording": Mistake(("instruction_unknown",), prompt=lambda text: f"please {text}"),
    "wrong statistics file": Mistake(("statistics_of_other_data",), statistics=of_another_robot),
}


class Robot(gymnasium.Wrapper):
    """A simulator behind a mistake."""

    def __init__(self, env: gymnasium.Env, mistake: Mistake) -> None:
        super().__init__(env)
        self.mistake = mistake
        self._states: deque[np.ndarray] = deque()
        self._frames: deque[Observation] = deque()

    def reset(self, **options: Any) -> tuple[Observation, dict[str, Any]]:
        observation, info = self.env.reset(**options)
        self._states = deque(maxlen=1 + self.mistake.state_late)
        self._frames = deque(maxlen=1 + self.mistake.images_late)
        self._first: np.ndarray | None = None
        return self._told(observation), info

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        for _ in range(self.mistake.repeat):
            observation, reward, terminated, truncated, info = self.env.step(action)
            if terminated or truncated or info["success"]:
                break
        return self._told(observation), reward, terminated, truncated, info

    def _told(self, observation: Observation) -> Observation:
        mistake = self.mistake
        self._states.append(observation["state"])
        self._frames.append({name: value for name, value in observation.items() if name != "state"})
        state, frames = self._states[0], dict(self._frames[0])
        if frames:
            first = next(iter(frames))
            self._first = frames[first] if self._first is None else self._first
            frame = self._first if mistake.frozen else frames[first]
            frames[first] = np.ascontiguousarray(frame if mistake.picture is None else mistake.picture(frame))
            if mistake.exchanged:
                second = list(frames)[1]
                frames[first], frames[second] = frames[second], frames[first]
        state = state if mistake.state is None else mistake.state(state).astype(np.float32)
        return {**frames, "state": state}


def record_session(
    policy: ModelPolicy | ExpertPolicy,
    simulator: str,
    task: str,
    options: dict[str, Any],
    mistake: Mistake,
    seed: int,
    steps: int,
    folder: Path,
) -> Path:
    """Episodes of consecutive seeds until a session has that many steps; returns their folder."""
    if folder.is_dir():
        return folder
    partial, taken = folder.with_name(f".{folder.name}"), 0
    shutil.rmtree(partial, ignore_errors=True)
    recorder = RolloutRecorder(partial)
    recorder.check({"planted": folder.name}, [])
    env = Robot(make_env(simulator, task, **options), mistake)
    try:
        while taken < steps:
            prompt = env.unwrapped.instruction if mistake.prompt is None else mistake.prompt(env.unwrapped.instruction)
            policy.reset(env, seed)
            episode = Episode(env, policy.execution, seed, prompt=prompt, keep_steps=True)
            result = episode.run(lambda request: policy.plan(request.history, request.prompt, request.prefix))
            recorder.write(task, result, prompt, {"control_hz": env.unwrapped.control_hz / mistake.repeat})
            taken, seed = taken + result.steps, seed + 1
    finally:
        env.close()
    return partial.rename(folder)


def named_in(folder: Path, checkpoint: dict[str, Any]) -> list[Mismatch]:
    """What the command names for a recorded session."""
    return held_against(checkpoint, resolve_recordings([folder], "--data_path"))[1]


def parse_args() -> argparse.Namespace:
    parser = CommandParser(__doc__)
    parser.add_argument("--checkpoint_path", type=Path, required=True, help="a policy of that simulator")
    parser.add_argument("--env", choices=BODIES, default="metaworld", help="simulator (default %(default)s)")
    parser.add_argument("--expert", action="store_true", help="the simulator's expert acts, not the policy")
    parser.add_argument("--only", nargs="+", help="these mistakes alone, by name")
    parser.add_argument("--tasks", nargs="+", required=True, help="tasks of the simulator; mistakes take turns on them")
    parser.add_argument("--env_options", nargs="*", default=[], metavar="KEY=VALUE", help="of the simulator")
    parser.add_argument("--steps", type=int, default=200, help="of a session, at least")
    parser.add_argument("--seed", type=int, default=20000, help="of the first session")
    parser.add_argument("--clean", type=int, default=20, help="sessions without a mistake")
    help_text = "keep the sessions here; those that are there already are judged again, not driven again"
    parser.add_argument("--sessions", type=Path, metavar="FOLDER", help=help_text)
    parser.add_argument("--quick", action="store_true", help="six mistakes, three clean sessions")
    parser.add_argument("--json", type=output_file, help="file for the result")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    checkpoint = read_policy(args.checkpoint_path)
    policy = ExpertPolicy() if args.expert else ModelPolicy(VLAPredictor.from_checkpoint(args.checkpoint_path))
    options = key_values(args.env_options, "--env_options")
    mistakes = list(mistakes_of(BODIES[args.env]).items())[:: 4 if args.quick else 1]
    mistakes = [pair for pair in mistakes if args.only is None or pair[0] in args.only]
    clean, rows, alarms = 3 if args.quick else args.clean, [], []
    with tempfile.TemporaryDirectory() if args.sessions is None else contextlib.nullcontext(args.sessions) as scratch:
        for i, (name, mistake) in enumerate(mistakes):
            task, folder = args.tasks[i % len(args.tasks)], Path(scratch) / name.replace(" ", "_")
            record_session(policy, args.env, task, options, mistake, args.seed + 100 * i, args.steps, folder)
            spoilt = checkpoint
            if mistake.statistics is not None:
                spoilt = {**checkpoint, "statistics": [mistake.statistics(one) for one in checkpoint["statistics"]]}
            kinds = [mismatch.kind for mismatch in named_in(folder, spoilt)]
            rows.append((name, task, ", ".join(kinds) or "nothing", "yes" if set(kinds) & set(mistake.kinds) else "NO"))
            print(*rows[-1], sep=" | ", file=sys.stderr)
        for i in range(clean):
            task, folder = args.tasks[i % len(args.tasks)], Path(scratch) / f"clean_{i}"
            record_session(
                policy, args.env, task, options, Mistake(()), args.seed + 50_000 + 100 * i, args.steps, folder
            )
            alarms.append((task, list(map(str, named_in(folder, checkpoint)))))
            print("clean", *alarms[-1], sep=" | ", file=sys.stderr)
    print(text_table(("planted", "task", "named", "right"), rows))
    right, false = sum(row[-1] == "yes" for row in rows), sum(bool(kinds) for _, kinds in alarms)
    print(f"{right} of {len(rows)} named rightly (wanted: 9 of 10); {false} of {clean} clean sessions raised an alarm")
    if args.json:
        result = {"named": right, "planted": len(rows), "false_alarms": false, "clean": clean, "steps": args.steps}
        with atomic_path(args.json) as temporary:
            temporary.write_text(json.dumps({**result, "rows": rows, "alarms": alarms}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
