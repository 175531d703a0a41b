"""What differs between a recorded session and the training data: suspected mistakes, each with evidence and remedy.

Both are profiles (`data/profile.py`). A session is suspected only of what lies well outside of how training episodes
differ among themselves, so that new scenes of the same kind raise nothing. For each part that does not fit, the
mistakes that robots and recorders commonly make are tried on the session, and the one that explains it is named.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.profile import LAGS, Profile, quantile_distance

NOISE = 2.0  # grey levels by which mean pictures of one scene may differ anyway
FAR = 1.6  # times the training episodes' own distances, from which a session is unlike all of them
LATE = 0.6  # steps from which a delay is one
SCALED = ("degrees_for_radians", "radians_for_degrees", "thousandfold", "a_thousandth")
EXPLAINED = 0.55  # share of the distance that may be left where a mistake explains it


@dataclass(frozen=True)
class Mismatch:
    """One suspected mistake.

    Attributes:
        kind: a short name, such as `red_and_blue_exchanged`.
        where: the camera, `state[2]`, `action`, `prompt` or `control rate`.
        evidence: what was measured.
        remedy: what to look at.
    """

    kind: str
    where: str
    evidence: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.kind.replace('_', ' ')} ({self.evidence}); {self.remedy}"


def mismatches(session: Profile, training: Profile) -> list[Mismatch]:
    """Suspected mistakes of a session, the surest kinds first.

    Args:
        session: of what a policy saw and did.
        training: of the data that it was trained on.
    """
    found = list(_cameras(session, training))
    as_trained = set(training["cameras"]) & set(session["cameras"]) - {mismatch.where for mismatch in found}
    of_numbers = list(_vectors(session, training, as_trained))
    rate = [] if any(mismatch.kind in SCALED for mismatch in of_numbers) else list(_rate(session, training))
    delays = [] if rate or of_numbers else list(_delays(session, training, as_trained))
    return [*found, *of_numbers, *rate, *delays, *_prompts(session, training)]


# Cameras


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
    "inverted": (lambda t: 255 - t, "send colours, not their negative"),
}
SHARES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.625, 0.5625, 0.5)  # of a picture that a crop leaves, or a box fills


def _cameras(session: Profile, training: Profile) -> Iterator[Mismatch]:
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
    distance = _distance(new, known, scale)
    if distance > limit:
        yield _explained(camera, seen, training)
        return
    detail, usual_detail = float(np.median(seen["detail"])), np.array(trained["detail"])
    slack = max(0.12, 2 * float(np.ptp(usual_detail) / usual_detail.mean()))
    blocks, usual_blocks = float(np.median(seen["blocks"])), float(np.max(trained["blocks"]))
    if blocks > 1.15 * usual_blocks:
        evidence = f"seams of 8 x 8 blocks {blocks:.2f} times other steps, in training at most {usual_blocks:.2f}"
        yield Mismatch("strong_compression", camera, evidence, "send frames with JPEG quality 90 or more")
    elif detail < (1 - slack) * usual_detail.min():
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
    unchanged = _rms(picture - usual_picture)
    for share in SHARES:
        for word, y, x in (("height and width", share, share), ("height", share, 1.0), ("width", 1.0, share)):
            left = _rms(picture - _zoomed(usual_picture, y, x)) / unchanged
            tried.append((left, "cropped", f"about {100 * share:.0f} % of the {word} is left", whole))
            left = _rms(picture - _zoomed(usual_picture, 1 / y, 1 / x)) / unchanged
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
    """Distance of a session's episodes to their nearest training episodes: the median root-mean-square, in `scale`."""
    squares = ((new[:, None] - known[None]) / scale) ** 2
    valid = np.isfinite(squares)
    squares = np.where(valid, squares, 0).sum(axis=(2, 3, 4)) / valid.sum(axis=(2, 3, 4))
    return float(np.median(np.sqrt(squares).min(axis=1)))


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


# State and action

UNITS = {  # what the session's numbers would have to be multiplied with -> what was sent
    np.pi / 180: ("degrees_for_radians", "send radians"),
    180 / np.pi: ("radians_for_degrees", "send degrees"),
    1e-3: ("thousandfold", "send metres, not millimetres (or the other way round)"),
    1e3: ("a_thousandth", "send millimetres, not metres (or the other way round)"),
}


def _vectors(session: Profile, training: Profile, cameras: set[str]) -> Iterator[Mismatch]:
    for column in ("state", "action"):
        if len(session[column]["quantiles"]) != len(training[column]["quantiles"]):
            widths = [len(profile[column]["quantiles"]) for profile in (session, training)]
            yield Mismatch("another_width", column, "{} values, in training {}".format(*widths), "send the same joints")
            continue
        yield from _column(column, session, training, cameras)


def _column(column: str, session: Profile, training: Profile, cameras: set[str]) -> Iterator[Mismatch]:
    new, known = (np.array(profile[column]["quantiles"]) for profile in (session, training))
    limit = FAR * np.array(training[column]["spread"]) + 0.05
    distance = quantile_distance(new, known)
    outside = _outside(new, known)
    wrong = np.flatnonzero((distance > limit) & (outside > 0.15) | (outside > 0.5))
    stuck = _stuck(column, session, training)
    for d in stuck:
        yield Mismatch(
            "stuck", f"{column}[{d}]", f"always {new[d][4]:.4g}, moves in training", "check the sensor and its wiring"
        )
    moved = [d for d in range(len(known)) if d not in stuck]
    order = _permutation(new, known, limit, moved)
    if order:
        names = ", ".join(f"{column}[{i}] looks like [{j}]" for i, j in order)
        yield Mismatch("dimensions_exchanged", column, names, "send the values in the training data's order")
        return
    turned = list(_turned(session, training, cameras)) if column == "state" else []
    named = {mismatch.where for mismatch in turned}
    for d in moved:
        inverted = _inverted(new[d], known[d], limit[d])
        if inverted and f"{column}[{d}]" not in named:
            kind, remedy = inverted
            evidence = f"{new[d][1]:.4g} to {new[d][-2]:.4g}, in training {_span(known[d])}"
            turned.append(Mismatch(kind, f"{column}[{d}]", evidence, remedy))
    yield from turned
    named = {mismatch.where for mismatch in turned}
    wrong = [int(d) for d in wrong if d not in stuck and f"{column}[{d}]" not in named]
    if not wrong:
        return
    for factor, (kind, remedy) in UNITS.items():
        scaled = new[wrong] * factor
        left = quantile_distance(scaled, known[wrong])
        if (left < limit[wrong]).mean() > 0.6 and (_outside(scaled, known[wrong]) < 0.15).mean() > 0.6:
            spans = f"{column}[{wrong[0]}] {new[wrong[0]][1]:.4g} to {new[wrong[0]][-2]:.4g}"
            yield Mismatch(kind, column, f"{spans}, in training {_span(known[wrong[0]])}", remedy)
            return
    for d in wrong:
        spans = f"{new[d][1]:.4g} to {new[d][-2]:.4g}, in training {_span(known[d])}"
        yield Mismatch(
            "outside_training", f"{column}[{d}]", spans, "check its zero, unit and order, or train on such values"
        )


def _inverted(new: np.ndarray, known: np.ndarray, limit: float) -> tuple[str, str] | None:
    """The kind and remedy where a dimension's values fit those of training the other way round, and only so."""
    distance = quantile_distance(new[None], known[None])[0]
    kinds = (
        (-new[::-1], "sign_reversed", "send it with the other sign"),
        (known[0] + known[-1] - new[::-1], "inverted", "open and closed are exchanged: send it the other way round"),
    )
    for turned, kind, remedy in kinds:
        if distance > 1.5 * limit and quantile_distance(turned[None], known[None])[0] < min(limit, 0.4 * distance):
            return kind, remedy
    return None


def _turned(session: Profile, training: Profile, cameras: set[str]) -> Iterator[Mismatch]:
    """Dimensions that move against what the pictures show, or against what the actions ask for."""
    new, known = (np.array(profile["state"]["quantiles"]) for profile in (session, training))
    moving = np.ptp(new[:, 1:-1], axis=1) > 0.1 * np.ptp(known[:, 1:-1], axis=1)
    for d in np.flatnonzero(moving).tolist():
        against = []
        for camera in sorted(cameras):
            seen, trained = (profile["cameras"][camera]["view"] for profile in (session, training))
            if trained["correlation"][d][d] > 0.8 and seen["correlation"][d][d] < -0.5:
                against.append(f"what {camera} shows")
        usual = np.array(training["response"]["correlation"])[:, d]
        here = np.array(session["response"]["correlation"])[:, d]
        for a in np.flatnonzero((np.abs(usual) > 0.6) & (usual * here < -0.25)).tolist():
            against.append(f"action[{a}]")
        if not against:
            continue
        evidence = f"it moves against {' and '.join(against)}, which it follows in training"
        middle, usual_middle = np.median(new[d]), np.median(known[d])
        about_zero = abs(middle + usual_middle) < abs(middle - (known[d][1] + known[d][-2] - usual_middle))
        kind, remedy = ("sign_reversed", "send it with the other sign")
        if known[d][1] >= 0 or not about_zero:
            kind, remedy = ("inverted", "open and closed, or both ends, are exchanged: send it the other way")
        yield Mismatch(kind, f"state[{d}]", evidence, remedy)


def _span(quantiles: np.ndarray) -> str:
    return f"{quantiles[1]:.4g} to {quantiles[-2]:.4g}"


def _outside(new: np.ndarray, known: np.ndarray) -> np.ndarray:
    """How far the session's middle quantiles lie beyond the training's 0 and 100 %, in ranges, (width,)."""
    span = known[:, -1] - known[:, 0]
    scale = np.maximum(span, 1e-3 * max(float(span.max()), 1e-9))
    return np.maximum(known[:, 0] - new[:, 3], new[:, 5] - known[:, -1]).clip(0) / scale


def _stuck(column: str, session: Profile, training: Profile) -> list[int]:
    new, known = (np.array(profile[column]["steps"]) for profile in (session, training))
    others_move = (new[:, 2] > 0).any() or column == "state"
    return [d for d in range(len(known)) if others_move and new[d, 2] == 0 and known[d, 0] > 0]


def _permutation(new: np.ndarray, known: np.ndarray, limit: np.ndarray, dims: list[int]) -> list[tuple[int, int]]:
    """Pairs (session's dimension, training's that it looks like) where another order fits far better; [] else."""
    if len(dims) < 2:
        return []
    cost = np.stack([quantile_distance(np.repeat(new[[i]], len(dims), axis=0), known[dims]) for i in dims])
    cost = np.minimum(cost, 5.0)
    here, columns = cost.diagonal(), cost.argmin(axis=1)
    if len(set(columns.tolist())) < len(dims) or not (here > limit[dims]).any():
        return []
    moved = [(dims[i], dims[j]) for i, j in enumerate(columns.tolist()) if i != j]
    if not moved:
        return []
    positions = [dims.index(i) for i, _ in moved]
    fits = all(cost[dims.index(i), dims.index(j)] < limit[j] for i, j in moved)
    better = sum(cost[dims.index(i), dims.index(j)] for i, j in moved) < 0.4 * here[positions].sum()
    return moved if fits and better else []


# Time and words


def _rate(session: Profile, training: Profile) -> Iterator[Mismatch]:
    rates = session["control_hz"], training["control_hz"]
    if all(rates) and not 0.8 < rates[0] / rates[1] < 1.25:
        evidence = f"{rates[0]:g} steps a second, in training {rates[1]:g}"
        yield Mismatch("another_rate", "control rate", evidence, "run the control loop at the training data's rate")
        return
    new, known = (np.array(profile["state"]["steps"])[:, 1] for profile in (session, training))
    moving = (known > 0) & (new > 0)
    ratio = float(np.exp(np.median(np.log(new[moving] / known[moving])))) if moving.any() else 1.0
    if not 0.6 < ratio < 1.6:
        evidence = f"states change {ratio:.2f} times as fast from step to step as in training"
        yield Mismatch("another_rate", "control rate", evidence, "check the rate of the control loop")


def _delays(session: Profile, training: Profile, cameras: set[str]) -> Iterator[Mismatch]:
    late = _delay(session["response"]["lag"], training["response"]["lag"])
    if late > LATE:
        evidence = f"it answers to actions {late:.1f} steps later than in training"
        yield Mismatch("state_late", "state", evidence, "read the state when the action is due; look for a slow motor")
        return
    for camera in sorted(cameras):
        views = [profile["cameras"][camera]["view"]["lag"] for profile in (session, training)]
        late = _delay(*views)
        if late > LATE:
            evidence = f"what it shows comes {late:.1f} steps later than in training, beside the state"
            yield Mismatch("images_late", camera, evidence, "send the frame that was taken with the state")


def _delay(session: list[float], training: list[float]) -> float:
    """By how many steps a session's lag curve has its peak later than the training's; 0 where that can't be told."""
    peaks = [_peak(np.array(curve)) for curve in (session, training)]
    return 0.0 if None in peaks else peaks[0] - peaks[1]


def _peak(curve: np.ndarray) -> float | None:
    """Where a curve over lags has its largest value, between the steps; None where it has no clear one."""
    if curve.max() < 0.25 or np.ptp(curve) < 0.05:
        return None
    around = np.arange(2, len(curve) - 2)
    best = int(around[curve[2:-2].argmax()])
    bend, slope, _ = np.polyfit(np.arange(-2, 3), curve[best - 2 : best + 3], 2)
    shift = -slope / (2 * bend) if bend < 0 else 0.0
    return best - LAGS + float(np.clip(shift, -2, 2))


def _prompts(session: Profile, training: Profile) -> Iterator[Mismatch]:
    for prompt in session["prompts"]:
        if prompt not in training["prompts"]:
            near = difflib.get_close_matches(prompt, training["prompts"], n=1, cutoff=0.0)
            evidence = f"{prompt!r} was never trained on" + (f", the nearest is {near[0]!r}" if near else "")
            yield Mismatch("instruction_unknown", "prompt", evidence, "word it as in training")
