"""A new policy from parts of a checkpoint: for another robot, or with another action head.

The backbone is taken whole. An action head's weights depend on the robot by their sizes: how many action dimensions and
state values there are, and how many steps a chunk has.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from model.checkpointing import require_same_architecture
from model.vla_model import VLAModel
from utils.config_utils import Config, ConfigError, config_from_dict

logger = logging.getLogger(__name__)

Parts = Literal["all", "backbone", "auto"]


def policy_from_parts(
    checkpoint: dict[str, Any],
    path: str,
    config: Config,
    statistics: Sequence[dict[str, Any]],
    parts: Parts,
    *,
    use_ema: bool = True,
) -> VLAModel:
    """A new policy whose weights come from a checkpoint, as far as `parts` says; the log says which did.

    Args:
        checkpoint, path: as loaded, and from where.
        config, statistics: of the new policy.
        parts: `all`: every weight, of the same architecture. `backbone`: the action head is new. `auto`: of the action
            head everything that fits; a weight that only has to grow with the robot is widened, its new values being
            those of a new head; everything else is new.
        use_ema: see `VLAModel.from_checkpoint`.

    Raises:
        ConfigError: the config describes another architecture where it has to be the checkpoint's.
    """
    require_same_architecture(checkpoint["config"], config, path, backbone_only=parts != "all")
    if parts == "all":
        return VLAModel.from_checkpoint(checkpoint, config, statistics=statistics, use_ema=use_ema)
    if config.model.action_head_config.expert.lora is not None:
        raise ConfigError(
            f"model.action_head_config.expert.lora adapts an expert that has learnt already, but --init_parts {parts} "
            "makes a new one or parts of it; give --init_parts all, or remove it"
        )
    before = config_from_dict(checkpoint["config"], source=path)
    vlm = dataclasses.replace(config.model.vlm_config, use_aux_camera=before.model.vlm_config.use_aux_camera)
    model = dataclasses.replace(config.model, vlm_config=vlm, action_head_config=before.model.action_head_config)
    old = VLAModel.from_checkpoint(
        checkpoint, dataclasses.replace(before, model=model, training=config.training), use_ema=use_ema
    )
    told = [f"taken: the backbone ({len(old.backbone.state_dict())} tensors)"]
    if old.cameras != config.cameras:
        told += old.backbone.see_through(config.cameras)
    new = VLAModel(config, old.backbone, statistics)
    new.base, new.published = old.base, old.published
    if parts == "backbone":
        told.append("new: the action head")
    else:
        told += _fill_head(new.action_head, old.action_head, _growing(before, config))
    logger.info("from %s (--init_parts %s): %s", path, parts, "; ".join(told))
    return new


def _growing(before: Config, config: Config) -> set[tuple[int, int]]:
    """The sizes that differ between two robots, as (old, new)."""
    heads = before.model.action_head_config, config.model.action_head_config
    sizes = {(getattr(heads[0], name), getattr(heads[1], name)) for name in ("per_action_dim", "horizon")}
    return sizes | {(before.data.state_dim, config.data.state_dim)}


@torch.no_grad()
def _fill_head(new: nn.Module, old: nn.Module, growing: set[tuple[int, int]]) -> list[str]:
    """Copy what fits from one action head to another; in words what was taken, widened and made new."""
    if type(new) is not type(old):
        return [f"new: the action head ({type(new).__name__}, in the checkpoint {type(old).__name__})"]
    source = dict(old.named_parameters())
    taken, widened, fresh = 0, [], []
    for name, parameter in new.named_parameters():
        there = source.get(name)
        if there is not None and there.shape == parameter.shape:
            parameter.copy_(there)
            taken += 1
        elif there is not None and _only_grows(there, parameter, growing):
            parameter[tuple(map(slice, there.shape))] = there
            widened.append(f"{name} {tuple(there.shape)} -> {tuple(parameter.shape)}")
        else:
            fresh.append(name)
    told = [f"taken: {taken} tensors of the action head"]
    told += [f"widened: {', '.join(widened)}"] if widened else []
    return told + ([f"new: {', '.join(fresh)}"] if fresh else [])


def _only_grows(old: Tensor, new: Tensor, growing: set[tuple[int, int]]) -> bool:
    """Whether the shapes differ only where a size of the robot is larger than before."""
    pairs = zip(old.shape, new.shape, strict=False)
    return old.ndim == new.ndim and all(a == b or (a < b and (a, b) in growing) for a, b in pairs)
