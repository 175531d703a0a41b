"""Image processor and tokenizer of a run that trains on from a checkpoint: the checkpoint's, and no others."""

from __future__ import annotations

from typing import Any

from data.processing import (
    ObservationError,
    PromptTokenizer,
    VLAImageProcessor,
    processors_from_checkpoint,
)
from utils.config_utils import Config


def processors_to_train_on(checkpoint: dict[str, Any], config: Config) -> tuple[VLAImageProcessor, PromptTokenizer]:
    """The image processor and the tokenizer that a checkpoint's weights know; prompts as long as the config says.

    Args:
        checkpoint: as loaded.
        config: of the run. A tokenizer or image processor that it names must be the checkpoint's.

    Raises:
        ObservationError: the config names another one, or one that is not there.
    """
    image_processor, tokenizer = processors_from_checkpoint(checkpoint)
    tokenizer.max_len = config.data.prompt_max_len
    backbone = checkpoint["config"]["model"]["vlm_config"]["type"]
    for key in ("tokenizer_name_or_path", "image_processor_name_or_path", "siglip_model_name"):
        named = getattr(config.data, key)
        if named is None:
            continue
        try:
            if key == "tokenizer_name_or_path":
                same = PromptTokenizer.from_pretrained(named, tokenizer.max_len, backbone).reads_like(tokenizer)
            else:
                other = VLAImageProcessor.from_pretrained(named, config.data.image_fit)
                same = other.to_settings() == image_processor.to_settings()
        except ObservationError:
            if named == checkpoint["config"]["data"].get(key):
                continue  # a checkpoint needs nothing beside itself
            raise
        if not same:
            raise ObservationError(
                f"data.{key}: {named!r} is another one than the checkpoint's, which its weights were trained with; "
                f"remove data.{key} to keep the checkpoint's, or begin from the pretrained backbone"
            )
    return image_processor, tokenizer
