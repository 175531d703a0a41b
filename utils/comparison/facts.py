"""The facts that profiles of data are made of; see `data/comparison/profile.py` for what a profile holds."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Profile = dict[str, Any]

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
GRID, PICTURE = 6, 24  # fields a side of a thumbnail, and of a camera's mean picture
WELL_SEEN = 0.8  # correlation with the state from which a camera shows a dimension well
TURNS = {  # of frames (N, H, W, 3): each undoes itself
    "mirrored": lambda frames: frames[:, :, ::-1],
    "upside_down": lambda frames: frames[:, ::-1],
    "turned_by_180_degrees": lambda frames: frames[:, ::-1, ::-1],
    "red_and_blue_exchanged": lambda frames: frames[..., ::-1],
}
LAGS = 4  # steps by which pictures or states may be late


class FrameFacts(NamedTuple):
    """One frame.

    Attributes:
        thumbnail: float32 (GRID, GRID, 3), mean colours of its fields, 0 to 255.
        picture: float32 (PICTURE, PICTURE, 3), the same on a finer grid.
        detail: how much of its contrast lies between neighbouring pixels: high in sharp pictures, low in blurred ones.
        blocks: how much larger steps at the seams of 8 x 8 blocks are than elsewhere: about 1, more where compression
            has left its blocks.
    """

    thumbnail: np.ndarray
    picture: np.ndarray
    detail: float
    blocks: float


def frame_facts(image: np.ndarray) -> FrameFacts:
    """Facts of a frame as the model gets it, (H, W, 3), uint8 or floats from 0 to 1."""
    pixels = image if image.dtype == np.uint8 else image * np.float32(255)
    picture = _shrunk(pixels, PICTURE)
    thumbnail = picture.reshape(GRID, PICTURE // GRID, GRID, PICTURE // GRID, 3).mean(axis=(1, 3))
    green = pixels[:, :, 1].astype(np.float32)
    near = np.abs(np.diff(green, axis=1)).mean(axis=0)  # (W - 1,)
    far = np.abs(green[:, 4:] - green[:, :-4]).mean()
    seams = near[7::8]
    beside = [near[6::8][: len(seams)], near[8::8]]
    mean = float(near.mean())
    blocks = float(seams.mean()) / (float(np.concatenate(beside).mean()) + 1e-3) if len(near) > 8 else 1.0
    return FrameFacts(thumbnail, picture, mean / (float(far) + 1e-3), blocks)


def _shrunk(pixels: np.ndarray, size: int) -> np.ndarray:
    """Mean colours of size x size fields, float32 (size, size, 3); fields of smaller pictures repeat."""
    edges = [np.linspace(0, length, size + 1).astype(int)[:-1] for length in pixels.shape[:2]]
    counts = [np.diff([*edge, length]).clip(1) for edge, length in zip(edges, pixels.shape[:2], strict=True)]
    rows = np.add.reduceat(pixels, edges[0], axis=0, dtype=np.float32)
    sums = np.add.reduceat(rows, edges[1], axis=1)
    return sums / (counts[0][:, None, None] * counts[1][:, None])


def quantile_distance(some: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """How far distributions lie from others, (width,), in units of the latter's ranges.

    Args:
        some, reference: (width, 9), at QUANTILES; the two outermost on each side are left out.
    """
    inner = slice(2, -2)
    width = reference[:, -2] - reference[:, 1]
    scale = np.maximum(width, 1e-3 * max(float(width.max()), 1e-9))
    return np.abs(some[:, inner] - reference[:, inner]).mean(axis=1) / scale


def is_profile(value: Any) -> bool:
    """Whether something read from a file has the form of a profile; what has not is not compared with."""
    try:
        state, action = (np.array(value[name]["quantiles"], np.float64) for name in ("state", "action"))
        shapes = [(np.array(value["response"]["correlation"], np.float64).shape, (len(action), len(state)))]
        for column, quantiles in (("state", state), ("action", action)):
            part = value[column]
            shapes.append((quantiles.shape, (len(quantiles), len(QUANTILES))))
            shapes.append((np.array(part["steps"], np.float64).shape, (len(quantiles), 3)))
            shapes.append((np.array(part["spread"], np.float64).shape, (len(quantiles),)))
        if "start" in value:  # which profiles of earlier versions lack, as motion
            shapes.append((np.array(value["start"]["state"], np.float64).shape, state.shape))
        motion = value["response"].get("motion")
        if motion:
            features = len(motion["mean"])
            shapes += [(np.array(motion[name], np.float64).shape, (features,)) for name in ("mean", "scale")]
            shapes.append((np.array(motion["weights"], np.float64).shape, (features, len(state))))
            shapes.append((np.array(motion["telling"], np.float64).shape, (len(state),)))
        for facts in value["cameras"].values():
            number, view = len(facts["thumbnails"]), facts["view"]
            fields = GRID * GRID * 3
            shapes.append((np.array(facts["thumbnails"], np.float64).shape, (max(1, number), GRID, GRID, 3)))
            shapes.append((np.array(facts["picture"], np.float64).shape, (PICTURE, PICTURE, 3)))
            shapes += [
                (np.array(facts[name], np.float64).shape, (number,)) for name in ("detail", "blocks", "change", "still")
            ]
            shapes += [(np.array(view[name], np.float64).shape, (fields,)) for name in ("mean", "scale")]
            shapes.append((np.array(view["weights"], np.float64).shape, (fields, len(state))))
            shapes.append((np.array(view["bias"], np.float64).shape, (len(state),)))
            shapes.append((np.array(view["correlation"], np.float64).shape, (len(state), len(state))))
        rate, prompts = value["control_hz"], value["prompts"]
        plain = (rate is None or rate > 0) and all(isinstance(prompt, str) for prompt in prompts)
    except (TypeError, ValueError, LookupError, AttributeError):
        return False
    return plain and all(found == wanted for found, wanted in shapes)
