"""States and actions of a session beside those of training: other units, order, sign, range, stuck values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from utils.comparison.facts import WELL_SEEN, Profile, quantile_distance
from utils.comparison.kinds import Mismatch

FAR = 1.6  # times the distance of training episodes from all of them, from which a session's values lie otherwise
FAR_OUT = 5.0  # ranges beyond the training's, which only another unit explains
MOST_EXCHANGED = 5  # dimensions that may be exchanged among each other
FOLLOWS = 0.6  # correlation with an action from which a dimension follows it
AGREES = 0.5  # share of a dimension's variance that what the pictures show has to explain, in its own units
ORDER = "send the values in the training data's order"

UNITS = {  # what the session's numbers would have to be multiplied with -> what was sent
    np.pi / 180: ("degrees_for_radians", "send radians"),
    180 / np.pi: ("radians_for_degrees", "send degrees"),
    1e-3: ("thousandfold", "send metres, not millimetres (or the other way round)"),
    1e3: ("a_thousandth", "send millimetres, not metres (or the other way round)"),
}


def number_mismatches(session: Profile, training: Profile, cameras: set[str]) -> Iterator[Mismatch]:
    """Suspected mistakes of states and actions; `cameras` are those that show what they showed in training."""
    for column in ("state", "action"):
        if len(session[column]["quantiles"]) != len(training[column]["quantiles"]):
            widths = [len(profile[column]["quantiles"]) for profile in (session, training)]
            yield Mismatch("another_width", column, "{} values, in training {}".format(*widths), "send the same joints")
            continue
        yield from _column(column, session, training, cameras)


def _column(column: str, session: Profile, training: Profile, cameras: set[str]) -> Iterator[Mismatch]:
    new, known = (np.array(profile[column]["quantiles"]) for profile in (session, training))
    limit = FAR * np.array(training[column]["spread"]) + 0.05
    stuck = _stuck(column, session, training)
    for d in stuck:
        evidence = f"always {new[d][4]:.4g}, moves in training"
        yield Mismatch("stuck", f"{column}[{d}]", evidence, "check the sensor and its wiring")
    exchanged = _exchanged_by_sight(session, training, cameras) if column == "state" else None
    if exchanged is not None:
        yield exchanged
        return
    begin, usual = (np.array(p["begin"][column]) if "begin" in p else None for p in (session, training))
    sound = _following(session, training) if column == "state" else []
    if begin is not None and usual is not None:
        at_the_start = _at_the_start(begin, usual, known) if column == "state" else None
        if at_the_start is not None:
            yield at_the_start
            return
        sound += np.flatnonzero(_begin_within(begin, usual).diagonal()).tolist()
    turned = list(_turned(session, training, cameras)) if column == "state" else []
    yield from other_distribution(column, new, known, limit, left_out=stuck, sound=sound, turned=turned, begin=begin)


def other_distribution(
    column: str,
    new: np.ndarray,
    known: np.ndarray,
    limit: np.ndarray,
    *,
    left_out: Sequence[int] = (),
    sound: Sequence[int] = (),
    turned: Sequence[Mismatch] = (),
    begin: np.ndarray | None = None,
) -> Iterator[Mismatch]:
    """Dimensions whose values lie otherwise than they did, by the mistake that would make them so.

    Args:
        column: `state` or `action`.
        new, known: quantiles of the session and of training, (width, 9), at `QUANTILES`.
        limit: (width,), the `quantile_distance` up to which a dimension is as it was.
        left_out: dimensions that are not looked at.
        sound: dimensions that follow an action or begin as they did. A policy may use another part of their range;
            that alone does not say that they are turned or exchanged.
        begin: quantiles of the first steps of the session's episodes. A mistake shows from the first step on; a policy
            that fails leaves what it was trained on later, by itself. None: there are no such steps.
        turned: what is known to move the wrong way; it is yielded unless the order of dimensions explains more.
    """
    looked_at = [d for d in range(len(known)) if d not in left_out]
    order = _permutation(new, known, limit, [d for d in looked_at if d not in sound])
    if order:
        names = ", ".join(f"{column}[{i}] looks like [{j}]" for i, j in order)
        yield Mismatch("dimensions_exchanged", column, names, ORDER)
        return
    yield from turned
    named = {mismatch.where for mismatch in turned}
    wrong = []
    distance, outside = quantile_distance(new, known), _outside(new, known)
    if begin is not None:
        outside = np.minimum(outside, _outside(begin, known))
    for d in looked_at:
        if f"{column}[{d}]" in named:
            continue
        inverted = None if d in sound else _inverted(new[d], known[d], limit[d])
        if inverted:
            yield Mismatch(inverted[0], f"{column}[{d}]", _spans(new[d], known[d]), inverted[1])
        elif (distance[d] > limit[d] and outside[d] > 0.15) or outside[d] > 0.5:
            wrong.append(d)
    if not wrong:
        return
    for factor, (kind, remedy) in UNITS.items():
        scaled = new[wrong] * factor
        wide = np.ptp(scaled[:, 1:-1], axis=1) > 0.1 * np.ptp(known[wrong][:, 1:-1], axis=1)
        beyond = _outside(scaled, known[wrong])
        as_before = (quantile_distance(scaled, known[wrong]) < limit[wrong]) & (beyond < 0.15)
        # A robot that is misled goes where no demonstration went, but not many times as far.
        fits = wide & (as_before | ((beyond < 1) & (outside[wrong] > FAR_OUT)))
        if fits.mean() > 0.6:
            evidence = f"{column}[{wrong[0]}] {_spans(new[wrong[0]], known[wrong[0]])}"
            yield Mismatch(kind, column, evidence, remedy)
            return
    for d in wrong:
        remedy = "check its zero, unit and order, or train on such values"
        yield Mismatch("outside_training", f"{column}[{d}]", _spans(new[d], known[d]), remedy)


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


def _exchanged_by_sight(session: Profile, training: Profile, cameras: set[str]) -> Mismatch | None:
    """Dimensions that go with what the pictures show of other dimensions, and not with what they show of themselves."""
    for camera in sorted(cameras):
        seen, trained = (np.array(p["cameras"][camera]["view"]["correlation"]) for p in (session, training))
        known = np.flatnonzero(trained.diagonal() > WELL_SEEN)
        if len(known) < 2:
            continue
        seen = seen[np.ix_(known, known)]
        best = seen.argmax(axis=0)  # of each dimension that was told, the one that the pictures show to move so
        gain = seen[best, np.arange(len(known))] - seen.diagonal()
        agrees = np.array(session["cameras"][camera]["view"]["agrees"])[np.ix_(known, known)]
        moved = np.flatnonzero((gain > 0.4) & (agrees[best, np.arange(len(known))] > AGREES))
        if len(moved) >= 2 and set(best[moved]) == set(moved):
            pairs = ", ".join(f"state[{known[d]}] moves as {camera} shows [{known[best[d]]}]" for d in moved)
            return Mismatch("dimensions_exchanged", "state", pairs, ORDER)
    return None


def _at_the_start(begin: np.ndarray, usual: np.ndarray, known: np.ndarray) -> Mismatch | None:
    """The one mistake that explains why the state begins elsewhere; None where there is none, or several.

    Robots begin where they did in training, whatever a misled policy does later. Every dimension that begins apart from
    its own beginnings has to begin within them when it is read in another unit, in another order or turned.

    Args:
        begin, usual: quantiles of where the episodes of the session and of training begin, (width, 9).
        known: quantiles of all of training.
    """
    low, high = _reach(usual)
    middle = begin[:, 1:-1]  # without the outermost values

    def clear_of(low: np.ndarray, high: np.ndarray) -> np.ndarray:  # bool (width,)
        return (middle > high[:, None]).all(axis=1) | (middle < low[:, None]).all(axis=1)

    fits = _begin_within(begin, usual)
    wrong = np.flatnonzero(~fits.diagonal()).tolist()
    apart = np.flatnonzero(clear_of(low, high)).tolist()
    if not apart:
        return None
    beyond = clear_of(known[:, 0], known[:, -1])
    found = []
    for factor, (kind, remedy) in UNITS.items():
        # Near zero, what is divided by much fits whatever it is: then it has to lie outside of all of training.
        fitting = _begin_within(begin * factor, usual).diagonal()[wrong]
        if len(apart) > 1 and fitting.all() and (factor > 1 or beyond[apart].all()):
            d = apart[0]
            found.append(Mismatch(kind, "state", f"state[{d}] begins at {_spans(begin[d], usual[d])}", remedy))
    if len(wrong) <= MOST_EXCHANGED and len(apart) > 1:
        permutations = itertools.permutations(wrong)
        orders = [order for order in permutations if all(fits[i, j] for i, j in zip(wrong, order, strict=True))]
        if len(orders) == 1:
            names = ", ".join(f"state[{i}] begins like [{j}]" for i, j in zip(wrong, orders[0], strict=True))
            found.append(Mismatch("dimensions_exchanged", "state", names, ORDER))
    if len(wrong) == 1:
        (d,) = wrong
        # The other end of its range, or of 0 to 1, where it may have been closed to a part alone.
        ends = [known[d, 0] + known[d, -1], *([1.0] if 0 <= known[d, 0] and known[d, -1] <= 1 else [])]
        if any(_begin_within(total - begin, usual)[d, d] for total in ends):
            remedy = "open and closed are exchanged: send it the other way round"
            evidence = f"begins at {_spans(begin[d], usual[d])}"
            found.append(Mismatch("inverted", f"state[{d}]", evidence, remedy))
    return found[0] if len(found) == 1 else None


def _following(session: Profile, training: Profile) -> list[int]:
    """Dimensions that follow an action as in training."""
    usual, here = (np.array(profile["response"]["correlation"]) for profile in (training, session))
    return np.flatnonzero(((np.abs(usual) > FOLLOWS) & (here * np.sign(usual) > FOLLOWS)).any(axis=0)).tolist()


def _begins_upright(session: Profile, training: Profile) -> np.ndarray:
    """Which dimensions of the state begin where they did, and would not with the other sign or the other way round."""
    known = np.array(training["state"]["quantiles"])
    if "start" not in training or "begin" not in session:  # a profile of an earlier version, or a few steps alone
        return np.zeros(len(known), bool)
    begin, usual = np.array(session["begin"]["state"]), np.array(training["start"]["state"])
    margin = 0.1 * np.ptp(known, axis=1)[:, None]

    def within(values: np.ndarray) -> np.ndarray:
        middle = values[:, 1:-1]
        return ((middle >= usual[:, [0]] - margin) & (middle <= usual[:, [-1]] + margin)).all(axis=1)

    return within(begin) & ~within(-begin) & ~within(known[:, [0]] + known[:, [-1]] - begin)


def _begin_within(begin: np.ndarray, usual: np.ndarray) -> np.ndarray:
    """Whether dimension i of a session begins where j begins in training, but for the outermost; (width, width)."""
    low, high = _reach(usual)
    middle = begin[:, None, 1:-1]
    return ((middle >= low[:, None]) & (middle <= high[:, None])).all(axis=2)


def _reach(usual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From where to where each dimension begins, with a margin, each (width,)."""
    reach = usual[:, -1] - usual[:, 0]
    margin = 0.1 * reach + 0.01 * max(float(reach.max()), 1e-9)
    return usual[:, 0] - margin, usual[:, -1] + margin


def _turned(session: Profile, training: Profile, cameras: set[str]) -> Iterator[Mismatch]:
    """Dimensions that move against what the pictures show, or against what the actions ask for.

    What follows an action as ever is none of them, whatever the pictures seem to show. Nor is what pictures alone speak
    against, where it begins as it did and would not if it were turned.
    """
    follows, begins = _following(session, training), _begins_upright(session, training)
    new, known = (np.array(profile["state"]["quantiles"]) for profile in (session, training))
    moving = np.ptp(new[:, 1:-1], axis=1) > 0.1 * np.ptp(known[:, 1:-1], axis=1)
    for d in np.flatnonzero(moving).tolist():
        if d in follows:
            continue
        against = []
        usual, here = (np.array(profile["response"]["correlation"])[:, d] for profile in (training, session))
        strong = np.abs(usual) > FOLLOWS
        for camera in sorted(cameras):
            seen, trained = (profile["cameras"][camera]["view"] for profile in (session, training))
            if trained["correlation"][d][d] > WELL_SEEN and seen["agrees_turned"][d] > AGREES:
                against.append(f"what {camera} shows")
        for a in np.flatnonzero(strong & (here * np.sign(usual) < -FOLLOWS)).tolist():
            against.append(f"action[{a}]")
        if not against or (begins[d] and not any(place.startswith("action") for place in against)):
            continue
        evidence = f"it moves against {' and '.join(against)}, which it follows in training"
        low, high = known[d][1], known[d][-2]
        kind, remedy = "inverted", "open and closed, or both ends, are exchanged: send it the other way round"
        if low < -0.2 * (high - low) and high > 0.2 * (high - low):
            kind, remedy = "sign_reversed", "send it with the other sign"
        yield Mismatch(kind, f"state[{d}]", evidence, remedy)


def _spans(new: np.ndarray, known: np.ndarray) -> str:
    return f"{new[1]:.4g} to {new[-2]:.4g}, in training {known[1]:.4g} to {known[-2]:.4g}"


def _outside(new: np.ndarray, known: np.ndarray) -> np.ndarray:
    """How far the session's middle quantiles lie beyond the training's 0 and 100 %, in ranges, (width,)."""
    span = known[:, -1] - known[:, 0]
    scale = np.maximum(span, 1e-3 * max(float(span.max()), 1e-9))
    return np.maximum(known[:, 0] - new[:, 3], new[:, 5] - known[:, -1]).clip(0) / scale


def _stuck(column: str, session: Profile, training: Profile) -> list[int]:
    """Dimensions that never move, where they do in training, and where they do not rest in training either.

    A gripper that stays open has a policy that leaves it so; a joint that stays anywhere else hangs.
    """
    new, known = (np.array(profile[column]["steps"]) for profile in (session, training))
    acts = column == "state" and np.array(session["action"]["steps"])[:, 2].max() > 0
    others_move = acts or (new[:, 2] > 0).any()  # a robot that waits is not stuck
    values, usual = (np.array(profile[column]["quantiles"]) for profile in (session, training))
    near = np.abs(usual - values[:, [4]]) <= 1e-3 * np.ptp(usual, axis=1)[:, None]
    rests = near.sum(axis=1) > 1  # at the same value for at least the shares between two quantiles
    return [d for d in range(len(known)) if others_move and new[d, 2] == 0 and known[d, 0] > 0 and not rests[d]]


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
