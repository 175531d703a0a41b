"""Whether a checkpoint and a config describe the same weights, setting by setting."""

from __future__ import annotations

import dataclasses
from typing import Any

from utils.config_utils import Config, ConfigError, config_from_dict, is_free


def require_same_architecture(saved: dict[str, Any], config: Config, path: str) -> None:
    """Raise a ConfigError that lists how the config's architecture differs from a checkpoint's.

    Args:
        saved: the checkpoint's resolved config.
        config: what the run asks for.
        path: the checkpoint, for the message.
    """
    old = config_from_dict(saved, source=path)
    differences = []
    for section in ("vlm_config", "vision_resampler_config", "action_head_config"):
        before, now = _settings(getattr(old.model, section)), _settings(getattr(config.model, section))
        differences += [
            f"model.{section}.{key}: checkpoint {before.get(key)!r}, config {now.get(key)!r}"
            for key in before | now
            if not is_free(getattr(config.model, section), key)
            and before.get(key) != now.get(key)
            and not _may_be_added(key, saved)
        ]
    for key in ("state_dim", "action_mode", "absolute_action_dims", "normalization_type", "action_bounds"):
        before, now = getattr(old.data, key), getattr(config.data, key)
        if before != now:
            differences.append(f"data.{key}: checkpoint {before!r}, config {now!r}")
    if differences:
        remedy = "make them agree"
        if not is_plain(saved):
            remedy += ", or turn it into a plain checkpoint first: python scripts/merge_lora.py --checkpoint_path"
        raise ConfigError(f"{path}: a checkpoint of another architecture: {'; '.join(differences)}; {remedy}")


def _settings(section: Any) -> dict[str, Any]:
    """A section's values by name; those of a section within it as `lora.rank`."""
    found = {}
    for key, value in vars(section).items():
        inner = _settings(value) if dataclasses.is_dataclass(value) else None
        found |= {key: value} if inner is None else {f"{key}.{name}": one for name, one in inner.items()}
    return found


def _may_be_added(key: str, saved: dict[str, Any]) -> bool:
    """Adapters and quantization go on top of the weights of a plain checkpoint."""
    return key.split(".")[0] in ("lora", "quantization") and is_plain(saved)


def is_plain(saved: dict[str, Any]) -> bool:
    """Whether a checkpoint's resolved config has neither adapters nor quantized weights."""
    vlm = saved["model"]["vlm_config"]
    return vlm.get("lora") is None and vlm.get("quantization", "none") == "none"
