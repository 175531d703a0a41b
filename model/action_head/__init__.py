"""Action heads behind two verbs, `loss` and `sample`; `ACTION_HEADS` maps the config's `type` to a class."""

from __future__ import annotations

import difflib

import torch

from model.action_head.action_expert import ActionExpertHead
from model.action_head.base import ActionHeadBase
from model.action_head.diffusion import DiffusionActionHead
from model.action_head.discrete import ActionHead
from model.action_head.flow_matching import FlowmatchingActionHead
from model.action_head.regression import RegressionActionHead
from model.context import ContextSpec
from model.normalizer import ActionRange
from utils.config_utils import ActionHeadConfig, ConfigError

# One line a head, and its import (docs/adding_a_head.md).
ACTION_HEADS: dict[str, type[ActionHeadBase]] = {
    "flow_matching": FlowmatchingActionHead,
    "regression": RegressionActionHead,
    "discrete": ActionHead,
    "diffusion": DiffusionActionHead,
    "action_expert": ActionExpertHead,
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
    config: ActionHeadConfig, spec: ContextSpec, state_dim: int, action_range: ActionRange | None = None
) -> ActionHeadBase:
    """The head that `config.type` names.

    Args:
        config: the head's section.
        spec: what the contexts look like, from the backbone.
        state_dim: S.
        action_range: where normalized actions lie, from the normalizer; None: in [-1, 1].

    Raises:
        ConfigError: no such head, or settings that it can't work with.
    """
    head = head_class(config.type)
    if action_range is None:
        unit_2A = torch.tensor([[-1.0], [1.0]]).repeat(1, config.per_action_dim)
        action_range = ActionRange(unit_2A, unit_2A)
    return head(config, spec, state_dim, action_range)
