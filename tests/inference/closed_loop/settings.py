"""Execution settings in one line."""

from __future__ import annotations

from typing import Any

from inference.closed_loop.execution import ExecutionSettings
from utils.config_utils import InferenceConfig


def executing(horizon: int, n_action_steps: int, strategy: str = "synchronous", **options: Any) -> ExecutionSettings:
    """The settings of a policy with this horizon; `options` are other fields of `inference`."""
    config = InferenceConfig(n_action_steps=n_action_steps, execution=strategy, **options)
    return ExecutionSettings.from_config(config, horizon)
