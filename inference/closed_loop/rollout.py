"""Closed-loop rollouts: policies that drive a gymnasium environment, and the success rates that come of it.

An environment here is what `inference.closed_loop.episode` describes, with `state_dim` and `per_action_dim` beside.

    history of frames ─► policy.plan ─► (T, A) actions ─► executed as `policy.execution` says ─► plan again
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from data.processing import Sample, collate_fn
from inference.closed_loop.episode import Asked, Episode, EpisodeResult, Observation, PlanRequest
from inference.closed_loop.execution import ExecutionSettings
from inference.closed_loop.policies import Policy, own_planner
from inference.closed_loop.video import VIDEO_FPS, tiled, write_video
from inference.metrics import wilson_interval
from inference.predictor import VLAPredictor
from model.action_head.guidance import ActionPrefix, joined
from utils.misc import derive_seed

logger = logging.getLogger(__name__)

GREY = 128  # what a blank image holds: the middle of the range, near zero after the backbone's normalization


class ModelPolicy:
    """A trained policy.

    Args:
        predictor: the policy.
        execution: how plans are executed; None: as the checkpoint's `inference` section says.
        num_inference_steps: sampling steps; None: the predictor's default.
        blind: give the policy grey images, with state and prompt intact. What it still achieves, it achieves
            without looking.
    """

    def __init__(
        self,
        predictor: VLAPredictor,
        execution: ExecutionSettings | None = None,
        num_inference_steps: int | None = None,
        blind: bool = False,
    ) -> None:
        self.predictor, self.num_inference_steps, self.blind = predictor, num_inference_steps, blind
        self.max_seq_len = predictor.max_seq_len
        self.execution = execution or predictor.execution_settings()
        self._seed = self._plans = 0

    def check_widths(self, state_dim: int, per_action_dim: int) -> None:
        """
        Raises:
            ValueError: an environment's state or actions have another width than the policy's.
        """
        for name, found in (("state_dim", state_dim), ("per_action_dim", per_action_dim)):
            wanted = getattr(self.predictor, name)
            if wanted != found:
                raise ValueError(f"the policy has {name} {wanted}, the environment {found}: it was trained for another")

    def reset(self, env: gymnasium.Env, seed: int) -> None:
        """Noise depends on the episode's seed and the number of the plan alone, so an episode can be repeated.

        Raises:
            ValueError: see `check_widths`.
        """
        self.check_widths(env.unwrapped.state_dim, env.unwrapped.per_action_dim)
        self._seed, self._plans = seed, 0

    def plan(self, history: Sequence[Observation], prompt: str, prefix: ActionPrefix | None = None) -> np.ndarray:
        asked = Asked(self._seed, self._plans, PlanRequest(tuple(history), prompt, prefix))
        self._plans += 1
        return self.plan_many([asked])[0]

    def plan_many(self, asked: Sequence[Asked]) -> list[np.ndarray]:
        """A plan (T, A) for each request, those with and those without something to continue in a batch each."""
        plans: list[np.ndarray] = [np.empty(0)] * len(asked)
        for continues in (False, True):
            places = [i for i, one in enumerate(asked) if (one.request.prefix is not None) == continues]
            if not places:
                continue
            chosen = [asked[i] for i in places]
            action_BTA = self.predictor.predict_batch(
                collate_fn([self._sample(one.request) for one in chosen]),
                [derive_seed("rollout", one.seed, one.number) for one in chosen],
                self.num_inference_steps,
                joined([one.request.prefix for one in chosen]) if continues else None,
            )
            for i, action_TA in zip(places, action_BTA, strict=True):
                plans[i] = action_TA
        return plans

    def _sample(self, request: PlanRequest) -> Sample:
        last = request.history[-1]
        images = [
            [self._seen(observation[camera]) for observation in request.history] if camera in last else None
            for camera in ("image_1", "image_2")
        ]
        return self.predictor.observation(*images, prompt=request.prompt, state=last["state"])

    def _seen(self, frame: np.ndarray) -> np.ndarray:
        return np.full_like(frame, GREY) if self.blind else frame


def run_episode(
    env: gymnasium.Env, policy: Policy, seed: int, *, prompt: str | None = None, record: bool = False
) -> EpisodeResult:
    """Drive one episode until success, termination or truncation.

    Args:
        env, prompt, record: as `Episode` takes them.
        policy: plans.
        seed: of the episode's initial state and of the policy's noise.

    Raises:
        ValueError: a plan is too short or not finite.
    """
    episode = Episode(env, policy.execution, seed, prompt=prompt, max_seq_len=policy.max_seq_len, record=record)
    return episode.run(own_planner(policy, env, seed))


def evaluate_task(
    env: gymnasium.Env,
    policy: Policy,
    seeds: Sequence[int],
    *,
    prompt: str | None = None,
    video_dir: str | Path | None = None,
    name: str = "task",
    num_videos: int = 0,
) -> dict[str, Any]:
    """Roll a policy out once per seed.

    Args:
        env, policy, prompt: as `run_episode` takes them.
        seeds: one episode each.
        video_dir, name, num_videos: the first `num_videos` episodes are written to
            `{video_dir}/{name}_seed{seed}.mp4`, and beside each other to `{video_dir}/{name}.mp4`.

    Returns:
        A JSON-able dict: successes, episodes, success_rate, wilson_95, instruction, prompt, and per episode
        seeds, success, steps, plans, held_steps, total_reward; seconds, plan_seconds (mean per plan), videos.
    """
    results: list[EpisodeResult] = []
    recorded: list[list[np.ndarray]] = []
    videos: list[str] = []
    fps = min(env.unwrapped.control_hz, VIDEO_FPS)
    for episode, seed in enumerate(seeds):
        record = video_dir is not None and episode < num_videos
        result = run_episode(env, policy, seed, prompt=prompt, record=record)
        if record:
            videos.append(str(Path(video_dir) / f"{name}_seed{seed}.mp4"))
            write_video(videos[-1], result.frames, fps)
            recorded.append(result.frames)
            result.frames = []
        results.append(result)
        outcome = "success" if result.success else "failure"
        logger.info("%s seed %d: %s, %d steps, %.1f s", name, seed, outcome, result.steps, result.seconds)
    if len(recorded) > 1:
        videos.append(str(Path(video_dir) / f"{name}.mp4"))
        write_video(videos[-1], tiled(recorded), fps)
    instruction = env.unwrapped.instruction
    return task_summary(results, instruction, instruction if prompt is None else prompt, videos)


def task_summary(
    results: Sequence[EpisodeResult], instruction: str, prompt: str, videos: Sequence[str]
) -> dict[str, Any]:
    """A task's episodes as JSON-able values; see `evaluate_task`."""
    successes = sum(result.success for result in results)
    return {
        "successes": successes,
        "episodes": len(results),
        "success_rate": successes / len(results),
        "wilson_95": list(wilson_interval(successes, len(results))),
        "instruction": instruction,
        "prompt": prompt,
        "seeds": [result.seed for result in results],
        "success": [result.success for result in results],
        "steps": [result.steps for result in results],
        "plans": [result.plans for result in results],
        "held_steps": [result.held_steps for result in results],
        "total_reward": [result.total_reward for result in results],
        "seconds": sum(result.seconds for result in results),
        "plan_seconds": sum(r.plan_seconds for r in results) / max(1, sum(r.plans for r in results)),
        "videos": list(videos),
    }


def summarize_tasks(tasks: dict[str, dict[str, Any]], tiers: dict[str, str] | None = None) -> dict[str, Any]:
    """Totals over tasks.

    Args:
        tasks: per task what `task_summary` gives.
        tiers: per task the tier of difficulty that it belongs to; None: there are none.

    Returns:
        successes, episodes, the interval of their ratio, and the mean of the tasks' rates; with tiers also the same
        per tier under `tiers`, and the mean of the tiers' rates, each tier's rate being the mean of its tasks'.
    """
    successes = sum(task["successes"] for task in tasks.values())
    episodes = sum(task["episodes"] for task in tasks.values())
    summary: dict[str, Any] = {
        "successes": successes,
        "episodes": episodes,
        "wilson_95": list(wilson_interval(successes, episodes)),
        "mean_success_rate": sum(task["success_rate"] for task in tasks.values()) / len(tasks),
    }
    if tiers is not None:
        names = dict.fromkeys(tiers.values())
        members = {tier: {task: tasks[task] for task in tasks if tiers[task] == tier} for tier in names}
        summary["tiers"] = {tier: {**summarize_tasks(own), "tasks": len(own)} for tier, own in members.items() if own}
        rates = [tier["mean_success_rate"] for tier in summary["tiers"].values()]
        summary["tier_mean_success_rate"] = sum(rates) / len(rates)
    return summary
