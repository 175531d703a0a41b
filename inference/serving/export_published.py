"""A policy of this program as a pi0 or pi0.5 that LeRobot or openpi can load: `inference.published` the other way.

Tensors keep their values and number types. The tables that those libraries hold and nothing reads are filled in: the
language model's output table is its input table, the expert's is zeros.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.pi_weights import (
    TABLE,
    TABLE_OF_OUTPUT,
    UNREAD,
    VISION,
    GemmaSizes,
    PiSizes,
    published_shapes,
    to_published,
)
from utils.checkpoint import CheckpointError, evaluation_weights
from utils.config_utils import Config, config_from_dict
from utils.normalization import OPENPI_MODES
from utils.policy_folder import ACTION, IMAGES, MODES, STATE, WEIGHTS

VARIANTS = {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}  # the only names that there are
PROMPTS = {"pi0": ("pi0", "openpi_pi0"), "pi05": ("pi05",)}


def export_published(checkpoint: dict[str, Any], folder: str | Path, layout: str) -> Path:
    """Write a policy folder.

    Args:
        checkpoint: as `load_checkpoint` gives it.
        folder: a new folder.
        layout: `lerobot` (config.json, model.safetensors, processors, statistics) or `openpi` (model.safetensors,
            assets/policy/norm_stats.json).

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder is there already, or the policy is none that the library could run alike; the
            message names the setting.
    """
    folder = Path(folder)
    if folder.exists():
        raise CheckpointError(f"{folder} exists; give a new folder")
    config = config_from_dict(checkpoint["config"], source="checkpoint")
    variant = check_exportable(config, checkpoint)
    modes = {config.data.state_mode, config.data.normalization_type}
    if layout == "openpi" and modes != {OPENPI_MODES[variant]}:
        raise CheckpointError(
            f"this policy normalizes by {' and '.join(sorted(modes))}, but openpi's {variant} by "
            f"{OPENPI_MODES[variant]}; export --format lerobot, or train with data.normalization_type "
            f"{OPENPI_MODES[variant]}"
        )
    sizes = sizes_of(checkpoint["backbone_config"], config, variant)
    tensors = to_published(evaluation_weights(checkpoint), published_shapes(sizes))
    folder.mkdir(parents=True)
    if layout == "openpi":
        _write_openpi(folder, config, checkpoint, tensors)
    else:
        _write_lerobot(folder, config, checkpoint, tensors, variant)
    return folder


def check_exportable(config: Config, checkpoint: Mapping[str, Any]) -> str:
    """`pi0` or `pi05`; a CheckpointError names the first setting that neither library knows."""
    head, data, vlm = config.model.action_head_config, config.data, config.model.vlm_config
    variant = "pi0" if head.expert.time == "token" else "pi05"
    faults = {
        f"model.action_head_config.type {head.type}": head.type != "action_expert",
        f"model.action_head_config.expert.state_token {head.expert.state_token}": head.expert.state_token
        != (variant == "pi0"),
        f"model.action_head_config.use_state_input {head.use_state_input}": not head.use_state_input,
        f"model.vision_resampler_config.type {config.model.vision_resampler_config.type}": (
            config.model.vision_resampler_config.type != "identity"
        ),
        "model.vlm_config.lora (merge it first: python scripts/merge_lora.py)": vlm.lora is not None,
        f"model.vlm_config.quantization {vlm.quantization}": vlm.quantization != "none",
        "model.action_head_config.expert.lora (merge it first: python scripts/merge_lora.py)": (
            head.expert.lora is not None
        ),
        f"data.prompt_format {data.prompt_format}": data.prompt_format not in PROMPTS[variant],
        f"data.image_fit {data.image_fit}": data.image_fit == "stretch",
        f"data.normalization_arithmetic {data.normalization_arithmetic}": data.normalization_arithmetic == "own",
        f"data.max_seq_len {data.max_seq_len}": data.max_seq_len != 1,
        "data.mixture": bool(data.mixture),
        "data.clip_normalized": data.clip_normalized is not None,
        "data.augmentation (its centre crop)": data.augmentation.enabled,
        "weights that are not in the checkpoint (training.save_adapters_only)": not (checkpoint.get("base") or {}).get(
            "included", True
        ),
    }
    for setting, refused in faults.items():
        if refused:
            raise CheckpointError(
                f"this policy has {setting}, with which {variant} acts otherwise elsewhere; train with the settings of "
                f"configs/{variant}_finetune.yaml to hand it back"
            )
    return variant


def sizes_of(backbone_config: Mapping[str, Any], config: Config, variant: str) -> PiSizes:
    """The sizes of a policy, from its architecture."""
    text, vision, expert = (
        backbone_config["text_config"],
        backbone_config["vision_config"],
        config.model.action_head_config.expert,
    )
    head_dim = text["head_dim"]
    return PiSizes(
        variant=variant,
        language=GemmaSizes(text["hidden_size"], text["intermediate_size"], text["num_attention_heads"], head_dim),
        expert=GemmaSizes(expert.width, expert.mlp_dim, expert.num_heads, head_dim),
        num_layers=text["num_hidden_layers"],
        vocab_size=text["vocab_size"],
        vision_width=vision["hidden_size"],
        vision_layers=vision["num_hidden_layers"],
        vision_mlp_dim=vision["intermediate_size"],
        patch_size=vision["patch_size"],
        image_size=vision["image_size"],
        max_state_dim=expert.max_state_dim if variant == "pi0" else 0,
        max_action_dim=expert.max_action_dim,
    )


def _write_openpi(folder: Path, config: Config, checkpoint: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    table = tensors.pop(TABLE)
    named = {_with_vision_model(name): value.contiguous() for name, value in tensors.items()}
    named[TABLE_OF_OUTPUT] = table.contiguous()
    named[UNREAD[0]] = _unread_table(tensors, table)
    save_file(named, folder / WEIGHTS, metadata={TABLE: TABLE_OF_OUTPUT, "format": "pt"})
    head = config.model.action_head_config
    precision = "bfloat16" if table.dtype == torch.bfloat16 else "float32"
    values = {"action_dim": head.expert.max_action_dim, "action_horizon": head.horizon, **VARIANTS}
    _write_json(folder / "config.json", {**values, "precision": precision})
    statistics = checkpoint["statistics"][0]
    kept = ("mean", "std", "q01", "q99")
    numbers = {
        theirs: {name: statistics[ours][name] for name in kept if name in statistics[ours]}
        for ours, theirs in (("state", "state"), ("action", "actions"))
    }
    (folder / "assets" / "policy").mkdir(parents=True)
    _write_json(folder / "assets" / "policy" / "norm_stats.json", {"norm_stats": numbers})


def _write_lerobot(
    folder: Path, config: Config, checkpoint: dict[str, Any], tensors: dict[str, Tensor], variant: str
) -> None:
    table = tensors[TABLE]
    named = {f"model.{_with_vision_model(name)}": value.contiguous() for name, value in tensors.items()}
    named[f"model.{TABLE_OF_OUTPUT}"] = table.clone()
    named[f"model.{UNREAD[0]}"] = _unread_table(tensors, table)
    save_file(named, folder / WEIGHTS)
    original = checkpoint.get("published") or {}
    here = {f"{IMAGES}{name}" for name in config.cameras} | {STATE, ACTION}
    renamed = {ours: theirs for ours, theirs in (original.get("renamed") or {}).items() if ours in here}
    values = lerobot_config(config, variant, original.get("config") or {}, renamed, checkpoint["backbone_config"])
    _write_json(folder / "config.json", values)
    features, modes = values["input_features"] | values["output_features"], values["normalization_mapping"]
    eps = 1e-8 if config.data.normalization_eps is None else config.data.normalization_eps
    before, index = _preprocessor(values, variant, features, modes, eps, renamed)
    name = f"policy_preprocessor_step_{index}_normalizer_processor.safetensors"
    before["steps"][index]["state_file"] = name
    after_name = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
    after = {
        "name": "policy_postprocessor",
        "steps": [
            {
                "registry_name": "unnormalizer_processor",
                "config": {"eps": eps, "features": values["output_features"], "norm_map": modes},
                "state_file": after_name,
            },
            {"registry_name": "absolute_actions_processor", "config": {"enabled": values["use_relative_actions"]}},
            {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}},
        ],
    }
    _write_json(folder / "policy_preprocessor.json", before)
    _write_json(folder / "policy_postprocessor.json", after)
    own = {
        f"{theirs}.{statistic}": torch.tensor(numbers, dtype=torch.float32)
        for ours, theirs in (("state", STATE), ("action", ACTION))
        for statistic, numbers in checkpoint["statistics"][0][ours].items()
        if isinstance(numbers, list)
    }
    for file, found in zip((name, after_name), original.get("statistics") or ({}, {}), strict=True):
        save_file({**_still_true(found, own), **own}, folder / file)


def _still_true(original: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Imported statistics but for those of a state or of actions that other data have now."""
    differ = [name for name, value in own.items() if name in original and not value.equal(original[name])]
    renewed = {name.rpartition(".")[0] for name in differ}
    return {name: value for name, value in original.items() if name.rpartition(".")[0] not in renewed}


def lerobot_config(
    config: Config,
    variant: str,
    original: Mapping[str, Any],
    renamed: Mapping[str, str],
    backbone_config: Mapping[str, Any],
) -> dict[str, Any]:
    """LeRobot's config.json: what this policy is, and for the rest what it was imported with, or LeRobot's defaults.

    Args:
        config, variant, backbone_config: of this policy.
        original: the config.json that it was imported with.
        renamed: a robot's name of a feature -> the policy's.
    """
    data, head, expert = config.data, config.model.action_head_config, config.model.action_head_config.expert
    size = backbone_config["vision_config"]["image_size"]
    frames = original.get("input_features", {})
    # A policy may call its camera something without that prefix, such as observation.image.
    theirs = [name if name in frames else renamed.get(f"{IMAGES}{name}", f"{IMAGES}{name}") for name in config.cameras]
    cameras = {name: frames.get(name, {"type": "VISUAL", "shape": [3, size, size]}) for name in theirs}
    empty = {name: feature for name, feature in frames.items() if name.startswith(f"{IMAGES}empty_camera_")}
    words = {ours: theirs for theirs, ours in MODES.items()}
    low, high = head.time_clamp
    relative = data.action_mode == "delta"
    names, excluded = original.get("action_feature_names"), original.get("relative_exclude_joints", ["gripper"])
    if names is not None and len(names) != head.per_action_dim:
        names = None  # of another robot
    if data.action_names:
        names = list(data.action_names)
    if data.absolute_joints:
        excluded = list(data.absolute_joints)
    absolute = set(data.absolute_action_dims)
    excludes = {d for d, name in enumerate(names or ()) if any(word.lower() in name.lower() for word in excluded)}
    if relative and excludes != absolute:
        names = [f"{'absolute' if dim in absolute else 'moved'}_{dim}" for dim in range(head.per_action_dim)]
        excluded = ["absolute"]
    own = {
        "type": variant,
        "n_obs_steps": 1,
        "input_features": {**cameras, STATE: {"type": "STATE", "shape": [data.state_dim]}, **empty},
        "output_features": {ACTION: {"type": "ACTION", "shape": [head.per_action_dim]}},
        **VARIANTS,
        "dtype": config.model.vlm_config.dtype,
        "chunk_size": head.horizon,
        "n_action_steps": config.inference.n_action_steps or head.horizon,
        # Of a pi0.5 nothing has that width.
        "max_state_dim": expert.max_state_dim if variant == "pi0" else original.get("max_state_dim", 32),
        "max_action_dim": expert.max_action_dim,
        "num_inference_steps": config.inference.num_inference_steps,
        "time_sampling_beta_alpha": head.time_beta[1],
        "time_sampling_beta_beta": head.time_beta[0],
        "time_sampling_scale": round(high - low, 9),
        "time_sampling_offset": round(1 - high, 9),
        "min_period": expert.time_periods[0],
        "max_period": expert.time_periods[1],
        "use_relative_actions": relative,
        "relative_exclude_joints": excluded,
        "action_feature_names": names,
        "image_resolution": [size, size],
        "normalization_mapping": {
            "VISUAL": "IDENTITY",
            "STATE": words[data.state_mode],
            "ACTION": words[data.normalization_type],
        },
        "tokenizer_max_length": data.prompt_max_len,
    }
    return {**DEFAULTS, **original, **own}


# Of LeRobot 0.6.1, where a policy says nothing of them.
DEFAULTS: dict[str, Any] = {
    "device": "cpu",
    "use_amp": False,
    "use_peft": False,
    "push_to_hub": False,
    "repo_id": None,
    "private": None,
    "tags": None,
    "license": None,
    "pretrained_path": None,
    "pretrained_revision": None,
    "rtc_config": None,
    "empty_cameras": 0,
    "gradient_checkpointing": False,
    "compile_model": False,
    "compile_mode": "max-autotune",
    "freeze_vision_encoder": False,
    "train_expert_only": False,
    "optimizer_lr": 2.5e-05,
    "optimizer_betas": [0.9, 0.95],
    "optimizer_eps": 1e-08,
    "optimizer_weight_decay": 0.01,
    "optimizer_grad_clip_norm": 1.0,
    "scheduler_warmup_steps": 1000,
    "scheduler_decay_steps": 30000,
    "scheduler_decay_lr": 2.5e-06,
}


def _preprocessor(
    values: Mapping[str, Any],
    variant: str,
    features: Mapping[str, Any],
    modes: Mapping[str, str],
    eps: float,
    renamed: Mapping[str, str],
) -> tuple[dict[str, Any], int]:
    """LeRobot's pre-processor, and which of its steps normalizes."""

    def step(name: str, **settings: Any) -> dict[str, Any]:
        return {"registry_name": name, "config": settings}

    rename = step("rename_observations_processor", rename_map=dict(renamed))
    batch = step("to_batch_processor")
    tokenize = step(
        "tokenizer_processor",
        max_length=values["tokenizer_max_length"],
        task_key="task",
        padding_side="right",
        padding="max_length",
        truncation=True,
        tokenizer_name="google/paligemma-3b-pt-224",
    )
    device = step("device_processor", device=values["device"], float_dtype=None)
    relative = step(
        "relative_actions_processor",
        enabled=values["use_relative_actions"],
        exclude_joints=values["relative_exclude_joints"],
        action_names=values["action_feature_names"],
    )
    normalize = step("normalizer_processor", eps=eps, features=dict(features), norm_map=dict(modes))
    if variant == "pi0":
        steps = [rename, batch, step("pi0_new_line_processor"), tokenize, device, relative, normalize]
    else:
        state = step("pi05_prepare_state_tokenizer_processor_step")
        steps = [rename, batch, relative, normalize, state, tokenize, device]
    return {"name": "policy_preprocessor", "steps": steps}, steps.index(normalize)


def _with_vision_model(name: str) -> str:
    """A canonical name with the level that the libraries' SigLIP has."""
    return name.replace(VISION, f"{VISION}vision_model.", 1) if name.startswith(VISION) else name


def _unread_table(tensors: Mapping[str, Tensor], table: Tensor) -> Tensor:
    """The expert's output table, which nothing reads."""
    width = tensors["action_in_proj.weight"].shape[0]
    return torch.zeros(table.shape[0], width, dtype=table.dtype)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=4) + "\n", encoding="utf-8")
