"""VLAModel: normalizer, backbone and action head as one checkpointable policy in physical units.

Shape letters: B batch, V cameras, L context tokens, E embedding width, T horizon, A per_action_dim, S state_dim.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from model.action_head import build_action_head, head_class
from model.action_head.base import Generators
from model.action_head.guidance import ActionPrefix
from model.adapters import base_fingerprint, load_state, trained_state
from model.architecture import is_plain
from model.augmentation import ImageAugmentation
from model.backbone import Backbone
from model.context import Context
from model.normalizer import Normalizer
from model.paligemma_vlm import PaliGemmaVLM
from model.siglip_llm import SiglipLLM
from utils.checkpoint import CheckpointError, evaluation_weights
from utils.config_utils import Config, ConfigError, config_from_dict
from utils.statistics import StatisticsError, check_statistics

BACKBONES: dict[str, type[Backbone]] = {
    "paligemma": PaliGemmaVLM,
    "siglip_llm": SiglipLLM,
}

logger = logging.getLogger(__name__)


class VLAModel(nn.Module):
    """A batch of the data contract in, a loss per action step or actions in physical units out."""

    def __init__(self, config: Config, backbone: Backbone, statistics: Sequence[dict[str, Any]]) -> None:
        """Assemble a policy; use `from_pretrained` or `from_checkpoint` instead.

        Args:
            config: read for the `data` section's normalization and the head's section.
            backbone: images and prompt -> fused tokens.
            statistics: per dataset, in the order of `dataset_index`.
        """
        super().__init__()
        head = config.model.action_head_config
        data, datasets = config.data, config.datasets
        if len(statistics) != len(datasets):
            raise StatisticsError(
                f"statistics of {len(statistics)} datasets, but the config has {len(datasets)} "
                f"({', '.join(dataset.name for dataset in datasets)}); calculate the statistics again for this config"
            )
        for one, dataset in zip(statistics, datasets, strict=True):
            remedy = "calculate the statistics again for this config"
            place = f"statistics of dataset {dataset.name}"
            check_statistics(one, dataset.state_dim, dataset.per_action_dim, place, remedy)
        self.cameras = config.cameras
        self.statistics = list(statistics)
        self.base: dict[str, Any] | None = None  # which pretrained weights are frozen beneath, see `state_to_save`
        self.compute_dtype = getattr(torch, config.model.vlm_config.dtype)
        self.normalizer = Normalizer.from_config(config, statistics)
        self.augmentation = ImageAugmentation(data.augmentation)
        self.backbone = backbone
        self.action_head = build_action_head(head, backbone.embed_dim, data.state_dim, self.normalizer.action_range)

    @classmethod
    def from_pretrained(
        cls,
        config: Config,
        statistics: Sequence[dict[str, Any]],
        image_mean: Sequence[float],
        image_std: Sequence[float],
    ) -> VLAModel:
        """A new policy on the pretrained backbone that `model.vlm_config` names.

        Raises:
            ConfigError: the backbone's directory is missing or does not fit the config.
            StatisticsError: statistics of another size.
        """
        head_class(config.model.action_head_config.type)  # a misspelt head is named before the weights are read
        vlm, resampler = config.model.vlm_config, config.model.vision_resampler_config
        backbone = BACKBONES[vlm.type].from_pretrained(vlm, resampler, image_mean, image_std)
        policy = cls(config, backbone, statistics)
        policy.base = _base_of(backbone, vlm.pretrained_names)
        return policy

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: dict[str, Any],
        config: Config | None = None,
        statistics: Sequence[dict[str, Any]] | None = None,
        *,
        use_ema: bool = True,
    ) -> VLAModel:
        """The policy of a checkpoint dict (`utils.checkpoint.load_checkpoint`), from it alone.

        Args:
            checkpoint: as loaded.
            config: build with this config instead of the checkpoint's own (fine-tuning with, say, another dtype).
            statistics: take these instead of the checkpoint's own (new data); None keeps the old units.
            use_ema: take the average of the weights where the checkpoint has one (`training.ema_decay`), as
                validation did; False to go on training.

        Raises:
            CheckpointError: the weights do not fit the architecture that the config describes.
        """
        config = config or config_from_dict(checkpoint["config"], source="checkpoint")
        vlm, resampler = config.model.vlm_config, config.model.vision_resampler_config
        mean, std = checkpoint["image_processor"]["image_mean"], checkpoint["image_processor"]["image_std"]
        weights = evaluation_weights(checkpoint) if use_ema else checkpoint["model"]
        base = checkpoint.get("base")
        base_name = None if base is None else base["name_or_path"]
        adapted_later = is_plain(checkpoint["config"]) and (vlm.lora is not None or vlm.quantization != "none")
        if base is not None and not base["included"]:
            backbone = BACKBONES[vlm.type].from_pretrained(vlm, resampler, mean, std)
        else:
            built = dataclasses.replace(vlm, lora=None, quantization="none") if adapted_later else vlm
            backbone = BACKBONES[vlm.type].from_config(checkpoint["backbone_config"], built, resampler, mean, std)
        model = cls(config, backbone, checkpoint["statistics"] if statistics is None else statistics)
        if base is not None and not base["included"]:
            weights, base_name = model.with_base(weights, base), vlm.pretrained_names
        if statistics is not None:
            fresh = {f"normalizer.{name}": value for name, value in model.normalizer.state_dict().items()}
            weights = {**weights, **fresh}
        model.load_weights(weights)
        if adapted_later:
            model.backbone.adapt(vlm)
        model.base = _base_of(backbone, base_name)
        if config.training.save_adapters_only and model.base is not None and model.base["name_or_path"] is None:
            raise ConfigError(
                "training.save_adapters_only needs frozen weights that a later run can read again, but these come from "
                "a checkpoint; set training.save_adapters_only: false"
            )
        return model

    def state_to_save(self, adapters_only: bool = False) -> dict[str, Any]:
        """What a checkpoint holds of the policy.

        Args:
            adapters_only: leave out what is frozen, which `from_checkpoint` then reads from the pretrained weights.

        Returns:
            `model` (weights), `base` (which pretrained weights lie beneath; None where nothing is frozen),
            `statistics`, `cameras` and `backbone_config`.
        """
        left_out = adapters_only and self.base is not None
        return {
            "model": trained_state(self) if left_out else self.state_dict(),
            "base": None if self.base is None else {**self.base, "included": not left_out},
            "statistics": self.statistics,
            "cameras": list(self.cameras),
            "backbone_config": self.backbone.backbone_config_dict(),
        }

    def with_base(self, trained: dict[str, Tensor], base: dict[str, Any]) -> dict[str, Tensor]:
        """The weights of an adapter checkpoint, completed by this model's frozen ones.

        Raises:
            CheckpointError: the adapters were trained on another base.
        """
        found = base_fingerprint(self.backbone)
        if found != base["fingerprint"]:
            raise CheckpointError(
                f"adapters trained on {base['name_or_path']} (fingerprint {base['fingerprint'][:12]}), but the frozen "
                f"weights found have fingerprint {found[:12]}; name the right base in "
                "model.vlm_config (--model_name_or_path; vision_ and language_model_name_or_path of a siglip_llm)"
            )
        own = trained_state(self).keys()
        return {key: value for key, value in self.state_dict().items() if key not in own} | trained

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Strictly load weights.

        Raises:
            CheckpointError: naming the first parameters that are missing, left over or of another shape.
        """
        own = self.state_dict()
        faults = [f"{key} is missing" for key in own if key not in weights]
        faults += [f"{key} is not part of this model" for key in weights if key not in own]
        for key in own.keys() & weights.keys():
            if own[key].shape != weights[key].shape:
                faults.append(f"{key} is {tuple(weights[key].shape)}, wanted {tuple(own[key].shape)}")
        if faults:
            raise CheckpointError(
                f"checkpoint of another architecture: {'; '.join(faults[:4])}"
                f"{f'; and {len(faults) - 4} more' if len(faults) > 4 else ''}; "
                "use the config that the checkpoint was trained with, or start anew without it"
            )
        load_state(self, weights)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        """Training loss per action step, float32 (B, T), zero where `action_is_pad`.

        Args:
            batch: the data contract, on the model's device, `action` in physical units.
        """
        with self.autocast():
            context = self.encode(batch)
            action_BTA = self.normalizer.normalize_action(batch["action"], batch["state"], batch["dataset_index"])
            return self.action_head.loss(context, action_BTA, batch["action_is_pad"])

    @torch.no_grad()
    def predict(
        self,
        batch: dict[str, Any],
        generator: Generators = None,
        num_inference_steps: int = 10,
        prefix: ActionPrefix | None = None,
    ) -> Tensor:
        """Sampled actions, float32 (B, T, A), physical units.

        Args:
            batch: the data contract; actions are not needed.
            generator: see `ActionHeadBase.sample`.
            num_inference_steps: integration steps of heads that iterate.
            prefix: what the actions have to continue, physical units; it is normalized for this batch's state, so
                delta actions stay where they are in the world.

        Raises:
            ValueError: the head cannot continue such a prefix.
        """
        return self.predict_draws(batch, [generator], num_inference_steps, prefix)[0]

    @torch.no_grad()
    def predict_draws(
        self,
        batch: dict[str, Any],
        generators: Sequence[Generators],
        num_inference_steps: int = 10,
        prefix: ActionPrefix | None = None,
    ) -> Tensor:
        """Several draws for each observation, which is encoded once: float32 (K, B, T, A), physical units.

        Args:
            batch: the data contract; actions are not needed.
            generators: one entry per draw, each as `ActionHeadBase.sample` takes it.
            num_inference_steps: integration steps of heads that iterate.
            prefix: as for `predict`.
        """
        noise = self.draw_noise(len(batch["state"]), generators, num_inference_steps)
        batch = batch if noise is None else {**batch, "noise": noise}
        return self.act(batch, len(generators), num_inference_steps, prefix=prefix)

    def draw_noise(self, batch_size: int, generators: Sequence[Generators], num_inference_steps: int) -> Tensor | None:
        """All that chance decides in K draws, (K, B, ...) on the model's device; None where it decides nothing."""
        device, draw = self.normalizer.state_center.device, self.action_head.draw_noise
        noise = [draw(batch_size, generator, device, num_inference_steps) for generator in generators]
        return None if noise[0] is None else torch.stack(noise)

    @torch.no_grad()
    def act(
        self,
        batch: dict[str, Any],
        num_draws: int,
        num_inference_steps: int,
        schedule: Any = None,
        prefix: ActionPrefix | None = None,
    ) -> Tensor:
        """`predict_draws` from noise that is already drawn: without a prefix a function fit for compilers and graphs.

        Args:
            batch: the data contract, what `encode` may find there, and as `noise` what `draw_noise` returned.
            num_draws, num_inference_steps, prefix: as for `predict_draws`.
            schedule: `action_head.schedule(num_inference_steps)`, where the caller has kept it.
        """
        place = batch["state"], batch["dataset_index"]
        noise_K = batch.get("noise", (None,) * num_draws)
        prefix = None if prefix is None else self._normalized(prefix, *place)
        with self.autocast():
            context = self.encode(batch)
            draws = [self.action_head.sample_from(context, x, num_inference_steps, schedule, prefix) for x in noise_K]
        return torch.stack([self.normalizer.denormalize_action(action.float(), *place) for action in draws])

    def _normalized(self, prefix: ActionPrefix, state_BS: Tensor, dataset_index_B: Tensor) -> ActionPrefix:
        if not self.action_head.continues_chunks:
            raise ValueError(
                f"{type(self.action_head).__name__} cannot continue a chunk; execute synchronous, naive_async or "
                "ensemble, or train a flow_matching head"
            )
        action_BTA = self.normalizer.normalize_action(prefix.action_BTA, state_BS, dataset_index_B)
        return dataclasses.replace(prefix, action_BTA=action_BTA)

    def encode(self, batch: dict[str, Any]) -> Context:
        """The fused observation that the head sees; the same for training, evaluation and serving.

        In training mode images are augmented; in evaluation mode they get the matching centre crop. A predictor may
        add what it knows beforehand: `prompt_embeds` (`backbone.embed_prompt` of the same tokens) and `image_slots`
        (see the backbone's forward).
        """
        tokens_BLE, mask_BL = self.backbone(
            self.augmentation([batch[camera] for camera in self.cameras]),
            batch["image_mask"],
            batch["vlm_attention_mask"],
            batch.get("input_ids"),
            batch["prompt_mask"],
            text_BLE=batch.get("prompt_embeds"),
            image_slots_N=batch.get("image_slots"),
        )
        state_BS = self.normalizer.normalize_state(batch["state"], batch["dataset_index"])
        return Context(tokens_BLE, mask_BL, state_BS, self.normalizer.action_dim_mask(batch["dataset_index"]))

    def components(self) -> dict[str, nn.Module]:
        """The policy's parts by name, as reports show them; every parameter is in exactly one."""
        return {**self.backbone.components(), "action head": self.action_head}

    def compile_layers(self, mode: str) -> int:
        """Let torch.compile make kernels for the transformer layers, in place; returns how many layers there are.

        Layer by layer because equal layers share one compilation, and because the rest (images that may be absent,
        noise) has no static shape or must draw the same random numbers as without.
        """
        layers = [m for m in self.backbone.modules() if isinstance(m, GradientCheckpointingLayer)]
        layers += [m for name, m in self.action_head.named_modules() if re.search(r"(^|\.)blocks\.\d+$", name)]
        for layer in layers:
            layer.compile(mode=mode)
        return len(layers)

    def parameter_kinds(self) -> dict[str, str]:
        """Per parameter name the learning rate that it goes by: vision, language or head (what is not pretrained)."""
        kinds = {"vision tower": "vision", "projector": "vision", "language model": "language"}
        kind_of = {
            id(parameter): kinds.get(component, "head")
            for component, module in self.components().items()
            for parameter in module.parameters()
        }
        return {name: kind_of[id(parameter)] for name, parameter in self.named_parameters()}

    def autocast(self) -> AbstractContextManager:
        """The compute precision, as a context."""
        device = self.normalizer.state_center.device
        enabled = self.compute_dtype != torch.float32
        return torch.autocast(device.type, dtype=self.compute_dtype if enabled else None, enabled=enabled)


def _base_of(backbone: Backbone, name_or_path: str | None) -> dict[str, Any] | None:
    """Which weights lie frozen in a backbone, and where they came from (None: a checkpoint); None where all train."""
    if all(parameter.requires_grad for parameter in backbone.parameters()):
        return None
    return {"name_or_path": name_or_path, "fingerprint": base_fingerprint(backbone)}
