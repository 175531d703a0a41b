"""PerceiverFusion: learnable latents read image and text features by cross-attention and become the context.

Shape letters: B batch, S observation frames, V cameras, n tokens per image, L text tokens, q latents,
M features of all images and the text, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import attend, split_heads
from model.vision_encoder_module import MLPBlock
from utils.config_utils import FusionConfig


class PerceiverFusion(nn.Module):
    """Image and text features of their own widths in, `num_latents` context tokens of width `hidden_dim` out.

    In each block the latents read the features by cross-attention, then each other by self-attention (Jaegle et al.
    2021, "Perceiver", sec. 3), so that what the prompt says can decide what is read from the images from the second
    block on.

    A policy must know where things are, not only what they are: every image feature carries the sines and cosines of
    its place in the image, and every latent starts from those of a place of its own, as a coarse grid over the image.
    Latents that start at random learn from images much more slowly.
    """

    def __init__(
        self, config: FusionConfig, vision_dim: int, language_dim: int, num_cameras: int, num_image_tokens: int
    ) -> None:
        """
        Args:
            config: `model.vlm_config.fusion`.
            vision_dim, language_dim: widths of image and text features.
            num_cameras: V.
            num_image_tokens: n, a square grid, row by row.
        """
        super().__init__()
        dim, side = config.hidden_dim, math.isqrt(num_image_tokens)
        assert side**2 == num_image_tokens, f"{num_image_tokens} image tokens are no square grid"
        self.image_proj = nn.Sequential(nn.LayerNorm(vision_dim), nn.Linear(vision_dim, dim))
        self.text_proj = nn.Sequential(nn.LayerNorm(language_dim), nn.Linear(language_dim, dim))
        for linear in (self.image_proj[1], self.text_proj[1]):
            nn.init.xavier_normal_(linear.weight)  # features of unit variance, beside marks of places and cameras
        self.camera_VD = nn.Parameter(torch.randn(num_cameras, dim) * 0.5)
        self.text_D = nn.Parameter(torch.randn(dim) * 0.5)  # marks text, and alone is the key that always exists
        self.latents_qD = nn.Parameter(place_embedding(_grid(config.num_latents), dim, side))
        self.register_buffer("place_nD", place_embedding(_grid(num_image_tokens), dim, side), persistent=False)
        self.layers = nn.ModuleList(FusionBlock(dim, config.num_heads) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(dim)

    def project_images(self, features_NnE: Tensor) -> Tensor:
        """Image features (N, n, vision_dim) to (N, n, D)."""
        return self.image_proj(features_NnE.to(self.image_proj[0].weight.dtype))

    def project_text(self, features_BLE: Tensor) -> Tensor:
        """Text features (B, L, language_dim) to (B, L, D)."""
        return self.text_proj(features_BLE.to(self.text_proj[0].weight.dtype))

    def forward(self, image_BSVnD: Tensor, slot_mask_BSV: Tensor, text_BLD: Tensor, prompt_mask_BL: Tensor) -> Tensor:
        """Fuse projected features.

        Args:
            image_BSVnD: the last frame is the current one.
            slot_mask_BSV: bool, True for images that exist.
            text_BLD: text features.
            prompt_mask_BL: bool, True for text tokens that exist.

        Returns:
            (B, q, D). What is masked changes nothing; all q tokens always exist.
        """
        batch, frames, _, n, dim = image_BSVnD.shape
        age_S = torch.arange(frames - 1, -1, -1, device=image_BSVnD.device, dtype=torch.float32)
        age_S11D = sines(age_S, dim, longest=16.0)[:, None, None]
        image_BSVnD = image_BSVnD + self.place_nD + self.camera_VD[:, None] + age_S11D
        text_BLD = torch.cat([text_BLD, torch.zeros_like(text_BLD[:, :1])], dim=1) + self.text_D
        features_BMD = torch.cat([image_BSVnD.flatten(1, 3), text_BLD], dim=1)
        mask_BM = torch.cat([slot_mask_BSV.flatten(1).repeat_interleave(n, dim=1), prompt_mask_BL], dim=1)
        mask_BM = F.pad(mask_BM, (0, 1), value=True)
        latents_BqD = self.latents_qD.expand(batch, -1, -1)
        for layer in self.layers:
            latents_BqD = layer(latents_BqD, features_BMD, mask_BM)
        return self.norm(latents_BqD)


class FusionBlock(nn.Module):
    """Latents read features, then each other, then an MLP; pre-norm, each added to its input."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm_latents = nn.LayerNorm(dim)
        self.norm_features = nn.LayerNorm(dim)
        self.cross = _Attention(dim, num_heads)
        self.norm_self = nn.LayerNorm(dim)
        self.self_attention = _Attention(dim, num_heads)
        self.mlp = MLPBlock(dim)

    def forward(self, latents_BqD: Tensor, features_BMD: Tensor, mask_BM: Tensor) -> Tensor:
        """Latents (B, q, D) after one reading; features where `mask_BM` is False are not read."""
        features_BMD = self.norm_features(features_BMD)
        latents_BqD = latents_BqD + self.cross(self.norm_latents(latents_BqD), features_BMD, mask_BM)
        normed_BqD = self.norm_self(latents_BqD)
        return self.mlp(latents_BqD + self.self_attention(normed_BqD, normed_BqD))


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x_BqD: Tensor, memory_BMD: Tensor, mask_BM: Tensor | None = None) -> Tensor:
        keys, values = (split_heads(x, self.num_heads) for x in self.key_value(memory_BMD).chunk(2, dim=-1))
        mask = None if mask_BM is None else mask_BM[:, None, None, :]
        return self.out(attend(self.query(x_BqD), keys, values, mask))


def sines(positions: Tensor, width: int, longest: float) -> Tensor:
    """Sines and cosines of positions.

    Args:
        positions: float (...).
        width: even; half of it are frequencies, with half periods from 1 to `longest`, evenly spaced in the logarithm.
        longest: see width.

    Returns:
        (..., width): sines, then cosines.
    """
    rates = math.pi / torch.logspace(0, math.log10(longest), width // 2, device=positions.device)
    angles = positions[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def place_embedding(places_n2: Tensor, width: int, side: int) -> Tensor:
    """Sines and cosines of places in an image, float32 (n, width).

    Args:
        places_n2: rows and columns in [0, 1].
        width: a multiple of 4.
        side: patches along the image, so that neighbouring patches are the finest thing told apart.
    """
    return sines(places_n2 * side, width // 2, longest=2.0 * side).flatten(1)


def _grid(count: int) -> Tensor:
    """Centres (count, 2) of cells that cover the unit square, row by row; the last row may be incomplete."""
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    index = torch.arange(count)
    return torch.stack([(index // columns + 0.5) / rows, (index % columns + 0.5) / columns], dim=1)
