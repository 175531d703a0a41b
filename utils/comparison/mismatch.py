"""What differs between a recorded session and the training data: suspected mistakes, each with evidence and remedy.

Both are profiles (`data/comparison/profile.py`). A session is suspected only of what lies well outside of how training
episodes differ among themselves, so that new scenes of the same kind raise nothing. For each part that does not fit,
the mistakes that robots and recorders commonly make are tried on it, and the one that explains it is named.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

import numpy as np

from utils.comparison.facts import LAGS, Profile
from utils.comparison.kinds import Mismatch
from utils.comparison.numbers import UNITS, number_mismatches
from utils.comparison.pictures import camera_mismatches

LATE = 0.6  # steps from which a delay is one
SURE = 3.0  # standard errors that a delay has to have


def mismatches(session: Profile, training: Profile) -> list[Mismatch]:
    """Suspected mistakes of a session, the surest kinds first.

    Args:
        session: of what a policy saw and did.
        training: of the data that it was trained on.
    """
    scaled = {kind for kind, _ in UNITS.values()}
    found = list(camera_mismatches(session, training))
    as_trained = set(training["cameras"]) & set(session["cameras"]) - {mismatch.where for mismatch in found}
    of_numbers = list(number_mismatches(session, training, as_trained))
    # Rows that are requests lie as many control steps apart as actions of each plan were executed, which nobody knows.
    timed = session.get("request_hz") is None
    scaled_units = any(mismatch.kind in scaled for mismatch in of_numbers)
    rate = list(_rate(session, training)) if timed and not scaled_units else []
    delays = list(_delays(session, training, as_trained)) if timed and not rate and not of_numbers else []
    return [*found, *of_numbers, *rate, *delays, *prompt_mismatches(session["prompts"], training)]


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
    answers = _delay(session["response"]["lag"], training["response"]["lag"])
    views = {
        camera: _delay(*(profile["cameras"][camera]["view"]["lag"] for profile in (session, training)))
        for camera in sorted(cameras)
    }
    known = [delay for delay in views.values() if delay is not None]
    # A late state is late beside the actions and beside the pictures; either alone may be how a policy moves.
    late = None if answers is None else min(answers, -max(known)) if known else answers - 1.0
    if late is not None and late > LATE:
        evidence = f"it answers to actions {answers:.1f} steps later than in training"
        yield Mismatch("state_late", "state", evidence, "read the state when the action is due; look for a slow motor")
        return
    for camera, delay in views.items():
        if delay is not None and delay > LATE:  # a late state would make them early
            evidence = f"what it shows comes {delay:.1f} steps later than in training, beside the state"
            yield Mismatch("images_late", camera, evidence, "send the frame that was taken with the state")


def _delay(session: list[float], training: list[float]) -> float | None:
    """By how many steps a session's lag curve lies later than the training's; None: that can't be told.

    The training's curve is moved and scaled until it fits the session's best. How steep it is and how well it fits say
    how surely: where the delay is less than SURE times its standard error, it is taken for none at all.
    """
    new, known = np.array(session), np.array(training)
    if known.max() < 0.2 or new.max() < 0.2 or np.ptp(known) < 0.05:
        return None
    lags = np.arange(-LAGS, LAGS + 1.0)
    best: tuple[float, float, float] | None = None  # (squared residual, shift, its standard error)
    for shift in np.linspace(-3, 3, 61):
        inside = np.abs(lags - shift) <= LAGS
        moved = np.interp(lags[inside] - shift, lags, known)
        design = np.stack([moved, np.ones_like(moved)], axis=1)
        (scale, offset), *_ = np.linalg.lstsq(design, new[inside], rcond=None)
        residual = new[inside] - scale * moved - offset
        variance = float((residual**2).sum()) / max(1, inside.sum() - 3)
        slope = scale * np.gradient(moved)
        if scale > 0 and (best is None or variance < best[0]):
            best = variance, float(shift), float(np.sqrt(variance / max((slope**2).sum(), 1e-9)))
    if best is None or abs(best[1]) > 2.9:
        return None
    return 0.0 if abs(best[1]) < SURE * best[2] else best[1]


def prompt_mismatches(prompts: Iterable[str], training: Profile) -> Iterator[Mismatch]:
    """Instructions that were never trained on."""
    for prompt in prompts:
        if prompt not in training["prompts"]:
            near = difflib.get_close_matches(prompt, training["prompts"], n=1, cutoff=0.0)
            evidence = f"{prompt!r} was never trained on" + (f", the nearest is {near[0]!r}" if near else "")
            yield Mismatch("instruction_unknown", "prompt", evidence, "word it as in training")
