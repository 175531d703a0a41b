"""How a frame of any shape becomes the square that a backbone sees, with its aspect ratio kept: a letterbox.

pi0 and pi0.5 were trained so. LeRobot interpolates in float32 without antialiasing; openpi lets Pillow resample bytes,
which smooths when it shrinks. Frames that fit already stay as they are in both.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


def letterbox_size(height: int, width: int, to_height: int, to_width: int) -> tuple[int, int]:
    """Height and width of a frame's picture within the target, rounded down as both libraries do.

    The division can end just below a whole number, and then a pixel is lost on that side too.
    """
    ratio = max(width / to_width, height / to_height)
    return int(height / ratio), int(width / ratio)


def letterbox_float(pixels_HW3: np.ndarray, height: int, width: int) -> np.ndarray:
    """LeRobot's `resize_with_pad_torch`, bit for bit: bilinear on values in [0, 1], black around it.

    Args:
        pixels_HW3: uint8.
        height, width: of the result.

    Returns:
        float32 (height, width, 3) in [0, 1]; an odd pixel of the border is below or to the right.
    """
    image_1HW3 = torch.tensor(pixels_HW3)[None].float() / 255  # a copy: decoders may give memory that is read-only
    if pixels_HW3.shape[:2] == (height, width):
        return image_1HW3[0].numpy()
    inner = letterbox_size(*pixels_HW3.shape[:2], height, width)
    resized = F.interpolate(image_1HW3.permute(0, 3, 1, 2), size=inner, mode="bilinear", align_corners=False)
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    border = (left, width - inner[1] - left, top, height - inner[0] - top)
    return F.pad(resized.clamp(0, 1), border, value=0.0)[0].permute(1, 2, 0).contiguous().numpy()


def letterbox_bytes(pixels_HW3: np.ndarray, height: int, width: int) -> np.ndarray:
    """openpi's `resize_with_pad`: Pillow's bilinear resampling, black around it; uint8 (height, width, 3).

    Args:
        pixels_HW3: uint8.
        height, width: of the result.
    """
    if pixels_HW3.shape[:2] == (height, width):
        return pixels_HW3
    inner_height, inner_width = letterbox_size(*pixels_HW3.shape[:2], height, width)
    resized = Image.fromarray(pixels_HW3).resize((inner_width, inner_height), Image.Resampling.BILINEAR)
    out = np.zeros((height, width, 3), dtype=np.uint8)
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    out[top : top + inner_height, left : left + inner_width] = resized
    return out
