"""Closed-loop rollouts: a trained policy that drives a gymnasium environment, and its success rates.

An environment here is what `inference.closed_loop.episode` describes, and has `state_dim` and `per_action_dim` as well.

    history of frames ─► policy.plan ─► (T, A) actions ─► executed as `policy.execution` says ─► plan again
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import torch

from data.processing import Sample, collate_fn
from inference.closed_loop.episode import Episode, EpisodeRequest, EpisodeResult, Observation, Plan, PlanRequest
from inference.closed_loop.execution import ExecutionSettings
from inference.closed_loop.policies import Policy, local_planner
from inference.metrics import wilson_interval
from inference.observations import GREY
from inference.predictor import VLAPredictor
from inference.settings import changed_settings
from model.action_head.guidance import joined
from model.context import ActionPrefix
from utils.misc import derive_seed


def execution_settings(predictor: VLAPredictor, **changes: Any) -> ExecutionSettings:
    """How a rollout or a robot executes a policy's chunks.

    Args:
        predictor: the policy, with its settings.
        changes: other values of them by name, such as execution="rtc" or latency_steps=2; None: as they are.

    Raises:
        ValueError: a setting that does not exist or is out of range, a horizon too short for the latency, or a strategy
            that the policy was not trained for.
    """
    config = changed_settings(predictor.settings, predictor.horizon, changes)
    settings = ExecutionSettings.from_config(config, predictor.horizon)
    trained = predictor.config.model.action_head_config.max_clean_prefix
    if settings.strategy == "clean_prefix" and settings.latency_steps > trained:
        raise ValueError(
            f"clean_prefix execution commits latency_steps {settings.latency_steps} actions, but the policy was "
            f"trained with max_clean_prefix {trained}; train with a longer one, or use rtc"
        )
    return settings


class ModelPolicy:
    """A trained policy.

    Args:
        predictor: the policy.
        execution: how plans are executed; None: as the predictor's settings say.
        blind: what the policy is not shown: names of cameras, whose images are grey, and `state`, which is at its mean
            over the training data; True: all cameras. What does it achieve without?

    Raises:
        ValueError: the policy has nothing of that name.
    """

    def __init__(
        self,
        predictor: VLAPredictor,
        execution: ExecutionSettings | None = None,
        blind: bool | Collection[str] = False,
    ) -> None:
        self.predictor = predictor
        self.blind = frozenset(predictor.cameras if blind is True else blind or ())
        names = [*predictor.cameras, *(["state"] if predictor.config.reads_state else [])]
        unknown = sorted(self.blind.difference(names))
        if unknown:
            raise ValueError(f"blind {unknown[0]}: this policy reads no such thing; give some of {', '.join(names)}")
        self.max_seq_len = predictor.max_seq_len
        self.execution = execution or execution_settings(predictor)
        self._seed = self._plans = 0
        self.uncertainty = math.nan  # of the last `plan`

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
        asked = EpisodeRequest(self._seed, self._plans, PlanRequest(tuple(history), prompt, prefix))
        self._plans += 1
        actions, self.uncertainty = self.plan_many([asked])[0]
        return actions

    def plan_many(self, requests: Sequence[EpisodeRequest]) -> list[Plan]:
        """A plan for each request.

        On a processor one after the other: sums in larger batches are rounded differently, and a gripper that touches
        something makes another episode of the last bit. A GPU plans for all that want the same at once.
        """
        if self.predictor.device.type == "cpu":
            return [plan for asked in requests for plan in self._plan_batch([asked])]
        plans = [Plan(np.empty(0))] * len(requests)
        for continues in (False, True):
            indices = [i for i, asked in enumerate(requests) if (asked.request.prefix is not None) == continues]
            for i, plan in zip(indices, self._plan_batch([requests[i] for i in indices]), strict=True):
                plans[i] = plan
        return plans

    def _plan_batch(self, batch: Sequence[EpisodeRequest]) -> list[Plan]:
        """Plans of requests that all have something to continue, or all have not."""
        if not batch:
            return []
        action_KBTA, uncertainty_KB = self.predictor.predict_measured(
            collate_fn([self._sample(asked.request) for asked in batch]),
            [[derive_seed("rollout", asked.seed, asked.number) for asked in batch]],
            prefix=joined([self._prefix(asked.request) for asked in batch])
            if batch[0].request.prefix is not None
            else None,
        )
        found = zip(batch, action_KBTA[0], uncertainty_KB[0], strict=True)
        return [Plan(action_TA + self._moved(asked.request), float(unsure)) for asked, action_TA, unsure in found]

    def _prefix(self, request: PlanRequest) -> ActionPrefix:
        """What the plan has to continue, from where the policy is shown to be."""
        action_BTA = request.prefix.action_BTA - torch.as_tensor(self._moved(request))
        return replace(request.prefix, action_BTA=action_BTA)

    def _moved(self, request: PlanRequest) -> np.ndarray | float:
        """Where relative actions were predicted from the mean state: from there to the true one, (A,)."""
        if "state" not in self.blind:
            return 0.0
        states = np.stack([request.history[-1]["state"], self.mean_state])
        true, shown = self.predictor.action_units.origin(states)
        return true - shown

    @property
    def mean_state(self) -> np.ndarray:
        """Of the training data, float32 (state_dim,)."""
        statistics = self.predictor.model.statistics[self.predictor.dataset_index]["state"]
        return np.array(statistics["mean"], np.float32)

    def _sample(self, request: PlanRequest) -> Sample:
        last = request.history[-1]
        images = {
            camera: [self._shown(camera, observation[camera]) for observation in request.history]
            for camera in self.predictor.cameras
            if camera in last
        }
        if not images:
            raise ValueError(
                f"the policy reads the cameras {', '.join(self.predictor.cameras)}, the environment has "
                f"{', '.join(name for name in last if name != 'state')}; give it those names"
                " (--env_options 'cameras=<name>=<camera of the simulator>,...')"
            )
        state = self.mean_state if "state" in self.blind else last["state"]
        return self.predictor.observation(images=images, prompt=request.prompt, state=state)

    def _shown(self, camera: str, frame: np.ndarray) -> np.ndarray:
        return np.full_like(frame, GREY) if camera in self.blind else frame


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
    return episode.run(local_planner(policy, env, seed))


def task_summary(
    results: Sequence[EpisodeResult], instruction: str, prompt: str, videos: Sequence[str]
) -> dict[str, Any]:
    """A task's episodes as JSON-able values.

    Returns:
        successes, episodes, success_rate, wilson_95, instruction, prompt, and per episode seeds, success, steps, plans,
        held_steps, total_reward, alarm_step; seconds, plan_seconds (mean per plan), videos.
    """
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
        "alarm_step": [result.alarm_step for result in results],
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
        members = {tier: part for tier, part in members.items() if part}
        summary["tiers"] = {tier: {**summarize_tasks(part), "tasks": len(part)} for tier, part in members.items()}
        rates = [tier["mean_success_rate"] for tier in summary["tiers"].values()]
        summary["tier_mean_success_rate"] = sum(rates) / len(rates)
    return summary
