"""Hugging Face directories and hub ids: reading their architecture, and their weights whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel

from utils.config_utils import ConfigError


def read_model_config(name_or_path: str, place: str, wanted: Sequence[str] | None, remedy: str) -> dict[str, Any]:
    """The values of a `config.json`.

    Args:
        name_or_path: directory or hub id.
        place: the config key and its value, for errors.
        wanted: model types that will do; None: any.
        remedy: what to do where nothing suitable is found.

    Raises:
        ConfigError: nothing there, or a model of another type.
    """
    is_dir = Path(name_or_path).is_dir()
    found = "no config.json with a model_type in it" if is_dir else "no such directory, nor such a model on the hub"
    try:
        values, _ = PretrainedConfig.get_config_dict(name_or_path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{place}: {found} ({reason}); {remedy}") from error
    if "model_type" not in values:
        raise ConfigError(f"{place}: {found}; {remedy}")
    if wanted is not None and values["model_type"] not in wanted:
        raise ConfigError(
            f"{place}: its config.json says model_type {values['model_type']!r}, wanted "
            f"{' or '.join(map(repr, wanted))}; {remedy}"
        )
    return values


def load_weights(
    model_class: type, name_or_path: str, place: str, config: PretrainedConfig, unused: str, **options: Any
) -> PreTrainedModel:
    """The weights of a directory as float32, or an error: nothing may be left at its random initialisation.

    Args:
        model_class: a transformers model or auto class.
        name_or_path: directory or hub id.
        place: the config key and its value, for errors.
        config: architecture to build.
        unused: pattern of the tensors that may be left over.
        options: for `from_pretrained`.

    Raises:
        ConfigError: no weights, damaged ones, or others than the architecture's.
    """
    try:
        model, report = model_class.from_pretrained(
            name_or_path,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # so that they are reported below
            output_loading_info=True,
            **options,
        )
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{place}: its weights cannot be read ({reason}); download it again or write it anew"
        ) from error
    for problem, tensors in (
        ("lack", report["missing_keys"]),
        ("have another size for", [key for key, *_ in report["mismatched_keys"]]),
        ("have the unknown", [key for key in report["unexpected_keys"] if not re.search(unused, key)]),
    ):
        if tensors:
            raise ConfigError(
                f"{place}: its weights {problem} {sorted(tensors)[0]} ({len(tensors)} such tensors), "
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
