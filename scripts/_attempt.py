"""One attempt at a task that is being recorded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.convert.episode_writer import Steps
from data.schema import INTERVENTION, SEED, SUCCESS


@dataclass
class Attempt:
    """One attempt of the expert, or of a policy and the expert after it. T time steps."""

    seed: int
    prompt: str
    settings: dict[str, Any]  # of the environment
    images: dict[str, list[bytes]]  # of each camera T encoded images
    states: list[np.ndarray] = field(default_factory=list)  # T float32 (state_dim,)
    actions: list[np.ndarray] = field(default_factory=list)  # T float32 (per_action_dim,)
    intervention: list[bool] | None = None  # T, whether the expert acted; None: no policy took part
    success: bool = False

    @property
    def is_wanted(self) -> bool:
        """Whether the attempt is kept: a success, and where a policy acted one that the expert had to bring about."""
        return self.success and (self.intervention is None or any(self.intervention))

    @property
    def extra(self) -> tuple[str, ...]:
        """The optional columns that the attempt has."""
        return (SEED,) if self.intervention is None else (SEED, INTERVENTION, SUCCESS)

    def steps(self) -> Steps:
        """The attempt as an episode's only block."""
        length = len(self.actions)
        columns = {
            SEED: np.full(length, self.seed, dtype=np.int64),
            INTERVENTION: self.intervention,
            SUCCESS: np.full(length, self.success),
        }
        return Steps(
            images=self.images,
            state=np.stack(self.states),
            action=np.stack(self.actions),
            prompts=[self.prompt] * length,
            extra={name: np.asarray(columns[name]) for name in self.extra},
            terminal=True,
        )
