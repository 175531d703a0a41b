"""Letterboxes, against LeRobot's own and against Pillow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from data.image_fit import letterbox_bytes, letterbox_float, letterbox_size
from tests.pi_fixtures import arrays


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
@pytest.mark.parametrize("camera", [0, 1, 2])
def test_float_letterbox_is_lerobots_to_the_bit(kind: str, camera: int) -> None:
    found = arrays(kind, "processors")
    for raw, wanted in zip(found[f"raw_image_{camera}"], found[f"image_{camera}"], strict=True):
        fitted = torch.from_numpy(letterbox_float(raw.permute(1, 2, 0).contiguous().numpy(), 56, 56))
        assert torch.equal((fitted * 2 - 1).permute(2, 0, 1), wanted)
        assert torch.equal(((fitted - 0.5) / 0.5).permute(2, 0, 1), wanted)  # as the backbone does it


def test_sizes_are_rounded_down() -> None:
    assert letterbox_size(75, 40, 56, 56) == (56, 29)
    assert letterbox_size(480, 640, 224, 224) == (168, 224)
    assert letterbox_size(36, 36, 224, 224) == (223, 223)  # 36 / (36 / 224) is just below 224
    lost = [width for width in range(32, 2000) if letterbox_size(width, width, 224, 224)[0] != 224]
    assert len(lost) == 155 and not {84, 96, 128, 256, 640, 1280} & set(lost)


def test_byte_letterbox_is_pillows_bilinear_between_black_bars() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (75, 40, 3), dtype=np.uint8)
    fitted = letterbox_bytes(pixels, 56, 56)
    assert fitted.dtype == np.uint8 and fitted.shape == (56, 56, 3)
    np.testing.assert_array_equal(fitted[:, 13:42], np.asarray(Image.fromarray(pixels).resize((29, 56), 2)))
    assert not fitted[:, :13].any() and not fitted[:, 42:].any()


def test_a_frame_that_fits_is_left_alone() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    assert letterbox_bytes(pixels, 56, 56) is pixels
    np.testing.assert_array_equal(letterbox_float(pixels, 56, 56), pixels.astype(np.float32) / np.float32(255))
