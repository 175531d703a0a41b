"""What every backbone offers, and what backbones share: only images that exist go through the vision tower.

Shape letters: B batch, S observation frames, V cameras, H height, W width, N images of the whole batch,
n tokens per image, L context tokens, E width of image tokens.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from model.adapters import adapt
from model.context import Context, ContextSpec
from utils.backbones import BACKBONE_SPECS
from utils.batch import Batch
from utils.config_utils import ConfigError, VisionResamplerConfig, VLMConfig

OLDEST_TRANSFORMERS = (5, 6)  # from which the vision tower's parameters have the names that checkpoints hold


class Backbone(nn.Module, ABC):
    """Images and a prompt in, a `Context` out.

    `utils.backbones.BACKBONE_SPECS` says which backbones there are, and what each is made of.

    Attributes:
        cameras: names of the cameras that it reads, in slot order.
        vision_dtype: `float32` where images are encoded so whatever the rest computes in; None: like the rest.
        language_sees_images: whether image tokens run through the language model, so that its keys and values tell a
            head about the whole observation; without that there are none to hand over.
    """

    language_sees_images: bool = True

    def __init__(
        self,
        vlm_config: VLMConfig,
        cameras: Sequence[str],
        image_mean: Sequence[float],
        image_std: Sequence[float],
    ) -> None:
        super().__init__()
        self.cameras, self.vision_dtype = tuple(cameras), vlm_config.vision_dtype
        self.register_buffer("image_mean", torch.tensor(image_mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("image_std", torch.tensor(image_std, dtype=torch.float32).view(-1, 1, 1))

    @classmethod
    @abstractmethod
    def from_pretrained(
        cls,
        vlm_config: VLMConfig,
        resampler_config: VisionResamplerConfig,
        cameras: Sequence[str],
        image_mean: Sequence[float],
        image_std: Sequence[float],
    ) -> Backbone:
        """Load the pretrained parts from Hugging Face directories or hub ids.

        Args:
            vlm_config: `model.vlm_config`; it names the directories.
            resampler_config: `model.vision_resampler_config`.
            cameras: names of the cameras to read, in slot order.
            image_mean, image_std: per RGB channel, on the scale of pixels in [0, 1], from the image processor.

        Raises:
            ConfigError: nothing loadable is there, it is a model of another kind, weights are missing from it or left
                over, or a setting contradicts the model.
        """

    @classmethod
    @abstractmethod
    def from_config(
        cls,
        backbone_config: dict[str, Any],
        vlm_config: VLMConfig,
        resampler_config: VisionResamplerConfig,
        cameras: Sequence[str],
        image_mean: Sequence[float],
        image_std: Sequence[float],
    ) -> Backbone:
        """Build the same module without weight files; its weights are undefined until a state dict is loaded.

        Args:
            backbone_config: what `backbone_config_dict()` returned.
            vlm_config, resampler_config, cameras, image_mean, image_std: as for `from_pretrained`, whose directories
                are not read here.

        Raises:
            ConfigError: a setting contradicts the model.
        """

    @property
    @abstractmethod
    def spec(self) -> ContextSpec:
        """What its contexts look like."""

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Height and width of the images that the vision tower takes, in pixels."""

    @property
    @abstractmethod
    def tokens_per_image(self) -> int:
        """n, tokens that one image becomes before they are fused with the prompt."""

    @abstractmethod
    def components(self) -> dict[str, nn.Module]:
        """The parts by the names that reports use; every parameter is in exactly one.

        The pretrained ones are called `vision tower`, `projector` and `language model`.
        """

    def see_through(self, cameras: Sequence[str]) -> list[str]:
        """Read other cameras from now on; in words what became of weights that belong to a camera."""
        self.cameras = tuple(cameras)
        return []

    def adapt(self, vlm_config: VLMConfig) -> None:
        """Freeze, quantize and add LoRA to the pretrained parts, as the config asks; see `model.adapters.adapt`."""
        parts = self.components()
        adapt({"vision": parts["vision tower"], "language": parts["language model"]}, vlm_config)
        if vlm_config.freeze_patch_embedding:
            # All weights of a filter see nearly the same brightness: Adam moves them together, and what that adds to
            # every token drowns small objects. Fixed filters mend that (as in MoCo v3, Chen, Xie & He 2021;
            # positions, which train there, stay fixed too).
            for name, weight in parts["vision tower"].named_parameters():
                if "patch_embedding" in name or "position_embedding" in name:
                    weight.requires_grad_(False)
        if vlm_config.freeze_projector:
            if "projector" not in parts:
                raise ConfigError(
                    f"model.vlm_config.freeze_projector is set, but a {vlm_config.type} backbone has no projector; "
                    "remove it"
                )
            parts["projector"].requires_grad_(False)

    @staticmethod
    @abstractmethod
    def read_config(vlm_config: VLMConfig) -> dict[str, Any]:
        """What `from_config` takes, from the pretrained directories' config.json alone; ConfigError where it lacks."""

    @abstractmethod
    def backbone_config_dict(self) -> dict[str, Any]:
        """The pretrained parts' architecture as plain values, for JSON, for checkpoints and for `from_config`."""

    @abstractmethod
    def num_context_tokens(self, num_images: int, text_len: int) -> int:
        """L, context tokens of a sample with so many images (of all frames and cameras) and text tokens."""

    @abstractmethod
    def forward(self, batch: Batch, *, keys_values: bool = False, tokens: bool = True) -> Context:
        """Fuse images and prompt.

        Args:
            batch: the data contract, on the backbone's device. Read are each camera's images (see `encode_images`),
                `image_mask`, `vlm_attention_mask`, `input_ids` (padded on the right) and `prompt_mask`. A caller may
                add what it has kept: `prompt_embeds`, which is `embed_prompt(input_ids)` and then read instead, and
                `image_slots`, see `encode_images`.
            keys_values: also hand over the language model's keys and values.
            tokens: False where nothing reads `tokens_BLE`, which then means nothing: only what keys and values need is
                computed, and tokens that do not exist may be left out.

        Returns:
            `tokens_BLE`, without meaning where `mask_BL` is False, `mask_BL`, and `keys_values` where asked for.

        Raises:
            ValueError: images of another size than `image_size`, or a backbone that has no keys and values to give.
        """

    def vision_parts(self) -> list[nn.Module]:
        """The parts that compute in `vision_dtype`; none where that is None."""
        parts = self.components()
        return (
            []
            if self.vision_dtype is None
            else [parts[name] for name in ("vision tower", "projector") if name in parts]
        )

    def unread_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters that have no effect where `tokens` is False."""
        return ()

    @abstractmethod
    def embed_prompt(self, input_ids_BL: Tensor) -> Tensor:
        """Text tokens as they are fused, (B, L, width); they depend on the instruction alone."""

    @abstractmethod
    def image_features(self, pixels_N3HW: Tensor) -> Tensor:
        """Tokens (N, n, E) of normalized images."""

    def slot_mask(self, batch: Batch) -> Tensor:
        """Which images of a batch exist, bool (B, S, V)."""
        return batch["vlm_attention_mask"][:, :, None] & batch["image_mask"][:, None, :]

    def encode_images(
        self, images: Sequence[Tensor], slot_mask_BSV: Tensor, image_slots_N: Tensor | None = None
    ) -> Tensor:
        """One vision pass over the images that exist.

        Args:
            images: one (B, S, 3, H, W) per camera, uint8 from 0 to 255 or float32 from 0 to 1.
            slot_mask_BSV: bool, True for images that exist.
            image_slots_N: int64, which of the flattened B·S·V slots hold an image, ascending, at least one, where
                the caller knows it. None: read from the mask, for which the host must wait for the GPU.

        Returns:
            (B, S·V·n, E), frames outer, cameras inner, with zeros in the slots that are empty.

        Raises:
            ValueError: images of another size than `image_size`.
        """
        assert len(images) == slot_mask_BSV.shape[2], f"{len(images)} cameras, mask {tuple(slot_mask_BSV.shape)}"
        self._check_images(images)
        batch, slots = slot_mask_BSV.shape[0], slot_mask_BSV[0].numel()
        pixels_N3HW = torch.stack(tuple(images), dim=2).flatten(0, 2)
        valid_N = slot_mask_BSV.flatten().nonzero().squeeze(1) if image_slots_N is None else image_slots_N
        all_valid = valid_N.numel() == slot_mask_BSV.numel()
        if valid_N.numel() == 0:
            # Encode one empty image all the same: DDP waits for the vision tower's gradients on every rank.
            valid_N = valid_N.new_zeros(1)
        if not all_valid:
            pixels_N3HW = pixels_N3HW[valid_N]
        if pixels_N3HW.dtype == torch.uint8:
            pixels_N3HW = pixels_N3HW.float() / 255
        pixels_N3HW = (pixels_N3HW - self.image_mean) / self.image_std
        if self.vision_dtype is None:
            features_NnE = self.image_features(pixels_N3HW)
        else:
            with torch.autocast(pixels_N3HW.device.type, enabled=False):
                features_NnE = self.image_features(pixels_N3HW)
        if not all_valid:
            empty_NnE = features_NnE.new_zeros(batch * slots, *features_NnE.shape[1:])
            features_NnE = empty_NnE.index_copy(0, valid_N, features_NnE)
        return features_NnE.view(batch, slots * features_NnE.shape[1], features_NnE.shape[2])

    def _check_images(self, images: Sequence[Tensor]) -> None:
        for camera, image_BS3HW in zip(self.cameras, images, strict=True):
            known = image_BS3HW.ndim == 5 and image_BS3HW.dtype in (torch.uint8, torch.float32)
            assert known, (image_BS3HW.shape, image_BS3HW.dtype)
            height, width = image_BS3HW.shape[-2:]
            if (height, width) != (self.image_size, self.image_size):
                raise ValueError(
                    f"{camera} is {height} x {width} pixels, but the backbone takes {self.image_size} x "
                    f"{self.image_size}; resize with the backbone's own image processor "
                    "(data.image_processor_name_or_path), or choose a backbone for that size"
                )


def backbone_class(name: str) -> type[Backbone]:
    """The class of a backbone, a key of `BACKBONE_SPECS`; only the file of that one is imported.

    Raises:
        ConfigError: transformers is too old.
    """
    version = transformers.__version__
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TRANSFORMERS:
        raise ConfigError(
            f"transformers {version} is installed, where SigLIP's parameters have other names than in checkpoints; "
            f"wanted {'.'.join(map(str, OLDEST_TRANSFORMERS))} or newer: pip install -r requirements.txt"
        )
    module, _, class_name = BACKBONE_SPECS[name].model_class.rpartition(".")
    return getattr(importlib.import_module(module), class_name)
