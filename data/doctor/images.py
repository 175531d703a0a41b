"""Checks of camera frames: every frame is decoded once, in parallel processes, a few dozen in memory at a time."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from data.doctor.findings import Findings
from data.doctor.frames import ABSENT, BROKEN, DECODED, FRAME, examine_frames
from data.doctor.reading import open_raw, stream
from data.doctor.rows import Rows
from data.schema import MAIN_CAMERA, encoded_frames
from utils.parquet_utils import DataError, one_line
from utils.recordings import LeRobotFolder

if TYPE_CHECKING:
    from data.lerobot_table import LeRobotTable

FRAMES_PER_TASK = 32
FEW_FRAMES = 4000  # below this, starting processes takes longer than decoding
USUAL = 0.5  # part of a file's frames from which something is the file's way, not a row's fault
SLOW_CAMERA = 0.2  # part of a file's frames that repeat the one before, from which the camera is slower than the rows


@dataclass
class Frames:
    """What decoding showed of every frame.

    Attributes:
        facts: camera -> `FRAME` array (N,) over global rows.
        errors: camera -> global row -> what decoding said.
        pictures: camera -> global row -> uint8 (H, W, 3), for the rows that were asked for.
    """

    facts: dict[str, np.ndarray]
    errors: dict[str, dict[int, str]]
    pictures: dict[str, dict[int, np.ndarray]]


def look_at_frames(
    rows: Rows, findings: Findings, *, keep: np.ndarray, thumbnail_size: int, num_workers: int | None
) -> Frames:
    """Decode every frame of every camera.

    Args:
        keep: global rows whose pictures are kept.
        thumbnail_size: pixels of the longer side of a kept picture.
        num_workers: decoding processes; 0: this process; None: one per core, or none for a few thousand frames.
    """
    cameras = rows.all_cameras
    facts = {camera: np.zeros(len(rows), dtype=FRAME) for camera in cameras}
    seen = Frames(facts, {camera: {} for camera in cameras}, {camera: {} for camera in cameras})
    is_kept = np.zeros(len(rows), dtype=bool)
    is_kept[keep] = True
    total = int(sum(len(columns) * size for columns, size in zip(rows.cameras, np.diff(rows.file_starts), strict=True)))
    if num_workers is None:
        num_workers = 0 if total < FEW_FRAMES else os.cpu_count() or 1
    waiting: deque[tuple[str, int, Future | _Done]] = deque()
    with ExitStack() as stack:
        progress = stack.enter_context(tqdm(total=total, unit="frame", desc="decoding", disable=None))
        submit: Callable[..., Any] = _Done
        if num_workers:
            context = multiprocessing.get_context("spawn")  # a fork would copy pyarrow's threads' locks
            stack.enter_context(_main_file_hidden())
            pool = stack.enter_context(ProcessPoolExecutor(num_workers, mp_context=context))
            submit = pool.submit
        for camera, first, frames in _encoded(rows, findings):
            positions = np.flatnonzero(is_kept[first : first + len(frames)]).tolist()
            waiting.append((camera, first, submit(examine_frames, frames, positions, thumbnail_size)))
            while len(waiting) > 2 * num_workers:
                progress.update(_take(waiting.popleft(), seen))
        while waiting:
            progress.update(_take(waiting.popleft(), seen))
    return seen


@contextmanager
def _main_file_hidden() -> Iterator[None]:
    """Processes that are started meanwhile do not run the program's main file anew.

    Its imports, torch among them, would cost each of them seconds, and decoding needs none of them.
    """
    main = sys.modules["__main__"]
    hidden = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
    for name in hidden:
        setattr(main, name, None)
    try:
        yield
    finally:
        for name, value in hidden.items():
            setattr(main, name, value)


def pictures_of(rows: Rows, wanted: np.ndarray, size: int) -> dict[str, dict[int, np.ndarray]]:
    """The pictures of some global rows, read anew: camera -> row -> uint8 (H, W, 3), `size` pixels on the longer side.

    Rows without a readable frame are left out.
    """
    is_wanted = np.zeros(len(rows), dtype=bool)
    is_wanted[wanted] = True
    pictures: dict[str, dict[int, np.ndarray]] = {camera: {} for camera in rows.all_cameras}
    for camera, first, frames in _encoded(rows, Findings({}, {}), set(rows.file_of[wanted].tolist())):
        positions = np.flatnonzero(is_wanted[first : first + len(frames)]).tolist()
        if positions:
            *_, kept = examine_frames([frames[i] for i in positions], range(len(positions)), size)
            pictures[camera] |= {first + positions[i]: picture for i, picture in kept.items()}
    return pictures


class _Done:
    """A task that was run at once, with the interface of a Future."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._result = function(*args)

    def result(self) -> Any:
        return self._result


def _take(task: tuple[str, int, Future | _Done], seen: Frames) -> int:
    camera, first, future = task
    facts, errors, kept = future.result()
    seen.facts[camera][first : first + len(facts)] = facts
    seen.errors[camera].update({first + i: message for i, message in errors.items()})
    seen.pictures[camera].update({first + i: picture for i, picture in kept.items()})
    return len(facts)


def _encoded(
    rows: Rows, findings: Findings, files: Collection[int] | None = None
) -> Iterator[tuple[str, int, list[bytes | np.ndarray | None]]]:
    """(camera, first global row, encoded frames, or those of a video decoded), streamed; of some files, or of all."""
    for number, columns in enumerate(rows.cameras):
        if files is not None and number not in files:
            continue
        path, begin = rows.files[number], int(rows.file_starts[number])
        for camera, column in columns.items():
            table = open_raw(path)
            if isinstance(path, LeRobotFolder) and column not in table.schema.names:
                for first, pictures in _decoded(table, column, findings):
                    yield camera, begin + first, pictures
                continue
            for first, array in stream(table, path, column, FRAMES_PER_TASK, findings):
                yield camera, begin + first, encoded_frames(array, column, path).to_pylist()


def _decoded(table: LeRobotTable, camera: str, findings: Findings) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(first row, frames) of a camera that is video; where it can't be read further, `corrupt_data` and the end."""
    first = 0
    try:
        for first, pictures in table.pictures(camera, FRAMES_PER_TASK):
            yield first, pictures
            first += len(pictures)
    except DataError as error:
        findings.add("corrupt_data", one_line(error), file=table.folder, row=first)


def check_presence(rows: Rows, frames: Frames | None, findings: Findings, cameras: tuple[str, ...]) -> None:
    """`camera_missing` (in some files, or everywhere though the config reads it), `null_value` (the main camera, or all
    cameras of a policy without it), `camera_gap` (another camera absent at some rows of an episode, or in an episode of
    a file that has it elsewhere).

    Args:
        frames: None where images were not looked at.
        cameras: those that the config reads; empty without a config.
    """
    if frames is not None and MAIN_CAMERA in frames.facts:
        absent = np.flatnonzero(frames.facts[MAIN_CAMERA]["status"] == ABSENT)
        findings.add_runs("null_value", rows, absent, lambda _: f"{MAIN_CAMERA} is null")
    elif frames is not None and (
        read := [frames.facts[camera] for camera in cameras or frames.facts if camera in frames.facts]
    ):
        absent = np.flatnonzero(np.logical_and.reduce([facts["status"] == ABSENT for facts in read]))
        findings.add_runs("null_value", rows, absent, lambda _: "no camera has a frame")
    for camera in dict.fromkeys([*cameras, *rows.all_cameras]):
        if camera == MAIN_CAMERA:
            continue
        lacking, partly = [], []  # files without the camera, and global rows without it in the others
        with_images = [file for file in range(len(rows.files)) if rows.cameras[file]]
        for file in with_images:
            where = rows.file_rows(file)
            absent = np.empty(0, dtype=np.int64)
            if frames is not None and camera in rows.cameras[file]:
                absent = where.start + np.flatnonzero(frames.facts[camera]["status"][where] == ABSENT)
            if camera not in rows.cameras[file] or len(absent) == where.stop - where.start:
                lacking.append(file)
            else:
                partly.append(absent)
        if not partly:
            if camera in cameras and lacking:
                message = f"no file has {camera}, which the config reads"
                findings.add("camera_missing", message, file=rows.files[lacking[0]])
            continue
        for file in lacking:
            columns = dict.fromkeys(of_file[camera] for of_file in rows.cameras if camera in of_file)
            edit = {"edit": ("--drop_columns", *columns), "splits": _splits_with(rows, camera)}
            findings.add("camera_missing", f"no {camera}, which other files have", file=rows.files[file], **edit)
        findings.add_runs("camera_gap", rows, np.concatenate(partly), lambda _, camera=camera: f"{camera} is null")


def _splits_with(rows: Rows, camera: str) -> list[str]:
    return list(
        dict.fromkeys(split for split, of_file in zip(rows.splits, rows.cameras, strict=True) if camera in of_file)
    )


def check_decoding(rows: Rows, frames: Frames, findings: Findings) -> None:
    """`undecodable_image`, `not_8_bit`, `odd_sized_image`, `blank_image`, `not_rgb`, `image_format`, `turned_image`."""
    for camera, facts in frames.facts.items():
        errors = frames.errors[camera]
        broken = np.flatnonzero(facts["status"] == BROKEN)
        for i in broken:
            findings.add_at("undecodable_image", rows, int(i), f"{camera}: {errors[int(i)]}")
        good = facts["status"] == DECODED
        if not good.any():
            continue
        (width, height), _ = Counter(
            zip(facts["width"][good].tolist(), facts["height"][good].tolist(), strict=True)
        ).most_common(1)[0]
        deep = np.char.startswith(facts["mode"], b"I") | np.char.startswith(facts["mode"], b"F")
        black = facts["level"] < 16

        def size(i: int, facts: np.ndarray = facts, usual: str = f"{width}x{height}") -> str:
            return f"is {facts['width'][i]}x{facts['height'][i]}, most frames are {usual}"

        def mode(i: int, facts: np.ndarray = facts) -> str:
            return f"has mode {facts['mode'][i].decode()}"

        def blank(i: int, black: np.ndarray = black) -> str:
            return "is all black" if black[i] else "has one colour all over"

        def container(i: int, facts: np.ndarray = facts) -> str:
            return f"is {facts['format'][i].decode()}"

        def turned(i: int, facts: np.ndarray = facts) -> str:
            return f"has EXIF orientation {facts['orientation'][i]}"

        for kind, wrong, describe in (
            ("not_8_bit", deep, mode),
            ("odd_sized_image", (facts["width"] != width) | (facts["height"] != height), size),
            ("blank_image", facts["blank"], blank),
            ("not_rgb", (facts["mode"] != b"RGB") & ~deep, mode),
            ("image_format", (facts["format"] != b"JPEG") & (facts["format"] != b"PNG"), container),
            ("turned_image", facts["orientation"] > 1, turned),
        ):
            _add_frames(kind, rows, good, wrong & good, camera, describe, findings)


def _add_frames(
    kind: str,
    rows: Rows,
    good: np.ndarray,
    wrong: np.ndarray,
    camera: str,
    describe: Callable[[int], str],
    findings: Findings,
) -> None:
    """One finding for a file in which it is usual, else one per run of rows."""
    for file, path in enumerate(rows.files):
        where = rows.file_rows(file)
        indices = where.start + np.flatnonzero(wrong[where])
        if len(indices) > max(USUAL * good[where].sum(), 3):
            first = int(indices[0])
            message = f"{camera} {describe(first)}: {len(indices)} of {good[where].sum()} frames"
            findings.add(kind, message, file=path)
        else:
            findings.add_runs(kind, rows, indices, lambda i: f"{camera} {describe(i)}", unit="frame")


def check_repeats(rows: Rows, frames: Frames, findings: Findings) -> np.ndarray:
    """`frozen_camera`, `slow_camera`, `identical_cameras`.

    Returns:
        bool (N - 1,): whether every image of a row equals the next row's (see `check_idle`).
    """
    inner = rows.same_episode()
    state = rows.state
    rests = (state[1:] == state[:-1]).all(axis=1)
    all_same = np.full(len(inner), bool(frames.facts))
    for camera, facts in frames.facts.items():
        there = facts["status"] == DECODED
        same = inner & there[1:] & there[:-1] & (facts["digest"][1:] == facts["digest"][:-1])
        all_same &= same | ~(there[1:] | there[:-1])
        stale = same & ~rests & ~facts["blank"][1:]
        for file, path in enumerate(rows.files):
            where = rows.file_rows(file)
            indices = where.start + np.flatnonzero(stale[where.start : max(where.stop - 1, where.start)]) + 1
            count = int(there[where].sum())
            if len(indices) > max(SLOW_CAMERA * count, 10) and _is_spread_out(indices, rows):
                message = f"{camera}: {len(indices)} of {count} frames repeat the one before while the state changes"
                findings.add("slow_camera", message, file=path)
                continue
            findings.add_runs(
                "frozen_camera",
                rows,
                indices,
                lambda _, camera=camera: f"{camera} repeats the frame before while the state changes",
                unit="frame",
            )
    for one, other in itertools.combinations(frames.facts, 2):
        first, second = frames.facts[one], frames.facts[other]
        both = (first["status"] == DECODED) & (second["status"] == DECODED)
        for file, path in enumerate(rows.files):
            where = rows.file_rows(file)
            equal = (first["digest"][where] == second["digest"][where]) & both[where]
            if equal.sum() > USUAL * both[where].sum():
                message = f"{one} and {other} are the same picture in {equal.sum()} of {both[where].sum()} rows"
                edit = ("--drop_columns", rows.cameras[file][other])
                findings.add("identical_cameras", message, file=path, edit=edit)
    return all_same


def _is_spread_out(indices: np.ndarray, rows: Rows) -> bool:
    """Whether repeated frames come in short stretches all over, as a slow camera's do, not in a few long ones."""
    breaks = np.flatnonzero(np.diff(indices) != 1)
    return len(indices) / (len(breaks) + 1) < 5
