"""Closed-loop episodes while a policy trains: how often it succeeds now.

    rollouts = TrainingRollouts(config, processors, tasks, make_env)
    counts = rollouts.run(policy, 500, rank=0, world_size=1, stopped=lambda: False)     # (tasks, 2), summed over ranks
    rollouts.videos(500)                           # {"closed_loop/reach-v3_seed20000": Path("…/videos/….mp4")}
    rollouts.values(counts)                        # {"success": 0.6, "success_low": 0.39, ..., "success/reach-v3": 0.8}

An episode depends on its seed and the weights alone, so a resumed run sees the numbers that an uninterrupted one sees.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.processing import PromptTokenizer, VLAImageProcessor
from inference.closed_loop.parallel import Finished, run_episodes
from inference.closed_loop.rollout import ModelPolicy
from inference.closed_loop.simulator import Job, MakeEnv
from inference.metrics import wilson_interval
from inference.predictor import VLAPredictor
from inference.settings import choose_dataset
from model.vla_model import VLAModel
from utils.config_utils import Config
from utils.text import file_stem


class _Stopped(Exception):
    """The run was asked to stop between two episodes."""


class TrainingRollouts:
    """What the `closed_loop` section of a config asks for.

    Args:
        config: of the run.
        processors: of the images and of the prompts, as the run trains with them.
        tasks: of the simulator.
        make_env: task -> environment; see `run_episodes`.
    """

    def __init__(
        self,
        config: Config,
        processors: tuple[VLAImageProcessor, PromptTokenizer],
        tasks: Sequence[str],
        make_env: MakeEnv,
    ) -> None:
        self._config, self._processors = config, processors
        self.tasks, self._make_env = list(tasks), make_env
        first, episodes = config.closed_loop.seed, config.closed_loop.episodes
        self._seeds = range(first, first + episodes)
        self._filmed = self._seeds[: config.closed_loop.num_videos]

    def check(self) -> None:
        """Make an environment of the first task once, so that what does not fit is told before the training begins.

        Raises:
            ValueError: an option that the simulator does not take, one that cannot run here, or an environment of other
                widths or cameras than the policy's.
        """
        _, dataset = choose_dataset(self._config, self._config.closed_loop.dataset)
        try:
            env = self._make_env(self.tasks[0])
        except RuntimeError as error:
            raise ValueError(f"closed_loop: {error}") from error
        env.close()
        for name in ("state_dim", "per_action_dim"):
            wanted, found = getattr(dataset, name), getattr(env, name)
            if wanted != found:
                raise ValueError(f"closed_loop: {self.tasks[0]} has {name} {found}, the policy {wanted}")
        seen = [name for name in env.observation_space if name != "state"]
        if not set(seen) & set(self._config.cameras):
            raise ValueError(
                f"closed_loop: {self.tasks[0]} shows {', '.join(seen) or 'no camera'}, the policy reads "
                f"{', '.join(self._config.cameras)}; give closed_loop.env_options such as cameras=<name>=<camera>"
            )

    def videos(self, step: int) -> dict[str, Path]:
        """Where the filmed episodes of a step are, by their names for trackers; those that ranks wrote so far."""
        places = {
            f"closed_loop/{task}_seed{seed}": self._video(task, seed, step)
            for task in self.tasks
            for seed in self._seeds
            if seed in self._filmed
        }
        return {name: path for name, path in places.items() if path.is_file()}

    def _video(self, task: str, seed: int, step: int) -> Path:
        return self._config.experiment_dir / "videos" / f"{file_stem(task)}_seed{seed}_step_{step:06d}.mp4"

    def run(self, policy: VLAModel, step: int, *, rank: int, world_size: int, stopped: Callable[[], bool]) -> Tensor:
        """Run this rank's share of the episodes with a copy of the policy; film the first ones of each task.

        Args:
            policy: with the weights to be judged; not changed.
            step: of the training, for the names of videos.
            rank, world_size: every rank takes each `world_size`-th episode.
            stopped: asked after each episode; True ends the run early, and the counts have no meaning then.

        Returns:
            float64 (tasks, 2): successes and episodes.

        Raises:
            ValueError: the simulator does not fit the policy.
            RuntimeError: a simulator process died.
        """
        loop = self._config.closed_loop
        predictor = VLAPredictor(
            copy.deepcopy(policy),
            self._config,
            *self._processors,
            device=next(policy.parameters()).device,
            dataset=loop.dataset,
            compile="none",
        )
        counts = torch.zeros(len(self.tasks), 2, dtype=torch.float64)
        jobs = [
            Job(task, seed, video=str(self._video(task, seed, step)) if seed in self._filmed else None)
            for task in self.tasks
            for seed in self._seeds
        ][rank::world_size]

        def on_finished(episode: Finished) -> None:
            counts[self.tasks.index(episode.job.task)] += torch.tensor([float(episode.result.success), 1.0])
            if stopped():
                raise _Stopped

        try:
            if jobs:
                run_episodes(jobs, self._make_env, ModelPolicy(predictor), on_finished, num_envs=loop.num_envs)
        except _Stopped:
            pass
        return counts

    def values(self, counts: Tensor) -> dict[str, Any]:
        """For the log: `success`, the mean over tasks; `success_low` and `success_high`, the 95 % Wilson interval of
        all episodes; `success_episodes`; and of several tasks `success/{task}`."""
        successes, episodes = counts.sum(dim=0).long().tolist()
        rates = (counts[:, 0] / counts[:, 1]).tolist()
        low, high = wilson_interval(successes, episodes)
        values = {"success": sum(rates) / len(rates), "success_low": low, "success_high": high}
        values["success_episodes"] = episodes
        if len(rates) > 1:
            values |= {f"success/{task}": rate for task, rate in zip(self.tasks, rates, strict=True)}
        return values
