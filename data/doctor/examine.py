"""Run every check over the files of a training and a validation split."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.doctor import duplicates, images, numbers, structure
from data.doctor.analysis import describe_dimensions, describe_lengths
from data.doctor.findings import KINDS, Finding, Findings
from data.doctor.frames import DECODED
from data.doctor.images import Frames
from data.doctor.reading import Wanted, read_rows
from data.doctor.rows import Rows
from data.schema import STATE
from utils.parquet_utils import Source

logger = logging.getLogger(__name__)

SHOWN_EPISODES = 12  # on a contact sheet and in traces
THUMBNAIL = 160  # pixels of the longer side


@dataclass(frozen=True)
class Requirements:
    """What a configuration asks of the data; with the defaults only what holds for every configuration is checked.

    Attributes:
        widths: per vector column the config key and its value.
        horizon: steps per prediction.
        cameras: image columns that the model reads.
        state_columns, needs_state: numeric columns that make up the state, and whether something reads it.
        count_tokens: tokens of a prompt, uncut, with `<bos>` and the newline.
        prompt_max_len: tokens that fit.
        held_out: which of so many training episodes are held out for validation, bool; None: none.
    """

    widths: dict[str, tuple[str, int]] = field(default_factory=dict)
    horizon: int | None = None
    cameras: tuple[str, ...] = ()
    state_columns: tuple[str, ...] = (STATE,)
    needs_state: bool = True
    count_tokens: Callable[[str], int] | None = None
    prompt_max_len: int = 0
    held_out: Callable[[int], np.ndarray] | None = None


@dataclass
class Examination:
    """The result of an examination.

    Attributes:
        rows: numbers, flags and prompts.
        frames: images; None where they were not looked at.
        findings: the faults.
        shown: episodes (numbers over both splits) whose pictures were kept, ascending.
        seconds: how long it took.
    """

    rows: Rows
    frames: Frames | None
    findings: Findings
    shown: list[int]
    seconds: float

    @property
    def may_train(self) -> bool:
        """Whether no error was found."""
        return self.findings.count("error") == 0

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able values."""
        listed = self.findings.ordered()
        by_kind = Counter(finding.kind for finding in listed)
        return {
            "may_train": self.may_train,
            "errors": self.findings.count("error"),
            "warnings": self.findings.count("warning"),
            "counts": {kind: self.findings.counts[kind] for kind in KINDS if self.findings.counts[kind]},
            "not_listed": {
                kind: number - by_kind[kind] for kind, number in self.findings.counts.items() if number > by_kind[kind]
            },
            "findings": [finding.to_dict() for finding in listed],
            "images_examined": self.frames is not None,
            "datasets": {split: describe_split(self, split) for split in dict.fromkeys(self.rows.splits)},
            "seconds": round(self.seconds, 2),
        }


def examine(
    train_files: Sequence[Source],
    val_files: Sequence[Source] = (),
    requirements: Requirements | None = None,
    *,
    skip_images: bool = False,
    num_workers: int | None = None,
    sources: Mapping[str, Sequence[Source]] | None = None,
) -> Examination:
    """Check files against docs/data_format.md, against each other and against what a config wants.

    No fault stops it. Numbers of all rows are held in memory, images are streamed.

    Args:
        train_files: Parquet files in order; an episode may go on from one into the next.
        val_files: the validation split, in order.
        requirements: what the config asks for.
        skip_images: leave image columns unread.
        num_workers: decoding processes (see `look_at_frames`).
        sources: what each split (train, val) was given as, for the commands that mend findings; None: its files.
    """
    started = time.monotonic()
    requirements = requirements or Requirements()
    files = [(path, "train") for path in train_files] + [(path, "val") for path in val_files]
    given = {"train": train_files, "val": val_files} | dict(sources or {})
    findings = Findings(
        {split: list(map(str, paths)) for split, paths in given.items()}, {str(path): split for path, split in files}
    )
    wanted = Wanted(requirements.cameras, requirements.state_columns, requirements.needs_state)
    rows = read_rows(files, findings, wanted)
    structure.check_values_present(rows, findings)
    structure.check_widths(rows, findings, requirements.widths)
    structure.check_flags(rows, findings)
    structure.check_indices(rows, findings)
    structure.check_prompts(rows, findings, requirements.count_tokens, requirements.prompt_max_len)
    structure.check_labels(rows, findings)
    structure.check_lengths(rows, findings, requirements.horizon)
    structure.check_closed(rows, findings)
    structure.check_time(rows, findings)
    repeated_files = duplicates.check_files(rows, findings)
    duplicates.check_episodes(rows, findings, repeated_files, requirements.held_out)
    numbers.check_finite(rows, findings)
    outliers = numbers.check_outliers(rows, findings)
    numbers.check_bounds(rows, findings, outliers["action"])
    numbers.check_jumps(rows, findings, outliers)
    numbers.check_angles(rows, findings)
    numbers.check_frozen(rows, findings, outliers)
    numbers.check_units(rows, findings)
    numbers.check_copies(rows, findings)
    logger.info("%d files, %d rows: numbers checked in %.1f s", len(rows.files), len(rows), time.monotonic() - started)
    shown = choose_episodes(rows, findings.listed, SHOWN_EPISODES)
    frames = None
    same_images = np.zeros(max(len(rows) - 1, 0), dtype=bool)
    if not skip_images:
        kept = np.array([i for number in shown for i in three_rows(rows, number)], dtype=np.int64)
        frames = images.look_at_frames(rows, findings, keep=kept, thumbnail_size=THUMBNAIL, num_workers=num_workers)
        images.check_decoding(rows, frames, findings)
        same_images = images.check_repeats(rows, frames, findings)
    images.check_presence(rows, frames, findings, requirements.cameras)
    numbers.check_idle(rows, findings, same_images)
    return Examination(rows, frames, findings, shown, time.monotonic() - started)


def choose_episodes(rows: Rows, findings: Sequence[Finding], count: int) -> list[int]:
    """Episodes to show: up to half of `count` with findings, the others spread evenly over both splits."""
    splits = dict(zip(map(str, rows.files), rows.splits, strict=True))
    first_val = next((n for n in range(rows.num_episodes) if _split_of(rows, n) == "val"), rows.num_episodes)
    suspect: list[int] = []
    for finding in findings:
        if finding.episode is not None:
            number = finding.episode + (first_val if splits[finding.file] == "val" else 0)
            if number not in suspect and len(suspect) < count // 2:
                suspect.append(number)
    others = [number for number in range(rows.num_episodes) if number not in suspect]
    room = min(count - len(suspect), len(others))
    even = np.linspace(0, len(others) - 1, room).round().astype(int) if room > 0 else []
    return sorted(suspect + [others[i] for i in even])


def three_rows(rows: Rows, number: int) -> list[int]:
    """The first, middle and last global row of an episode (number over both splits)."""
    where = rows.episode_rows(number)
    return [where.start, (where.start + where.stop - 1) // 2, where.stop - 1]


def describe_split(seen: Examination, split: str) -> dict[str, Any]:
    """Files, episodes, steps, lengths, rate, prompts, cameras and ranges of one split, as JSON-able values."""
    rows = seen.rows
    files = [file for file, name in enumerate(rows.splits) if name == split]
    where = np.isin(rows.file_of, files)
    starts = [n for n in range(rows.num_episodes) if _split_of(rows, n) == split]
    lengths = np.diff(rows.episode_starts)[starts]
    rates = structure.file_rates(rows)
    known = [rates[file] for file in files if rates[file] is not None]
    first_rows = rows.episode_starts[:-1][starts]
    codes, steps = np.unique(rows.prompt[where], return_counts=True)
    return {
        "files": [
            {
                "file": str(rows.files[file]),
                "rows": int(rows.file_starts[file + 1] - rows.file_starts[file]),
                "episodes": int((rows.file_of[first_rows] == file).sum()),
                "bytes": duplicates.size_of(rows.files[file]),
                "rate_hz": rates[file],
            }
            for file in files
        ],
        "episodes": len(starts),
        "steps": int(where.sum()),
        "length": describe_lengths(lengths),
        "rate_hz": float(np.median(known)) if known else None,
        "prompts": [
            {
                "prompt": rows.prompts[code],
                "steps": int(count),
                "episodes": int((rows.prompt[first_rows] == code).sum()),
            }
            for code, count in zip(codes, steps, strict=True)
            if code >= 0
        ],
        "cameras": _describe_cameras(seen, where, files),
        "vectors": list(rows.vectors),
        **{name: describe_dimensions(rows.vectors[name][where]) for name in rows.vectors},
    }


def _describe_cameras(seen: Examination, where: np.ndarray, files: list[int]) -> dict[str, Any]:
    rows = seen.rows
    result = {}
    for camera in rows.all_cameras:
        count = sum(camera in rows.cameras[file] for file in files)
        if not count:
            continue
        about: dict[str, Any] = {"files": count}
        if seen.frames is not None:
            facts = seen.frames.facts[camera][where]
            facts = facts[facts["status"] == DECODED]
            kinds = Counter(zip(facts["width"].tolist(), facts["height"].tolist(), facts["format"], strict=True))
            about["frames"] = len(facts)
            about["sizes"] = {f"{w}x{h} {name.decode()}": number for (w, h, name), number in kinds.most_common(8)}
        result[camera] = about
    return result


def _split_of(rows: Rows, number: int) -> str:
    return rows.splits[rows.file_of[rows.episode_starts[number]]]
