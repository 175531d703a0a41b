"""The backbone `siglip_llm`: a SigLIP vision model and a causal language model, fused by learnable latents.

Shape letters: B batch, S observation frames, V cameras, N images of the whole batch, n tokens per image,
L text tokens, U different prompts of a batch, q latents, D fused width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from model.backbone import Backbone
from model.context import Context, ContextSpec
from model.perceiver_fusion import PerceiverFusion
from model.pretrained import (
    attention_of,
    check_num_image_tokens,
    config_values,
    enable_checkpointing,
    load_weights,
    num_image_tokens,
    read_model_config,
    truncate_layers,
)
from utils.backbones import BACKBONE_SPECS
from utils.batch import Batch
from utils.config_utils import ConfigError, VisionResamplerConfig, VLMConfig


class SiglipLLM(Backbone):
    """SigLIP (Zhai et al. 2023) sees, a causal language model (Qwen2.5, Llama, ...) reads, `PerceiverFusion` joins.

    The language model is a text encoder: its last hidden states are used, nothing is decoded, no logits are computed.
    It reads each different prompt of a batch once. The state is not fused here: the action head has it.
    Parameters that train are float32; those frozen by `freeze_vision_tower`, `freeze_language_model` or LoRA are
    stored in `vlm_config.dtype`, or quantized (see `model.adapters.adapt`). The fusion always trains. The module works
    inside and outside of `torch.autocast`.
    """

    language_sees_images = False

    def __init__(
        self,
        vision_tower: SiglipVisionModel,
        language_model: PreTrainedModel,
        vlm_config: VLMConfig,
        cameras: Sequence[str],
        image_mean: Sequence[float],
        image_std: Sequence[float],
    ) -> None:
        """Use `from_pretrained` or `from_config`: they check the configuration before any weights are made."""
        super().__init__(vlm_config, cameras, image_mean, image_std)
        self.vision_tower = vision_tower
        self.language_model = language_model
        self.fusion = PerceiverFusion(
            vlm_config.fusion,
            vision_tower.config.hidden_size,
            language_model.config.hidden_size,
            num_cameras=len(self.cameras),
            num_image_tokens=num_image_tokens(vision_tower.config),
        )
        self.adapt(vlm_config)
        if vlm_config.gradient_checkpointing:
            enable_checkpointing(vision_tower)
            enable_checkpointing(language_model)
        self.train()  # transformers hands out loaded models in evaluation mode, built ones in training mode

    @classmethod
    def from_pretrained(
        cls,
        vlm_config: VLMConfig,
        resampler_config: VisionResamplerConfig,
        cameras: Sequence[str],
        image_mean: Sequence[float],
        image_std: Sequence[float],
    ) -> SiglipLLM:
        """See `Backbone.from_pretrained`; the fusion starts untrained.

        `vlm_config.vision_model_name_or_path` names a SigLIP, `language_model_name_or_path` a causal language model.
        `resampler_config` must be the identity, since the fusion resamples.
        """
        vision_name, language_name = vlm_config.vision_model_name_or_path, vlm_config.language_model_name_or_path
        vision_config = _read_vision_config(vision_name)
        language_config = _read_language_config(language_name)
        _check(vlm_config, resampler_config, vision_config)
        left_over = truncate_layers(language_config, vlm_config.num_language_layers)
        attention = attention_of(language_config, vlm_config.attn_implementation)
        # Published SigLIPs hold a text tower and the pooling head as well, published language models an lm_head.
        vision_tower = load_weights(
            SiglipVisionModel,
            vision_name,
            _setting("vision", vision_name),
            vision_config,
            unused=r"^text_model\.|^logit_(scale|bias)$|(^|\.)head\.",
            attn_implementation="sdpa",
        )
        language_model = load_weights(
            AutoModel,
            language_name,
            _setting("language", language_name),
            language_config,
            unused=rf"(^|\.)(lm_head|embed_out)\.|(^|\.)layers{left_over}",
            attn_implementation=attention,
        )
        _require_causal(language_model, language_name)
        return cls(vision_tower, language_model, vlm_config, cameras, image_mean, image_std)

    @classmethod
    def from_config(
        cls,
        backbone_config: dict[str, Any],
        vlm_config: VLMConfig,
        resampler_config: VisionResamplerConfig,
        cameras: Sequence[str],
        image_mean: Sequence[float],
        image_std: Sequence[float],
    ) -> SiglipLLM:
        """See `Backbone.from_config`."""
        values = copy.deepcopy(backbone_config)
        vision_config = SiglipVisionConfig.from_dict(values["vision"])
        language_config = CONFIG_MAPPING[values["language"]["model_type"]].from_dict(values["language"])
        _check(vlm_config, resampler_config, vision_config)
        truncate_layers(language_config, vlm_config.num_language_layers)
        attention = attention_of(language_config, vlm_config.attn_implementation)
        with no_init_weights():  # random numbers that the state dict would overwrite
            vision_tower = SiglipVisionModel._from_config(vision_config, attn_implementation="sdpa")
            language_model = AutoModel.from_config(
                language_config, attn_implementation=attention, trust_remote_code=False
            )
        return cls(vision_tower, language_model, vlm_config, cameras, image_mean, image_std)

    @staticmethod
    def read_config(vlm_config: VLMConfig) -> dict[str, Any]:
        """See `Backbone.read_config`."""
        return {
            "vision": config_values(_read_vision_config(vlm_config.vision_model_name_or_path)),
            "language": config_values(_read_language_config(vlm_config.language_model_name_or_path)),
        }

    def backbone_config_dict(self) -> dict[str, Any]:
        """Both models' architectures as plain values, for JSON, for checkpoints and for `from_config`."""
        return {
            "vision": config_values(self.vision_tower.config),
            "language": config_values(self.language_model.config),
        }

    def components(self) -> dict[str, nn.Module]:
        """See `Backbone.components`."""
        return {"vision tower": self.vision_tower, "language model": self.language_model, "fusion": self.fusion}

    def see_through(self, cameras: Sequence[str]) -> list[str]:
        old_VD = self.fusion.camera_VD.detach()
        kept = min(len(old_VD), len(cameras))
        marks_VD = torch.randn(len(cameras), old_VD.shape[1]) * 0.5  # as PerceiverFusion makes them
        marks_VD[:kept] = old_VD[:kept]
        self.fusion.camera_VD = nn.Parameter(marks_VD, requires_grad=self.fusion.camera_VD.requires_grad)
        return [*super().see_through(cameras), f"fusion.camera_VD {tuple(old_VD.shape)} -> {tuple(marks_VD.shape)}"]

    @property
    def spec(self) -> ContextSpec:
        """See `Backbone.spec`. There are no keys and values to hand over: the language model reads the prompt alone."""
        return ContextSpec(width=self.fusion.latents_qD.shape[1])

    @property
    def image_size(self) -> int:
        """Height and width of the images that the vision tower takes, in pixels."""
        return self.vision_tower.config.image_size

    @property
    def tokens_per_image(self) -> int:
        """n, features that the latents read from one image; the context has `fusion.num_latents` tokens."""
        return num_image_tokens(self.vision_tower.config)

    def num_context_tokens(self, num_images: int, text_len: int) -> int:
        """See `Backbone.num_context_tokens`; always one per latent."""
        return len(self.fusion.latents_qD)

    def forward(self, batch: Batch, *, keys_values: bool = False, tokens: bool = True) -> Context:
        """See `Backbone.forward`.

        Returns:
            `tokens_BLE`: the latents after reading, float32 or the autocast dtype; `mask_BL` is all True, for latents
            always exist.

        Raises:
            ValueError: images of another size than `image_size`, or `keys_values`.
        """
        if keys_values:
            raise ValueError("a siglip_llm backbone hands over no keys and values: its language model sees no images")
        slot_mask_BSV = self.slot_mask(batch)
        images = [batch[camera] for camera in self.cameras]
        image_BMD = self.encode_images(images, slot_mask_BSV, batch.get("image_slots"))
        text_BLD = batch.get("prompt_embeds")
        if text_BLD is None:
            text_BLD = self.embed_prompt(batch["input_ids"])
        image_BSVnD = image_BMD.unflatten(1, (*slot_mask_BSV.shape[1:], -1))
        tokens_BqD = self.fusion(image_BSVnD, slot_mask_BSV, text_BLD, batch["prompt_mask"])
        return Context(tokens_BqD, torch.ones(tokens_BqD.shape[:2], dtype=torch.bool, device=tokens_BqD.device))

    def embed_prompt(self, input_ids_BL: Tensor) -> Tensor:
        """Text tokens as the fusion takes them, (B, L, D); they depend on the instruction alone.

        No attention mask is needed: the model is causal, so padding on the right changes no token before it.
        """
        prompts_UL, prompt_B = torch.unique(input_ids_BL, dim=0, return_inverse=True)
        hidden_ULE = self.language_model(input_ids=prompts_UL, use_cache=False).last_hidden_state
        return self.fusion.project_text(hidden_ULE)[prompt_B]

    def image_features(self, pixels_N3HW: Tensor) -> Tensor:
        """Tokens (N, n, D) of normalized images, as the fusion takes them."""
        return self.fusion.project_images(self.vision_tower(pixels_N3HW).last_hidden_state)


def _setting(kind: str, name_or_path: str) -> str:
    return f"model.vlm_config.{kind}_model_name_or_path is {name_or_path!r}"


def _remedy(kind: str) -> str:
    return BACKBONE_SPECS["siglip_llm"].remedy(f"{kind}_model_name_or_path")


def _read_vision_config(name_or_path: str) -> SiglipVisionConfig:
    model_types = ["siglip", "siglip_vision_model"]
    values = read_model_config(name_or_path, _setting("vision", name_or_path), model_types, _remedy("vision"))
    config = SiglipVisionConfig.from_dict(values["vision_config"] if values["model_type"] == "siglip" else values)
    config.vision_use_head = False  # SigLIP's pooling head: nothing here reads it, it could not train
    return config


def _read_language_config(name_or_path: str) -> PretrainedConfig:
    setting, remedy = _setting("language", name_or_path), _remedy("language")
    values = read_model_config(name_or_path, setting, None, remedy)
    kind = values["model_type"]
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config = CONFIG_MAPPING[kind].from_dict(values)
        if hasattr(config, "hidden_size") and not hasattr(config, "vision_config"):
            return config
    raise ConfigError(
        f"{setting}: its config.json says model_type {kind!r}, wanted a causal language model of text alone, such as "
        f"'qwen2' or 'llama'; {remedy}"
    )


def _check(vlm_config: VLMConfig, resampler_config: VisionResamplerConfig, vision_config: SiglipVisionConfig) -> None:
    check_num_image_tokens(vlm_config, vision_config)
    if resampler_config.type != "identity":
        raise ConfigError(
            f"model.vision_resampler_config.type is {resampler_config.type}, but a siglip_llm backbone resamples in "
            "its fusion; remove it and set model.vlm_config.fusion"
        )


@torch.no_grad()
def _require_causal(language_model: PreTrainedModel, name_or_path: str) -> None:
    """Raise a ConfigError unless a token's features are free of what follows it."""
    pairs_22 = torch.tensor([[0, 1], [0, 2]])
    first_2E = language_model(input_ids=pairs_22, use_cache=False).last_hidden_state[:, 0]
    if not torch.allclose(first_2E[0], first_2E[1], atol=1e-4, rtol=1e-4):
        raise ConfigError(
            f"{_setting('language', name_or_path)}: a token's features change with the tokens after it, wanted a "
            f"causal language model; {_remedy('language')}"
        )
