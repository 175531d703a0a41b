"""What every backbone offers, and what backbones share: pixels that exist, and only those, go through the vision tower.

Shape letters: B batch, S observation frames, V cameras, H height, W width, N images of the whole batch,
n tokens per image, L context tokens, E width of image tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.adapters import adapt
from utils.config_utils import VLMConfig


class Backbone(nn.Module, ABC):
    """Images and a prompt in, context tokens out. `model.vla_model.BACKBONES` maps the config's `type` to a class.

    A class is made by `from_pretrained(vlm_config, resampler_config, image_mean, image_std)`, from Hugging Face
    directories, or by `from_config(backbone_config, ...)`, from what `backbone_config_dict` returned and without
    weight files.
    """

    def __init__(self, image_mean: Sequence[float], image_std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("image_mean", torch.tensor(image_mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("image_std", torch.tensor(image_std, dtype=torch.float32).view(-1, 1, 1))

    @property
    @abstractmethod
    def embed_dim(self) -> int:
        """Width of the context tokens."""

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

    def adapt(self, vlm_config: VLMConfig) -> None:
        """Freeze, quantize and add LoRA to the pretrained parts, as the config asks; see `model.adapters.adapt`."""
        parts = self.components()
        adapt({"vision": parts["vision tower"], "language": parts["language model"]}, vlm_config)

    @staticmethod
    @abstractmethod
    def read_config(vlm_config: VLMConfig) -> dict[str, Any]:
        """What `from_config` takes, from the pretrained directories' config.json alone; ConfigError where it lacks."""

    @abstractmethod
    def backbone_config_dict(self) -> dict[str, Any]:
        """The pretrained parts' architecture as plain values, for JSON, for checkpoints and for `from_config`."""

    @abstractmethod
    def forward(
        self,
        images: Sequence[Tensor],
        image_mask_BV: Tensor,
        frame_mask_BS: Tensor,
        input_ids_BL: Tensor,
        prompt_mask_BL: Tensor,
        *,
        text_BLE: Tensor | None = None,
        image_slots_N: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Fuse images and prompt.

        Args:
            images: one uint8 (B, S, 3, H, W) per camera, V of them, pixels 0 to 255.
            image_mask_BV: bool, False where a sample lacks that camera.
            frame_mask_BS: bool, False for frames before the episode's start.
            input_ids_BL: int64, text tokens only, padded on the right.
            prompt_mask_BL: bool, True for text tokens that exist.
            text_BLE: `embed_prompt(input_ids_BL)` where the caller has kept it; `input_ids_BL` is then not read.
            image_slots_N: see `encode_images`.

        Returns:
            tokens_BLE, without meaning where the mask is False, and mask_BL, bool, True for tokens that exist.

        Raises:
            ValueError: images of another size than `image_size`.
        """

    @abstractmethod
    def embed_prompt(self, input_ids_BL: Tensor) -> Tensor:
        """Text tokens as they are fused, (B, L, width); they depend on the instruction alone."""

    @abstractmethod
    def image_features(self, pixels_N3HW: Tensor) -> Tensor:
        """Tokens (N, n, E) of normalized images."""

    def encode_images(
        self, images: Sequence[Tensor], slot_mask_BSV: Tensor, image_slots_N: Tensor | None = None
    ) -> Tensor:
        """One vision pass over the images that exist.

        Args:
            images: one uint8 (B, S, 3, H, W) per camera, pixels 0 to 255.
            slot_mask_BSV: bool, True for images that exist.
            image_slots_N: int64, which of the flattened B·S·V slots hold an image, ascending, at least one, where
                the caller knows it; None: found from the mask, for which a GPU must be waited for.

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
            # One image in vain: DDP waits for the vision tower's gradients on every rank.
            valid_N = valid_N.new_zeros(1)
        if not all_valid:
            pixels_N3HW = pixels_N3HW[valid_N]
        features_NnE = self.image_features((pixels_N3HW.float() / 255 - self.image_mean) / self.image_std)
        if not all_valid:
            empty_NnE = features_NnE.new_zeros(batch * slots, *features_NnE.shape[1:])
            features_NnE = empty_NnE.index_copy(0, valid_N, features_NnE)
        return features_NnE.view(batch, slots * features_NnE.shape[1], features_NnE.shape[2])

    def _check_images(self, images: Sequence[Tensor]) -> None:
        for camera, image_BS3HW in enumerate(images, start=1):
            assert image_BS3HW.ndim == 5 and image_BS3HW.dtype == torch.uint8, (image_BS3HW.shape, image_BS3HW.dtype)
            height, width = image_BS3HW.shape[-2:]
            if (height, width) != (self.image_size, self.image_size):
                raise ValueError(
                    f"image_{camera} is {height} x {width} pixels, but the backbone takes {self.image_size} x "
                    f"{self.image_size}; resize with the backbone's own image processor "
                    "(data.image_processor_name_or_path), or choose a backbone for that size"
                )
