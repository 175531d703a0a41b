"""Hugging Face directories and hub ids: reading their architecture, and their weights whole or not at all."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel, SiglipVisionConfig
from transformers.utils import logging

from utils.config_utils import ConfigError, VLMConfig
from utils.hub import hub_options, is_local


def read_model_config(
    name_or_path: str, setting: str, model_types: Sequence[str] | None, remedy: str
) -> dict[str, Any]:
    """The values of a `config.json`.

    Args:
        name_or_path: directory or hub id.
        setting: the config key and its value, for errors.
        model_types: those that will do; None: any.
        remedy: what to do where no suitable model is there.

    Raises:
        ConfigError: nothing there, or a model of another type.
    """
    is_dir = Path(name_or_path).is_dir()
    problem = "no config.json with a model_type in it" if is_dir else "no such directory, nor such a model on the hub"
    try:
        values, _ = PretrainedConfig.get_config_dict(name_or_path, **hub_options(name_or_path))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{setting}: {problem} ({reason}); {remedy}") from error
    if "model_type" not in values:
        raise ConfigError(f"{setting}: {problem}; {remedy}")
    if model_types is not None and values["model_type"] not in model_types:
        raise ConfigError(
            f"{setting}: its config.json says model_type {values['model_type']!r}, wanted "
            f"{' or '.join(map(repr, model_types))}; {remedy}"
        )
    return values


def load_weights(
    model_class: type, name_or_path: str, setting: str, config: PretrainedConfig, unused: str, **options: Any
) -> PreTrainedModel:
    """The weights of a directory as float32, or an error: nothing may be left at its random initialisation.

    Args:
        model_class: a transformers model or auto class.
        name_or_path: directory or hub id.
        setting: the config key and its value, for errors.
        config: architecture to build.
        unused: pattern of the tensors that may be left over.
        options: for `from_pretrained`.

    Raises:
        ConfigError: no weights, damaged ones, or others than the architecture's.
    """
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # no table of the tensors left over: what matters of it is an error below
    if is_local(name_or_path):
        logging.disable_progress_bar()  # a download shows its own
    try:
        model, report = model_class.from_pretrained(
            name_or_path,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # so that they are reported below
            output_loading_info=True,
            trust_remote_code=False,
            **hub_options(name_or_path),
            **options,
        )
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{setting}: its weights cannot be read ({reason}); download it again or write it anew"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    for problem, tensors in (
        ("lack", report["missing_keys"]),
        ("have another size for", [key for key, *_ in report["mismatched_keys"]]),
        ("have the unknown", [key for key in report["unexpected_keys"] if not re.search(unused, key)]),
    ):
        if tensors:
            raise ConfigError(
                f"{setting}: its weights {problem} {sorted(tensors)[0]} ({len(tensors)} such tensors), "
                "so they do not belong to its config.json; download it again or write it anew"
            )
    return model


def attention_of(text_config: PretrainedConfig, choice: str) -> str:
    """The attention implementation of a language model: `choice`, with `auto` decided.

    Raises:
        ConfigError: the choice cannot compute what the model does.
    """
    softcap = getattr(text_config, "attn_logit_softcapping", None)
    if choice == "auto":
        return "sdpa" if softcap is None else "eager"
    if choice == "sdpa" and softcap is not None:
        # torch's scaled_dot_product_attention has no cap. Newer transformers (5.23) refuse the combination, older ones
        # (5.17) run it without the cap and without a word.
        raise ConfigError(
            f"model.vlm_config.attn_implementation is sdpa, but this backbone caps attention logits at {softcap} "
            "(attn_logit_softcapping), which SDPA cannot do; give auto or eager"
        )
    return choice


def num_image_tokens(vision_config: SiglipVisionConfig) -> int:
    """Tokens that a SigLIP tower makes of one image."""
    return (vision_config.image_size // vision_config.patch_size) ** 2


def check_num_image_tokens(vlm_config: VLMConfig, vision_config: SiglipVisionConfig) -> None:
    """Raise a ConfigError where `num_image_tokens` is given and is another number than the tower's."""
    if vlm_config.num_image_tokens not in (None, num_image_tokens(vision_config)):
        raise ConfigError(
            f"model.vlm_config.num_image_tokens is {vlm_config.num_image_tokens}, but the backbone makes "
            f"{num_image_tokens(vision_config)} tokens of an image ({vision_config.image_size} px, patches of "
            f"{vision_config.patch_size} px); remove num_image_tokens or choose another backbone"
        )


def config_values(config: PretrainedConfig) -> dict[str, Any]:
    """An architecture as plain values."""
    values = json.loads(config.to_json_string(use_diff=False))
    values.pop("_name_or_path", None)  # where it came from, on the machine that loaded it
    return values


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute each layer's activations in the backward pass."""
    # Not the public gradient_checkpointing_enable: that also makes embedding outputs require gradients, which
    # sends the backward pass through frozen layers, and it goes by another name from transformers 5.23 on.
    model._set_gradient_checkpointing(True, functools.partial(checkpoint, use_reentrant=False))


def truncate_layers(text_config: PretrainedConfig, num_layers: int | None) -> str:
    """Let a language model be built from its first `num_layers` layers alone (None: all of them).

    Args:
        text_config: changed in setting, so that it describes the truncated model from then on.
        num_layers: `model.vlm_config.num_language_layers`.

    Returns:
        Pattern of the layer numbers that are left over, with dots around them; it matches nothing when all are kept.

    Raises:
        ConfigError: the model has fewer layers.
    """
    existing = text_config.num_hidden_layers
    if num_layers is None or num_layers == existing:
        return r"(?!)"
    if num_layers > existing:
        raise ConfigError(
            f"model.vlm_config.num_language_layers is {num_layers}, but the language model has {existing} layers; "
            f"give 1 to {existing}, or remove it to keep them all"
        )
    text_config.num_hidden_layers = num_layers
    if getattr(text_config, "layer_types", None) is not None:  # which layers attend in windows, one entry each
        text_config.layer_types = text_config.layer_types[:num_layers]
    return rf"\.({'|'.join(map(str, range(num_layers, existing)))})\."
