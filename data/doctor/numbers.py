"""Checks of states and actions: values that can't be, that lie far out, that never change, that leap.

Distributions of robot data are anything but normal (clipped, two-valued, mostly at rest), so nothing here counts
standard deviations. A value is an outlier when a wide empty gap separates it from all others, a step is a jump when
it is several times as long as every other step of its dimension, and what happens in most episodes is no fault.
"""

from __future__ import annotations

import numpy as np

from data.doctor.findings import Findings
from data.doctor.rows import Rows, runs
from data.schema import ACTION, STATE

RARE = 0.002  # at most this part of the rows (but always FEW) can be outliers or jumps of a dimension
FEW = 4
ENOUGH = 20  # values that a distribution needs before anything can be far from it
APART = 1.5  # an outlier lies this many times the range of all other values away from them
JUMP = 4.0  # a jump is this many times longer than every other step
FLAT = 1e-6  # relative range below which a dimension is constant (the normalizer's threshold)
IDLE_STEPS = 10  # rows in which nothing is commanded, or nothing changes, from which on the robot idles
UNIT_RATIO = 20.0  # between the spreads of one dimension in two files, from which their units differ
FAR_JUMP = 10.0  # an action's step so many times longer than every other is a jump even if it is not undone
STUCK_STEPS = 10  # rows over which a dimension that otherwise keeps moving must stand still to be stuck
RESTLESS = 0.9  # part of the steps at which a dimension keeps moving


def check_finite(rows: Rows, findings: Findings) -> None:
    """`nan`, `infinity`, `float32_precision`."""
    for name in rows.vectors:
        values = rows.vectors[name]
        present = rows.lengths[name] == values.shape[1]
        for kind, wrong, word in (
            ("nan", np.isnan(values) & present[:, None], "NaN or null"),
            ("infinity", np.isinf(values), "infinite in float32"),
        ):
            indices = np.flatnonzero(wrong.any(axis=1))
            findings.add_runs(
                kind, rows, indices, lambda i, wrong=wrong, word=word, name=name: f"{_dims(name, wrong[i])} {word}"
            )
        findings.add_runs(
            "float32_precision",
            rows,
            rows.imprecise[name],
            lambda _, name=name: f"{name} holds a value of 2^24 or more that float32 rounds",
        )


def check_outliers(rows: Rows, findings: Findings) -> dict[str, np.ndarray]:
    """`state_outlier`, `action_outlier`; returns a bool mask of them (N, width) per column."""
    masks = {}
    for name in rows.vectors:
        values = rows.vectors[name]
        mask = np.zeros(values.shape, dtype=bool)
        for d in range(values.shape[1]):
            known = np.flatnonzero(np.isfinite(values[:, d]))
            far = known[_isolated(values[known, d])]
            if len(far) and not _in_most_episodes(far, rows):
                mask[far, d] = True
        masks[name] = mask
        findings.mark(name, mask)
        if mask.any():
            rest = np.where(mask | ~np.isfinite(values), np.nan, values)
            low, high = np.nanmin(rest, axis=0), np.nanmax(rest, axis=0)
            for first, length in runs(np.flatnonzero(mask.any(axis=1)), rows):
                d = int(mask[first].argmax())
                others = "" if mask[first].sum() == 1 else f" (and {mask[first].sum() - 1} more dimensions)"
                message = f"{name}[{d}] is {values[first, d]:.5g}{others}; everywhere else it lies between "
                message += f"{low[d]:.5g} and {high[d]:.5g}" + (f"; so in {length} rows" if length > 1 else "")
                findings.add_at(f"{_kind(name)}_outlier", rows, first, message)
    return masks


def check_bounds(rows: Rows, findings: Findings, outliers: np.ndarray) -> None:
    """`action_out_of_bounds`: actions fill [-1, 1] up to its edge, as commands of a clipped controller do, and a few
    lie outside. Distributions that fade out around 1 have as many values beyond it as just below, and are left alone.

    Args:
        outliers: bool (N, width), values that are outliers already.
    """
    action = rows.vectors["action"]
    size = np.where(np.isfinite(action) & ~outliers, np.abs(action), 0.0)
    beyond, near = size > 1 + 1e-4, (size > 0.9) & (size <= 1 + 1e-4)
    if near.sum() < ENOUGH or beyond.sum() > 0.1 * near.sum():
        return
    for first, length in runs(np.flatnonzero(beyond.any(axis=1)), rows):
        d = int(beyond[first].argmax())
        more = f"; so in {length} rows" if length > 1 else ""
        message = f"action[{d}] is {action[first, d]:.5g}; all but {beyond.sum()} action values lie in [-1, 1]{more}"
        findings.add_at("action_out_of_bounds", rows, first, message)


def check_jumps(rows: Rows, findings: Findings, outliers: dict[str, np.ndarray]) -> None:
    """`state_jump`: a step several times longer than all others. `action_jump`: one that is undone by the next step
    (controllers do switch from one level to another, but do not come back at once), or is longer still.
    """
    inner = rows.same_episode()
    for name in rows.vectors:
        values = np.where(outliers[name], np.nan, rows.vectors[name])
        wrong = np.zeros(values.shape, dtype=bool)
        length = np.zeros(values.shape, dtype=np.float32)
        usual = np.zeros(values.shape[1])
        for d in range(values.shape[1]):
            steps = np.diff(values[:, d])
            known = np.flatnonzero(inner & np.isfinite(steps) & (steps != 0))
            far = known[_far_steps(np.abs(steps[known]))] + 1
            far = far[[not _is_switch(values[:, d], int(i)) for i in far]] if len(far) else far
            longest = np.abs(steps[np.setdiff1d(known, far - 1)]).max(initial=0.0)
            if name == "action" and len(far):
                undone = np.array([_is_undone(steps, inner, int(i)) for i in far])
                far = far[undone | (np.abs(steps[far - 1]) > FAR_JUMP * longest)]
            if len(far) and not _in_most_episodes(far, rows):
                wrong[far, d] = True
                length[1:, d], usual[d] = steps, longest
        findings.mark(name, wrong)
        for first, run in runs(np.flatnonzero(wrong.any(axis=1)), rows):
            d = int(wrong[first].argmax())
            others = "" if wrong[first].sum() == 1 else f" (and {wrong[first].sum() - 1} more dimensions)"
            message = f"{name}[{d}] changes by {length[first, d]:+.4g} in one step{others}; no other step is longer "
            findings.add_at(f"{_kind(name)}_jump", rows, first, message + f"than {usual[d]:.4g}", length=run)


def check_angles(rows: Rows, findings: Findings) -> None:
    """`angle_wraps`: a dimension that moves smoothly but for steps of nearly a whole turn, in radians or degrees."""
    inner = rows.same_episode()
    for name in rows.vectors:
        values = rows.vectors[name]
        for d in range(values.shape[1]):
            steps = np.abs(np.diff(values[:, d]))
            known = inner & np.isfinite(steps)
            for turn, unit in ((2 * np.pi, "pi"), (360.0, "180 degrees")):
                wraps = np.flatnonzero(known & (steps > 0.9 * turn)) + 1
                if not len(wraps) or np.nanmax(values[:, d]) - np.nanmin(values[:, d]) > 1.01 * turn:
                    continue
                rest = steps[known & (steps <= 0.9 * turn)]
                if len(rest) >= ENOUGH and np.quantile(rest, 0.99) < turn / 6:
                    message = f"{name}[{d}] crosses +-{unit} {len(wraps)} times, first here; differences across it, as "
                    findings.add_at("angle_wraps", rows, int(wraps[0]), message + "delta actions are, are a turn off")


def check_frozen(rows: Rows, findings: Findings, outliers: dict[str, np.ndarray]) -> None:
    """`frozen_dimension`: constant in all data, or in a file of several episodes; outliers are not movement.
    `stuck_dimension`: see `_report_stuck`.
    """
    if len(rows) < ENOUGH:
        return
    file_of = rows.file_of[rows.episode_starts[:-1]]
    for name in rows.vectors:
        values = np.where(outliers[name], np.nan, rows.vectors[name])
        low, high = _episode_ranges(values, rows.episode_starts)
        known = np.isfinite(low)
        frozen = np.zeros((len(rows.files), values.shape[1]), dtype=bool)
        for d in np.flatnonzero(known.any(axis=0)):
            files = np.unique(file_of[known[:, d]])
            if not _moves(np.nanmin(low[:, d]), np.nanmax(high[:, d])):
                frozen[:, d] = True
                where = f" in all {len(files)} files" if len(files) > 1 else ""
                message = f"{name}[{d}] is {np.nanmin(low[:, d]):.5g} in every row{where}"
                findings.add("frozen_dimension", message, file=rows.files[files[0]])
                continue
            for file in files:
                mine = (file_of == file) & known[:, d]
                if mine.sum() >= 2 and not _moves(low[mine, d].min(), high[mine, d].max()):
                    frozen[file, d] = True
                    message = f"{name}[{d}] is {low[mine, d].min():.5g} in every row of this file, but moves in others"
                    findings.add("frozen_dimension", message, file=rows.files[file])
        _report_stuck(rows, findings, name, values, frozen)


def _report_stuck(rows: Rows, findings: Findings, name: str, values: np.ndarray, frozen: np.ndarray) -> None:
    """`stuck_dimension`: in one episode, or a tenth of them, a dimension stays exactly the same for a while though it
    changes at nearly every step of all others, and others of its column move. A command may rest at 0 or at an end
    of its range.
    """
    inner = rows.same_episode()
    known = inner[:, None] & np.isfinite(values[1:]) & np.isfinite(values[:-1])
    still = known & (values[1:] == values[:-1])
    others_move = (known & ~still).any(axis=1)
    for d in range(values.shape[1]):
        indices = np.flatnonzero(still[:, d] & others_move) + 1
        if name == "action" and len(indices):
            rest = (np.nanmin(values[:, d]), np.nanmax(values[:, d]), 0.0)
            indices = indices[~np.isin(values[indices, d], rest)]
        stretches = [(first, length) for first, length in runs(indices, rows) if length + 1 >= STUCK_STEPS]
        affected = np.unique(np.searchsorted(rows.episode_starts, [first for first, _ in stretches], side="right") - 1)
        if not stretches or len(affected) > max(1, 0.1 * rows.num_episodes):
            continue
        elsewhere = known[:, d].copy()
        for number in affected:
            elsewhere[rows.episode_rows(number)] = False
        if elsewhere.sum() < ENOUGH or (~still[elsewhere, d]).mean() < RESTLESS:
            continue
        for first, length in stretches:
            if not frozen[rows.file_of[first], d]:
                message = f"{name}[{d}] stays {values[first, d]:.5g} for {length + 1} rows, but changes nearly always"
                findings.add_at("stuck_dimension", rows, first - 1, message)


def check_units(rows: Rows, findings: Findings) -> None:
    """`unit_mismatch`: most dimensions of a file spread many times wider (or narrower) than in the other files."""
    for name in rows.vectors:
        values = rows.vectors[name]
        spreads = np.full((len(rows.files), values.shape[1]), np.nan)
        for file in range(len(rows.files)):
            here = values[rows.file_rows(file)]
            here = here[np.isfinite(here).all(axis=1)]
            if len(here) >= ENOUGH:
                low, high = np.quantile(here, [0.05, 0.95], axis=0)
                spread = high - low
                spreads[file] = np.where(spread > FLAT * np.maximum(np.abs(high), 1e-3), np.log(spread + 1e-30), np.nan)
        known = np.isfinite(spreads)
        columns = known.sum(axis=0) >= 2
        if not columns.any():
            continue
        usual = np.nanquantile(spreads[:, columns], 0.5, axis=0, method="lower")
        for file, path in enumerate(rows.files):
            ratios = (spreads[file, columns] - usual)[known[file, columns]]
            for sign, word in ((1, "wider"), (-1, "narrower")):
                far = sign * ratios > np.log(UNIT_RATIO)
                if far.sum() >= max(2, 0.5 * len(columns)):
                    factor = float(np.exp(np.median(np.abs(ratios[far]))))
                    message = f"{far.sum()} of {len(columns)} {name} dimensions spread about {factor:.3g} times {word} "
                    findings.add("unit_mismatch", message + "than in the other files", file=path)


def check_copies(rows: Rows, findings: Findings) -> None:
    """`action_is_state`: in every row of a file the action equals the state."""
    state, action = rows.state, rows.vectors["action"]
    if state.shape[1] != action.shape[1]:
        return
    for file, path in enumerate(rows.files):
        where = rows.file_rows(file)
        known = np.isfinite(state[where]).all(axis=1) & np.isfinite(action[where]).all(axis=1)
        if known.sum() >= ENOUGH and (state[where][known] == action[where][known]).all():
            findings.add("action_is_state", f"action equals state in all {known.sum()} rows", file=path)


def check_idle(rows: Rows, findings: Findings, same_images: np.ndarray) -> None:
    """`idle`: nothing commanded, or nothing changing, over a stretch of rows; `repeated_row`: shorter stretches in
    which the images are the same too.

    Args:
        same_images: bool (N - 1,), whether every image of a row equals the next row's; False where images were not
            looked at.
    """
    if len(rows) < 2:
        return
    action, inner = rows.vectors["action"], rows.same_episode()
    zero = (action == 0).all(axis=1)
    for first, length in runs(np.flatnonzero(zero), rows):
        if length >= IDLE_STEPS:
            findings.add_at("idle", rows, first, f"all action values are 0 for {length} rows", length=length)
    same = inner.copy()
    for name in rows.vectors:
        same &= (rows.vectors[name][1:] == rows.vectors[name][:-1]).all(axis=1)
    still = np.flatnonzero(same) + 1
    for first, length in runs(still, rows):
        if zero[first - 1] and length + 1 >= IDLE_STEPS:
            continue
        if length + 1 >= IDLE_STEPS:
            message = f"state and action stay the same for {length + 1} rows"
            findings.add_at("idle", rows, first, message, length=length)
        elif same_images[first - 1 : first - 1 + length].all():
            count = f"{length} rows repeat" if length > 1 else "the row repeats"
            message = f"{count} the state, action and images of the row before"
            findings.add_at("repeated_row", rows, first, message, length=length)


def _isolated(values: np.ndarray) -> np.ndarray:
    """Indices of the few values that a gap of APART times the range of all others separates from them."""
    few = max(FEW, int(np.ceil(RARE * len(values))))
    if len(values) < ENOUGH + 2 * few:
        return np.empty(0, dtype=np.int64)
    order = np.argpartition(values, [few, len(values) // 2, len(values) - few - 1])
    center = abs(float(values[order[len(values) // 2]]))
    lowest, highest = (part[np.argsort(values[part])] for part in (order[: few + 1], order[-few - 1 :]))
    low, high = values[lowest].astype(np.float64), values[highest].astype(np.float64)
    isolated = []
    for line, floor, indices in ((high, low[-1], highest), (-low[::-1], -high[0], lowest[::-1])):
        for i in range(few, 0, -1):
            below = line[-i - 1]
            span = below - floor
            if span <= FLAT * center:
                span = 2 * center  # a constant but for these: 1 among zeros is a rare event, 1000 among ones is not
            if span > 0 and line[-i] - below > APART * span:
                isolated.append(indices[-i:])
                break
    return np.sort(np.concatenate(isolated)) if isolated else np.empty(0, dtype=np.int64)


def _far_steps(lengths: np.ndarray) -> np.ndarray:
    """Indices of the few step lengths that are more than JUMP times all the others."""
    few = max(FEW, int(np.ceil(RARE * len(lengths))))
    if len(lengths) < ENOUGH + few:
        return np.empty(0, dtype=np.int64)
    longest = np.argpartition(lengths, len(lengths) - few - 1)[-few - 1 :]
    longest = longest[np.argsort(lengths[longest])]
    ranked = lengths[longest].astype(np.float64)
    breaks = np.flatnonzero(ranked[1:] > JUMP * ranked[:-1])
    return np.sort(longest[1 + breaks[0] :]) if len(breaks) else np.empty(0, dtype=np.int64)


def _is_switch(values: np.ndarray, index: int) -> bool:
    """Whether the step to a row leads from one of two levels, at which nearly all values lie, to the other."""
    before, after = values[index - 1], values[index]
    margin = 0.1 * abs(after - before)
    known = values[np.isfinite(values)]
    near_before, near_after = np.abs(known - before) <= margin, np.abs(known - after) <= margin
    return near_before.sum() >= 3 and near_after.sum() >= 3 and (near_before | near_after).mean() > 0.8


def _is_undone(steps: np.ndarray, inner: np.ndarray, index: int) -> bool:
    """Whether the step to a row is reversed, by half of it or more, by the step before or after it."""
    step = steps[index - 1]
    neighbours = [i for i in (index - 2, index) if 0 <= i < len(steps) and inner[i]]
    return any(np.isfinite(steps[i]) and -steps[i] / step >= 0.5 for i in neighbours)


def _in_most_episodes(indices: np.ndarray, rows: Rows) -> bool:
    """Whether rows lie in at least half of all episodes (three or more): then they belong to the task."""
    numbers = np.searchsorted(rows.episode_starts, indices, side="right")
    touched = len(np.unique(numbers))
    return touched >= 3 and touched >= 0.5 * rows.num_episodes


def _episode_ranges(values: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(min, max), each (episodes, width), NaN where an episode has no finite value."""
    if not len(values):
        return np.empty((0, values.shape[1])), np.empty((0, values.shape[1]))
    finite = np.isfinite(values)
    low = np.minimum.reduceat(np.where(finite, values, np.inf), starts[:-1], axis=0)
    high = np.maximum.reduceat(np.where(finite, values, -np.inf), starts[:-1], axis=0)
    known = low <= high
    return np.where(known, low, np.nan), np.where(known, high, np.nan)


def _moves(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Whether a range is more than rounding; the same threshold as the normalizer's."""
    return (high - low) / 2 > FLAT * np.maximum(np.maximum(np.abs(low), np.abs(high)), 1.0)


def _kind(name: str) -> str:
    """What a column is part of, `state` or `action`."""
    return ACTION if name == ACTION else STATE


def _dims(name: str, wrong: np.ndarray) -> str:
    """`action[2] is`, or `action[0], action[2] are`, or `all of action is`."""
    where = np.flatnonzero(wrong)
    if len(where) == len(wrong) and len(where) > 1:
        return f"all of {name} is"
    listed = ", ".join(f"{name}[{d}]" for d in where[:4]) + (" and more" if len(where) > 4 else "")
    return f"{listed} {'is' if len(where) == 1 else 'are'}"
