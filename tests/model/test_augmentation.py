"""Augmentation: one draw per sample, none in evaluation, and the crop that goes with it."""

from __future__ import annotations

import pytest
import torch

from model.augmentation import ImageAugmentation
from utils.config_utils import AugmentationConfig, ConfigError

PLAIN = dict(enabled=True, crop_scale=1.0, scale_jitter=0.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)


def make(**changes):
    return ImageAugmentation(AugmentationConfig(**(PLAIN | changes)))


@pytest.fixture
def image():
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(30, 220, (1, 1, 3, 6, 6), generator=generator).float()
    smooth = torch.nn.functional.interpolate(small[0], size=(48, 48), mode="bicubic").clamp(0, 255)
    return smooth.round().to(torch.uint8)[None]


def test_off_returns_the_same_tensors(image):
    module = ImageAugmentation(AugmentationConfig())
    assert module([image])[0] is image


def test_nothing_to_change_changes_nothing(image):
    torch.testing.assert_close(make()([image])[0], image, atol=1, rtol=0)


def test_each_sample_of_a_batch_has_its_own_draw(image):
    batch = image.repeat(8, 1, 1, 1, 1)
    for name, value in {"crop_scale": 0.7, "brightness": 0.4, "contrast": 0.4, "hue": 0.2}.items():
        changed = make(**{name: value})([batch])[0]
        pairs = [(i, j) for i in range(8) for j in range(i)]
        assert all(not torch.equal(changed[i], changed[j]) for i, j in pairs), name


def test_frames_of_a_sample_share_the_draw(image):
    frames = image.repeat(1, 3, 1, 1, 1)
    changed = make(crop_scale=0.7, brightness=0.4, hue=0.1)([frames])[0][0]
    assert torch.equal(changed[0], changed[1]) and torch.equal(changed[0], changed[2])
    assert not torch.equal(changed[0], frames[0, 0])


def test_evaluation_takes_the_centre_crop_and_draws_nothing(image):
    module = make(crop_scale=0.5, brightness=0.9, hue=0.5).eval()
    state = torch.get_rng_state()
    first, second = module([image])[0], module([image])[0]
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), state)
    centre = image[0, 0, :, 12:36, 12:36].float()[None]
    expected = torch.nn.functional.interpolate(centre, size=(48, 48), mode="bilinear", align_corners=False)
    inner = (slice(None), slice(2, -2), slice(2, -2))
    torch.testing.assert_close(first[0, 0].float()[inner], expected[0][inner], atol=1, rtol=0)


def test_the_same_seed_gives_the_same_draw(image):
    module = make(crop_scale=0.7, contrast=0.3)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(module([image, image]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(*results[0]), "cameras differ in their crop"


def test_brightness_keeps_its_range_and_greys_stay_grey(image):
    bright = make(brightness=0.3)([image.repeat(200, 1, 1, 1, 1)])[0].float().mean(dim=(1, 2, 3, 4))
    ratio = bright / image.float().mean()
    assert 0.69 < ratio.min() < 0.75 and 1.2 < ratio.max() < 1.31
    grey = torch.full((4, 1, 3, 8, 8), 100, dtype=torch.uint8)
    assert torch.equal(make(hue=0.5, saturation=0.9, contrast=0.9)([grey])[0], grey)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_scale": 0.0}, "crop_scale is 0.0"),
        ({"scale_jitter": 1.0}, "scale_jitter is 1.0"),
        ({"brightness": 1.0}, "brightness is 1.0"),
        ({"hue": 0.6}, "hue is 0.6"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        make(**changes)
