"""Vision resamplers: what happens to image tokens between the projector and the language model.

Shape letters: N images, n tokens per image, q latent tokens, E embedding width (the language model's).

Every resampler works on each image by itself, so an absent camera needs no mask here: its image never enters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import attend, split_heads
from utils.config_utils import ConfigError, VisionResamplerConfig


class IdentityResampler(nn.Module):
    """Image tokens as the projector made them: what PaliGemma was pretrained with."""

    def __init__(self, config: VisionResamplerConfig, dim: int) -> None:
        super().__init__()

    def tokens_per_image(self, num_image_tokens: int) -> int:
        """Tokens per image after resampling, given those before."""
        return num_image_tokens

    def forward(self, features_NnE: Tensor) -> Tensor:
        """Return the (N, n, E) features unchanged."""
        return features_NnE


class MLPResampler(nn.Module):
    """A residual MLP on each token: `x + W2 gelu(W1 norm(x))`.

    W2 starts at zero, so training starts from the pretrained model's own image tokens.
    """

    def __init__(self, config: VisionResamplerConfig, dim: int) -> None:
        super().__init__()
        self.block = MLPBlock(dim)
        nn.init.zeros_(self.block.down.weight)
        nn.init.zeros_(self.block.down.bias)

    def tokens_per_image(self, num_image_tokens: int) -> int:
        """Tokens per image after resampling, given those before."""
        return num_image_tokens

    def forward(self, features_NnE: Tensor) -> Tensor:
        """(N, n, E) image tokens to (N, n, E)."""
        return self.block(features_NnE)


class PerceiverResampler(nn.Module):
    """A few learned latents read each image by cross-attention: n tokens become `num_latents`.

    Pre-norm blocks of cross-attention and MLP, as in Perceiver (Jaegle et al. 2021, section 3); keys and values
    are the image tokens followed by the latents themselves, as in Flamingo's resampler (Alayrac et al. 2022,
    appendix A.1.1). Image tokens carry SigLIP's position embeddings, so none are added.
    """

    def __init__(self, config: VisionResamplerConfig, dim: int) -> None:
        super().__init__()
        if dim % config.num_heads:
            raise ConfigError(
                f"model.vision_resampler_config.num_heads is {config.num_heads}, which does not divide the language "
                f"model's width {dim}; choose a divisor"
            )
        self.latents_qE = nn.Parameter(torch.randn(config.num_latents, dim))
        self.layers = nn.ModuleList(_PerceiverBlock(dim, config.num_heads) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(dim)

    def tokens_per_image(self, num_image_tokens: int) -> int:
        """Tokens per image after resampling, given those before."""
        return self.latents_qE.shape[0]

    def forward(self, features_NnE: Tensor) -> Tensor:
        """(N, n, E) image tokens to (N, q, E)."""
        latents_NqE = self.latents_qE.expand(features_NnE.shape[0], -1, -1)
        for layer in self.layers:
            latents_NqE = layer(latents_NqE, features_NnE)
        return self.norm(latents_NqE)


class MLPBlock(nn.Module):
    """A pre-norm MLP, four times as wide, added to its input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.down(F.gelu(self.up(self.norm(tokens))))


class _PerceiverBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_latents = nn.LayerNorm(dim)
        self.norm_features = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.mlp = MLPBlock(dim)

    def forward(self, latents_NqE: Tensor, features_NnE: Tensor) -> Tensor:
        normed_NqE = self.norm_latents(latents_NqE)
        memory = torch.cat([self.norm_features(features_NnE), normed_NqE], dim=1)
        keys, values = (split_heads(x, self.num_heads) for x in self.key_value(memory).chunk(2, dim=-1))
        return self.mlp(latents_NqE + self.out(attend(self.query(normed_NqE), keys, values)))


VISION_RESAMPLERS: dict[str, type[nn.Module]] = {
    "identity": IdentityResampler,
    "mlp": MLPResampler,
    "perceiver": PerceiverResampler,
}


def build_vision_resampler(config: VisionResamplerConfig, dim: int) -> nn.Module:
    """The resampler that `config.type` names, from and to tokens of width `dim`.

    Args:
        config: `model.vision_resampler_config`.
        dim: width of image tokens after the projector, and of the language model that they are fed to.

    Returns:
        A module from (N, n, dim) to (N, m, dim), with a method `tokens_per_image(n) -> m`.

    Raises:
        ConfigError: `output_dim` is given and is not `dim`, or the heads don't divide `dim`.
    """
    if config.output_dim is not None and config.output_dim != dim:
        raise ConfigError(
            f"model.vision_resampler_config.output_dim is {config.output_dim}, but image tokens feed the language "
            f"model, whose width is {dim}; remove output_dim"
        )
    return VISION_RESAMPLERS[config.type](config, dim)
