"""What becomes of which row: the episodes of the source, and the pieces of them that are written."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.doctor import structure
from data.doctor.findings import Findings
from data.doctor.reading import Wanted, read_rows
from data.doctor.rows import Rows
from data.editing.edits import Edits, Ranges, numbers
from data.editing.sources import path_of, schema_of, single_episodes
from data.schema import camera_columns
from utils.misc import derive_seed
from utils.parquet_utils import DataError, is_uri
from utils.recordings import LeRobotFolder, Recording

UNREADABLE = ("unreadable_file", "corrupt_data", "empty_file", "missing_column", "wrong_type")
FLAG_FAULTS = (
    *("begins_without_is_first", "missing_is_first", "unexpected_is_first", "missing_is_last", "unexpected_is_last"),
    *("ends_without_is_last", "terminal_without_is_last"),
)
STRAY = re.compile(r"[\s\x00-\x1f\x7f\ufffd]+")
RATE_KEYS = (b"control_hz", b"fps")  # of a file's metadata


@dataclass(frozen=True)
class Piece:
    """An episode that is written.

    Attributes:
        number: among those written, from 0.
        source: the episode that it is of.
        rows: int64 (T,), global rows of the source in order; one may come twice after resampling.
        time: float64 (T,), seconds since its start; None: the rows' own time stamps stay.
        terminal: whether it ended by itself.
        action: float32 (T, A) instead of the rows' own; None: they stay.
        prompt: instead of the rows' own; None: they stay.
        success: likewise.
        folder: below the output folder; "" where there are no splits.
    """

    number: int
    source: int
    rows: np.ndarray
    time: np.ndarray | None
    terminal: bool
    action: np.ndarray | None = None
    prompt: str | None = None
    success: bool | None = None
    folder: str = ""


@dataclass
class Plan:
    """Everything that is written.

    Attributes:
        rows: the source.
        pieces: in order.
        dropped: per reason, source episode -> its steps that go, as (first, last).
        reworded: instruction -> what it becomes.
    """

    rows: Rows
    pieces: list[Piece]
    dropped: dict[str, dict[int, list[tuple[int, int]]]]
    reworded: dict[str, str]

    def describe(self) -> str:
        """What changes, for people: one line per episode of which steps go, and the sums."""
        lines = []
        for reason, episodes in self.dropped.items():
            for episode, stretches in episodes.items():
                begin = int(self.rows.episode_starts[episode])
                file, row, _ = self.rows.place(begin)
                count = sum(last - first + 1 for first, last in stretches)
                listed = ", ".join(f"{first}-{last}" for first, last in stretches)
                lines.append(f"episode {episode} ({file} row {row}): {reason}: {count} steps, {listed}")
        lines += [f"prompt {before!r} becomes {after!r}" for before, after in self.reworded.items() if before != after]
        kept = {piece.source for piece in self.pieces}
        gone = [str(number) for number in range(self.rows.num_episodes) if number not in kept]
        if gone:
            lines.append(f"episodes that go: {', '.join(gone)}")
        for folder in dict.fromkeys(piece.folder for piece in self.pieces):
            mine = [piece for piece in self.pieces if piece.folder == folder]
            count = sum(len(piece.rows) for piece in mine)
            lines.append(f"{folder + ': ' if folder else ''}{len(mine)} episodes, {count} steps")
        lines.append(f"before: {self.rows.num_episodes} episodes, {len(self.rows)} steps")
        return "\n".join(lines)


def make_plan(recordings: Sequence[Recording], edits: Edits) -> Plan:
    """Read everything but the images, and decide.

    Args:
        recordings: in order; an episode may go on from one file into the next.
        edits: what is asked for.

    Raises:
        DataError: a file that can't be read, flags that contradict each other (without `mend_flags`), an episode or
            step that is not there, an episode of which nothing is left, widths that differ, no known rate.
    """
    files = single_episodes(recordings)
    if remote := next((path for path in files if not isinstance(path, LeRobotFolder) and is_uri(path)), None):
        raise DataError(f"--data_path {remote}: is not on this machine; copy the files here first")
    findings = Findings()
    of_split = [(path, "train") for path in _without(files, edits.without)]
    rows = read_rows(of_split, findings, Wanted(needs_state=edits.drop_idle is not None))
    _refuse(findings, UNREADABLE, "leave the file out with --without, or record it again")
    _check_columns(rows.files, edits)
    structure.check_widths(rows, widths := Findings(), {})
    _refuse(widths, ("width_differs_between_files",), "these are of different robots: edit them apart")
    if edits.join:
        rows = _joined(rows, edits.join)
    structure.check_flags(rows, flags := Findings())
    if not edits.mend_flags and not edits.join:
        _refuse(flags, FLAG_FAULTS, "write the flags anew with --mend_flags, or join two episodes with --join")
    dropped: dict[str, dict[int, list[tuple[int, int]]]] = {}
    chosen = _chosen(rows, edits)
    for name in ("split_at", "drop_steps", "set_prompt", "set_success"):
        _check_episodes(rows, getattr(edits, name), f"--{name}")
    pieces: list[Piece] = []
    for episode in chosen:
        where = rows.episode_rows(episode)
        keep = _kept_steps(rows, episode, edits, dropped)
        bounds = [0, *sorted(edits.split_at.get(episode, ())), where.stop - where.start]
        if bounds != sorted(set(bounds)):
            raise DataError(
                f"--split_at {episode}: a new episode can begin at its steps 1 to {bounds[-1] - 1}, once each"
            )
        for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
            steps = np.arange(begin, end)[keep[begin:end]]
            if not len(steps):
                raise DataError(
                    f"nothing is left of episode {episode}, steps {begin} to {end - 1}: --delete it instead"
                )
            terminal = end == bounds[-1] and not edits.trim[1] and bool(rows.flags["is_terminal"][where.stop - 1] == 1)
            common = {"prompt": edits.set_prompt.get(episode), "success": edits.set_success.get(episode)}
            piece = _timed(rows, Piece(0, episode, where.start + steps, None, terminal, **common), edits)
            pieces.append(replace(piece, action=_actions(rows, piece, where.start + end, edits)))
    if not pieces:
        raise DataError("no episode is left; see --keep and --delete")
    pieces = _foldered(pieces, chosen, edits)
    return Plan(rows, [replace(piece, number=i) for i, piece in enumerate(pieces)], dropped, _reworded(rows, edits))


def _without(files: Sequence[Recording], names: Sequence[str]) -> list[Recording]:
    resolved = {str(path_of(path)): path for path in files}
    for name in names:
        if resolved.pop(str(Path(name).resolve()), None) is None:
            raise DataError(f"--without {name}: is none of the {len(files)} files of --data_path")
    if not resolved:
        raise DataError("--without leaves no file")
    return list(resolved.values())


def _check_columns(files: Sequence[Recording], edits: Edits) -> None:
    names = (
        {name for path in files for name in schema_of(path).names} if edits.drop_columns or edits.rename_camera else {}
    )
    for column in edits.drop_columns:
        if column not in names:
            raise DataError(f"--drop_columns {column}: no file has it (found: {', '.join(sorted(names))})")
    for camera in edits.rename_camera:
        if not camera_columns(camera, list(names)):
            raise DataError(f"--rename_camera {camera}: no file has it (found: {', '.join(sorted(names))})")


def _refuse(findings: Findings, kinds: Sequence[str], remedy: str) -> None:
    for finding in findings.listed:
        if finding.kind in kinds:
            row = "" if finding.row is None else f" row {finding.row}"
            raise DataError(f"{finding.file}{row}: {finding.message}; {remedy}")


def _joined(rows: Rows, join: Sequence[int]) -> Rows:
    """The rows with some episodes going on from the ones before; every later one has a lower number then."""
    for episode in join:
        if not 0 < episode < rows.num_episodes:
            raise DataError(f"--join {episode}: episodes 1 to {rows.num_episodes - 1} have one before them")
    starts = np.delete(rows.episode_starts, list(join))
    return replace(rows, episode_starts=starts, episode=np.repeat(np.arange(len(starts) - 1), np.diff(starts)))


def _check_episodes(rows: Rows, episodes: Sequence[int], flag: str) -> None:
    for episode in episodes:
        if not 0 <= episode < rows.num_episodes:
            raise DataError(f"{flag}: there is no episode {episode} (0 to {rows.num_episodes - 1})")


def _chosen(rows: Rows, edits: Edits) -> list[int]:
    keep = range(rows.num_episodes) if edits.keep is None else numbers(edits.keep)
    delete = set(numbers(edits.delete))
    _check_episodes(rows, keep, "--keep")
    _check_episodes(rows, delete, "--delete")
    return [episode for episode in keep if episode not in delete]


def _kept_steps(
    rows: Rows, episode: int, edits: Edits, dropped: dict[str, dict[int, list[tuple[int, int]]]]
) -> np.ndarray:
    """bool (T,): which steps of an episode stay."""
    where = rows.episode_rows(episode)
    length = where.stop - where.start
    keep = np.ones(length, dtype=bool)

    def drop(reason: str, stretches: Ranges | list[tuple[int, int]]) -> None:
        for first, last in stretches:
            if last >= length:
                raise DataError(f"episode {episode} has steps 0 to {length - 1}; step {last} is asked for ({reason})")
            keep[first : last + 1] = False
        if stretches:
            dropped.setdefault(reason, {})[episode] = list(stretches)

    drop("--drop_steps", edits.drop_steps.get(episode, ()))
    head, tail = edits.trim
    trimmed = [(0, head - 1)] if head else []
    trimmed += [(length - tail, length - 1)] if tail else []
    if head + tail >= length:
        raise DataError(f"--trim {head} {tail} leaves nothing of episode {episode}, which has {length} steps")
    drop("--trim", trimmed)
    if edits.drop_idle:
        drop("idle", _idle(rows, episode, edits))
    return keep


def _idle(rows: Rows, episode: int, edits: Edits) -> list[tuple[int, int]]:
    """Stretches of steps at which the state moves slower than asked for, for longer than asked for."""
    speed, seconds = edits.drop_idle
    where = rows.episode_rows(episode)
    state = rows.state[where].astype(np.float64)
    if any(d >= state.shape[1] for d in edits.idle_dims):
        raise DataError(f"--idle_dims {max(edits.idle_dims)}: the state has dimensions 0 to {state.shape[1] - 1}")
    state = state[:, list(edits.idle_dims)] if edits.idle_dims else state
    if len(state) < 2:
        return []
    rate = rate_of(rows, episode, edits)
    moved = np.linalg.norm(np.diff(state, axis=0), axis=1) * rate
    slow = np.append(moved, moved[-1]) < speed
    changes = np.flatnonzero(np.diff(np.concatenate([[False], slow, [False]])))
    stretches = zip(changes[::2].tolist(), changes[1::2].tolist(), strict=True)
    return [(first, after - 1) for first, after in stretches if (after - first) / rate > seconds]


def rate_of(rows: Rows, episode: int, edits: Edits) -> float:
    """Rows a second of an episode: from its time stamps, its file's metadata, or as asked for.

    Raises:
        DataError: nothing tells.
    """
    if edits.rate is not None:
        return edits.rate
    time = rows.timestamp[rows.episode_rows(episode)]
    steps = np.diff(time[np.isfinite(time)])
    if (steps > 0).any():
        return float(1 / np.median(steps[steps > 0]))
    return _recorded_rate(rows.files[rows.file_of[rows.episode_starts[episode]]])


@functools.lru_cache(maxsize=64)
def _recorded_rate(file: Recording) -> float:
    metadata = schema_of(file).metadata or {}
    for key in RATE_KEYS:
        if key in metadata and metadata[key] not in (b"null", b"None"):
            return float(metadata[key])
    raise DataError(f"{file}: neither time stamps nor metadata tell the rate; give --rate, in rows a second")


def _timed(rows: Rows, piece: Piece, edits: Edits) -> Piece:
    """A piece with its time stamps, where dropping rows or resampling changes them."""
    if edits.resample is None:
        if (np.diff(piece.rows) == 1).all() and piece.rows[0] == rows.episode_starts[piece.source]:
            return piece
        time = rows.timestamp[piece.rows]
        if not np.isfinite(time).all():
            return piece
        usual = 1 / rate_of(rows, piece.source, edits)
        steps = np.where(np.diff(piece.rows) == 1, np.diff(time), usual)  # no pause where steps were dropped
        return replace(piece, time=np.concatenate([[0.0], np.cumsum(steps)]))
    rate = rate_of(rows, piece.source, edits)
    time = rows.timestamp[piece.rows]
    if edits.rate is not None or not np.isfinite(time).all() or (np.diff(time) <= 0).any():
        time = np.arange(len(piece.rows)) / rate
    time = time - time[0]
    if edits.resample > 1.05 * rate:
        raise DataError(
            f"--resample {edits.resample:g}: episode {piece.source} has {rate:.4g} rows a second, and pictures between "
            "them can't be made up; choose a rate that no episode is below"
        )
    grid = np.arange(int(np.floor(time[-1] * edits.resample + 1e-6)) + 1) / edits.resample
    after = np.clip(np.searchsorted(time, grid), 1, max(1, len(time) - 1)) if len(time) > 1 else np.zeros(1, int)
    nearer = after - (np.abs(grid - time[after - 1]) <= np.abs(grid - time[after])) if len(time) > 1 else after
    return replace(piece, rows=piece.rows[nearer], time=grid)


def _actions(rows: Rows, piece: Piece, end: int, edits: Edits) -> np.ndarray | None:
    """The actions of a piece whose last row comes before the global row `end`, where they are not the rows' own."""
    source = rows.vectors["action"]
    action = source[piece.rows]
    if edits.displacement_dims:
        dims = list(edits.displacement_dims)
        if max(dims) >= source.shape[1]:
            raise DataError(f"--displacement_dims {max(dims)}: the action has dimensions 0 to {source.shape[1] - 1}")
        following = np.append(piece.rows[1:], end)
        for i, (first, after) in enumerate(zip(piece.rows.tolist(), following.tolist(), strict=True)):
            action[i, dims] = source[first : max(after, first + 1), dims].sum(axis=0)
    if edits.clip_actions:
        action = action.clip(*edits.clip_actions)
    return action if edits.displacement_dims or edits.clip_actions else None


def _foldered(pieces: list[Piece], chosen: Sequence[int], edits: Edits) -> list[Piece]:
    """The pieces with their folders, those of one folder after each other."""
    if not edits.split:
        return pieces
    folder_of: dict[int, str] = {}
    left = np.random.default_rng(derive_seed("edit split", edits.split_seed)).permutation(chosen).tolist()
    for name, part in edits.split.items():
        if isinstance(part, tuple):
            for episode in numbers(part):
                if episode in folder_of or episode not in chosen:
                    raise DataError(
                        f"--split {name}: episode {episode} is given twice, or is not among those that stay"
                    )
                folder_of[episode] = name
                left.remove(episode)
    shares = {name: part for name, part in edits.split.items() if isinstance(part, float)}
    total = len(left)
    for name, share in shares.items():
        count = round(share * total)
        folder_of |= dict.fromkeys(left[:count], name)
        left = left[count:]
    rest = [name for name, part in edits.split.items() if part is None]
    if rest:
        folder_of |= dict.fromkeys(left, rest[0])
    elif left:
        raise DataError(f"--split leaves {len(left)} episodes without a folder ({left[0]}, ...): give one =rest")
    for name in edits.split:
        if name not in folder_of.values():
            raise DataError(f"--split {name}: gets no episode")
    return [replace(piece, folder=name) for name in edits.split for piece in pieces if folder_of[piece.source] == name]


def _reworded(rows: Rows, edits: Edits) -> dict[str, str]:
    """Every instruction of the source, and what becomes of it."""
    for prompt in edits.rename_prompt:
        if prompt not in rows.prompts:
            found = ", ".join(map(repr, rows.prompts[:12]))
            raise DataError(f"--rename_prompt {prompt!r}: is no instruction of these files (found: {found})")
    words = {prompt: edits.rename_prompt.get(prompt, prompt) for prompt in rows.prompts}
    if edits.clean_prompts:
        words = {prompt: STRAY.sub(" ", text).strip() for prompt, text in words.items()}
    return words
