"""The record of a closed-loop evaluation, one line an episode, so that a killed evaluation goes on where it was.

{folder}/rollout_settings.json    what was evaluated; another evaluation may not continue it
{folder}/episodes.jsonl           one finished episode per line
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from inference.closed_loop.episode import EpisodeResult
from inference.closed_loop.parallel import Finished
from inference.closed_loop.rollout import task_summary
from inference.policy_files import is_stamp_of
from utils.misc import atomic_path, read_json_lines

logger = logging.getLogger(__name__)

FIELDS = ("seed", "success", "steps", "plans", "held_steps", "total_reward", "seconds", "plan_seconds", "alarm_step")


class RolloutRecord:
    """The finished episodes of one evaluation.

    Attributes:
        settings: what decides an episode; of an earlier version's record with the policy's stamp that it has.
        lines: of episodes.jsonl.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any], restart: bool = False) -> None:
        """Open the record, or begin one.

        Args:
            folder: of the evaluation.
            settings: everything that decides an episode; JSON-able.
            restart: forget what is there.

        Raises:
            ValueError: the folder holds the episodes of an evaluation with other settings.
        """
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path, settings_path = self.folder / "episodes.jsonl", self.folder / "rollout_settings.json"
        settings = json.loads(json.dumps(settings))
        if restart:
            self.path.unlink(missing_ok=True)
            settings_path.unlink(missing_ok=True)
        self.lines: list[dict[str, Any]] = []
        if self.path.is_file() and not settings_path.is_file():
            raise ValueError(
                f"{self.folder} holds {self.path.name}, but no {settings_path.name} that says of which evaluation; "
                "choose another --output_dir, or discard them with --restart"
            )
        if settings_path.is_file() and self.path.is_file():
            old = json.loads(settings_path.read_text(encoding="utf-8"))
            stamp = old.get("checkpoint_stamp")
            if stamp is not None and is_stamp_of(stamp, settings.get("checkpoint")):
                settings["checkpoint_stamp"] = stamp
            differing = sorted(key for key in old.keys() | settings.keys() if old.get(key) != settings.get(key))
            if differing:
                raise ValueError(
                    f"{self.folder} holds episodes of another evaluation: {', '.join(differing)} differ"
                    f"{'s' if len(differing) == 1 else ''} (there {old.get(differing[0])!r}, now "
                    f"{settings.get(differing[0])!r}); choose another --output_dir, or discard them with --restart"
                )
            self._read()
        self.settings = settings
        with atomic_path(settings_path) as temporary:
            temporary.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    @property
    def done(self) -> set[tuple[str, int]]:
        """(task, seed) of every finished episode."""
        return {(line["task"], line["seed"]) for line in self.lines}

    @property
    def env_settings(self) -> dict[str, Any]:
        """The environment's settings, as the first episode recorded them; see `RobotEnv.settings`."""
        return self.lines[0]["env_settings"] if self.lines else {}

    def require_prompts(self, prompts: Mapping[str, str]) -> None:
        """
        Args:
            prompts: task -> what it will be told.

        Raises:
            ValueError: finished episodes of such a task were told something else.
        """
        for line in self.lines:
            prompt = prompts.get(line["task"], line["prompt"])
            if prompt != line["prompt"]:
                raise ValueError(
                    f"{self.folder} holds episodes of {line['task']} that were told {line['prompt']!r}, now it is told "
                    f"{prompt!r}; choose another --output_dir, or discard them with --restart"
                )

    def add(self, episode: Finished) -> None:
        """Append a finished episode; it is on disk when this returns.

        Raises:
            ValueError: the environment's settings are not those of this task's first episode, such as the version of
                its simulator.
        """
        before = next((line["env_settings"] for line in self.lines if line["task"] == episode.job.task), {})
        for name in before.keys() & episode.env_settings.keys():
            if before[name] != episode.env_settings[name]:
                raise ValueError(
                    f"{self.folder} holds episodes of {episode.job.task} with {name} {before[name]!r}, now it is "
                    f"{episode.env_settings[name]!r}; choose another --output_dir, or discard them with --restart"
                )
        job, values = episode.job, asdict(episode.result)
        line = {"task": job.task, "instruction": episode.instruction, "prompt": job.prompt or episode.instruction}
        line |= {field: values[field] for field in FIELDS}
        uncertainty = [None if math.isnan(value) else value for value in episode.result.uncertainty]
        line |= {"uncertainty": uncertainty, "plan_steps": episode.result.plan_steps}
        line |= {"video": job.video, "env_settings": episode.env_settings}
        self.lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def task(self, name: str, seeds: Sequence[int]) -> dict[str, Any]:
        """The summary of a task over its seeds, in their order; see `task_summary`.

        With `env_settings`, of those that are not as in `self.env_settings`.
        """
        by_seed = {line["seed"]: line for line in self.lines if line["task"] == name}
        lines = [by_seed[seed] for seed in seeds]
        results = [EpisodeResult(**{field: line[field] for field in FIELDS if field in line}) for line in lines]
        videos = [line["video"] for line in lines if line["video"]]
        own = {key: value for key, value in lines[0]["env_settings"].items() if self.env_settings.get(key) != value}
        summary = task_summary(results, lines[0]["instruction"], lines[0]["prompt"], videos)
        return {**summary, "env_settings": own} if own else summary

    def _read(self) -> None:
        """Read finished episodes; a last line that a kill cut off is removed."""
        self.lines = read_json_lines(self.path)
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")
        logger.info("%s: %d episodes were finished before and are not repeated", self.path, len(self.lines))
