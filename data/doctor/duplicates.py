"""Checks for data that are there twice: files and episodes, within a split and over both."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable

import numpy as np

from data.doctor.analysis import row_digests
from data.doctor.findings import Findings
from data.doctor.rows import Rows
from utils.parquet_utils import READ_ERRORS, Source, open_bytes
from utils.recordings import LeRobotFolder, Recording, fingerprint

SHARED = 0.5  # part of an episode's rows that also occur in the other split, from which the splits overlap


def check_files(rows: Rows, findings: Findings) -> set[int]:
    """`duplicated_file` within a split, `split_overlap` over both; returns the files that repeat an earlier one."""
    groups: dict[tuple[int, str], list[int]] = defaultdict(list)
    sizes = [size_of(path) for path in rows.files]
    for file, path in enumerate(rows.files):
        whole = sizes.count(sizes[file]) > 1 and rows.schema_ok[file]
        if whole and not isinstance(path, LeRobotFolder):  # a dataset of many files is compared episode by episode
            groups[sizes[file], _digest(path)].append(file)
    repeated = set()
    for group in groups.values():
        for file in group[1:]:
            repeated.add(file)
            across = rows.splits[file] != rows.splits[group[0]]
            message = f"the same content as {rows.files[group[0]]}"
            if across:
                findings.add("split_overlap", message + ", which is training data", file=rows.files[file])
            else:
                findings.add("duplicated_file", message, file=rows.files[file])
    return repeated


def check_episodes(
    rows: Rows, findings: Findings, repeated_files: set[int], held_out: Callable[[int], np.ndarray] | None
) -> None:
    """`duplicated_episode` within a split, `split_overlap` over both, by states and actions.

    Args:
        repeated_files: files that are reported already.
        held_out: which of so many training episodes the config holds out for validation, bool; None: none.
    """
    values = np.concatenate(list(rows.vectors.values()), axis=1)
    digests = row_digests(values)
    known = np.isfinite(values).all(axis=1)
    in_val = np.array([split == "val" for split in rows.splits], dtype=bool)[rows.file_of]
    if held_out is not None:
        training = np.flatnonzero(~in_val[rows.episode_starts[:-1]])
        chosen = np.zeros(rows.num_episodes, dtype=bool)
        chosen[training] = held_out(len(training))
        in_val |= np.repeat(chosen, np.diff(rows.episode_starts))
    shared = np.isin(digests, digests[known & ~in_val]) & known & in_val if in_val.any() else np.zeros_like(known)
    order = np.argsort(digests, kind="stable")
    earlier: dict[tuple[bool, bytes], int] = {}
    for number in range(rows.num_episodes):
        where = rows.episode_rows(number)
        if int(rows.file_of[where.start]) in repeated_files:
            continue
        if shared[where].mean() > SHARED:
            twins = digests[where.start + int(shared[where].argmax())]
            other = next(int(i) for i in order[np.searchsorted(digests, twins, sorter=order) :] if not in_val[i])
            file, row, episode = rows.place(other)
            message = f"{shared[where].sum()} of {where.stop - where.start} rows also occur in the training data "
            findings.add_at("split_overlap", rows, where.start, message + f"({file} row {row}, episode {episode})")
        if where.stop - where.start < 2 or not known[where].all():
            continue
        key = bool(in_val[where.start]), digests[where].tobytes()
        if key in earlier:
            file, row, episode = rows.place(earlier[key])
            message = f"the same states and actions as episode {episode} ({file} row {row})"
            findings.add_at("duplicated_episode", rows, where.start, message)
        earlier.setdefault(key, where.start)


def size_of(path: Recording) -> int:
    """Bytes of a recording; 0 where it can't be opened."""
    try:
        if isinstance(path, LeRobotFolder):
            return int(fingerprint(path)[1])
        with open_bytes(path) as file:
            return file.size()
    except READ_ERRORS:
        return 0


def _digest(path: Source) -> str:
    digest = hashlib.sha256()
    with open_bytes(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
