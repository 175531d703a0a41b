"""Closed-loop evaluation: every task rolled out from every seed, recorded as it goes, filmed and summarized.

{folder}/rollouts.json                         settings, the episodes of every task, success rates with intervals
{folder}/episodes.jsonl, rollout_settings.json    what an interrupted evaluation goes on from (`closed_loop.record`)
{folder}/videos/                               the filmed episodes, those of a task side by side, one of every task
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from inference.closed_loop.episode import EpisodeResult
from inference.closed_loop.parallel import Finished, Planner, run_episodes
from inference.closed_loop.policies import Control, ExpertPolicy, ReplayPolicy
from inference.closed_loop.record import RolloutRecord
from inference.closed_loop.rollout import ModelPolicy, summarize_tasks
from inference.closed_loop.simulator import Job, MakeEnv
from inference.closed_loop.video import VIDEO_FPS, write_grid
from inference.policy_files import policy_stamp, write_json
from inference.predictor import VLAPredictor
from utils.text import file_stem

logger = logging.getLogger(__name__)


class Recorder(Protocol):
    """Keeps episodes as training data; `data.convert.rollouts.RolloutRecorder` is one."""

    def check(self, settings: Mapping[str, Any], done: Collection[tuple[str, int]]) -> None:
        """Raise a ValueError where the recordings of these finished episodes are missing, or others are in the way."""

    def write(self, task: str, result: EpisodeResult, prompt: str, env_settings: Mapping[str, Any]) -> None:
        """Keep one finished episode, from its `result.recording`."""


def evaluate_closed_loop(
    args: argparse.Namespace,
    predictor: VLAPredictor | None,
    tiers: Mapping[str, str | None],
    seeds: Sequence[int],
    make_env: MakeEnv,
    demonstrations: Callable[[Sequence[str], int, int], Sequence[np.ndarray]],
    recorder: Recorder | None = None,
) -> dict[str, Any]:
    """The closed-loop mode of main_eval.py.

    Args:
        args: its flags, see `inference.eval_args`.
        predictor: the policy; None: what --control names runs in its place.
        tiers, seeds, make_env: as `evaluate_tasks` takes them.
        demonstrations: (wordings of the instruction, state_dim, per_action_dim) -> the recorded actions to replay,
            (steps, A) each.
        recorder: keeps every episode; None: nothing is recorded.

    Returns:
        As `evaluate_tasks`.
    """
    override = args.prompt_override
    given = "own" if args.paraphrase is None else f"paraphrase {args.paraphrase}"
    settings = {
        "checkpoint": args.checkpoint_path,
        "checkpoint_stamp": policy_stamp(args.checkpoint_path),
        "control": args.control or _what_it_sees(args.blind),
        "prompts": "swapped" if args.swap_prompts else given if override is None else override,
        "env": args.env,
        "env_options": args.options,
        "demos_path": args.demos_path,
    }
    prompts = {} if override is None else dict.fromkeys(tiers, override)
    if args.swap_prompts:
        prompts = _swapped({task: _closed(make_env, task).instruction for task in tiers})
    elif args.paraphrase is not None:
        prompts = {task: _paraphrase(make_env, task, args.paraphrase) for task in tiers}
    policy: Planner | dict[str, Control]
    if args.control == "expert":
        policy = {task: ExpertPolicy() for task in tiers}
    elif args.control == "replay":
        policy = {}
        for task in tiers:
            env = _closed(make_env, task)
            wordings = (env.instruction, *getattr(env, "paraphrases", ()))
            policy[task] = ReplayPolicy(demonstrations(wordings, env.state_dim, env.per_action_dim))
    else:
        policy = ModelPolicy(predictor, blind=args.blind)
    return evaluate_tasks(
        Path(args.output_dir),
        tiers,
        seeds,
        make_env,
        policy,
        settings,
        prompts=prompts,
        num_envs=args.num_envs,
        num_videos=args.num_videos,
        restart=args.restart,
        recorder=recorder,
    )


def evaluate_tasks(
    folder: Path,
    tiers: Mapping[str, str | None],
    seeds: Sequence[int],
    make_env: MakeEnv,
    policy: Planner | dict[str, Control],
    settings: dict[str, Any],
    *,
    prompts: Mapping[str, str],
    num_envs: int,
    num_videos: int,
    restart: bool,
    recorder: Recorder | None = None,
) -> dict[str, Any]:
    """Roll a policy out in several tasks.

    Args:
        folder: gets the output; episodes that an interrupted evaluation finished there are not repeated.
        tiers: per task the tier of difficulty, or other group, that it belongs to; None: to none.
        seeds: one episode of every task each.
        make_env, policy, num_envs: as `run_episodes` takes them.
        settings: what decides an episode beside task, seed and policy; JSON-able. The policy's own are added.
        prompts: instructions of tasks that are not given their own.
        num_videos: episodes per task to film, the first ones.
        restart: forget the episodes that the folder holds.
        recorder: keeps every episode before it counts as finished.

    Returns:
        The content of rollouts.json: `settings`; `tasks`, as `task_summary` gives them; `summary`, as `summarize_tasks`
        gives it; `seconds`.

    Raises:
        ValueError: the folder holds another evaluation, also one with other instructions or another version of the
            simulator, or what an episode raises.
        RuntimeError: a simulator process died.
    """
    started = time.perf_counter()
    settings = {**settings, **_policy_settings(policy)}
    record = RolloutRecord(folder, settings, restart)
    settings = record.settings
    record.require_prompts(prompts)
    if recorder is not None:
        recorder.check(settings, record.done)
    filmed = set(seeds[:num_videos])
    control, given = settings.get("control", "policy"), settings.get("prompts", "own")
    words = [] if given == "own" else ["swapped prompt" if given == "swapped" else "other prompt"]
    label = ", ".join([control, *words] if control != "policy" or not words else words)
    jobs = [
        Job(
            *(task, seed, prompts.get(task)),
            str(_video(folder, task, seed)) if seed in filmed else None,
            label,
            keep_steps=recorder is not None,
            alarm=settings.get("alarm"),
        )
        for task in tiers
        for seed in seeds
        if (task, seed) not in record.done
    ]
    progress = tqdm(total=len(jobs), unit="episode", disable=None)

    def on_finished(episode: Finished) -> None:
        job, result = episode.job, episode.result
        if recorder is not None:
            recorder.write(job.task, result, job.prompt or episode.instruction, episode.env_settings)
            result.recording = None
        record.add(episode)
        outcome = "success" if result.success else "failure"
        logger.info("%s seed %d: %s, %d steps, %.1f s", job.task, job.seed, outcome, result.steps, result.seconds)
        progress.update()

    with logging_redirect_tqdm(), progress:
        run_episodes(jobs, make_env, policy, on_finished, num_envs=num_envs)
    results = {task: record.task(task, seeds) for task in tiers}
    _tile_videos(folder, results, min(record.env_settings.get("control_hz", VIDEO_FPS), VIDEO_FPS))
    result = {
        "settings": {**settings, "env_settings": record.env_settings, "seed": seeds[0]},
        "tasks": results,
        "summary": summarize_tasks(results, None if None in tiers.values() else dict(tiers)),
        "seconds": time.perf_counter() - started,
    }
    write_json(folder / "rollouts.json", result)
    return result


def _what_it_sees(blind: bool | Sequence[str]) -> str:
    """`policy`, or `blind` and the names of what it does not see, unless that is all images."""
    return "policy" if blind is False else "blind" if blind is True else " ".join(["blind", *sorted(set(blind))])


def _closed(make_env: MakeEnv, task: str) -> Any:
    """A task's environment, closed: what it says of itself."""
    env = make_env(task)
    env.close()
    return env.unwrapped


def _swapped(instructions: Mapping[str, str]) -> dict[str, str]:
    """Per task the instruction of the next task, the first following the last, that has another than its own."""
    words = list(instructions.values())
    if len(set(words)) < 2:
        raise ValueError(f"--swap_prompts needs tasks with different instructions; found {', '.join(instructions)}")
    swapped = {}
    for i, (task, own) in enumerate(instructions.items()):
        swapped[task] = next(other for other in (*words[i + 1 :], *words[:i]) if other != own)
    return swapped


def _paraphrase(make_env: MakeEnv, task: str, number: int) -> str:
    known = _closed(make_env, task).paraphrases
    if number > len(known):
        raise ValueError(f"--paraphrase {number}: {task} has {len(known)} paraphrases; use --prompt_override")
    return known[number - 1]


def _policy_settings(policy: Planner | dict[str, Control]) -> dict[str, Any]:
    """What decides a policy's plans beside its checkpoint."""
    if isinstance(policy, dict):
        return {"execution": vars(next(iter(policy.values())).execution)}
    settings: dict[str, Any] = {"execution": vars(policy.execution)}
    if isinstance(policy, ModelPolicy):
        predictor = policy.predictor
        settings |= {
            "dataset": predictor.dataset.name,
            "num_inference_steps": predictor.num_inference_steps,
            "quantization": predictor.quantization,
            "compute_dtype": str(predictor.model.compute_dtype).removeprefix("torch."),
            "weight_dtype": str(predictor.weight_dtype).removeprefix("torch."),
        }
        if predictor.settings.best_of > 1:
            settings["best_of"] = predictor.settings.best_of
        alarm, reason = predictor.new_alarm()
        if alarm is None:
            logger.info("%s", reason)
        else:
            settings["alarm"] = asdict(alarm.calibration)
    return settings


def _video(folder: Path, task: str, seed: int) -> Path:
    return folder / "videos" / f"{file_stem(task)}_seed{seed}.mp4"


def _tile_videos(folder: Path, results: dict[str, dict[str, Any]], fps: float) -> None:
    """The filmed episodes of each task side by side, and the first of every task in one grid."""
    firsts = [result["videos"][0] for result in results.values() if result["videos"]]
    for task, result in results.items():
        if len(result["videos"]) > 1:
            path = folder / "videos" / f"{file_stem(task)}.mp4"
            write_grid(path, result["videos"], fps)
            result["videos"].append(str(path))
    if len(firsts) > 1:
        write_grid(folder / "videos" / "grid.mp4", firsts, fps)
