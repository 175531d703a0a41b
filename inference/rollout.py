"""Closed-loop rollouts: policies that drive a gymnasium environment, and the success rates that come of it.

An environment here gives observations `{"image_1": uint8 (H, W, 3), optionally "image_2", "state": float32}`,
reports `info["success"]`, and carries `instruction`, `control_hz`, `state_dim` and `per_action_dim`.

    history of frames ─► policy.plan ─► (T, A) actions ─► the first n_action_steps are executed ─► plan again
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import gymnasium
import numpy as np

from inference.metrics import wilson_interval
from inference.predictor import VLAPredictor
from inference.video import captioned, tiled, write_video
from utils.misc import derive_seed

logger = logging.getLogger(__name__)

GREY = 128  # what a blank image holds: the middle of the range, near zero after the backbone's normalization
VIDEO_FPS = 20  # at most, so that an episode of a fast simulator can be followed
Observation = dict[str, np.ndarray]


class Policy(Protocol):
    """Anything that plans actions; one instance drives one episode at a time."""

    max_seq_len: int  # frames of history that `plan` wants
    n_action_steps: int  # actions of each plan that are executed

    def reset(self, env: gymnasium.Env, seed: int) -> None:
        """Start an episode that was reset with `seed`."""

    def plan(self, history: Sequence[Observation], prompt: str) -> np.ndarray:
        """Actions (T, A), T at least n_action_steps, from the last frames (oldest first) and the instruction."""


class ModelPolicy:
    """A trained policy.

    Args:
        predictor: the policy.
        n_action_steps: executed actions per prediction; None: the predictor's default.
        num_inference_steps: sampling steps; None: the predictor's default.
        blind: give the policy grey images, with state and prompt intact. What it still achieves, it achieves
            without looking.
    """

    def __init__(
        self,
        predictor: VLAPredictor,
        n_action_steps: int | None = None,
        num_inference_steps: int | None = None,
        blind: bool = False,
    ) -> None:
        self.predictor, self.num_inference_steps, self.blind = predictor, num_inference_steps, blind
        self.max_seq_len = predictor.max_seq_len
        self.n_action_steps = n_action_steps or predictor.n_action_steps
        if self.n_action_steps > predictor.horizon:
            raise ValueError(
                f"n_action_steps is {self.n_action_steps}, but the policy predicts a horizon of {predictor.horizon} "
                "actions; at most all of them can be executed"
            )
        self._seed = self._plans = 0

    def reset(self, env: gymnasium.Env, seed: int) -> None:
        """Noise depends on the episode's seed and the number of the plan alone, so an episode can be repeated.

        Raises:
            ValueError: the environment's state or actions have another width than the policy's.
        """
        for name in ("state_dim", "per_action_dim"):
            wanted, found = getattr(self.predictor, name), getattr(env.unwrapped, name)
            if wanted != found:
                raise ValueError(f"the policy has {name} {wanted}, the environment {found}: it was trained for another")
        self._seed, self._plans = seed, 0

    def plan(self, history: Sequence[Observation], prompt: str) -> np.ndarray:
        images = {
            camera: [self._seen(observation[camera]) for observation in history] if camera in history[-1] else None
            for camera in ("image_1", "image_2")
        }
        seed = derive_seed("rollout", self._seed, self._plans)
        self._plans += 1
        return self.predictor.predict(
            images["image_1"],
            images["image_2"],
            prompt=prompt,
            state=history[-1]["state"],
            seed=seed,
            num_inference_steps=self.num_inference_steps,
        )

    def _seen(self, frame: np.ndarray) -> np.ndarray:
        return np.full_like(frame, GREY) if self.blind else frame


class ReplayPolicy:
    """Plays demonstrations back without looking: the floor that any policy must beat.

    The episode's seed chooses the demonstration (seed modulo their number). After its end its last action is
    repeated, so that the control has as much time as a policy has.

    Args:
        demonstrations: actions of one episode each, (steps, A), physical units.
    """

    max_seq_len = 1
    n_action_steps = 1

    def __init__(self, demonstrations: Sequence[np.ndarray]) -> None:
        if not demonstrations:
            raise ValueError("no demonstration to replay")
        self.demonstrations = list(demonstrations)
        self._actions, self._step = self.demonstrations[0], 0

    def reset(self, env: gymnasium.Env, seed: int) -> None:
        self._actions, self._step = self.demonstrations[seed % len(self.demonstrations)], 0

    def plan(self, history: Sequence[Observation], prompt: str) -> np.ndarray:
        step = min(self._step, len(self._actions) - 1)
        self._step += 1
        return self._actions[step : step + 1]


class ExpertPolicy:
    """The environment's own scripted expert: the ceiling of what its demonstrations can teach."""

    max_seq_len = 1
    n_action_steps = 1

    def reset(self, env: gymnasium.Env, seed: int) -> None:
        self._env = env.unwrapped

    def plan(self, history: Sequence[Observation], prompt: str) -> np.ndarray:
        return np.asarray(self._env.expert_action())[None]


@dataclass
class EpisodeResult:
    """One episode.

    Attributes:
        seed: given to `env.reset`.
        success: reported at any step; the episode ends there.
        steps: environment steps taken. plans: how often the policy was asked.
        total_reward: sum of rewards.
        seconds, plan_seconds: wall time, and the part of it that the policy took.
        frames: captioned frames, one per step and the first; empty unless recorded.
    """

    seed: int
    success: bool
    steps: int
    plans: int
    total_reward: float
    seconds: float
    plan_seconds: float
    frames: list[np.ndarray] = field(default_factory=list, repr=False)


def run_episode(
    env: gymnasium.Env,
    policy: Policy,
    seed: int,
    *,
    prompt: str | None = None,
    record: bool = False,
) -> EpisodeResult:
    """Drive one episode until success, termination or truncation.

    Args:
        env: see the module's text. Actions are sent as predicted; clipping is the environment's business.
        policy: plans; the history it gets is one entry per time step, the newest last, shorter than
            `max_seq_len` near the episode's start.
        seed: of the episode's initial state and of the policy's noise.
        prompt: instead of the environment's instruction.
        record: keep captioned frames of image_1.

    Raises:
        ValueError: the policy plans fewer actions than it wants executed, or not finite ones.
    """
    started = time.perf_counter()
    observation, _ = env.reset(seed=seed)
    policy.reset(env, seed)
    prompt = env.unwrapped.instruction if prompt is None else prompt
    history: deque[Observation] = deque([observation], maxlen=policy.max_seq_len)
    result = EpisodeResult(seed, False, 0, 0, 0.0, 0.0, 0.0)
    queue: deque[np.ndarray] = deque()

    def keep_frame() -> None:
        if record:
            state = f"seed {seed}  step {result.steps}" + ("  success" if result.success else "")
            result.frames.append(captioned(observation["image_1"], (prompt, state), good=result.success))

    keep_frame()
    ended = False
    while not (ended or result.success):
        if not queue:
            plan_started = time.perf_counter()
            actions = policy.plan(tuple(history), prompt)
            result.plan_seconds += time.perf_counter() - plan_started
            result.plans += 1
            bad = int((~np.isfinite(actions)).any(axis=-1).sum())
            if len(actions) < policy.n_action_steps or bad:
                raise ValueError(
                    f"seed {seed} step {result.steps}: the policy planned {len(actions)} actions, {bad} of them not "
                    f"finite; wanted at least {policy.n_action_steps}, all finite"
                )
            queue.extend(actions[: policy.n_action_steps])
        observation, reward, terminated, truncated, info = env.step(queue.popleft())
        history.append(observation)
        result.steps += 1
        result.total_reward += float(reward)
        result.success = bool(info["success"])
        ended = terminated or truncated
        keep_frame()
    result.seconds = time.perf_counter() - started
    return result


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
        seeds, success, steps, plans, total_reward; seconds, plan_seconds (mean per plan), videos.
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
    successes = sum(result.success for result in results)
    instruction = env.unwrapped.instruction
    return {
        "successes": successes,
        "episodes": len(results),
        "success_rate": successes / len(results),
        "wilson_95": list(wilson_interval(successes, len(results))),
        "instruction": instruction,
        "prompt": instruction if prompt is None else prompt,
        "seeds": [result.seed for result in results],
        "success": [result.success for result in results],
        "steps": [result.steps for result in results],
        "plans": [result.plans for result in results],
        "total_reward": [result.total_reward for result in results],
        "seconds": sum(result.seconds for result in results),
        "plan_seconds": sum(r.plan_seconds for r in results) / max(1, sum(r.plans for r in results)),
        "videos": videos,
    }


def summarize_tasks(tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Totals over tasks: successes, episodes, the interval of their ratio, and the mean of the tasks' rates."""
    successes = sum(task["successes"] for task in tasks.values())
    episodes = sum(task["episodes"] for task in tasks.values())
    return {
        "successes": successes,
        "episodes": episodes,
        "wilson_95": list(wilson_interval(successes, episodes)),
        "mean_success_rate": sum(task["success_rate"] for task in tasks.values()) / len(tasks),
    }
