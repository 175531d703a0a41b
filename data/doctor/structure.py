"""Checks of rows, flags, episodes, prompts and time: what is there, and whether it agrees with itself."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np

from data.doctor.findings import Findings
from data.doctor.rows import (
    EMPTY,
    INVALID,
    NO_INDEX,
    NULL,
    Rows,
    after_gap,
    before_gap,
    common_width,
    hard_starts,
    runs,
)
from data.schema import ACTION, FLAGS, LABELS, STATE, SUCCESS

SHORTEST = 3  # steps that an episode needs whatever the config
LENGTH_RATIO = 3.0  # an episode this many times longer or shorter than every other of its prompt is an outlier,
LOOSE_LENGTH_RATIO = 5.0  # and so is one this many times longer or shorter than all others, where prompts are few
RATE_TOLERANCE = 0.1  # files whose rates differ by more than this part do not go together
LEAP, LEAST_LEAPS, LEAST_APART = 4.0, 3, 5  # see check_closed; so many leaps, so many steps apart
GAP_STEPS = 1.8  # a pause of so many usual steps is a gap
JITTER = 0.25  # standard deviation of the step, in usual steps, from which a rate is irregular
STRAY = re.compile(r"^\s|\s$|\s\s|[^\S ]|[\x00-\x1f\x7f\ufffd]")


def check_values_present(rows: Rows, findings: Findings) -> None:
    """`null_value`, `empty_prompt`, `invalid_text`: rows without a value."""
    for name in rows.vectors:
        absent = np.flatnonzero(rows.lengths[name] == NULL)
        findings.add_runs("null_value", rows, absent, lambda _, name=name: f"{name} is null or an empty list")
    for name in FLAGS:
        absent = np.flatnonzero(rows.flags[name] == NULL)
        findings.add_runs("null_value", rows, absent, lambda _, name=name: f"{name} is null")
    for code, kind, message in (
        (NULL, "null_value", "prompt is null"),
        (EMPTY, "empty_prompt", "prompt is empty"),
        (INVALID, "invalid_text", "prompt is not valid UTF-8"),
    ):
        findings.add_runs(kind, rows, np.flatnonzero(rows.prompt == code), lambda _, message=message: message)


def check_widths(rows: Rows, findings: Findings, config_widths: dict[str, tuple[str, int]]) -> None:
    """`width_varies`, `width_differs_between_files`, `width_differs_from_config`.

    Args:
        config_widths: for `state` and `action` the config key and the width that the config gives; empty without a
            config. A state of several columns must have it in all.
    """
    states = [name for name in rows.vectors if name != ACTION]
    if len(states) > 1 and STATE in config_widths:
        key, width = config_widths[STATE]
        for file, path in enumerate(rows.files):
            widths = {name: common_width(rows.lengths[name][rows.file_rows(file)]) for name in states}
            if len(rows.lengths[states[0]][rows.file_rows(file)]) and sum(widths.values()) != width:
                listed = " + ".join(f"{name} {each}" for name, each in widths.items())
                message = (
                    f"data.state_columns have {listed} = {sum(widths.values())} values, config wants {key} {width}"
                )
                findings.add("width_differs_from_config", message, file=path)
        config_widths = {ACTION: config_widths[ACTION]}
    elif STATE in config_widths and states:
        config_widths = {states[0]: config_widths[STATE], ACTION: config_widths[ACTION]}
    for name in rows.vectors:
        lengths = rows.lengths[name]
        usual = common_width(lengths)
        for file, path in enumerate(rows.files):
            here = lengths[rows.file_rows(file)]
            if not (here > 0).any():
                continue
            width = common_width(here)
            key, config_width = config_widths.get(name, ("", usual))
            if width != config_width and name in config_widths:
                message = f"{name} has {width} values, config wants {key} {config_width}"
                findings.add("width_differs_from_config", message, file=path)
            elif width != usual:
                message = f"{name} has {width} values, other files have {usual}"
                findings.add("width_differs_between_files", message, file=path)
            odd = int(rows.file_starts[file]) + np.flatnonzero((here > 0) & (here != width))
            findings.add_runs(
                "width_varies",
                rows,
                odd,
                lambda i, name=name, width=width: f"{name} has {rows.lengths[name][i]} values, the file has {width}",
            )


def check_flags(rows: Rows, findings: Findings) -> None:
    """The seven kinds of `is_first`, `is_last` and `is_terminal` that contradict each other.

    Where one row says that an episode ends and the next does not begin one (or the other way round), either may be
    wrong: what else changes there (file, episode_index, frame_index, prompt, a leap of the state) decides which.
    """
    if not len(rows):
        return
    first, last, terminal = (rows.flags[name] for name in FLAGS)
    hard = set(hard_starts(rows).tolist())
    leaps = _leaps(rows)
    blamed = set()
    for i in np.flatnonzero((first[1:] == 1) & (last[:-1] == 0)) + 1:
        if i in hard:
            continue
        if _episode_really_ends(rows, leaps, int(i)):
            blamed.add(int(i) - 1)
            message = "is_last is false, but the next row is_first and belongs to another episode"
            findings.add_at("missing_is_last", rows, int(i) - 1, message)
        else:
            findings.add_at("unexpected_is_first", rows, int(i), "is_first is true, but the row before is not is_last")
    for i in np.flatnonzero((first[1:] == 0) & (last[:-1] == 1)) + 1:
        if i in hard:
            continue
        if _episode_really_ends(rows, leaps, int(i)) is False:
            message = "is_last is true, but the next row is not is_first and continues the episode"
            findings.add_at("unexpected_is_last", rows, int(i) - 1, message)
        else:
            findings.add_at("missing_is_first", rows, int(i), "is_first is false, but the row before is_last")
    for file in range(len(rows.files)):
        begin, end = rows.file_starts[file], rows.file_starts[file + 1]
        if begin == end:
            continue
        begins_split = file == 0 or all(s != rows.splits[file] for s in rows.splits[:file])
        ends_split = file == len(rows.files) - 1 or rows.splits[file + 1] != rows.splits[file]
        if begins_split and not after_gap(rows, file) and first[begin] == 0:
            findings.add_at("begins_without_is_first", rows, int(begin), "the data begin here, but is_first is false")
        if ends_split and not before_gap(rows, file) and last[end - 1] == 0:
            blamed.add(int(end) - 1)
            message = "the data end here, but is_last is false"
            findings.add_at("ends_without_is_last", rows, int(end) - 1, message)
    for i in np.flatnonzero((terminal == 1) & (last == 0)):
        if int(i) not in blamed:
            message = "is_terminal is true, but is_last is not"
            findings.add_at("terminal_without_is_last", rows, int(i), message)


def _leaps(rows: Rows) -> np.ndarray:
    """float32 (N,): how far the state moves to each row, in units of the 99th percentile of such steps.

    All NaN where the state does not move smoothly, so that a leap would mean nothing.
    """
    state = rows.state
    result = np.full(len(rows), np.nan, dtype=np.float32)
    finite = np.isfinite(state).all(axis=1)
    if finite.sum() < 20:
        return result
    spread = state[finite].std(axis=0, dtype=np.float64)
    steps = np.abs(np.diff(state, axis=0)) / np.where(spread > 0, spread, 1.0)
    distance = np.sqrt((steps**2).sum(axis=1))
    inner = distance[rows.same_episode() & np.isfinite(distance)]
    if len(inner) >= 10 and 0 < np.median(inner) < 0.3:
        result[1:] = distance / max(np.quantile(inner, 0.99), 1e-12)
    return result


def _episode_really_ends(rows: Rows, leaps: np.ndarray, index: int) -> bool | None:
    """Whether another episode begins at a global row, by everything but its flags; None where nothing tells."""
    before = index - 1
    if rows.flags["is_terminal"][before] == 1:
        return True
    episode, frame = rows.indices["episode_index"], rows.indices["frame_index"]
    if rows.file_of[before] == rows.file_of[index] and NO_INDEX not in (episode[before], episode[index]):
        return bool(episode[before] != episode[index])
    if NO_INDEX not in (frame[before], frame[index]):
        return bool(frame[index] <= frame[before])
    if rows.prompt[before] >= 0 and rows.prompt[index] >= 0 and rows.prompt[before] != rows.prompt[index]:
        return True
    if np.isfinite(leaps[index]):
        return bool(leaps[index] > 2)
    return True if rows.file_of[before] != rows.file_of[index] else None


def check_indices(rows: Rows, findings: Findings) -> None:
    """`episode_index_contradicts` and `frame_index_contradicts`: columns that recorders add, against the flags."""
    inner = rows.same_episode()
    one_file = rows.file_of[1:] == rows.file_of[:-1]
    episode, frame = rows.indices["episode_index"], rows.indices["frame_index"]
    known = (episode[1:] != NO_INDEX) & (episode[:-1] != NO_INDEX)
    for i in np.flatnonzero(known & inner & (episode[1:] != episode[:-1])) + 1:
        message = f"episode_index changes from {episode[i - 1]} to {episode[i]} inside an episode"
        findings.add_at("episode_index_contradicts", rows, int(i), message)
    for i in np.flatnonzero(known & ~inner & one_file & (episode[1:] == episode[:-1])) + 1:
        message = f"an episode begins, but episode_index stays {episode[i]}"
        findings.add_at("episode_index_contradicts", rows, int(i), message)
    known = (frame[1:] != NO_INDEX) & (frame[:-1] != NO_INDEX)
    steps = np.diff(frame)
    usual = Counter(steps[known & inner].tolist()).most_common(1)
    for i in np.flatnonzero(known & inner & ((steps != (usual[0][0] if usual else 0)) | (steps < 1))) + 1:
        message = f"frame_index goes from {frame[i - 1]} to {frame[i]}, elsewhere by steps of {usual[0][0]}"
        if usual[0][0] < 1:
            message = f"frame_index goes from {frame[i - 1]} to {frame[i]}; it counts the steps of an episode"
        findings.add_at("frame_index_contradicts", rows, int(i), message)


def check_prompts(rows: Rows, findings: Findings, count_tokens: Callable[[str], int] | None, max_tokens: int) -> None:
    """`prompt_changes`, `prompt_whitespace`, `prompt_variants`, `prompt_too_long`.

    Args:
        count_tokens: tokens of a prompt as the model gets it, uncut; None: lengths are not checked.
        max_tokens: `data.prompt_max_len`.
    """
    code = rows.prompt
    changes = (code[1:] != code[:-1]) & (code[1:] >= 0) & (code[:-1] >= 0) & rows.same_episode()
    for i in np.flatnonzero(changes) + 1:
        before, after = (_quoted(rows.prompts[code[j]]) for j in (i - 1, i))
        findings.add_at("prompt_changes", rows, int(i), f"the prompt changes within the episode: {before} to {after}")
    used, firsts = np.unique(code, return_index=True)
    spellings: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for number, index in zip(used.tolist(), firsts.tolist(), strict=True):
        if number < 0:
            continue
        prompt, steps = rows.prompts[number], int((code == number).sum())
        if STRAY.search(prompt):
            message = f"prompt {_quoted(prompt)} has stray whitespace or control characters ({steps} rows)"
            findings.add_at("prompt_whitespace", rows, index, message)
        if count_tokens is not None and (tokens := count_tokens(prompt)) > max_tokens:
            message = (
                f"prompt {_quoted(prompt)} takes {tokens} tokens, data.prompt_max_len is {max_tokens} ({steps} rows)"
            )
            findings.add_at("prompt_too_long", rows, index, message)
        spellings[" ".join(re.findall(r"\w+", prompt.lower()))].append((steps, index))
    for group in spellings.values():
        usual = max(group)[1]
        for steps, index in group:
            plain = " ".join(rows.prompts[code[index]].split()) != " ".join(rows.prompts[code[usual]].split())
            if index != usual and plain:
                here, there = _quoted(rows.prompts[code[index]]), _quoted(rows.prompts[code[usual]])
                message = f"prompt {here} ({steps} rows) is {there} in other rows"
                texts = [rows.prompts[code[i]] for i in (index, usual)]
                edit = () if "=" in texts[0] else ("--rename_prompt", "=".join(texts))
                findings.add_at("prompt_variants", rows, index, message, edit=edit)


def _quoted(prompt: str, length: int = 80) -> str:
    return repr(prompt if len(prompt) <= length else prompt[: length - 1] + "…")


def check_labels(rows: Rows, findings: Findings) -> None:
    """`label_contradicts`: a `success` that changes within an episode, and labels that are null."""
    inner = rows.same_episode()
    for name in LABELS:
        values, edit = rows.labels[name], ("--drop_columns", name)
        changes = inner & (values[1:] >= 0) & (values[:-1] >= 0) & (values[1:] != values[:-1])
        for i in np.flatnonzero(changes) + 1 if name == SUCCESS else ():
            words = [("false", "true")[values[j]] for j in (i - 1, i)]
            message = f"{name} changes from {words[0]} to {words[1]} within the episode, of which it is the outcome"
            findings.add_at("label_contradicts", rows, int(i), message, edit=edit)
        for first, length in runs(np.flatnonzero(values == NULL), rows):
            message = f"{name} is null" + (f" in {length} rows" if length > 1 else "")
            findings.add_at("label_contradicts", rows, first, message, edit=edit)


def check_lengths(rows: Rows, findings: Findings, horizon: int | None) -> None:
    """`short_episode` and `episode_length_outlier`; `horizon` (steps) is the config's, None without one."""
    lengths = np.diff(rows.episode_starts)
    least = max(SHORTEST, horizon or 0)
    for number in np.flatnonzero(lengths < least):
        reason = f"the horizon is {horizon}" if least == horizon else f"at least {least} are wanted"
        message = f"the episode has {lengths[number]} step{'s' if lengths[number] > 1 else ''}, {reason}"
        findings.add_at("short_episode", rows, int(rows.episode_starts[number]), message)
    prompts = rows.prompt[rows.episode_starts[:-1]]
    long_enough = lengths >= least
    groups = [np.flatnonzero((prompts == prompt) & long_enough) for prompt in np.unique(prompts)]
    ratio, few = LENGTH_RATIO, 6
    if all(len(group) < few for group in groups):
        groups, ratio, few = [np.flatnonzero(long_enough)], LOOSE_LENGTH_RATIO, 4
    for group in groups:
        if len(group) < few:
            continue
        order = group[np.argsort(lengths[group], kind="stable")]
        for number, others in ((order[-1], order[:-1]), (order[0], order[1:])):
            here, low, high = int(lengths[number]), int(lengths[others].min()), int(lengths[others].max())
            if here > ratio * high or ratio * here < low:
                message = f"the episode has {here} steps, the {len(others)} others it is compared with {low} to {high}"
                findings.add_at("episode_length_outlier", rows, int(rows.episode_starts[number]), message)


def check_closed(rows: Rows, findings: Findings) -> None:
    """`unclosed_episode`: inside one episode most of the state leaps again and again, as where a recording begins anew.

    A dimension leaps where its step is LEAP times as long as nine tenths of its steps in that episode. One that mostly
    rests (a gripper) does not count.
    """
    for number in range(rows.num_episodes):
        where = rows.episode_rows(number)
        steps = np.abs(np.diff(rows.state[where], axis=0))
        if len(steps) < LEAST_LEAPS * LEAST_APART or not np.isfinite(steps).all():
            continue
        usual = np.quantile(steps, 0.9, axis=0)
        moving = usual > 0
        leaps = (steps[:, moving] > LEAP * usual[moving]).sum(axis=1)
        begins = np.flatnonzero(leaps >= max(2, 0.5 * moving.sum())) + 1
        if len(begins) >= LEAST_LEAPS and np.diff(begins).min() >= LEAST_APART:
            listed = ", ".join(map(str, begins[:4])) + (", ..." if len(begins) > 4 else "")
            message = f"the state leaps at {len(begins)} of {where.stop - where.start} steps ({listed}), as where a "
            _, _, episode = rows.place(where.start)
            edit = ("--split_at", f"{episode}:{','.join(map(str, begins))}")
            findings.add_at("unclosed_episode", rows, where.start, message + "recording begins anew", edit=edit)


def check_time(rows: Rows, findings: Findings) -> None:
    """The five kinds of a `timestamp` column: missing values, order, gaps, irregular and different rates."""
    rates = file_rates(rows)
    known = [rate for rate in rates if rate is not None]
    usual = float(np.median(known)) if known else 0.0
    resample = ("--resample", f"{min(known, default=0):.6g}")  # pictures between rows can't be made up
    for file, rate in enumerate(rates):
        if not rows.has_timestamp[file]:
            continue
        where = rows.file_rows(file)
        absent = where.start + np.flatnonzero(~np.isfinite(rows.timestamp[where]))
        findings.add_runs("timestamp_missing", rows, absent, lambda _: "timestamp is null, NaN or infinite")
        steps, indices = _time_steps(rows, where)
        backwards = steps <= 0
        findings.add_runs(
            "timestamp_not_increasing",
            rows,
            indices[backwards],
            lambda i: f"timestamp goes from {rows.timestamp[i - 1]:.6g} to {rows.timestamp[i]:.6g} s",
        )
        if rate is None:
            continue
        if abs(rate / usual - 1) > RATE_TOLERANCE:
            message = f"the file runs at {rate:.4g} Hz, most files at {usual:.4g} Hz"
            splits = _faster_splits(rows, rates)
            findings.add("rate_differs", message, file=rows.files[file], edit=resample, splits=splits)
        gap = steps > GAP_STEPS / rate
        for i, step in zip(indices[gap], steps[gap], strict=True):
            message = f"{step:.4g} s since the row before, usually {1 / rate:.4g} s"
            findings.add_at("timestamp_gap", rows, int(i), message)
        regular = steps[~backwards & ~gap]
        jitter = float(regular.std() * rate) if len(regular) else 0.0
        if jitter > JITTER:
            message = f"steps vary by {100 * jitter:.0f} % (standard deviation) around {1 / rate:.4g} s"
            findings.add("irregular_rate", message, file=rows.files[file], edit=resample)


def _faster_splits(rows: Rows, rates: list[float | None]) -> list[str]:
    """The splits that have files faster than the slowest of all."""
    known = [(rate, name) for rate, name in zip(rates, rows.splits, strict=True) if rate is not None]
    return list(dict.fromkeys(name for rate, name in known if rate > min(known)[0] * (1 + RATE_TOLERANCE)))


def file_rates(rows: Rows) -> list[float | None]:
    """Rows per second of each file: one over the median time step; None without usable timestamps."""
    rates: list[float | None] = []
    for file in range(len(rows.files)):
        steps, _ = _time_steps(rows, rows.file_rows(file))
        steps = steps[steps > 0]
        rates.append(float(1 / np.median(steps)) if len(steps) else None)
    return rates


def _time_steps(rows: Rows, where: slice) -> tuple[np.ndarray, np.ndarray]:
    """(seconds since the row before, global row) within episodes of one file."""
    indices = np.arange(where.start + 1, max(where.stop, where.start + 1))
    steps = rows.timestamp[indices] - rows.timestamp[indices - 1]
    inner = rows.same_episode()[indices - 1] & np.isfinite(steps)
    return steps[inner], indices[inner]
