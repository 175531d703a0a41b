"""VLAModel: normalizer, backbone and action head as one checkpointable policy in physical units.

Shape letters: B batch, V cameras, L context tokens, E embedding width, T horizon, A per_action_dim, S state_dim.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from model.action_head import build_action_head, head_class
from model.action_head.padding import repeat_last
from model.augmentation import ImageAugmentation
from model.backbone import Backbone, backbone_class
from model.checkpointing import frozen_base, policy_from_checkpoint
from model.context import ActionPrefix, Context
from model.published_normalizer import build_normalizer
from utils.batch import Batch
from utils.config_utils import Config, ConfigError
from utils.normalization import needed_statistics
from utils.statistics import StatisticsError, check_statistics


class VLAModel(nn.Module):
    """A batch of the data contract in, a loss per action step or actions in physical units out."""

    def __init__(self, config: Config, backbone: Backbone, statistics: Sequence[dict[str, Any]]) -> None:
        """Assemble a policy; use `from_pretrained` or `from_checkpoint` instead.

        Args:
            config: read for the `data` section's normalization and the head's section.
            backbone: images and prompt -> context.
            statistics: per dataset, in the order of `dataset_index`.

        Raises:
            ConfigError: the head wants keys and values that this backbone cannot hand over.
            StatisticsError: statistics of another size.
        """
        super().__init__()
        _check_head_and_backbone(config)
        data, datasets = config.data, config.datasets
        if len(statistics) != len(datasets):
            raise StatisticsError(
                f"statistics of {len(statistics)} datasets, but the config has {len(datasets)} "
                f"({', '.join(dataset.name for dataset in datasets)}); calculate the statistics again for this config"
            )
        for entry, dataset in zip(statistics, datasets, strict=True):
            remedy = "calculate the statistics again for this config"
            place = f"statistics of dataset {dataset.name}"
            check_statistics(entry, dataset.state_dim, dataset.per_action_dim, place, remedy, needed_statistics(data))
        self.statistics = list(statistics)
        self.base: dict[str, Any] | None = None  # see `model.checkpointing.frozen_base`
        self.published: dict[str, Any] | None = None  # what it was imported with, to be handed back with
        self.compute_dtype = getattr(torch, config.model.vlm_config.dtype)
        self.normalizer = build_normalizer(config, statistics)
        self.augmentation = ImageAugmentation(data.augmentation)
        self.backbone = backbone
        self.action_head = build_action_head(
            config.model.action_head_config, backbone.spec, data.state_dim, self.normalizer.action_range
        )
        self.trains_over_padding = config.model.action_head_config.trains_over_padding
        self.action_head.adapt(config.model.action_head_config, self.compute_dtype)
        self.rest_unread()

    def rest_unread(self) -> None:
        """Stop training what nothing reads: with DDP, a weight that gets no gradient is an error."""
        if not self.action_head.wants_tokens:
            for parameter in self.backbone.unread_parameters():
                parameter.requires_grad_(False)

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
        _check_head_and_backbone(config)  # before the weights are read
        if config.model.action_head_config.expert.lora is not None:
            raise ConfigError(
                "model.action_head_config.expert.lora adapts an expert that has learnt already, but this one is new; "
                "give --init_checkpoint, or remove it"
            )
        vlm, resampler = config.model.vlm_config, config.model.vision_resampler_config
        settings = resampler, config.cameras, image_mean, image_std
        policy = cls(config, backbone_class(vlm.type).from_pretrained(vlm, *settings), statistics)
        policy.base = frozen_base(policy.backbone, vlm.pretrained_names, vlm)
        return policy

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: dict[str, Any],
        config: Config | None = None,
        statistics: Sequence[dict[str, Any]] | None = None,
        *,
        use_ema: bool = True,
        must_be_finite: bool = True,
    ) -> VLAModel:
        """The policy of a checkpoint dict (`utils.checkpoint.load_checkpoint`), from it alone.

        Args:
            checkpoint: as loaded.
            config: build with this config instead of the checkpoint's own (fine-tuning with, say, another dtype).
            statistics: take these instead of the checkpoint's own (new data); None keeps the old units.
            use_ema: take the average of the weights where the checkpoint has one (`training.ema_decay`), as
                validation did; False to go on training.
            must_be_finite: refuse weights that are NaN or infinite; False to look at them.

        Raises:
            CheckpointError: the weights do not fit the architecture that the config describes, or are not finite.
        """
        options = {"use_ema": use_ema, "must_be_finite": must_be_finite}
        return policy_from_checkpoint(cls, checkpoint, config, statistics, **options)

    def forward(self, batch: Batch) -> Tensor:
        """Training loss per action step, float32 (B, T), zero where `utils.batch.steps_with_loss` is False.

        Args:
            batch: the data contract, on the model's device, `action` in physical units.
        """
        with self.autocast():
            context = self.encode(batch)
            action_BTA = self.normalizer.normalize_action(batch["action"], batch["state"], batch["dataset_index"])
            is_pad_BT = batch["action_is_pad"].bool()
            if self.trains_over_padding:
                action_BTA, is_pad_BT = repeat_last(action_BTA, is_pad_BT)
            return self.action_head.loss(context, action_BTA, is_pad_BT)

    def draw_noise(self, seeds_KB: Sequence[Sequence[int]], num_inference_steps: int) -> Tensor | None:
        """The noise of K draws, (K, B, ...) on the model's device, or None for heads that sample nothing.

        Args:
            seeds_KB: per draw one seed per sample, so that a sample's noise does not depend on the rest of the batch.
            num_inference_steps: as for `act`.
        """
        draws = []
        for seeds_B in seeds_KB:
            generators = [torch.Generator().manual_seed(seed) for seed in seeds_B]
            draws.append(self.action_head.draw_noise(generators, self._device, num_inference_steps))
        return None if draws[0] is None else torch.stack(draws)

    @torch.no_grad()
    def act(
        self,
        batch: Batch,
        num_inference_steps: int,
        *,
        num_draws: int = 1,
        schedule: Any = None,
        prefix: ActionPrefix | None = None,
    ) -> Tensor:
        """Actions, float32 (K, B, T, A), physical units: K draws for each observation, which is encoded once.

        Nothing in it is random, and without a prefix the host never waits for the GPU, so that it can be compiled or
        captured as a graph.

        Args:
            batch: the data contract, without actions, and as `noise` what `draw_noise` returned for K draws. Heads that
                sample nothing need no noise.
            num_inference_steps: integration or denoising steps, for heads that iterate.
            num_draws: K.
            schedule: `action_head.schedule(num_inference_steps, device)`, where the caller has kept it.
            prefix: what the actions have to continue, physical units; it is normalized for this batch's state, so
                delta actions stay where they are in the world.

        Raises:
            ValueError: the head cannot continue such a prefix.
        """
        rest = {"num_draws": num_draws, "schedule": schedule, "prefix": prefix}
        return self.act_measured(batch, num_inference_steps, **rest)[0]

    @torch.no_grad()
    def act_measured(
        self,
        batch: Batch,
        num_inference_steps: int,
        *,
        num_draws: int = 1,
        schedule: Any = None,
        prefix: ActionPrefix | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`act`, and how unsure the head was, float32 (K, B, T); see `ActionHeadBase.sample_draws`."""
        head, units = self.action_head, (batch["state"], batch["dataset_index"])
        noise_K = batch.get("noise", (None,) * num_draws)
        assert len(noise_K) == num_draws, f"noise of {len(noise_K)} draws, wanted {num_draws}"
        assert "noise" in batch or not head.is_stochastic, f"{type(head).__name__} needs batch['noise'] (draw_noise)"
        if prefix is not None:
            prefix = self._normalized(prefix, *units)
        with self.autocast():
            context = self.encode(batch)
            draws, unsure_KBT = head.sample_draws(context, noise_K, num_inference_steps, schedule, prefix)
        actions = [self.normalizer.denormalize_action(action.float(), *units) for action in draws]
        return torch.stack(actions), unsure_KBT.float()

    def _normalized(self, prefix: ActionPrefix, state_BS: Tensor, dataset_index_B: Tensor) -> ActionPrefix:
        if not self.action_head.continues_chunks:
            raise ValueError(
                f"{type(self.action_head).__name__} cannot continue a chunk; execute synchronous, naive_async or "
                "ensemble, or train a flow_matching head"
            )
        action_BTA = self.normalizer.normalize_action(prefix.action_BTA, state_BS, dataset_index_B)
        return dataclasses.replace(prefix, action_BTA=action_BTA)

    def encode(self, batch: Batch) -> Context:
        """The fused observation that the head sees; the same for training, evaluation and serving.

        In training mode images are augmented; in evaluation mode they get the matching centre crop. What a batch may
        hold beside the observation: see `Backbone.forward`.
        """
        images = self.augmentation([batch[camera] for camera in self.cameras])
        seen = {**batch, **dict(zip(self.cameras, images, strict=True))}
        head = self.action_head
        context = self.backbone(seen, keys_values=head.wants_keys_values, tokens=head.wants_tokens)
        return dataclasses.replace(
            context,
            state_BS=self.normalizer.normalize_state(batch["state"], batch["dataset_index"]),
            action_dim_mask_BA=self.normalizer.action_dim_mask(batch["dataset_index"]),
        )

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the cameras that it reads, in slot order."""
        return self.backbone.cameras

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
        enabled = self.compute_dtype != torch.float32
        return torch.autocast(self._device.type, dtype=self.compute_dtype if enabled else None, enabled=enabled)

    @property
    def _device(self) -> torch.device:
        return self.normalizer.state_exists.device


def _check_head_and_backbone(config: Config) -> None:
    """Raise a ConfigError where there is no such head, or the backbone cannot hand over what it reads."""
    head, backbone = config.model.action_head_config.type, config.model.vlm_config.type
    if head_class(head).wants_keys_values and not backbone_class(backbone).language_sees_images:
        raise ConfigError(
            f"model.action_head_config.type {head} reads the keys and values of the backbone's language model, but "
            f"that of model.vlm_config.type {backbone} sees no images; choose another head or another backbone"
        )
