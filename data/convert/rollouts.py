"""Closed-loop episodes in the schema of docs/data_format.md, one file each: what `main_eval.py --record` keeps."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq

from data.convert.episode_writer import EpisodeFileWriter, ImageEncoding, Steps
from data.schema import PLAN, SEED, SUCCESS, TIMESTAMP, VECTORS
from utils.misc import writing
from utils.parquet_utils import READ_ERRORS, DataError
from utils.text import file_stem

ROLLOUT = "rollout"  # metadata key: what was evaluated, as JSON
_NOT_CAMERAS = (*VECTORS, PLAN, "plan_step")


class Rollout(Protocol):
    """One episode, T steps."""

    seed: int
    success: bool
    recording: Mapping[str, np.ndarray] | None
    """Of each camera uint8 (T, H, W, 3); `state` and `action`, (T, width); `plan` (P, horizon, width) and `plan_step`
    (P,), the step at which each plan was made."""


class RolloutRecorder:
    """Writes each episode of an evaluation to `<folder>/<task>_seed<seed>.parquet`."""

    def __init__(self, folder: Path, encoding: ImageEncoding | None = None) -> None:
        self.folder, self.encoding = folder, encoding or ImageEncoding()
        self._settings: dict[str, Any] = {}

    def path(self, task: str, seed: int) -> Path:
        """The file of an episode."""
        return self.folder / f"{file_stem(task)}_seed{seed:06d}.parquet"

    def check(self, settings: Mapping[str, Any], done: Collection[tuple[str, int]]) -> None:
        """Begin an evaluation, or go on with one.

        Args:
            settings: everything that decides an episode; JSON-able. They become the files' provenance.
            done: (task, seed) of the episodes that were finished before.

        Raises:
            DataError: the folder holds something else, or lacks one of those episodes.
            WriteError: the folder can't be made.
        """
        self._settings = json.loads(json.dumps(settings))
        with writing(self.folder, "choose another --record"):
            self.folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.folder.glob("*.parquet")):
            if _recorded_settings(path) != self._settings:
                raise DataError(
                    f"{path} is not of this evaluation (another policy, other settings, or no rollout) and would be "
                    "mixed with it; choose another --record"
                )
        for task, seed in sorted(done):
            if not self.path(task, seed).is_file():
                raise DataError(
                    f"--record {self.folder} has no {self.path(task, seed).name}, but --output_dir says that this "
                    "episode is finished: begin again with --restart, or choose another --output_dir"
                )

    def write(self, task: str, result: Rollout, prompt: str, env_settings: Mapping[str, Any]) -> None:
        """Write one finished episode.

        Args:
            task: of the simulator.
            result: the episode.
            prompt: the instruction that the policy was given.
            env_settings: of the environment, for the metadata; `control_hz` makes the time stamps.
        """
        seen = result.recording
        length = len(seen["action"])
        hz = env_settings.get("control_hz")
        extra: dict[str, Any] = {
            SEED: np.full(length, result.seed),
            SUCCESS: np.full(length, result.success),
            PLAN: [None] * length,
        }
        for step, plan in zip(seen.get("plan_step", ()), seen.get(PLAN, ()), strict=True):
            extra[PLAN][int(step)] = np.asarray(plan, np.float32).reshape(-1)
        if hz:
            extra[TIMESTAMP] = (np.arange(length) / hz).astype(np.float32)
        cameras = [name for name in seen if name not in _NOT_CAMERAS]
        steps = Steps(
            images={camera: [self.encoding(image) for image in seen[camera]] for camera in cameras},
            state=seen["state"],
            action=seen["action"],
            prompts=[prompt] * length,
            extra=extra,
            terminal=result.success,
        )
        metadata = {"task": task, "seed": str(result.seed), **env_settings, ROLLOUT: json.dumps(self._settings)}
        with EpisodeFileWriter(
            self.path(task, result.seed),
            cameras=cameras,
            state_dim=steps.state.shape[1],
            per_action_dim=steps.action.shape[1],
            metadata=metadata,
            source=task,
            extra=tuple(extra),
        ) as writer:
            writer.write_episode(0, length, [steps])


def _recorded_settings(path: Path) -> dict[str, Any] | None:
    """What was evaluated, from the metadata of a recorded episode; None for any other file."""
    try:
        text = (pq.read_schema(path).metadata or {}).get(ROLLOUT.encode())
        return json.loads(text) if text else None
    except (*READ_ERRORS, json.JSONDecodeError):
        return None
