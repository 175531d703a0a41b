"""Recording demonstrations of scripted experts: what scripts/record_demos.py does, for measurements as well."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import multiprocessing
import os
import pathlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from tqdm import tqdm

from data.convert.conversion import add_encoding_arguments, encoding_of
from data.convert.episode_writer import EpisodeFileWriter
from envs import FIRST_EVALUATION_SEED, expand_tasks, make_env
from scripts._attempt import Attempt
from scripts._takeover import Corridor, WatchedEnv, watched_attempt
from utils.arguments import CommandParser, at_least
from utils.cli import key_values
from utils.misc import writing
from utils.parquet_utils import READ_ERRORS
from utils.text import file_stem

if TYPE_CHECKING:
    from envs.base import RobotEnv

logger = logging.getLogger(__name__)

# Shorthands of --env_options, for options that several simulators have or that documents name: what argparse is told of
# each, and the help. Only those that are given reach the environment.
ENVIRONMENT_FLAGS: dict[str, tuple[dict[str, Any], str]] = {
    "image_size": ({"type": at_least(1)}, "height and width in pixels (default: the simulator's)"),
    "camera": ({}, "camera of image_1 (default: the simulator's)"),
    "second_camera": ({}, "camera of image_2, e.g. gripperPOV (default: no image_2)"),
    "cameras": (
        {"nargs": "+", "metavar": "NAME=CAMERA"},
        "instead of the two: any number of cameras, each a column of that name (CAMERA alone: its own name)",
    ),
    "hide_goal": ({"action": "store_true", "default": None}, "leave goal markers out of the images"),
    "layout_of": ({}, "draw object positions from this task's range; it must share the scene"),
    "max_episode_steps": ({"type": at_least(1)}, "an attempt fails after (default: the simulator's)"),
}


TAKEOVER_DEFAULTS = {"corridor": 0.5, "corridor_steps": 8, "patience": None}  # for flags that are not given


@dataclass(frozen=True)
class TaskSummary:
    """What was recorded of one task."""

    task: str
    path: pathlib.Path
    kept: int  # episodes in the file
    dropped: int  # attempts that failed, and those in which the policy needed no help
    steps: int  # rows in the file
    seconds: float


def recording_parser(description: str | None = None) -> argparse.ArgumentParser:
    """The command line of recording. A flag of the environment that is not given leaves the simulator's default."""
    parser = CommandParser(description)
    parser.add_argument("--env", default="metaworld", help="simulator (default %(default)s)")
    parser.add_argument("--tasks", nargs="+", required=True, help="names, tiers (easy, ...) or all; one file each")
    parser.add_argument("--episodes", type=int, required=True, help="successful episodes wanted of each task")
    parser.add_argument("--output_dir", type=pathlib.Path, required=True, help="folder of the Parquet files")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    help_text = "of the simulator, e.g. image_size=128 camera=corner2; see its class in envs/"
    parser.add_argument("--env_options", nargs="+", default=[], metavar="KEY=VALUE", help=help_text)
    for name, (options, text) in ENVIRONMENT_FLAGS.items():
        parser.add_argument(f"--{name}", help=text, **options)
    parser.add_argument("--steps_after_success", type=int, default=3, help="then stop (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="reset seed of the first attempt (default 0)")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    add_encoding_arguments(parser)
    parser.add_argument(
        "--noise_scale",
        type=float,
        default=0.0,
        help="standard deviation of gaussian noise on the executed action, in the simulator's own unit (noise_unit of "
        "its class: Meta-World 1 cm, ALOHA 0.1 rad); the recorded action stays the expert's, so that recoveries are "
        "shown (DART, Laskey et al. 2017, arXiv 1703.09327) (default 0)",
    )
    help_text = "give each episode one of the task's instructions, drawn by its seed, instead of always the first"
    parser.add_argument("--paraphrase", action="store_true", help=help_text)
    parser.add_argument(
        "--max_attempts_factor",
        type=float,
        default=3.0,
        help="give up when there are not --episodes episodes to keep in this many times as many attempts "
        "(default %(default)s)",
    )
    _add_takeover_flags(parser)
    return parser


def _add_takeover_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("corrections of a policy (docs/editing.md)")
    group.add_argument("--policy", help="checkpoint, or exported folder, that acts; needs --takeover")
    group.add_argument(
        "--takeover", action="store_true", help="the expert finishes where the policy leaves its corridor"
    )
    group.add_argument(
        "--corridor", type=float, help="mean distance of its actions from the expert's, 0 to 2, let pass (default 0.5)"
    )
    group.add_argument("--corridor_steps", type=int, help="steps over which it is the mean (default 8)")
    group.add_argument(
        "--patience", type=int, help="steps until the expert takes over in any case (default: half of the episode's)"
    )


def record(args: argparse.Namespace, on_episode: Callable[[Attempt], None] | None = None) -> list[TaskSummary]:
    """Records every task of ``args`` with ``args.num_workers`` processes.

    Args:
        args: from :func:`recording_parser`, and `command`, which is written into the files.
        on_episode: called with each finished attempt, in order.

    Returns:
        One summary a task, in the order given.

    Raises:
        ValueError: an argument cannot be.
        FileExistsError: an output file exists and ``args.overwrite`` is False, or it is no recording; nothing has been
            recorded.
        RuntimeError: an expert failed too often, or rendering is impossible.
    """
    args = _checked(args)
    with writing(args.output_dir, "choose another --output_dir"):
        args.output_dir.mkdir(parents=True, exist_ok=True)
    # spawn, not fork: a GL context and its threads do not survive a fork
    executor = ProcessPoolExecutor(args.num_workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        return [_record_task(args, task, executor, on_episode) for task in args.tasks]
    finally:
        executor.shutdown(cancel_futures=True)


def record_attempt(args: argparse.Namespace, task: str, seed: int) -> Attempt:
    """Lets the expert try once, or the policy with the expert behind it; runs in a worker process.

    Args:
        args: as for :func:`record`.
        task: name of the task.
        seed: of the reset, and of the noise on the executed actions.

    Returns:
        The attempt, whether or not it succeeded.
    """
    env = _worker_env(args.env, task, json.dumps(environment_options(args)))
    if args.takeover:
        watched = WatchedEnv(env, _corridor(args), encoding_of(args), args.steps_after_success)
        return watched_attempt(watched, args.policy, seed)
    noise = np.random.default_rng((seed, 1))
    observation, _ = env.reset(seed=seed)
    images: dict[str, list[bytes]] = {key: [] for key in observation if key != "state"}
    prompts = env.instructions if args.paraphrase else (env.instruction,)
    prompt = prompts[np.random.default_rng((seed, 2)).integers(len(prompts))]
    attempt = Attempt(seed, prompt, {"instruction": env.instruction, **env.settings()}, images)
    encode = encoding_of(args)
    truncated, steps_left = False, args.steps_after_success
    while not truncated and steps_left >= 0:
        action = env.expert_action()
        for key, encoded in images.items():
            encoded.append(encode(observation[key]))
        attempt.states.append(observation["state"])
        attempt.actions.append(action)
        unit = np.asarray(env.noise_unit, np.float32)
        executed = action + args.noise_scale * unit * noise.standard_normal(action.shape, dtype=np.float32)
        observation, _, _, truncated, info = env.step(executed)
        attempt.success |= info["success"]
        steps_left -= attempt.success
    return attempt


def environment_options(args: argparse.Namespace) -> dict[str, Any]:
    """What --env_options and its shorthands choose.

    Raises:
        ValueError: an argument is no KEY=VALUE, or a shorthand names an option that --env_options has too.
    """
    options = key_values(args.env_options, "--env_options")
    for name in ENVIRONMENT_FLAGS:
        value = getattr(args, name)
        if value is not None and name in options:
            raise ValueError(f"--{name} and --env_options {name}=... say the same; give one of them")
        if value is not None:
            options[name] = value
    return options


def _corridor(args: argparse.Namespace) -> Corridor:
    given = {name: getattr(args, name) for name in TAKEOVER_DEFAULTS}
    return Corridor(*(TAKEOVER_DEFAULTS[name] if value is None else value for name, value in given.items()))


@functools.lru_cache(maxsize=1)
def _worker_env(env: str, task: str, options: str) -> RobotEnv:
    """The environment that this process works in, its options as JSON, since lists are no keys of a cache."""
    return make_env(env, task, **json.loads(options))


def _checked(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with the tasks that `all` and tiers stand for, if they can be."""
    if len(set(args.tasks)) < len(args.tasks):
        raise ValueError(f"--tasks names a task twice: {' '.join(args.tasks)}")
    args = argparse.Namespace(**{**vars(args), "tasks": expand_tasks(args.env, args.tasks)})
    for name, least in (
        ("episodes", 1),
        ("num_workers", 1),
        ("seed", 0),
        ("steps_after_success", 0),
        ("noise_scale", 0),
    ):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} is {getattr(args, name)}, must be at least {least}")
    encoding_of(args)
    environment_options(args)
    _check_takeover(args)
    if args.max_attempts_factor < 1:
        raise ValueError(f"--max_attempts_factor is {args.max_attempts_factor}, must be at least 1")
    existing = [path for task in args.tasks if (path := _path_of(args, task)).exists()]
    if existing and not args.overwrite:
        raise FileExistsError(
            f"{', '.join(map(str, existing))} exists already; choose another --output_dir, or replace with --overwrite"
        )
    for path in existing:
        if not _is_recording(path):
            raise FileExistsError(f"{path} is no recording of this script, so it is not replaced; choose another place")
    if args.seed + args.episodes > FIRST_EVALUATION_SEED:
        logger.warning(
            "--seed %d with %d episodes reaches the seeds that evaluation starts from (%d): evaluate with another "
            "--seed, or success will be measured on scenes that were trained on",
            args.seed,
            args.episodes,
            FIRST_EVALUATION_SEED,
        )
    return args


def _check_takeover(args: argparse.Namespace) -> None:
    if args.takeover != (args.policy is not None):
        raise ValueError("--policy and --takeover go together: a policy that acts, and the expert that finishes")
    given = [name for name in TAKEOVER_DEFAULTS if getattr(args, name) is not None]
    if given and not args.takeover:
        raise ValueError(f"--{given[0]} says when the expert takes over from a policy: give --policy and --takeover")
    if args.takeover and args.noise_scale:
        raise ValueError(f"--noise_scale is {args.noise_scale}, but with --takeover actions are executed as they are")
    if args.takeover and args.paraphrase:
        raise ValueError("--paraphrase belongs to the expert's own demonstrations; the policy is told the instruction")
    _corridor(args)


def _is_recording(path: pathlib.Path) -> bool:
    """Whether a file says that it was recorded here (see `_metadata`)."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except READ_ERRORS:
        return False
    return {b"env", b"task", b"command"} <= metadata.keys()


def _path_of(args: argparse.Namespace, task: str) -> pathlib.Path:
    return args.output_dir / f"{file_stem(task)}.parquet"


def _record_task(
    args: argparse.Namespace, task: str, executor: Executor, on_episode: Callable[[Attempt], None] | None
) -> TaskSummary:
    started = time.perf_counter()
    path = _path_of(args, task)
    kept = dropped = num_steps = 0
    writer: EpisodeFileWriter | None = None
    with ExitStack() as stack:
        progress = stack.enter_context(tqdm(total=args.episodes, desc=task, unit="episode", disable=None))
        for attempt in _attempts(args, task, executor):
            if on_episode is not None:
                on_episode(attempt)
            if not attempt.is_wanted:
                dropped += 1
                progress.set_postfix(dropped=dropped)
                continue
            steps = attempt.steps()
            if writer is None:
                writer = EpisodeFileWriter(
                    path,
                    cameras=list(steps.images),
                    state_dim=steps.state.shape[1],
                    per_action_dim=steps.action.shape[1],
                    metadata=_metadata(args, task, attempt),
                    source=task,
                    extra=attempt.extra,
                )
                stack.enter_context(writer)
            writer.write_episode(kept, len(steps.prompts), [steps])
            kept += 1
            num_steps += len(steps.prompts)
            progress.update()
    return TaskSummary(task, path, kept, dropped, num_steps, time.perf_counter() - started)


def _attempts(args: argparse.Namespace, task: str, executor: Executor) -> Iterator[Attempt]:
    """Yields attempts in the order of their seeds until enough of them have succeeded.

    Never more are under way than can still be needed, so none is thrown away, and never more than a few for
    each worker, so that memory stays flat however many episodes are wanted.
    """
    max_attempts = int(args.episodes * args.max_attempts_factor)
    pending: deque[Future[Attempt]] = deque()
    submitted = kept = 0
    while kept < args.episodes:
        while len(pending) < min(3 * args.num_workers, args.episodes - kept) and submitted < max_attempts:
            pending.append(executor.submit(record_attempt, args, task, args.seed + submitted))
            submitted += 1
        if not pending:
            if args.takeover:
                raise RuntimeError(
                    f"{task}: {kept} of {max_attempts} attempts (seeds {args.seed} to {args.seed + max_attempts - 1}) "
                    f"became corrections, {args.episodes} are wanted: the policy mostly succeeds alone, or the expert "
                    "fails where it takes over; ask for fewer, raise --max_attempts_factor, or lower --corridor"
                )
            raise RuntimeError(
                f"{task}: the expert succeeded in {kept} of {max_attempts} attempts (seeds {args.seed} to "
                f"{args.seed + max_attempts - 1}), {args.episodes} episodes are wanted; ask for fewer, or raise "
                "--max_attempts_factor or --max_episode_steps, or lower --noise_scale"
            )
        attempt = pending.popleft().result()
        kept += attempt.is_wanted
        yield attempt


def _metadata(args: argparse.Namespace, task: str, attempt: Attempt) -> dict[str, Any]:
    return {
        "env": args.env,
        "task": task,
        "instruction": attempt.prompt,
        "noise_scale": args.noise_scale,
        "command": args.command,
        **attempt.settings,
        **_provenance(args),
    }


def _provenance(args: argparse.Namespace) -> dict[str, Any]:
    """Which policy was corrected and when, where one was."""
    if not args.takeover:
        return {}
    from inference.policy_files import policy_stamp  # imports torch

    corridor = {"width": _corridor(args).width, "steps": _corridor(args).steps, "patience": args.patience}
    return {"policy": args.policy, "policy_stamp": policy_stamp(args.policy), "corridor": corridor}
