"""Cameras of a session beside those of training: exchanged, turned, cropped, darker, frozen, blurred pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from utils.comparison.facts import Profile
from utils.comparison.kinds import Mismatch

NOISE = 2.0  # grey levels by which mean pictures of one scene may differ anyway
FAR = 1.6  # times the training episodes' own distances, from which a session is unlike all of them
UNSEEN, SEEN = 0.3, 0.7  # correlations below which the state is not read off pictures, and from which it is
FAINT = 0.3  # grey levels of tint below which a scene has no colours
EXPLAINED = 0.55  # share of the distance that may be left where a mistake explains it


def _zoomed(picture: np.ndarray, y: float, x: float) -> np.ndarray:
    """The middle part of a picture, of `y` of its height and `x` of its width, at full size; above 1: with bars."""
    size = len(picture)
    centre, steps = (size - 1) / 2, np.arange(size)
    result = picture
    for axis, share in ((0, y), (1, x)):
        places = centre + (steps - centre) * share
        low = np.clip(np.floor(places).astype(int), 0, size - 1)
        high = np.minimum(low + 1, size - 1)
        shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
        part = (np.clip(places, 0, size - 1) - low).reshape(shape)
        result = np.take(result, low, axis) * (1 - part) + np.take(result, high, axis) * part
        outside = (places < -0.5) | (places > size - 0.5)
        result = np.where(outside.reshape(shape), 0.0, result)
    return result


# Pictures that training would have looked like after a mistake: applied to the training side.
PICTURE_MISTAKES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "red_and_blue_exchanged": (lambda t: t[..., ::-1], "convert BGR to RGB before the frames are sent"),
    "mirrored": (lambda t: t[:, :, ::-1], "flip the frames from left to right"),
    "upside_down": (lambda t: t[:, ::-1], "flip the frames from top to bottom"),
    "turned_by_180_degrees": (lambda t: t[:, ::-1, ::-1], "turn the frames, or the camera"),
    "turned_by_90_degrees": (lambda t: np.rot90(t, 1, (1, 2)), "turn the frames clockwise"),
    "turned_by_270_degrees": (lambda t: np.rot90(t, -1, (1, 2)), "turn the frames counterclockwise"),
    "inverted_colours": (lambda t: 255 - t, "send colours, not their negative"),
}
SHARES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.625, 0.5625, 0.5)  # of a picture that a crop leaves, or a box fills


def camera_mismatches(session: Profile, training: Profile) -> Iterator[Mismatch]:
    """Suspected mistakes of each camera of the training data."""
    for camera, trained in training["cameras"].items():
        seen = session["cameras"].get(camera)
        if seen is None:
            yield Mismatch("camera_missing", camera, "no frame in the session", "connect it, or check its name")
            continue
        yield from _camera(camera, seen, trained, session, training)


def _camera(
    camera: str, seen: dict[str, Any], trained: dict[str, Any], session: Profile, training: Profile
) -> Iterator[Mismatch]:
    known, new = _pictures(trained), _pictures(seen)
    scale, usual = _usual_distance(known)
    limit = FAR * usual + 0.5
    if new.std(axis=(1, 2)).max() < 4 <= np.median(known.std(axis=(1, 2))):
        level = float(new.mean())
        word = "black" if level < 20 else "blank"
        yield Mismatch(f"camera_{word}", camera, f"every frame is plain, at {level:.0f} of 255", "check cap and cable")
        return
    moves = np.array(session["state"]["steps"])[:, 1].max() > 0
    if moves and np.median(seen["still"]) > 0.9 and np.median(trained["still"]) < 0.5:
        share = 100 * float(np.median(seen["still"]))
        yield Mismatch(
            "camera_frozen", camera, f"{share:.0f} % of its frames equal the one before", "check the camera's driver"
        )
        return
    blocks, usual_blocks = float(np.median(seen["blocks"])), float(np.max(trained["blocks"]))
    if blocks > 1.3 * usual_blocks:
        evidence = f"steps at the seams of 8 x 8 blocks are {blocks:.2f} times those beside them, in training at most "
        remedy = "send frames with JPEG quality 90 or more"
        yield Mismatch("strong_compression", camera, f"{evidence}{usual_blocks:.2f}", remedy)
        return
    sharpness = list(_sharpness(camera, seen, trained))
    if _distance(new, known, scale) > limit:
        explained = _explained(camera, seen, training)
        if explained.kind == "unlike_training":
            # Where the scene differs too, as it does after a policy was misled, what is left to see is how it is read,
            # and its sharpness.
            turned = _turned(camera, seen)
            yield from [turned] if turned else sharpness or [explained]
        else:
            yield explained
        return
    turned = _turned(camera, seen) or _colours(camera, new, known)
    yield from [turned] if turned else sharpness


def _turned(camera: str, seen: dict[str, Any]) -> Mismatch | None:
    """A picture whose mean says nothing, as in a symmetric scene, but off which the state can only be read when it is
    turned."""
    reads = dict(seen.get("seen_as", {}))
    as_it_is = reads.pop("", 1.0)
    kind = max(reads, key=reads.get, default="")
    if as_it_is > UNSEEN or reads.get(kind, 0.0) < SEEN:
        return None
    evidence = (
        f"the state is read off it with a correlation of {as_it_is:.2f}, and of {reads[kind]:.2f} after turning it"
    )
    return Mismatch(kind, camera, evidence, PICTURE_MISTAKES[kind][1])


def _colours(camera: str, new: np.ndarray, known: np.ndarray) -> Mismatch | None:
    """Red and blue exchanged in a scene of few colours, whose mean pictures hardly change by it.

    What is redder than blue in training's mean picture is held against each part of the session: 1 is as in training,
    -1 exchanged. Only where every training episode, held against the others, is clearly positive.
    """
    if len(known) < 8:
        return None
    tint, here = known[..., 0] - known[..., 2], new[..., 0] - new[..., 2]
    others = (tint.sum(axis=0) - tint) / (len(tint) - 1)
    usual = (tint * others).sum(axis=(1, 2)) / ((others**2).sum(axis=(1, 2)) + 1e-6)
    mean = tint.mean(axis=0)
    shares = (here * mean).sum(axis=(1, 2)) / ((mean**2).sum() + 1e-6)
    if np.sqrt((mean**2).mean()) < FAINT or np.quantile(usual, 0.05) < 0.3 or np.median(shares) > -0.5:
        return None
    if (shares < 0).mean() < 0.9:
        return None
    evidence = f"what is red in training is blue: {np.median(shares):.2f} of the usual tint, in training at least "
    remedy = PICTURE_MISTAKES["red_and_blue_exchanged"][1]
    return Mismatch("red_and_blue_exchanged", camera, f"{evidence}{usual.min():.2f}", remedy)


def _sharpness(camera: str, seen: dict[str, Any], trained: dict[str, Any]) -> Iterator[Mismatch]:
    detail, usual_detail = float(np.median(seen["detail"])), np.array(trained["detail"])
    slack = max(0.12, 2 * float(np.ptp(usual_detail) / max(usual_detail.mean(), 1e-6)))
    if detail < (1 - slack) * usual_detail.min():
        evidence = f"fine detail {detail:.3f}, in training at least {usual_detail.min():.3f}"
        yield Mismatch("blurred", camera, evidence, "check focus and lens, and how frames are resized")
    elif detail > (1 + slack) * usual_detail.max():
        evidence = f"fine detail {detail:.3f}, in training at most {usual_detail.max():.3f}"
        yield Mismatch("noisy_or_sharpened", camera, evidence, "check gain and how frames are resized")


def _explained(camera: str, seen: dict[str, Any], training: Profile) -> Mismatch:
    """The mistake that brings the session's pictures nearest to the training's."""
    new, known = _pictures(seen), _pictures(training["cameras"][camera])
    scale, usual = _usual_distance(known)
    distance = _distance(new, known, scale)
    tried: list[tuple[float, str, str, str]] = []  # (share of the distance that is left, kind, detail, remedy)
    for other, trained in training["cameras"].items():
        if other != camera:
            left = _distance(new, _pictures(trained), scale) / distance
            tried.append((left, "cameras_exchanged", f"they look like {other}", f"send {other} as {other}"))
    for kind, (mistake, remedy) in PICTURE_MISTAKES.items():
        tried.append((_distance(new, mistake(known), scale) / distance, kind, "", remedy))
    gain, left = _best_gain(new, known, scale)
    kind = "darker" if gain < 1 else "brighter"
    tried.append((left / distance, kind, f"{gain:.2f} times the training's brightness", "check exposure and light"))
    whole, fitted = "send the whole frame, fitted as in training", "fit frames as in training (data.image_fit)"
    picture, usual_picture = (np.array(facts["picture"], np.float64) for facts in (seen, training["cameras"][camera]))
    fine = scale.repeat(len(picture) // len(scale), axis=0).repeat(len(picture) // len(scale), axis=1)
    unchanged = _rms((picture - usual_picture) / fine)
    for share in SHARES:
        for word, y, x in (("height and width", share, share), ("height", share, 1.0), ("width", 1.0, share)):
            left = _rms((picture - _zoomed(usual_picture, y, x)) / fine) / unchanged
            tried.append((left, "cropped", f"about {100 * share:.0f} % of the {word} is left", whole))
            left = _rms((picture - _zoomed(usual_picture, 1 / y, 1 / x)) / fine) / unchanged
            tried.append((left, "letterboxed", f"the picture fills {100 * share:.0f} % of the {word}", fitted))
    left, kind, detail, remedy = min(tried)
    far = f"its mean pictures are {distance / max(usual, 0.5):.1f} times as far from training's as those are apart"
    if left < EXPLAINED:
        return Mismatch(kind, camera, f"{far}, {100 * left:.0f} % of it if so" + f": {detail}" * bool(detail), remedy)
    return Mismatch("unlike_training", camera, far, "check view, light and scene, or train on such pictures")


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt((values**2).mean()))


def _pictures(facts: dict[str, Any]) -> np.ndarray:
    return np.array(facts["thumbnails"], np.float64)


def _distance(new: np.ndarray, known: np.ndarray, scale: np.ndarray) -> float:
    """Distance of a session to the nearest training episode: a root-mean-square, in `scale`, of the part that is
    nearest. A mistake is in every part; a scene that a failing policy has changed is not."""
    squares = ((new[:, None] - known[None]) / scale) ** 2
    valid = np.isfinite(squares)
    squares = np.where(valid, squares, 0).sum(axis=(2, 3, 4)) / valid.sum(axis=(2, 3, 4))
    return float(np.sqrt(squares.min()))


def _usual_distance(known: np.ndarray) -> tuple[np.ndarray, float]:
    """By how much each field of a training episode differs from its nearest other episode's, (GRID, GRID, 3), and how
    far an episode lies from that one in units of this, at most (95 %)."""
    if len(known) < 2:
        return np.full(known.shape[1:], 4 * NOISE), 1.0
    distance = ((known[:, None] - known[None]) ** 2).mean(axis=(2, 3, 4))
    np.fill_diagonal(distance, np.inf)
    residual = known - known[distance.argmin(axis=1)]
    scale = np.sqrt((residual**2).mean(axis=0)) + NOISE
    return scale, float(np.quantile(np.sqrt(((residual / scale) ** 2).mean(axis=(1, 2, 3))), 0.95))


def _best_gain(new: np.ndarray, known: np.ndarray, scale: np.ndarray) -> tuple[float, float]:
    """(brightness of the session over the training's, distance that is left)."""
    gains = np.concatenate([np.linspace(0.2, 0.95, 16), np.linspace(1.05, 2.5, 16)])
    left = [_distance(new, np.minimum(known * gain, 255), scale) for gain in gains]
    best = int(np.argmin(left))
    return float(gains[best]), left[best]
