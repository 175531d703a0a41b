"""Image augmentation on the device, one draw per sample.

Shape letters: B batch, V cameras, S observation frames, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.config_utils import AugmentationConfig

GREY = (0.299, 0.587, 0.114)  # luma weights of RGB (ITU-R BT.601)


class ImageAugmentation(nn.Module):
    """Random crop, size and colour in training; the centre crop of the same size otherwise.

    Every sample of a batch gets its own draw, and all frames of one camera share it, so that motion between
    frames stays true. Cameras differ in their crop and share the colours. Randomness comes from torch's global
    generator, which the trainer seeds from (seed, step, rank).
    """

    def __init__(self, config: AugmentationConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, images: Sequence[Tensor]) -> list[Tensor]:
        """
        Args:
            images: per camera (B, S, 3, H, W), uint8, or float32 from 0 to 1.

        Returns:
            The same shapes and types; the very same tensors when augmentation is off.
        """
        if not self.config.enabled:
            return list(images)
        if not self.training:
            scale_B = torch.full((len(images[0]),), self.config.crop_scale, device=images[0].device)
            return [_like(image, _crop(image, scale_B, torch.zeros_like(scale_B).expand(2, -1))) for image in images]
        batch, device = len(images[0]), images[0].device
        colour = self._draw_colour(batch, device)
        result = []
        for image_BS3HW in images:
            jitter_B = _uniform(batch, self.config.scale_jitter, device)
            scale_B = (self.config.crop_scale + jitter_B).clamp(max=1.0)
            shift_2B = torch.stack([_uniform(batch, 1.0, device) for _ in range(2)]) * (1 - scale_B)
            cropped = _crop(image_BS3HW, scale_B, shift_2B)
            result.append(_like(image_BS3HW, _recolour(cropped, colour)))
        return result

    def _draw_colour(self, batch: int, device: torch.device) -> Tensor:
        """(4, B): factors of brightness, contrast and saturation, and hue in turns."""
        names = ("brightness", "contrast", "saturation", "hue")
        draws = torch.stack([_uniform(batch, getattr(self.config, name), device) for name in names])
        draws[:3] += 1
        return draws


def _uniform(count: int, bound: float, device: torch.device) -> Tensor:
    return (2 * torch.rand(count, device=device) - 1) * bound


def _crop(image_BS3HW: Tensor, scale_B: Tensor, shift_2B: Tensor) -> Tensor:
    """A square window of relative side `scale`, its centre moved by `shift` (in half image sizes), at full size; from 0
    to 255."""
    batch, frames, _, height, width = image_BS3HW.shape
    theta_B23 = torch.zeros(batch, 2, 3, device=image_BS3HW.device)
    theta_B23[:, 0, 0] = theta_B23[:, 1, 1] = scale_B
    theta_B23[:, :, 2] = shift_2B.T
    grid = F.affine_grid(theta_B23, [batch, 3, height, width], align_corners=False)
    grid = grid.repeat_interleave(frames, dim=0)
    flat = image_BS3HW.flatten(0, 1).float()
    if image_BS3HW.dtype != torch.uint8:
        flat = flat * 255
    return F.grid_sample(flat, grid, padding_mode="border", align_corners=False).view_as(image_BS3HW)


def _recolour(image_BS3HW: Tensor, colour_4B: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, in that order; values stay on the scale 0 to 255."""
    brightness, contrast, saturation, hue = (value.view(-1, 1, 1, 1, 1) for value in colour_4B)
    grey = torch.tensor(GREY, device=image_BS3HW.device).view(3, 1, 1)
    image = (image_BS3HW * brightness).clamp(0, 255)
    mean = (image * grey).sum(dim=2, keepdim=True).mean(dim=(-2, -1), keepdim=True)
    image = ((image - mean) * contrast + mean).clamp(0, 255)
    luma = (image * grey).sum(dim=2, keepdim=True)
    image = ((image - luma) * saturation + luma).clamp(0, 255)
    return _rotate_hue(image, hue)


def _rotate_hue(image_BS3HW: Tensor, turns: Tensor) -> Tensor:
    """Rotate colours about the grey axis of RGB (Rodrigues' formula), which keeps greys as they are."""
    cos, sin = torch.cos(2 * math.pi * turns), torch.sin(2 * math.pi * turns)
    red, green, blue = image_BS3HW.split(1, dim=2)
    cross = torch.cat([blue - green, red - blue, green - red], dim=2) / math.sqrt(3)
    mean = image_BS3HW.mean(dim=2, keepdim=True)
    return image_BS3HW * cos + cross * sin + mean * (1 - cos)


def _like(original: Tensor, image: Tensor) -> Tensor:
    """Values from 0 to 255 in the type and on the scale of the original."""
    if original.dtype != torch.uint8:
        return image.clamp(0, 255) / 255
    return image.round().clamp(0, 255).to(torch.uint8)
