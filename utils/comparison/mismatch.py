"""What differs between a recorded session and the training data: suspected mistakes, each with evidence and remedy.

Both are profiles (`data/comparison/profile.py`). A session is suspected only of what lies well outside of how training
episodes differ among themselves, so that new scenes of the same kind raise nothing. For each part that does not fit,
the mistakes that robots and recorders commonly make are tried on it, and the one that explains it is named.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from utils.comparison.facts import LAGS, Profile
from utils.comparison.kinds import Mismatch
from utils.comparison.numbers import UNITS, number_mismatches
from utils.comparison.pictures import camera_mismatches

FASTER = 1.6  # times the training's changes from step to step, from which another rate is suspected
# Standard errors that a delay has to have: below 0.1 % by chance with eight other lags in each of four signals, and
# the sparse parts that the errors are taken from.
SURE = 4.5
PARTS = 3, 8  # parts of a session and of training from which delays are told


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
    """Another control rate: as the recorders noted it, or, where one did not, as the state moves.

    Movement alone says little: policies are slower than their demonstrations, or faster, without any mistake. It counts
    where no rate is known, and every dimension moves faster from step to step than it ever did in training.
    """
    rates = session["control_hz"], training["control_hz"]
    if all(rates):
        if not 0.8 < rates[0] / rates[1] < 1.25:
            evidence = f"{rates[0]:g} steps a second, in training {rates[1]:g}"
            yield Mismatch("another_rate", "control rate", evidence, "run the control loop at the training data's rate")
        return
    (_, new, _), (_, known, most) = (np.array(profile["state"]["steps"]).T for profile in (session, training))
    moving = known > 0
    if not moving.any() or not (new > most)[moving].all():
        return
    ratio = float(np.median(new[moving] / known[moving]))
    if ratio > FASTER:
        evidence = f"states change {ratio:.2f} times as fast from step to step as in training, in every dimension"
        yield Mismatch("another_rate", "control rate", evidence, "check the rate of the control loop")


def _delays(session: Profile, training: Profile, cameras: set[str]) -> Iterator[Mismatch]:
    answers = _delay(session["response"], training["response"])
    views = {
        camera: _delay(*(profile["cameras"][camera]["view"] for profile in (session, training)))
        for camera in sorted(cameras)
    }
    known = [delay for delay in views.values() if delay is not None]
    # A late state is late beside the actions and beside the pictures; either alone may be how a policy moves.
    late = None if answers is None else min(answers, -max(known)) if known else answers - 1
    if late is not None and late > 0:
        steps = "1 step" if answers == 1 else f"{answers} steps"
        evidence = f"it answers to actions {steps} later than in training"
        yield Mismatch("state_late", "state", evidence, "read the state when the action is due; look for a slow motor")
        return
    for camera, delay in views.items():
        if delay is not None and delay > 0:  # a late state would make them early
            steps = "1 step" if delay == 1 else f"{delay} steps"
            evidence = f"what it shows comes {steps} later than in training, beside the state"
            yield Mismatch("images_late", camera, evidence, "send the frame that was taken with the state")


def _delay(session: dict[str, Any], training: dict[str, Any]) -> int | None:
    """By how many whole steps a session's signals go together later than the training's; None: that can't be told.

    The lag at which they go together best must differ from the training's in the session and in either half of it. And
    what they gain by it must be more than chance twice: by the errors of a mean over the session's parts, since a
    session is short; and by how much single training episodes differ, since a policy's way to move is no mistake.
    """
    if "lags" not in training:
        return None  # a profile of an earlier version, which kept the mean alone
    new, known = (np.array(profile["lags"]).reshape(-1, 2 * LAGS + 1) for profile in (session, training))
    if len(new) < PARTS[0] or len(known) < PARTS[1]:
        return None
    usual, best = int(known.mean(axis=0).argmax()), int(new.mean(axis=0).argmax())
    if not {usual, best} <= set(range(1, 2 * LAGS)):
        return None  # no peak
    if best == usual:
        return 0
    middle = len(new) // 2
    halves = [int(half.mean(axis=0).argmax()) - usual for half in (new[:middle], new[middle:])]
    if any(half * (best - usual) <= 0 for half in halves):
        return 0
    gain, usual_gain = (curves[:, best] - curves[:, usual] for curves in (new, known))
    variance, usual_variance = gain.var(ddof=1), usual_gain.var(ddof=1)
    displaced = gain.mean() / np.sqrt((variance + usual_variance) / len(gain) + 1e-9)
    unusual = (gain.mean() - usual_gain.mean()) / np.sqrt(variance / len(gain) + usual_variance + 1e-9)
    return best - usual if min(displaced, unusual) > SURE else 0


def prompt_mismatches(prompts: Iterable[str], training: Profile) -> Iterator[Mismatch]:
    """Instructions that were never trained on."""
    for prompt in prompts:
        if prompt not in training["prompts"]:
            near = difflib.get_close_matches(prompt, training["prompts"], n=1, cutoff=0.0)
            evidence = f"{prompt!r} was never trained on" + (f", the nearest is {near[0]!r}" if near else "")
            yield Mismatch("instruction_unknown", "prompt", evidence, "word it as in training")
