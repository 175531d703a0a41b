"""The settings of a prediction: the `inference` section of a checkpoint, changed by whoever loads the policy.

Simulator processes import this module: it must not need torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from utils.config_reader import build
from utils.config_utils import Config, InferenceConfig, MixtureEntry


def changed_settings(trained: InferenceConfig, horizon: int, given: Mapping[str, Any]) -> InferenceConfig:
    """A policy's settings with those that somebody gave instead.

    Args:
        trained: the checkpoint's `inference` section.
        horizon: actions per prediction.
        given: other values of its fields; None leaves a field as it is.

    Returns:
        The settings, `n_action_steps` filled in: where nobody gave it, the checkpoint's or the whole horizon.

    Raises:
        ConfigError: a name that is no field (with the nearest that is), a value of another type or out of range, or a
            given n_action_steps above the horizon.
    """
    given = {name: value for name, value in given.items() if value is not None}
    settings = build(InferenceConfig, {**asdict(trained), **given}, "inference")
    if "n_action_steps" in given:
        check_n_action_steps(settings.n_action_steps, horizon)
    return replace(settings, n_action_steps=min(settings.n_action_steps or horizon, horizon))


def check_n_action_steps(n_action_steps: int, horizon: int) -> None:
    """Raise a ValueError unless a prediction holds so many actions."""
    if not 1 <= n_action_steps <= horizon:
        raise ValueError(
            f"n_action_steps is {n_action_steps}, but the policy predicts a horizon of {horizon} actions; give 1 to "
            f"{horizon}"
        )


def choose_dataset(config: Config, name: str | None) -> tuple[int, MixtureEntry]:
    """The dataset of that name, or the only one, and its `dataset_index`."""
    names = [entry.name for entry in config.datasets]
    if name is None and len(names) == 1:
        name = names[0]
    if name not in names:
        found = "no dataset was named" if name is None else f"there is no dataset {name!r}"
        raise ValueError(
            f"this policy was trained on {', '.join(names)}; {found}: give one of them as dataset (--dataset)"
        )
    return names.index(name), config.datasets[names.index(name)]
