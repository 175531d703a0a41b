"""Published pi0 and pi0.5 policies, as LeRobot and openpi write them, turned into a checkpoint of this program.

`VLAPredictor.from_pretrained` acts with the result, and `scripts/import_policy.py` writes it to a file to train from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from data.processing import PromptTokenizer, VLAImageProcessor
from model.pi_weights import PiSizes, read_tensors, to_ours
from model.published_normalizer import build_normalizer
from utils.checkpoint import FORMAT
from utils.config_utils import Config, config_from_dict, config_to_dict
from utils.normalization import OPENPI_MODES, needed_statistics
from utils.policy_folder import IMAGES, PolicyFolderError, PublishedPolicy, read_policy_folder, read_weights

TOKENIZER = "google/paligemma-3b-pt-224"
VISION_HEADS = 16
PROMPT_LENGTHS = {"pi0": 48, "pi05": 200}  # openpi's, whose folders don't say


def published_checkpoint(
    folder: str | Path,
    *,
    tokenizer_name_or_path: str | None = None,
    vision_num_attention_heads: int = VISION_HEADS,
    norm_stats: str | Path | None = None,
    variant: str | None = None,
) -> dict[str, Any]:
    """The checkpoint dict of a published policy, for `VLAModel.from_checkpoint`; tensors stay mapped from their file.

    Args:
        folder: a local folder.
        tokenizer_name_or_path: directory or hub id; None: the folder's own, else google/paligemma-3b-pt-224, which
            published policies name.
        vision_num_attention_heads: SigLIP's, which neither tensors nor files tell.
        norm_stats: a `norm_stats.json` to take instead of the folder's statistics.
        variant: `pi0` or `pi05`, what the folder must hold; None: what it says or its tensors tell.

    Raises:
        PolicyFolderError: a file that is missing, truncated or of another kind; tensors missing, left over, of another
            shape or of the other variant, by name; an unknown processor step; statistics that are missing or of another
            width.
        ObservationError: no tokenizer there.
    """
    policy = read_policy_folder(folder, norm_stats)
    if variant is not None and policy.declared not in (None, variant):
        raise PolicyFolderError(f"{policy.folder}: config.json says type {policy.declared}, asked for {variant}")
    place = str(policy.folder / "model.safetensors")
    sizes, published = read_tensors(read_weights(policy.folder), place, variant or policy.declared)
    if policy.image_size not in (None, (sizes.image_size,) * 2):
        raise PolicyFolderError(
            f"{policy.folder}: config.json says image_resolution {list(policy.image_size)}, but the tensors are those "
            f"of {sizes.image_size} x {sizes.image_size} pixels; give the config.json that belongs to them"
        )
    tokenizer_name = tokenizer_name_or_path or _own_tokenizer(policy.folder) or TOKENIZER
    config = policy_config(policy, sizes, tokenizer_name)
    _check_statistics(policy, config)
    statistics = [policy.statistics]
    tokenizer = PromptTokenizer.from_pretrained(tokenizer_name, config.data.prompt_max_len)
    image_processor = VLAImageProcessor(
        sizes.image_size, sizes.image_size, (0.5,) * 3, (0.5,) * 3, 3, config.data.image_fit
    )
    normalizer = build_normalizer(config, statistics).state_dict()
    return {
        "format": FORMAT,
        "step": 0,
        "config": config_to_dict(config),
        "statistics": statistics,
        "cameras": list(config.cameras),
        "base": None,
        "backbone_config": sizes.backbone_config(vision_num_attention_heads),
        "image_processor": image_processor.to_settings(),
        "tokenizer_files": tokenizer.to_files(),
        "published": {
            "config": policy.config if policy.layout == "lerobot" else {},
            "renamed": policy.renamed,
            "statistics": list(policy.statistics_files),
        },
        "model": {
            **to_ours(published),
            **{f"normalizer.{name}": value for name, value in normalizer.items()},
            **image_scale(image_processor),
        },
    }


def policy_config(policy: PublishedPolicy, sizes: PiSizes, tokenizer_name: str) -> Config:
    """The configuration that a published policy amounts to here, its presets of training included."""
    variant, config, lerobot = sizes.variant, policy.config, policy.layout == "lerobot"
    scale, offset = config.get("time_sampling_scale", 0.999), config.get("time_sampling_offset", 0.001)
    state_mode, action_mode = (policy.normalization[name] or OPENPI_MODES[variant] for name in ("state", "action"))
    absolute = [dim for dim in range(policy.action_dim) if dim not in policy.relative_action_dims]
    names = {theirs.removeprefix(IMAGES): ours.removeprefix(IMAGES) for ours, theirs in policy.renamed.items()}
    tree = {
        "data": {
            "cameras": [names.get(camera, camera) for camera in policy.cameras],
            "image_fit": "pad" if lerobot else "pad_bytes",
            "prompt_format": variant if lerobot or variant == "pi05" else "openpi_pi0",
            "prompt_max_len": policy.prompt_max_len or PROMPT_LENGTHS[variant],
            "tokenizer_name_or_path": tokenizer_name,
            "state_dim": policy.state_dim,
            "normalization_arithmetic": policy.arithmetic,
            "normalization_type": action_mode,
            "state_normalization_type": None if state_mode == action_mode else state_mode,
            "normalization_eps": policy.eps,
            "action_mode": "delta" if policy.relative_action_dims else "absolute",
            "action_names": action_names(policy),
            "absolute_action_dims": absolute if policy.relative_action_dims else [],
        },
        "model": {
            "vlm_config": {
                "dtype": config.get("dtype", config.get("precision", "float32")),
                "vision_dtype": "float32" if lerobot else None,
            },
            "action_head_config": {
                "type": "action_expert",
                "horizon": policy.horizon,
                "per_action_dim": policy.action_dim,
                # Their Beta(a, b) counts from the action to the noise.
                "time_beta": [config.get("time_sampling_beta_beta", 1.0), config.get("time_sampling_beta_alpha", 1.5)],
                "time_clamp": [max(0.0, round(1 - offset - scale, 9)), round(1 - offset, 9)],
                "expert": {
                    "width": sizes.expert.width,
                    "mlp_dim": sizes.expert.mlp_dim,
                    "num_heads": sizes.expert.num_heads,
                    "max_action_dim": sizes.max_action_dim,
                    "time": "token" if variant == "pi0" else "adaptive_norm",
                    "state_token": variant == "pi0",
                    "time_periods": [config.get("min_period", 4e-3), config.get("max_period", 4.0)],
                    **({"max_state_dim": sizes.max_state_dim} if variant == "pi0" else {}),
                },
            },
        },
        "inference": {
            "num_inference_steps": policy.num_inference_steps,
            "n_action_steps": min(policy.n_action_steps, policy.horizon),
        },
    }
    return config_from_dict(tree, source=str(policy.folder))


def action_names(policy: PublishedPolicy) -> list[str]:
    """What LeRobot calls the action's dimensions; nothing where it does not say, or not of all."""
    names = policy.config.get("action_feature_names")
    fits = isinstance(names, list) and len(names) == policy.action_dim and all(isinstance(name, str) for name in names)
    return names if fits else []


def image_scale(image_processor: VLAImageProcessor) -> dict[str, Any]:
    """The backbone's buffers that its pixels are normalized by."""

    pairs = {"image_mean": image_processor.mean, "image_std": image_processor.std}
    return {f"backbone.{name}": torch.tensor(value).view(-1, 1, 1) for name, value in pairs.items()}


def _own_tokenizer(folder: Path) -> str | None:
    """The tokenizer that newer folders carry."""
    return str(folder / "tokenizer") if (folder / "tokenizer" / "tokenizer_config.json").is_file() else None


def _check_statistics(policy: PublishedPolicy, config: Config) -> None:
    for name, needed in needed_statistics(config.data).items():
        missing = [statistic for statistic in needed if statistic not in policy.statistics[name]]
        if missing:
            mode = config.data.state_mode if name == "state" else config.data.normalization_type
            raise PolicyFolderError(
                f"{policy.folder}: {name}s are normalized by {mode}, but the folder has no {' and '.join(missing)} of "
                "them; give --norm_stats the statistics that the policy was trained with"
            )
