"""What differs between a recorded session and the training data: suspected mistakes, each with evidence and remedy.

Both are profiles (`data/comparison/profile.py`). A session is suspected only of what lies well outside of how training
episodes differ among themselves, so that new scenes of the same kind raise nothing. For each part that does not fit,
the mistakes that robots and recorders commonly make are tried on it, and the one that explains it is named.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

import numpy as np

from utils.comparison.facts import WELL_SEEN, Profile
from utils.comparison.kinds import Mismatch
from utils.comparison.numbers import UNITS, number_mismatches
from utils.comparison.pictures import camera_mismatches

FASTER = 1.6  # times the training's changes from step to step, from which another rate is suspected
STATE_LATE = IMAGES_LATE = 0.1  # share of what is unexplained that a delay must explain
SURE = 3.0  # standard errors over the parts of a session that the gain of late pictures has to have
# How far a step's delay must raise the logarithm of the unexplained in training for a dimension to count, and the most
# that one counts for.
TELLING, MOST_TELLING = 0.1, 2.0


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
    """A state that comes late after actions; only without one, pictures that come late after the state."""
    motion = training["response"].get("motion")  # which profiles of earlier versions lack
    weights = np.clip((motion or {}).get("telling", []), 0, MOST_TELLING)
    late, less = _best_delay(session["response"]["unexplained"], np.where(weights < TELLING, 0, weights))
    if late and less > STATE_LATE:
        evidence = f"its changes follow actions {_steps(late)} later than in training, by a model that then errs "
        evidence += f"{less:.0%} less"
        yield Mismatch("state_late", "state", evidence, "read the state when the action is due; look for a slow motor")
        return
    for camera in sorted(cameras):
        shown, known = (profile["cameras"][camera]["view"] for profile in (session, training))
        seen = np.array(known["correlation"]).diagonal() > WELL_SEEN
        late, less = _delay_of_pictures(shown["unexplained"], seen.astype(float))
        if late and less > IMAGES_LATE:
            evidence = f"the state that it shows is the one of {_steps(late)} earlier: it then differs {less:.0%} less"
            yield Mismatch("images_late", camera, evidence, "send the frame that was taken with the state")


def _best_delay(unexplained: list[list[float]], weights: np.ndarray) -> tuple[int, float]:
    """By how many steps signals have to be moved back to go together best, and by which share less is then unexplained.

    Args:
        unexplained: mean squares, (LAGS + 1, S), or nothing.
        weights: of the dimensions, (S,); where all are 0, nothing can be told.
    """
    if not len(unexplained) or not weights.any():
        return 0, 0.0
    logarithm = np.log(np.array(unexplained))
    gain = (logarithm[0] - logarithm) @ weights / weights.sum()
    late = int(gain.argmax())
    return late, 1 - float(np.exp(-gain[late]))


def _delay_of_pictures(parts: list[list[list[float]]], weights: np.ndarray) -> tuple[int, float]:
    """As `_best_delay`, of (parts, LAGS + 1, S): no delay where the session's parts don't agree on it."""
    if len(parts) < 2 or not weights.any():
        return 0, 0.0
    late, less = _best_delay(np.mean(parts, axis=0).tolist(), weights)
    logarithm = np.log(np.array(parts)) @ weights / weights.sum()
    gain = logarithm[:, 0] - logarithm[:, late]
    sure = gain.mean() > SURE * gain.std(ddof=1) / np.sqrt(len(gain))
    return (late, less) if sure else (0, 0.0)


def _steps(number: int) -> str:
    return "1 step" if number == 1 else f"{number} steps"


def prompt_mismatches(prompts: Iterable[str], training: Profile) -> Iterator[Mismatch]:
    """Instructions that were never trained on."""
    for prompt in prompts:
        if prompt not in training["prompts"]:
            near = difflib.get_close_matches(prompt, training["prompts"], n=1, cutoff=0.0)
            evidence = f"{prompt!r} was never trained on" + (f", the nearest is {near[0]!r}" if near else "")
            yield Mismatch("instruction_unknown", "prompt", evidence, "word it as in training")
