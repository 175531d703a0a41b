"""The backbone: images and a prompt in, fused tokens out.

Shape letters: B batch, S observation frames, V cameras, H height, W width, N images of the whole batch,
n tokens per image, L context tokens (S·V·n of images, then text), E embedding width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PaliGemmaConfig, PaliGemmaModel
from transformers.initialization import no_init_weights

from model.backbone import Backbone
from model.context import Context, ContextSpec
from model.keys_values import KeysValues, collecting
from model.prefix import keys_values_alone, unread_parameters, without_gaps
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
from model.vision_encoder_module import build_vision_resampler
from utils.backbones import BACKBONE_SPECS
from utils.batch import Batch
from utils.config_utils import VisionResamplerConfig, VLMConfig


class PaliGemmaVLM(Backbone):
    """PaliGemma (1 or 2) as an encoder of observations (Beyer et al. 2024, Steiner et al. 2024).

    Attention is bidirectional over the whole prefix, as in PaliGemma's pretraining; nothing is decoded and no
    logits are computed. Parameters that train are float32; those frozen by `freeze_vision_tower` (the SigLIP tower
    without the projector after it), `freeze_projector`, `freeze_language_model` or LoRA are stored in
    `vlm_config.dtype`, or quantized (see `model.adapters.adapt`).
    The module works inside and outside of `torch.autocast` and never enters it by itself.
    """

    def __init__(
        self,
        backbone: PaliGemmaModel,
        resampler: nn.Module,
        vlm_config: VLMConfig,
        cameras: Sequence[str],
        image_mean: Sequence[float],
        image_std: Sequence[float],
    ) -> None:
        """Use `from_pretrained` or `from_config`: they check the configuration before any weights are made."""
        super().__init__(vlm_config, cameras, image_mean, image_std)
        self.backbone = backbone
        self.resampler = resampler
        self.adapt(vlm_config)
        if vlm_config.gradient_checkpointing:
            enable_checkpointing(backbone)
        self.train()  # transformers hands out loaded models in evaluation mode, built ones in training mode

    @classmethod
    def from_pretrained(
        cls,
        vlm_config: VLMConfig,
        resampler_config: VisionResamplerConfig,
        cameras: Sequence[str],
        image_mean: Sequence[float],
        image_std: Sequence[float],
    ) -> PaliGemmaVLM:
        """See `Backbone.from_pretrained`; `vlm_config.model_name_or_path` names a PaliGemma."""
        config = _read_backbone_config(vlm_config.model_name_or_path)
        check_num_image_tokens(vlm_config, config.vision_config)
        resampler = build_vision_resampler(resampler_config, config.text_config.hidden_size)
        backbone = _load_backbone(vlm_config, config)
        return cls(backbone, resampler, vlm_config, cameras, image_mean, image_std)

    @classmethod
    def from_config(
        cls,
        backbone_config: dict[str, Any],
        vlm_config: VLMConfig,
        resampler_config: VisionResamplerConfig,
        cameras: Sequence[str],
        image_mean: Sequence[float],
        image_std: Sequence[float],
    ) -> PaliGemmaVLM:
        """See `Backbone.from_config`."""
        config = PaliGemmaConfig.from_dict(copy.deepcopy(backbone_config))
        truncate_layers(config.text_config, vlm_config.num_language_layers)
        check_num_image_tokens(vlm_config, config.vision_config)
        resampler = build_vision_resampler(resampler_config, config.text_config.hidden_size)
        config._attn_implementation = _attn_implementation(vlm_config, config)
        with no_init_weights():  # minutes of random numbers for a 3B model, all overwritten by the state dict
            backbone = PaliGemmaModel(config)
        return cls(backbone, resampler, vlm_config, cameras, image_mean, image_std)

    @staticmethod
    def read_config(vlm_config: VLMConfig) -> dict[str, Any]:
        """See `Backbone.read_config`."""
        return config_values(_read_backbone_config(vlm_config.model_name_or_path))

    def backbone_config_dict(self) -> dict[str, Any]:
        """The backbone's architecture as plain values, for JSON, for checkpoints and for `from_config`."""
        return config_values(self.backbone.config)

    def components(self) -> dict[str, nn.Module]:
        """See `Backbone.components`."""
        return {
            "vision tower": self.backbone.vision_tower,
            "projector": self.backbone.multi_modal_projector,
            "resampler": self.resampler,
            "language model": self.backbone.language_model,
        }

    @property
    def spec(self) -> ContextSpec:
        """See `Backbone.spec`; keys and values are those of the whole prefix."""
        text = self.backbone.config.text_config
        return ContextSpec(
            width=text.hidden_size,
            num_layers=text.num_hidden_layers,
            num_kv_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            rope_theta=text.rope_parameters["rope_theta"],
        )

    @property
    def image_size(self) -> int:
        """Height and width of the images that the vision tower takes, in pixels."""
        return self.backbone.config.vision_config.image_size

    @property
    def tokens_per_image(self) -> int:
        """n, context tokens that one image takes, after the resampler."""
        return self.resampler.tokens_per_image(num_image_tokens(self.backbone.config.vision_config))

    def num_context_tokens(self, num_images: int, text_len: int) -> int:
        """See `Backbone.num_context_tokens`."""
        return num_images * self.tokens_per_image + text_len

    def forward(self, batch: Batch, *, keys_values: bool = False, tokens: bool = True) -> Context:
        """See `Backbone.forward`.

        Returns:
            `tokens_BLE`: the backbone's last hidden states. The images come first (frames outer, cameras inner,
            `tokens_per_image` each), then the text. float32, or the autocast or storage dtype where the language model
            computes in that.
        """
        slot_mask_BSV = self.slot_mask(batch)
        images = [batch[camera] for camera in self.cameras]
        features_BLE = self.encode_images(images, slot_mask_BSV, batch.get("image_slots"))
        text_BLE = batch.get("prompt_embeds")
        if text_BLE is None:
            text_BLE = self.embed_prompt(batch["input_ids"])
        # PaliGemmaModel.forward puts image features among the text embeddings as they are: only text embeddings are
        # scaled by sqrt(E), and in transformers 5 the embedding does that by itself.
        embeds_BLE = torch.cat([features_BLE.to(text_BLE.dtype), text_BLE], dim=1)

        image_mask_BL = slot_mask_BSV.flatten(1).repeat_interleave(self.tokens_per_image, dim=1)
        mask_BL = torch.cat([image_mask_BL, batch["prompt_mask"]], dim=1)
        if not tokens:
            slots = batch.get("image_slots"), self.tokens_per_image, slot_mask_BSV[0].numel()
            embeds_BLE, mask_BL = without_gaps(embeds_BLE, mask_BL, *slots)
            before_last_BLE, layers = keys_values_alone(self.backbone.language_model, embeds_BLE, mask_BL)
            return Context(before_last_BLE, mask_BL, keys_values=layers, first_position=0)
        # Positions count the tokens that exist, from 1: what is masked out moves nothing.
        position_ids_BL = mask_BL.cumsum(dim=1)
        collected = KeysValues() if keys_values else None
        # token_type_ids 0 mark one bidirectional block; without them PaliGemmaModel is causal. In the block Gemma 2's
        # sliding windows don't apply, in stock transformers as here. The mask is given even where all are True:
        # without one, positions that repeat would be taken for several packed sequences.
        outputs = self.backbone(
            inputs_embeds=embeds_BLE,
            attention_mask=mask_BL,
            position_ids=position_ids_BL,
            token_type_ids=torch.zeros_like(position_ids_BL),
            use_cache=False,
            **({} if collected is None else {"keys_values": collected}),
        )
        layers = None if collected is None else collected.close()
        return Context(outputs.last_hidden_state, mask_BL, keys_values=layers)

    def unread_parameters(self) -> Iterable[nn.Parameter]:
        """See `Backbone.unread_parameters`."""
        return unread_parameters(self.backbone.language_model)

    def embed_prompt(self, input_ids_BL: Tensor) -> Tensor:
        """Text tokens as the language model takes them, (B, L, E); they depend on the instruction alone."""
        return self.backbone.get_input_embeddings()(input_ids_BL)

    def image_features(self, pixels_N3HW: Tensor) -> Tensor:
        """Tokens (N, n, E) of normalized images, as the language model gets them."""
        features_NnE = self.backbone.vision_tower(pixels_N3HW).last_hidden_state
        # Not get_image_features: a frozen tower gives bfloat16, which the float32 projector refuses outside autocast.
        projector = self.backbone.multi_modal_projector
        return self.resampler(projector(features_NnE.to(projector.linear.weight.dtype)))


def _attn_implementation(vlm_config: VLMConfig, config: PaliGemmaConfig) -> dict[str, str]:
    """Attention of each sub-model. Only the text model's is a choice: SigLIP caps nothing and runs on SDPA."""
    choice = collecting(attention_of(config.text_config, vlm_config.attn_implementation))
    return {"": choice, "text_config": choice, "vision_config": "sdpa"}


def _setting(name_or_path: str) -> str:
    return f"model.vlm_config.model_name_or_path is {name_or_path!r}"


def _read_backbone_config(name_or_path: str) -> PaliGemmaConfig:
    remedy = BACKBONE_SPECS["paligemma"].remedy("model_name_or_path")
    values = read_model_config(name_or_path, _setting(name_or_path), ["paligemma"], remedy)
    config = PaliGemmaConfig.from_dict(values)
    config.vision_config.vision_use_head = False  # SigLIP's pooling head: nothing here reads it, it could not train
    return config


def _load_backbone(vlm_config: VLMConfig, config: PaliGemmaConfig) -> PaliGemmaModel:
    name_or_path = vlm_config.model_name_or_path
    left_over = truncate_layers(config.text_config, vlm_config.num_language_layers)
    # The published checkpoints are PaliGemmaForConditionalGeneration: an lm_head may be left over, nothing else.
    unused = rf"(^|\.)lm_head\.|vision_tower\.(vision_model\.)?head\.|language_model\.(model\.)?layers{left_over}"
    attention = _attn_implementation(vlm_config, config)
    return load_weights(
        PaliGemmaModel, name_or_path, _setting(name_or_path), config, unused, attn_implementation=attention
    )
