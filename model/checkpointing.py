"""A policy's weights into a checkpoint and out of it, and whether a config still describes the same weights.

A checkpoint holds every weight, or, with `training.save_adapters_only`, all but the frozen ones, which are then read
from the pretrained directories again. `utils.checkpoint` writes and reads the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from model.adapters import base_fingerprint, load_state, trained_state
from model.allocation import AllocationLimit
from model.backbone import Backbone, backbone_class
from utils.backbones import BACKBONE_SPECS
from utils.checkpoint import CheckpointError, check_finite, evaluation_weights
from utils.config_utils import Config, ConfigError, VLMConfig, config_from_dict, is_free
from utils.statistics import StatisticsError
from utils.text import printable

logger = logging.getLogger(__name__)

# What the classes of transformers and torch run into on a description that somebody changed.
_BUILDING_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
Policy = TypeVar("Policy", bound=nn.Module)


def policy_from_checkpoint(
    policy_class: Callable[[Config, Backbone, Sequence[dict[str, Any]]], Policy],
    checkpoint: dict[str, Any],
    config: Config | None = None,
    statistics: Sequence[dict[str, Any]] | None = None,
    *,
    use_ema: bool = True,
    must_be_finite: bool = True,
) -> Policy:
    """The policy of a checkpoint; see `VLAModel.from_checkpoint`, whose class is `policy_class`."""
    config = config or config_from_dict(checkpoint["config"], source="checkpoint")
    vlm, resampler = config.model.vlm_config, config.model.vision_resampler_config
    mean, std = checkpoint["image_processor"]["image_mean"], checkpoint["image_processor"]["image_std"]
    settings = resampler, config.cameras, mean, std
    weights = evaluation_weights(checkpoint) if use_ema else checkpoint["model"]
    base = checkpoint.get("base")
    base_name = None if base is None else base["name_or_path"]
    without_base = base is not None and not base["included"]
    head = config.model.action_head_config
    adapts = vlm.lora is not None or vlm.quantization != "none" or head.expert.lora is not None
    adapted_later = adapts and is_plain(checkpoint["config"])
    if must_be_finite:
        check_finite(weights, "checkpoint")
    given_statistics = checkpoint["statistics"] if statistics is None else statistics
    if without_base:
        vlm = _where_the_base_is(vlm, checkpoint)
        backbone = backbone_class(vlm.type).from_pretrained(vlm, *settings)
        policy = policy_class(config, backbone, given_statistics)
    else:
        built = without_adapters(config) if adapted_later else config
        with _describes_a_model(), AllocationLimit(weights.values()):
            backbone = backbone_class(vlm.type).from_config(
                checkpoint["backbone_config"], built.model.vlm_config, *settings
            )
            policy = policy_class(built, backbone, given_statistics)
    if without_base:
        weights, base_name = _with_base(policy, weights, base, vlm.type), vlm.pretrained_names
    if statistics is not None:
        fresh = {f"normalizer.{name}": value for name, value in policy.normalizer.state_dict().items()}
        weights = {**weights, **fresh}
    load_weights(policy, weights)
    if adapted_later:
        policy.backbone.adapt(vlm)
        policy.action_head.adapt(head, policy.compute_dtype)
        policy.rest_unread()
    policy.base = frozen_base(backbone, base_name, vlm if without_base else None)
    policy.published = checkpoint.get("published")
    if config.training.save_adapters_only and policy.base is not None and policy.base["name_or_path"] is None:
        raise ConfigError(
            "training.save_adapters_only needs frozen weights that a later run can read again, but these come from "
            "a checkpoint; set training.save_adapters_only: false"
        )
    return policy


@contextlib.contextmanager
def _describes_a_model() -> Iterator[None]:
    """Name a checkpoint's architecture as the fault where no model can be built from it."""
    try:
        yield
    except (CheckpointError, ConfigError, StatisticsError):
        raise
    except _BUILDING_FAULTS as error:
        raise CheckpointError(
            f"checkpoint: no model can be built from its configuration ({type(error).__name__}: {printable(error)}); "
            "it was changed, or is of another version"
        ) from None


def frozen_base(backbone: Backbone, name_or_path: str | None, vlm: VLMConfig | None) -> dict[str, Any] | None:
    """Which weights are frozen in a backbone.

    Args:
        backbone: as it is trained.
        name_or_path: where the frozen weights came from, in words; None: from a checkpoint.
        vlm: whose folders they were read from; None: from a checkpoint.

    Returns:
        `name_or_path`, the weights' `fingerprint`, and `folders`, as absolute paths by their settings; None where every
        weight trains.
    """
    if all(parameter.requires_grad for parameter in backbone.parameters()):
        return None
    folders = {}
    for part in () if vlm is None else BACKBONE_SPECS[vlm.type].parts:
        folder = Path(getattr(vlm, part.key)).expanduser()
        if folder.is_dir():  # and no hub id
            folders[part.key] = str(folder.resolve())
    return {"name_or_path": name_or_path, "fingerprint": base_fingerprint(backbone), "folders": folders}


def _where_the_base_is(vlm: VLMConfig, checkpoint: dict[str, Any]) -> VLMConfig:
    """The folders of an adapter checkpoint's base as they are, or where they were in training.

    A relative path means something else in another working directory.
    """
    saved, folders = checkpoint["config"]["model"]["vlm_config"], checkpoint["base"].get("folders", {})
    moved = {
        key: folder
        for key, folder in folders.items()
        if getattr(vlm, key, None) == saved.get(key)
        and not Path(saved[key]).expanduser().is_dir()
        and Path(folder).is_dir()
    }
    if moved:
        logger.info("the adapters' base is read from %s, where it was in training", " and ".join(moved.values()))
    return dataclasses.replace(vlm, **moved)


def state_to_save(policy: nn.Module, adapters_only: bool = False) -> dict[str, Any]:
    """What a checkpoint holds of a policy.

    Args:
        policy: a `VLAModel`.
        adapters_only: leave out the frozen weights; `policy_from_checkpoint` reads them from the pretrained
            directories again.

    Returns:
        `model` (weights), `base` (`frozen_base`, and whether its weights are `included`), `statistics`, `cameras`,
        `backbone_config` and, of an imported policy, `published`.
    """
    left_out = adapters_only and policy.base is not None
    return {
        "model": trained_state(policy) if left_out else policy.state_dict(),
        "base": None if policy.base is None else {**policy.base, "included": not left_out},
        "statistics": policy.statistics,
        "cameras": list(policy.cameras),
        "backbone_config": policy.backbone.backbone_config_dict(),
        **({} if policy.published is None else {"published": policy.published}),
    }


def load_weights(policy: nn.Module, weights: dict[str, Tensor]) -> None:
    """Strictly load weights.

    Raises:
        CheckpointError: naming the first parameters that are missing, left over or of another shape.
    """
    expected = policy.state_dict()
    faults = [f"{key} is missing" for key in expected if key not in weights]
    faults += [f"{key} is not part of this model" for key in weights if key not in expected]
    for key in expected.keys() & weights.keys():
        if expected[key].shape != weights[key].shape:
            faults.append(f"{key} is {tuple(weights[key].shape)}, wanted {tuple(expected[key].shape)}")
    if faults:
        raise CheckpointError(
            f"checkpoint of another architecture: {'; '.join(faults[:4])}"
            f"{f'; and {len(faults) - 4} more' if len(faults) > 4 else ''}; "
            "use the config that the checkpoint was trained with, or start anew without it"
        )
    load_state(policy, weights)


def _with_base(
    policy: nn.Module, trained: dict[str, Tensor], base: dict[str, Any], backbone_type: str
) -> dict[str, Tensor]:
    """The weights of an adapter checkpoint, completed by the policy's frozen ones.

    Raises:
        CheckpointError: the adapters were trained on another base.
    """
    fingerprint = base_fingerprint(policy.backbone)
    if fingerprint != base["fingerprint"]:
        keys = " and ".join(part.key for part in BACKBONE_SPECS[backbone_type].parts)
        raise CheckpointError(
            f"adapters trained on {base['name_or_path']} (fingerprint {base['fingerprint'][:12]}), but the frozen "
            f"weights that were read have fingerprint {fingerprint[:12]}; name the right base in model.vlm_config "
            f"({keys})"
        )
    trains = trained_state(policy).keys()
    return {key: value for key, value in policy.state_dict().items() if key not in trains} | trained


# What an action expert may change from one robot to the next: its tokens have the width of the widest robot, are not
# numbered, and were normalized before it saw them.
HEAD_OF_ANY_ROBOT = ("horizon", "per_action_dim", "action_dim")
DATA_OF_ONE_ROBOT = (
    "state_dim",
    "action_mode",
    "absolute_action_dims",
    "normalization_type",
    "state_normalization_type",
    "normalization_arithmetic",
    "normalization_eps",
    "action_bounds",
)
DATA_AS_SEEN = ("image_fit", "prompt_format")


def require_same_architecture(saved: dict[str, Any], config: Config, path: str, *, backbone_only: bool = False) -> None:
    """Raise a ConfigError that lists how the config's architecture differs from a checkpoint's.

    Args:
        saved: the checkpoint's resolved config.
        config: what the run asks for.
        path: the checkpoint, for the message.
        backbone_only: the action head, the robot's cameras, and how its numbers are normalized may be others.
    """
    old = config_from_dict(saved, source=path)
    any_robot = backbone_only or config.model.action_head_config.type == "action_expert"
    differences = []
    sections = ["vlm_config", "vision_resampler_config"] + ([] if backbone_only else ["action_head_config"])
    for section in sections:
        before, now = _settings(getattr(old.model, section)), _settings(getattr(config.model, section))
        differences += [
            f"model.{section}.{key}: checkpoint {before.get(key)!r}, config {now.get(key)!r}"
            for key in before | now
            if not is_free(getattr(config.model, section), key)
            and before.get(key) != now.get(key)
            and not _may_be_added(key, saved)
            and not (key in HEAD_OF_ANY_ROBOT and any_robot)
            and not (key == "use_aux_camera" and any_robot)
        ]
    for key in (*(() if any_robot else DATA_OF_ONE_ROBOT), *DATA_AS_SEEN):
        before, now = getattr(old.data, key), getattr(config.data, key)
        if before != now:
            differences.append(f"data.{key}: checkpoint {before!r}, config {now!r}")
    if differences:
        remedy = "make them agree" + ("" if backbone_only else ", or take what fits with --init_parts auto (backbone)")
        if not is_plain(saved):
            remedy += ", or turn it into a plain checkpoint first: python scripts/merge_lora.py --checkpoint_path"
        raise ConfigError(f"{path}: a checkpoint of another architecture: {'; '.join(differences)}; {remedy}")


def _settings(section: Any) -> dict[str, Any]:
    """A section's values by name; those of a section within it as `lora.rank`."""
    values = {}
    for key, value in vars(section).items():
        inner = _settings(value) if dataclasses.is_dataclass(value) else None
        values |= {key: value} if inner is None else {f"{key}.{name}": item for name, item in inner.items()}
    return values


def _may_be_added(key: str, saved: dict[str, Any]) -> bool:
    """Adapters and quantization go on top of the weights of a plain checkpoint."""
    return key.removeprefix("expert.").split(".")[0] in ("lora", "quantization") and is_plain(saved)


def is_plain(saved: dict[str, Any]) -> bool:
    """Whether a checkpoint's resolved config has neither adapters nor quantized weights."""
    model = saved["model"]
    parts = model["vlm_config"], model["action_head_config"].get("expert", {})
    return all(part.get("lora") is None and part.get("quantization", "none") == "none" for part in parts)


def without_adapters(config: Config) -> Config:
    """The same policy with neither adapters nor quantized weights."""
    plain, model = {"lora": None, "quantization": "none"}, config.model
    head = model.action_head_config
    model = dataclasses.replace(
        model,
        vlm_config=dataclasses.replace(model.vlm_config, **plain),
        action_head_config=dataclasses.replace(head, expert=dataclasses.replace(head.expert, **plain)),
    )
    return dataclasses.replace(config, model=model)
