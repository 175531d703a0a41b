"""Checks of what a robot or a program hands to a policy, before anything is computed from it."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.processing import Frame, ObservationError
from utils.statistics import state_labels

GREY = 128  # of a blank image: the middle of the range, near zero after the backbone's normalization
STATE_MARGIN = 0.25  # a state may leave the training range by this share of it before the policy warns


def as_list(images: Frame | Sequence[Frame] | None) -> list[Frame] | None:
    """One frame or several as a list of frames."""
    if images is None:
        return None
    several = isinstance(images, (list, tuple)) or (isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4)
    return list(images) if several else [images]


def frames_by_camera(
    cameras: Sequence[str],
    max_seq_len: int,
    images_1: Frame | Sequence[Frame] | None,
    images_2: Frame | Sequence[Frame] | None,
    images: Mapping[str, Frame | Sequence[Frame] | None] | None,
    told: dict[str, str],
) -> dict[str, list[Frame] | None]:
    """The frames that were given for each camera of a policy, None where it is absent.

    Args:
        cameras, max_seq_len: of the policy.
        images_1, images_2, images: as `VLAPredictor.predict` takes them.
        told: takes what is not used (kind -> text).

    Raises:
        ObservationError: no camera at all, one that is given twice, or one that the policy does not have.
    """
    first, second = cameras[0], "image_2" if len(cameras) == 1 else cameras[1]
    if images_1 is None and images is None:
        raise ObservationError(f"{first} is missing; give it, or another camera of {', '.join(cameras)}")
    if images_2 is not None and len(cameras) == 1:
        told[f"unread {second}"] = f"this policy was trained on {first} alone: {second} is ignored"
        images_2 = None
    images = dict(images or {})
    for camera, frames in ((first, images_1), (second, images_2)):
        if frames is not None and images.get(camera) is not None:
            raise ObservationError(f"images and images_1 or images_2 both give {camera}; give it once")
        images |= {} if frames is None else {camera: frames}
    unknown = [name for name in images if name not in cameras]
    if unknown:
        raise ObservationError(f"this policy has no camera {unknown[0]!r}; it reads {', '.join(cameras)}")
    found = {camera: as_list(images.get(camera)) for camera in cameras}
    for camera, frames in found.items():
        if frames is None:
            text = f"this policy was trained with {camera}, which is missing: its slot is masked"
            told[f"masked {camera}"] = text
        elif len(frames) > max_seq_len:
            text = f"{camera}: {len(frames)} frames, of which the policy takes max_seq_len {max_seq_len}"
            told["older frames"] = f"{text}: the newest (last) are used"
            found[camera] = frames[-max_seq_len:]
    return found


def checked_seeds(seeds_B: Sequence[int], batch_size: int) -> list[int]:
    """One seed for each sample of a batch, as integers.

    Raises:
        ObservationError: an empty batch, or not one valid seed per sample.
    """
    if batch_size == 0:
        raise ObservationError("an empty batch: there is no sample to predict for; give one or more")
    if len(seeds_B) != batch_size:
        raise ObservationError(f"{len(seeds_B)} seeds for a batch of {batch_size} samples; give one for each")
    for seed in seeds_B:
        if not isinstance(seed, numbers.Integral) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise ObservationError(f"seed is {seed!r}; wanted a whole number, 0 or more and below 2**63")
    return [int(seed) for seed in seeds_B]


def checked_noise(noise: np.ndarray, seed: int | None, drawn: Tensor | None) -> Tensor:
    """Where sampling starts, as the model takes it: one draw of one sample, float32 (1, 1, ...).

    Args:
        noise, seed: as `VLAPredictor.predict` takes them.
        drawn: what the model draws for that itself; None: it samples nothing.

    Raises:
        ValueError: a seed as well, a policy that samples nothing, another shape.
    """
    if seed is not None:
        raise ValueError("seed and noise both say where sampling starts; give one of them")
    if drawn is None:
        raise ValueError("noise was given, but this policy's head samples nothing")
    values = torch.as_tensor(np.asarray(noise), dtype=torch.float32)
    if values.shape != drawn.shape[2:]:
        raise ValueError(f"noise has shape {tuple(values.shape)}; this policy takes {tuple(drawn.shape[2:])}")
    return values[None, None]


State = Sequence[float] | np.ndarray | Mapping[str, Sequence[float] | float | np.ndarray]


def checked_state(state: State | None, widths: Mapping[str, int], takes_state: bool) -> np.ndarray:
    """A state as float32 (state_dim,); zeros for None where the policy takes no state.

    Args:
        state: all values, or those of each column by its name.
        widths: values of each column of the policy's state, in order.
        takes_state: whether the policy needs one.

    Raises:
        ObservationError: it is missing, of another width or other columns, or not all finite numbers.
    """
    state_dim = sum(widths.values())
    wanted = f"{state_dim} values" if len(widths) == 1 else " + ".join(f"{n} {name}" for name, n in widths.items())
    if state is None:
        if takes_state:
            raise ObservationError(f"state is missing; this policy takes {wanted}")
        return np.zeros(state_dim, np.float32)
    if isinstance(state, Mapping):
        other = [name for name in (*state, *widths) if name not in widths or name not in state]
        if other:
            fault = "is missing" if other[0] in widths else "is no part of it"
            raise ObservationError(f"state: {other[0]!r} {fault}; this policy takes {wanted}")
        parts = [_numbers(state[name], name, (width,)) for name, width in widths.items()]
        values = np.concatenate(parts)
    else:
        values = _numbers(state, "state", (state_dim,))
    if not np.isfinite(values).all():
        index = int(np.flatnonzero(~np.isfinite(values))[0])
        label = state_labels(widths)[index]
        raise ObservationError(f"{label} is {values[index]}; every value must be a finite number")
    return values


def _numbers(given: Any, name: str, shape: tuple[int]) -> np.ndarray:
    try:
        values = np.asarray(given)
    except ValueError:  # nested lists of several lengths
        values = np.empty(0, object)
    if values.dtype.kind not in "iuf":
        raise ObservationError(f"{name} is a {type(given).__name__} of {values.dtype}; wanted {shape[0]} numbers")
    values = values.astype(np.float32)
    if values.ndim == 0 and shape == (1,):
        values = values[None]
    if values.shape != shape:
        raise ObservationError(f"{name} has shape {values.shape}, {values.size} values; this policy takes {shape[0]}")
    return values


def outside_training(state_S: np.ndarray, statistics: dict[str, list[float]], widths: Mapping[str, int]) -> str | None:
    """Which value of a state is far from all that the policy was trained on, as a warning; None: none is.

    Far is by more than STATE_MARGIN of the dimension's range, or, where that hardly varied, of the widest one's.

    Args:
        state_S: physical units.
        statistics: `min` and `max` of each dimension, of the training data.
        widths: values of each column that the state is joined from.
    """
    if not {"min", "max"} <= statistics.keys():
        return None  # openpi's statistics do not say how far states went
    low_S, high_S = (np.array(statistics[name][: len(state_S)], np.float64) for name in ("min", "max"))
    range_S = high_S - low_S
    margin_S = STATE_MARGIN * np.maximum(range_S, STATE_MARGIN * range_S.max()) + 1e-6
    excess_S = np.maximum(low_S - state_S, state_S - high_S) / margin_S
    worst = int(excess_S.argmax())
    if excess_S[worst] <= 1:
        return None
    others = int((excess_S > 1).sum()) - 1
    return (
        f"{state_labels(widths)[worst]} is {state_S[worst]:g}, in training it was {low_S[worst]:g} to {high_S[worst]:g}"
        f"{f' ({others} more dimensions are outside as well)' if others else ''}: check the units (metres, "
        "radians), the order and the zero of what the robot sends"
    )
