"""An environment without a simulator, importable by simulator processes."""

from __future__ import annotations

import os
from typing import Any

import gymnasium
import numpy as np


class DriftEnv(gymnasium.Env):
    """The state follows the actions; frames show it; success when its first value passes a limit set by the task."""

    instruction, control_hz, state_dim, per_action_dim = "move", 10.0, 4, 4
    action_space = gymnasium.spaces.Box(-5.0, 5.0, (4,), np.float32)

    def __init__(self, task: str) -> None:
        self.task = task

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, np.ndarray], dict]:
        super().reset(seed=seed)
        if self.task == "crash":
            os._exit(9)
        self._state = self.np_random.normal(size=4).astype(np.float32)
        self._steps = 0
        return self._observation(), {"success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict]:
        self._state = self._state + np.asarray(action, np.float32)
        self._steps += 1
        done = bool(abs(self._state[0]) > float(self.task.removeprefix("to_")))
        return self._observation(), float(self._state[0]), False, self._steps == 12, {"success": done}

    def settings(self) -> dict[str, Any]:
        return {"camera": "none", "control_hz": self.control_hz}

    def hold_action(self, previous: np.ndarray | None) -> np.ndarray:
        return np.zeros(4, np.float32)

    def _observation(self) -> dict[str, np.ndarray]:
        pixels = np.clip(128 + 40 * self._state[:3], 0, 255).astype(np.uint8)
        return {"image_1": np.broadcast_to(pixels, (40, 40, 3)).copy(), "state": self._state}
