"""The fusion: what is masked changes nothing, what exists does, and places survive it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.perceiver_fusion import PerceiverFusion, place_embedding
from utils.config_utils import ConfigError, FusionConfig

BATCH, FRAMES, CAMERAS, TOKENS, TEXT, DIM, LATENTS = 2, 2, 2, 16, 6, 24, 9


@pytest.fixture
def fusion() -> PerceiverFusion:
    torch.manual_seed(0)
    config = FusionConfig(hidden_dim=DIM, num_latents=LATENTS, num_layers=2, num_heads=2)
    return PerceiverFusion(config, vision_dim=20, language_dim=28, num_cameras=CAMERAS, num_image_tokens=TOKENS)


@pytest.fixture
def features() -> list[Tensor]:
    """Arguments of `forward`, everything there."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(BATCH, FRAMES, CAMERAS, TOKENS, DIM, generator=generator),
        torch.ones(BATCH, FRAMES, CAMERAS, dtype=torch.bool),
        torch.randn(BATCH, TEXT, DIM, generator=generator),
        torch.ones(BATCH, TEXT, dtype=torch.bool),
    ]


def test_padded_text_changes_nothing(fusion: PerceiverFusion, features: list[Tensor]) -> None:
    image, slots, text, prompt = features
    longer = torch.cat([text, 1e4 * torch.randn(BATCH, 5, DIM)], dim=1)
    mask = torch.nn.functional.pad(prompt, (0, 5))
    torch.testing.assert_close(fusion(image, slots, longer, mask), fusion(*features), atol=2e-6, rtol=0)


def test_masked_features_have_no_gradient_and_others_do(fusion: PerceiverFusion, features: list[Tensor]) -> None:
    image, slots, text, prompt = features
    slots[0, 0, 1] = slots[1, 1, 0] = False
    prompt[1, 4:] = False
    image.requires_grad_(), text.requires_grad_()
    (fusion(*features) * torch.randn(BATCH, LATENTS, DIM)).sum().backward()
    assert torch.equal(image.grad.abs().amax(dim=(-1, -2)) > 0, slots)
    assert torch.equal(text.grad.abs().amax(dim=-1) > 0, prompt)


def test_a_sample_with_nothing_to_read_is_finite(fusion: PerceiverFusion, features: list[Tensor]) -> None:
    image, slots, text, prompt = features
    slots[1], prompt[1] = False, False
    tokens = fusion(*features)
    tokens.square().sum().backward()
    assert tokens.isfinite().all() and all(p.grad.isfinite().all() for p in fusion.layers.parameters())


def test_samples_do_not_see_each_other(fusion: PerceiverFusion, features: list[Tensor]) -> None:
    alone = fusion(*(value[1:] for value in features))
    torch.testing.assert_close(fusion(*features)[1:], alone, atol=2e-6, rtol=0)


@pytest.mark.parametrize("axis", ["tokens", "cameras", "frames"])
def test_the_same_features_elsewhere_are_another_context(
    fusion: PerceiverFusion, features: list[Tensor], axis: str
) -> None:
    image, *rest = features
    moved = image.flip({"tokens": 3, "cameras": 2, "frames": 1}[axis])
    assert (fusion(moved, *rest) - fusion(image, *rest)).abs().amax() > 1e-2


def test_the_current_frame_is_the_same_with_and_without_a_past(fusion: PerceiverFusion, features: list[Tensor]) -> None:
    image, slots, text, prompt = features
    slots[:, 0] = False
    now = fusion(image[:, 1:], slots[:, 1:], text, prompt)
    torch.testing.assert_close(fusion(image, slots, text, prompt), now, atol=2e-6, rtol=0)


def test_place_embeddings_tell_every_patch_and_fall_with_distance() -> None:
    side = 6
    index = torch.arange(side**2)
    places = (torch.stack([index // side, index % side], dim=1) + 0.5) / side
    embedding = place_embedding(places, 48, side)
    likeness = embedding @ embedding.T / embedding.square().sum(dim=1)
    distance = torch.cdist(places, places) * side
    itself, beside, far = likeness.diagonal(), likeness[(distance - 1).abs() < 0.1], likeness[distance > 2.9]
    assert itself.min() > beside.max() + 0.2 and beside.min() > far.max() + 0.1


@pytest.mark.parametrize("latents", [1, 5, 64])
def test_any_number_of_latents(latents: int, features: list[Tensor]) -> None:
    config = FusionConfig(hidden_dim=DIM, num_latents=latents, num_layers=1, num_heads=2)
    fusion = PerceiverFusion(config, 20, 28, num_cameras=CAMERAS, num_image_tokens=TOKENS)
    assert fusion(*features).shape == (BATCH, latents, DIM)
    assert len(fusion.latents_qD.unique(dim=0)) == latents


@pytest.mark.parametrize(("width", "heads"), [(30, 5), (32, 3)])
def test_widths_that_do_not_split(width: int, heads: int) -> None:
    with pytest.raises(ConfigError, match=rf"fusion: hidden_dim is {width} and num_heads {heads}; give a width"):
        FusionConfig(hidden_dim=width, num_heads=heads)
