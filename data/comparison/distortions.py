"""Single mistakes between a robot and its policy, to be tried on recorded input: which one would explain a session?"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageFilter

Picture = Callable[[np.ndarray], np.ndarray]
MAX_PAIRS = 8  # dimensions of a state up to which every pair is exchanged; of a wider one, neighbours alone


@dataclass(frozen=True)
class Distortion:
    """One mistake.

    Attributes:
        name: what a report calls it.
        picture: what a frame, uint8 (H, W, 3), becomes.
        camera: whose frames; None: those of all.
        exchanged: camera -> the camera whose frames stand in its place.
        images_late, state_late: by how many steps they lag behind; before an episode's first step, that one stays.
        frozen: pictures stay those of the episode's first step.
        state: what the state becomes, (state_dim,).
        prompt: the instruction instead.
    """

    name: str
    picture: Picture | None = None
    camera: str | None = None
    exchanged: Mapping[str, str] = field(default_factory=dict)
    images_late: int = 0
    state_late: int = 0
    frozen: bool = False
    state: Picture | None = None
    prompt: str | None = None

    def frame(self, camera: str, frame: np.ndarray) -> np.ndarray:
        """What a frame of a camera becomes."""
        if self.picture is None or self.camera not in (None, camera):
            return frame
        return np.ascontiguousarray(self.picture(frame))

    def changes(self, camera: str) -> bool:
        """Whether the pixels of a camera's frames are changed."""
        return self.picture is not None and self.camera in (None, camera)


AS_RECORDED = Distortion("as recorded")


def swapped_channels(frame: np.ndarray) -> np.ndarray:
    """Red and blue exchanged."""
    return frame[..., ::-1]


def turned(quarters: int) -> Picture:
    """Turned counterclockwise by so many quarters."""
    return lambda frame: np.rot90(frame, quarters)


def cropped(share: float) -> Picture:
    """The middle part, of that share of height and width, at full size."""

    def change(image: Image.Image) -> Image.Image:
        width, height = image.size
        left, top = width * (1 - share) / 2, height * (1 - share) / 2
        return image.resize(image.size, Image.Resampling.BILINEAR, box=(left, top, width - left, height - top))

    return _with_pillow(change)


def letterboxed(share: float) -> Picture:
    """Pressed into that share of the height, between black bars."""

    def change(image: Image.Image) -> Image.Image:
        width, height = image.size
        inner = max(1, round(height * share))
        canvas = Image.new("RGB", image.size)
        canvas.paste(image.resize((width, inner), Image.Resampling.BILINEAR), (0, (height - inner) // 2))
        return canvas

    return _with_pillow(change)


def brightened(factor: float) -> Picture:
    """Every value multiplied, and cut at 255."""
    return lambda frame: np.minimum(frame * np.float32(factor), 255).astype(np.uint8)


def blurred(radius: float) -> Picture:
    """Gaussian blur, its radius in pixels of an image of 224."""
    return _with_pillow(lambda image: image.filter(ImageFilter.GaussianBlur(radius * min(image.size) / 224)))


def compressed(quality: int) -> Picture:
    """JPEG."""

    def change(frame: np.ndarray) -> np.ndarray:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=quality)
        return np.asarray(Image.open(buffer))

    return change


def shrunk(size: int) -> Picture:
    """Sent at so many pixels a side."""
    return _with_pillow(lambda image: image.resize((size, size)).resize(image.size))


def scaled(factor: float) -> Picture:
    """A state in another unit."""
    return lambda state: state * np.float32(factor)


def negated(dimension: int) -> Picture:
    """One value of the state with the other sign."""
    return _one(dimension, lambda value: -value)


def reordered(order: Sequence[int]) -> Picture:
    """A state in another order: value `i` is what was value `order[i]`."""
    return lambda state: state[list(order)]


def _one(dimension: int, change: Callable[[np.floating], np.floating]) -> Picture:
    def changed(state: np.ndarray) -> np.ndarray:
        state = state.copy()
        state[dimension] = change(state[dimension])
        return state

    return changed


def _with_pillow(change: Callable[[Image.Image], Image.Image]) -> Picture:
    return lambda frame: np.asarray(change(Image.fromarray(frame)))


def pictures() -> dict[str, Picture]:
    """The changes of pictures that are tried, by name."""
    tried: dict[str, Picture] = {
        "red and blue exchanged": swapped_channels,
        "mirrored": lambda frame: frame[:, ::-1],
        "upside down": lambda frame: frame[::-1],
        **{f"turned by {90 * quarters} degrees": turned(quarters) for quarters in (1, 2, 3)},
        **{f"cropped to {100 * share:.0f} %": cropped(share) for share in (0.95, 0.9, 0.8, 0.7, 0.5)},
        **{f"letterboxed to {100 * share:.0f} %": letterboxed(share) for share in (0.75, 0.5625)},
        **{f"{factor:g} times as bright": brightened(factor) for factor in (0.4, 0.6, 0.8, 1.25, 1.6)},
        **{f"blurred by {radius} pixels of 224": blurred(radius) for radius in (2, 4)},
        **{f"JPEG of quality {quality}": compressed(quality) for quality in (10, 30)},
        **{f"sent at {size} pixels": shrunk(size) for size in (32, 64)},
        "black": np.zeros_like,
        "inverted colours": lambda frame: 255 - frame,
    }
    return tried


def every_distortion(
    cameras: Sequence[str], state: np.ndarray, prompts: Iterable[str], takes_state: bool
) -> Iterator[Distortion]:
    """Every single mistake that is tried.

    Args:
        cameras: of the policy that the recording has.
        state: (N, state_dim), of the recording.
        prompts: other instructions that may have been given.
        takes_state: whether the policy reads a state.
    """
    for name, picture in pictures().items():
        if len(cameras) > 1:
            yield Distortion(f"all cameras {name}", picture=picture)
        for camera in cameras:
            yield Distortion(f"{camera} {name}", picture=picture, camera=camera)
    for one, other in itertools.combinations(cameras, 2):
        yield Distortion(f"{one} and {other} exchanged", exchanged={one: other, other: one})
    for steps in (1, 2, 3, 5):
        yield Distortion(f"pictures {steps} steps late", images_late=steps)
    yield Distortion("pictures frozen at the first step", frozen=True)
    if takes_state:
        yield from _state_distortions(state)
    for prompt in prompts:
        yield Distortion(f"told {prompt!r}", prompt=prompt)


def _state_distortions(state: np.ndarray) -> Iterator[Distortion]:
    for steps in (1, 2, 3):
        yield Distortion(f"state {steps} steps late", state_late=steps)
    for name, factor in (
        ("in degrees", 180 / np.pi),
        ("in radians", np.pi / 180),
        ("a thousand times as large", 1e3),
        ("a thousandth", 1e-3),
        ("of zeros", 0.0),
    ):
        yield Distortion(f"state {name}", state=scaled(factor))
    low, high = np.quantile(state, (0.01, 0.99), axis=0)
    moving = np.flatnonzero(high - low > 1e-6).tolist()
    for d in moving:
        yield Distortion(f"state[{d}] with the other sign", state=negated(d))
        total = np.float32(low[d] + high[d])
        yield Distortion(f"state[{d}] inverted", state=_one(d, lambda value, total=total: total - value))
        middle = np.float32(np.median(state[:, d]))
        yield Distortion(f"state[{d}] stuck", state=_one(d, lambda value, middle=middle: middle))
    pairs = itertools.combinations(moving, 2) if len(moving) <= MAX_PAIRS else itertools.pairwise(moving)
    for one, other in pairs:
        order = list(range(state.shape[1]))
        order[one], order[other] = other, one
        yield Distortion(f"state[{one}] and [{other}] exchanged", state=reordered(order))
    if 3 <= len(moving):
        first = moving[:3]
        for cycle in ((1, 2, 0), (2, 0, 1)):
            order = list(range(state.shape[1]))
            for place, source in zip(first, cycle, strict=True):
                order[place] = first[source]
            yield Distortion(f"state{first} in the order {[first[i] for i in cycle]}", state=reordered(order))
