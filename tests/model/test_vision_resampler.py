"""Vision resamplers: shapes, what they start as, and their errors."""

from __future__ import annotations

import pytest
import torch

from model.vision_encoder_module import VISION_RESAMPLERS, build_vision_resampler
from utils.config_utils import ConfigError, VisionResamplerConfig

DIM, IMAGES, TOKENS = 32, 3, 16


@pytest.fixture
def features_NnE() -> torch.Tensor:
    return torch.randn(IMAGES, TOKENS, DIM, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("kind", "tokens"), [("identity", TOKENS), ("mlp", TOKENS), ("perceiver", 5)])
def test_shapes(features_NnE: torch.Tensor, kind: str, tokens: int) -> None:
    config = VisionResamplerConfig(type=kind, num_latents=5, num_heads=4, output_dim=DIM)
    resampler = build_vision_resampler(config, DIM)
    assert resampler(features_NnE).shape == (IMAGES, tokens, DIM)
    assert resampler.tokens_per_image(TOKENS) == tokens


@pytest.mark.parametrize("kind", ["identity", "mlp"])
def test_starts_as_the_identity(features_NnE: torch.Tensor, kind: str) -> None:
    resampler = build_vision_resampler(VisionResamplerConfig(type=kind), DIM)
    assert torch.equal(resampler(features_NnE), features_NnE)


def test_mlp_leaves_the_identity_when_trained(features_NnE: torch.Tensor) -> None:
    resampler = build_vision_resampler(VisionResamplerConfig(type="mlp"), DIM)
    resampler(features_NnE).square().sum().backward()
    assert resampler.block.down.weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", list(VISION_RESAMPLERS))
def test_each_image_is_resampled_by_itself(features_NnE: torch.Tensor, kind: str) -> None:
    resampler = build_vision_resampler(VisionResamplerConfig(type=kind, num_latents=5, num_heads=4), DIM)
    alone = torch.cat([resampler(features_NnE[i : i + 1]) for i in range(IMAGES)])
    torch.testing.assert_close(resampler(features_NnE), alone)


def test_perceiver_depends_on_every_image_token_and_on_each_latent(features_NnE: torch.Tensor) -> None:
    resampler = build_vision_resampler(VisionResamplerConfig(type="perceiver", num_latents=5, num_heads=4), DIM)
    features_NnE.requires_grad_(True)
    out_NqE = resampler(features_NnE)
    # not a sum: the closing layer norm makes the sum of a token's values constant
    (out_NqE * torch.randn_like(out_NqE)).sum().backward()
    assert (features_NnE.grad.abs().amax(dim=-1) > 0).all()
    assert (resampler.latents_qE.grad.abs().amax(dim=-1) > 0).all()
    assert not torch.allclose(out_NqE[:, 0], out_NqE[:, 1])


@pytest.mark.parametrize("kind", list(VISION_RESAMPLERS))
def test_output_dim_must_be_the_language_models_width(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"vision_resampler_config\.output_dim is 64.*width is 32"):
        build_vision_resampler(VisionResamplerConfig(type=kind, output_dim=64, num_heads=4), DIM)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ConfigError, match=r"num_heads is 5, which does not divide.*width 32"):
        build_vision_resampler(VisionResamplerConfig(type="perceiver", num_heads=5), DIM)
