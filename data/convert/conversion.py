"""What every converter into the schema of docs/data_format.md shares: resuming, processes, options.

A conversion is a list of `OutputFile`s of whole episodes. Each is renamed into place when it is complete, and its
metadata record what it was made from and how: an interrupted conversion goes on where it stopped, and files of
another source or of other settings are noticed instead of being mixed in. Files are a function of the source and
the settings, never of the number of processes.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import fcntl
import json
import logging
import multiprocessing
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.parquet as pq
from tqdm import tqdm

from data.convert.episode_writer import RECORD, SUBSAMPLING, ImageEncoding, OutputFile
from data.schema import MAIN_CAMERA, STATE
from utils.arguments import at_least
from utils.config_data import NOT_STATES, is_camera_name, is_column_name
from utils.misc import writing
from utils.parquet_utils import READ_ERRORS, DataError

logger = logging.getLogger(__name__)

MAX_FILES = 500  # beyond so many episodes, a file holds several of them
UNITS = "unknown: the source does not record them"

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ConversionSummary:
    """What a conversion did."""

    written: int  # files
    skipped: int  # files that were complete before
    episodes: int
    rows: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.episodes} episodes, {self.rows} steps: {self.written} files written, {self.skipped} complete "
            f"before, {self.seconds:.1f} s"
        )


def plan_files(
    output_dir: Path,
    episodes: Sequence[int],
    *,
    total: int,
    lengths: Mapping[int, int] | None = None,
    places: Mapping[int, Any] | None = None,
    settings: dict[str, Any],
    sources: Callable[[tuple[int, ...]], dict[str, Any]],
) -> list[OutputFile]:
    """Group episodes into files `episode_<first>.parquet`: one each, several each beyond MAX_FILES episodes.

    Args:
        output_dir: folder of the files.
        episodes: those to convert, ascending.
        total: episodes of the whole source; the grouping depends on it and not on the selection.
        lengths: steps of each episode; None where that is known only once they are read.
        places: of each episode what its reader needs to find it.
        settings, sources: see `OutputFile`; `sources` is called with the episodes of each file.
    """
    per_file = -(-total // MAX_FILES)
    groups: dict[int, list[int]] = {}
    for episode in episodes:
        groups.setdefault(episode // per_file, []).append(episode)
    return [
        OutputFile(
            path=output_dir / f"episode_{group * per_file:06d}.parquet",
            episodes=tuple(members),
            rows=None if lengths is None else sum(lengths[episode] for episode in members),
            settings={**settings, "episodes_per_file": per_file},
            sources=sources(tuple(members)),
            places=() if places is None else tuple(places[episode] for episode in members),
        )
        for group, members in sorted(groups.items())
    ]


def convert_files(
    files: Sequence[OutputFile], convert: Callable[[OutputFile], int | None], *, num_workers: int, overwrite: bool
) -> ConversionSummary:
    """Make every file that is not there yet, in parallel.

    Args:
        files: all in one folder, which is created.
        convert: makes one file with `EpisodeFileWriter`, and says how many steps it has where `rows` does not;
            picklable when `num_workers` > 1.
        num_workers: processes.
        overwrite: make every file again, and delete files of conversions with other settings.

    Raises:
        DataError: the folder holds files made from something else or otherwise, or files of unknown origin;
            another conversion is writing there; a fault in the source.
        WriteError: the folder can't be made or written.
    """
    started = time.perf_counter()
    output_dir = files[0].path.parent
    with writing(output_dir, "choose another --output_dir"):
        output_dir.mkdir(parents=True, exist_ok=True)
    with _only_writer(output_dir):
        for leftover in output_dir.glob(".*.parquet.tmp"):
            leftover.unlink()
        _check_folder(output_dir, files, overwrite)
        missing = [file for file in files if overwrite or not is_complete(file)]
        episodes = sum(len(file.episodes) for file in files)
        before = episodes - sum(len(file.episodes) for file in missing)
        with tqdm(total=episodes, initial=before, unit="episode", disable=None) as progress:
            made = {}
            for file, rows in zip(missing, run_jobs(convert, missing, num_workers), strict=True):
                made[file.path] = rows
                progress.update(len(file.episodes))
        empty = [file for file in missing if not file.path.exists()]  # no step of it was kept
    return ConversionSummary(
        written=len(missing) - len(empty),
        skipped=len(files) - len(missing),
        episodes=episodes - sum(len(file.episodes) for file in empty),
        rows=sum(_rows(file, made) for file in files),
        seconds=time.perf_counter() - started,
    )


def _rows(file: OutputFile, made: Mapping[Path, int | None]) -> int:
    """The steps of a file: as planned, as just made, or as it says."""
    if file.rows is not None:
        return file.rows
    return made[file.path] if file.path in made else read_record(file.path)[1] or 0


def is_complete(file: OutputFile) -> bool:
    """Whether the file is there, whole, and what this conversion would make.

    Raises:
        DataError: it is a whole file of another source or of other settings.
    """
    if not file.path.exists():
        return False
    record, rows = read_record(file.path)
    if rows is None:
        logger.warning("%s is damaged: it is made again", file.path)
        return False
    if record != file.record:
        raise DataError(
            f"{file.path} was made from something else or otherwise ({_difference(record, file.record)}); choose "
            "another --output_dir, or make it again with --overwrite"
        )
    return file.rows is None or rows == file.rows


def read_record(path: Path) -> tuple[dict[str, Any] | None, int | None]:
    """(what a conversion recorded in a Parquet file, its rows); None where there is no record, or no whole file."""
    try:
        with pq.ParquetFile(path) as file:
            text = (file.schema_arrow.metadata or {}).get(RECORD.encode())
            rows = file.metadata.num_rows
    except READ_ERRORS:
        return None, None
    try:
        record = json.loads(text) if text else None
    except ValueError:
        return None, rows
    is_record = isinstance(record, dict) and isinstance(record.get("settings"), dict)
    return (record if is_record else None), rows


def run_jobs(function: Callable[[Job], Result], jobs: Iterable[Job], num_workers: int) -> Iterator[Result]:
    """Yield `function(job)` in order, computed by `num_workers` processes (1: in this one).

    Never more than three jobs for each process are under way, so that memory stays flat.

    Raises:
        DataError: a process died.
    """
    if num_workers == 1:
        yield from map(function, jobs)
        return
    # spawn, not fork: the decoders' and Arrow's threads do not survive a fork
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_prepare_worker)
    pending: deque[Future[Result]] = deque()
    try:
        for job in jobs:
            if len(pending) == 3 * num_workers:
                yield pending.popleft().result()
            pending.append(executor.submit(function, job))
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "a worker process was killed, perhaps for want of memory: start again with fewer --num_workers; what is "
            "complete is kept"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


def _prepare_worker() -> None:
    def follow_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # a parent that was killed can't stop its workers

    threading.Thread(target=follow_parent, daemon=True).start()
    signal.signal(signal.SIGINT, lambda *_: os._exit(1))  # Ctrl-C reaches every process: no traceback from each


@contextlib.contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another conversion is writing there; wait for it, or stop it") from None
        except OSError as error:
            reason = error.strerror
            logger.warning("%s: no lock (%s): see that no other conversion writes there meanwhile", folder, reason)
        yield
    finally:
        os.close(handle)


def _check_folder(folder: Path, files: Sequence[OutputFile], overwrite: bool) -> None:
    """Refuse Parquet files that would be read together with these; delete outdated ones with `overwrite`."""
    made, outdated = {file.path for file in files}, []
    for path in sorted(folder.glob("*.parquet")):
        record, rows = read_record(path)
        if path in made and rows is None:
            continue  # damaged: it is made again
        if record is None:
            raise DataError(
                f"{path} is not of a conversion and would be mixed with its files; choose another --output_dir, or "
                "move that file away"
            )
        if path in made or record["settings"] == files[0].settings:
            continue
        if not overwrite:
            raise DataError(
                f"{path} was made from something else or otherwise "
                f"({_difference(record['settings'], files[0].settings, 'settings')}) and would be mixed with these "
                "files; choose another --output_dir, or delete such files with --overwrite"
            )
        outdated.append(path)
    for path in outdated:
        path.unlink()


def _difference(before: Any, now: Any, name: str = "") -> str:
    """Where two records differ first: `settings.image_format is "png", now "jpeg"`."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                return _difference(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    return f"{name} is {json.dumps(before)}, now {json.dumps(now)}"


def fingerprint(path: Path) -> list[int]:
    """[size in bytes, modification time in ns] of a source file.

    Raises:
        DataError: there is no such file.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; the source is incomplete, so fetch that file again") from None
    return [stat.st_size, stat.st_mtime_ns]


def check_names(names: Iterable[str], available: Sequence[str], what: str, where: str) -> None:
    """Raise a DataError that lists what there is, and the nearest name, when one of `names` is not available."""
    for name in names:
        if name not in available:
            nearest = difflib.get_close_matches(name, available, n=1, cutoff=0.3)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise DataError(f"{where}: no {what} {name!r} (found: {', '.join(available) or 'none'}){hint}")


def parse_cameras(texts: Sequence[str], available: Sequence[str], where: str) -> dict[str, str]:
    """`["observation.images.front=image_1"]` as {"observation.images.front": "image_1"}, image_1 first.

    Args:
        texts: the values of --cameras.
        available: cameras of the source; those without a mapping are left out, and a log line says so.
        where: the source, for messages.

    Raises:
        DataError: another form, an unknown camera, a camera or column given twice, no camera at all.
    """
    mapping: dict[str, str] = {}
    for text in texts:
        camera, _, column = text.partition("=")
        if not camera or not column:
            raise DataError(f"--cameras {text!r}: wanted <camera>=<column>, as in {camera or 'front'}={MAIN_CAMERA}")
        if not is_camera_name(column):
            raise DataError(f"--cameras {text!r}: a camera's column can't be called so; choose another name")
        if camera in mapping or column in mapping.values():
            raise DataError(f"--cameras {text!r}: {camera!r} or {column!r} is given twice")
        mapping[camera] = column
    check_names(mapping, available, "camera", where)
    if not mapping:
        raise DataError(
            f"--cameras: no camera, and every step needs one; give <camera>={MAIN_CAMERA} (cameras of {where}: "
            f"{', '.join(available) or 'none'})"
        )
    left_out = [camera for camera in available if camera not in mapping]
    if left_out:
        logger.info("left out, since --cameras does not name them: %s", ", ".join(left_out))
    if MAIN_CAMERA not in mapping.values():
        logger.info("to train on these files, name their cameras: data.cameras: [%s]", ", ".join(mapping.values()))
    return dict(sorted(mapping.items(), key=lambda item: item[1] != MAIN_CAMERA))


def parse_state_keys(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """`["observation.state", "observation.effort=force"]` as {"state": ("observation.state",), "force": (...,)}.

    Args:
        texts: the values of --state_key: what is joined into `state`, and with `=<column>` into a column of its own.

    Raises:
        DataError: no name for a column.
    """
    columns: dict[str, tuple[str, ...]] = {}
    for text in texts:
        key, equals, column = text.partition("=")
        column = column if equals else STATE
        if not key or not is_column_name(column) or column in NOT_STATES:
            raise DataError(f"--state_key {text!r}: wanted <key>, or <key>=<column> for a column of its own")
        columns[column] = (*columns.get(column, ()), key)
    return columns


def parse_episodes(texts: Sequence[str] | None, available: Collection[int], where: str) -> list[int]:
    """The episodes that --episodes names (numbers and ranges such as 3-7), ascending; all of them for None.

    Raises:
        DataError: another form, or an episode that is not there.
    """
    if texts is None:
        return sorted(available)
    chosen: set[int] = set()
    for text in texts:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise DataError(f"--episodes {text!r}: wanted a number or a range such as 3-7")
        chosen |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    unknown = sorted(index for index in chosen if index not in available)
    if unknown:
        raise DataError(
            f"--episodes: {where} has no episode {unknown[0]} (it has {len(available)}, from {min(available)} to "
            f"{max(available)})"
        )
    return sorted(chosen)


def add_conversion_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """The options that all converters share; --output_dir is `required`, or may be left out."""
    parser.add_argument("--output_dir", type=Path, required=required, help="folder that is written")
    parser.add_argument("--episodes", nargs="+", metavar="N", help="numbers and ranges such as 3-7 (default: all)")
    parser.add_argument(
        "--num_workers", type=at_least(1), default=os.cpu_count(), help="processes (default: all cores)"
    )
    add_encoding_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="make everything again")
    parser.add_argument("--follow_links", action="store_true", help="read linked files that lie outside of the folder")


def add_encoding_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `ImageEncoding`, for converters and the recorder."""
    parser.add_argument("--image_format", choices=("jpeg", "png"), default="jpeg", help="of frames that are encoded")
    parser.add_argument("--jpeg_quality", type=int, default=95, help="1 to 95 (default %(default)s)")
    parser.add_argument(
        "--subsampling",
        choices=tuple(SUBSAMPLING),
        default="444",
        help="colour resolution of a JPEG: full, or 420, half in both directions (default %(default)s)",
    )
    parser.add_argument(
        "--short_side", type=int, help="pixels to which larger frames are scaled down (default: as they are)"
    )


def encoding_of(args: argparse.Namespace) -> ImageEncoding:
    """What `add_encoding_arguments` read."""
    return ImageEncoding(args.image_format, args.jpeg_quality, args.subsampling, args.short_side)
