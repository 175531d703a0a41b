"""Action heads behind two verbs, `loss` and `sample`; `ACTION_HEADS` maps the config's `type` to a class."""

from __future__ import annotations

import difflib
import importlib

import torch

from model.action_head.base import ActionHeadBase
from model.normalizer import ActionRange
from utils.config_utils import ActionHeadConfig, ConfigError


def _head(name: str) -> type[ActionHeadBase]:
    """The class `module.Class` of this folder."""
    module, _, cls = name.partition(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), cls)


# One line a head (docs/adding_a_head.md).
ACTION_HEADS: dict[str, type[ActionHeadBase]] = {
    "flow_matching": _head("flow_matching.FlowmatchingActionHead"),
    "regression": _head("regression.RegressionActionHead"),
    "discrete": _head("discrete.ActionHead"),
    "diffusion": _head("diffusion.DiffusionActionHead"),
}


def head_class(name: str) -> type[ActionHeadBase]:
    """The class that `action_head_config.type` names; ConfigError with the names that exist."""
    if name not in ACTION_HEADS:
        near = difflib.get_close_matches(name, ACTION_HEADS, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"model.action_head_config.type is {name!r}; choose from {', '.join(ACTION_HEADS)}; did you mean {near}?"
        )
    return ACTION_HEADS[name]


def build_action_head(
    config: ActionHeadConfig, context_dim: int, state_dim: int, action_range: ActionRange | None = None
) -> ActionHeadBase:
    """The head that `config.type` names.

    Args:
        config: the head's section.
        context_dim: E, width of the backbone's tokens.
        state_dim: S.
        action_range: where normalized actions lie, from the normalizer; None: in [-1, 1].

    Raises:
        ConfigError: no such head, or settings that it can't work with.
    """
    head = head_class(config.type)
    if action_range is None:
        unit_2A = torch.tensor([[-1.0], [1.0]]).repeat(1, config.per_action_dim)
        action_range = ActionRange(unit_2A, unit_2A)
    return head(config, context_dim, state_dim, action_range)
