"""Action heads behind two verbs, `loss` and `sample`; `ACTION_HEADS` maps the config's `type` to a class."""

from __future__ import annotations

from model.action_head.base import ActionHeadBase
from model.action_head.flow_matching import FlowmatchingActionHead
from utils.config_utils import ActionHeadConfig

ACTION_HEADS: dict[str, type[ActionHeadBase]] = {
    "flow_matching": FlowmatchingActionHead,
}


def build_action_head(config: ActionHeadConfig, context_dim: int, state_dim: int) -> ActionHeadBase:
    """The head that `config.type` names, for a context of width `context_dim`."""
    return ACTION_HEADS[config.type](config, context_dim, state_dim)
