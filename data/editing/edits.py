"""What can be done to recorded episodes, as values. Episodes and steps are always counted in the source, as the doctor
counts them, so that edits can be given together and in any order."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data.convert.episode_writer import ImageEncoding
from data.schema import REQUIRED
from utils.parquet_utils import DataError

Ranges = tuple[tuple[int, int], ...]  # first and last, both included


@dataclass(frozen=True)
class Edits:
    """Everything that is asked for; the defaults change nothing.

    Attributes:
        without: files that are left out, unread.
        keep: the only episodes that stay; None: all. delete: episodes that go.
        join: episodes that go on from the one before: no episode begins there.
        split_at: episode -> steps at which a new one begins.
        split: folder -> the share (0 to 1) or the episodes that go there, None for the rest.
        split_seed: of the episodes that shares choose.
        mend_flags: write is_first, is_last and is_terminal anew where they contradict each other.
        drop_steps: episode -> steps that go.
        trim: steps that go at the beginning and at the end of every episode.
        drop_idle: (speed, seconds): steps at which the state moves slower, in its units a second, for longer.
        idle_dims: dimensions of the state that count; empty: all.
        resample: rate in Hz that episodes are brought to, by leaving out or repeating rows.
        displacement_dims: dimensions of the action that are displacements, which `resample` adds up.
        rate: rows a second, where the files do not say.
        rename_prompt: instruction -> its new wording. set_prompt: episode -> instruction.
        clean_prompts: without stray whitespace and control characters.
        set_success: episode -> outcome.
        clip_actions: range that actions are clipped to.
        drop_columns: columns that go, cameras among them.
        rename_camera: old -> new. add_camera: new camera -> (files, camera) with a frame for each row.
        encoding: of frames that are encoded anew; None: they stay as they are, byte by byte.
    """

    without: tuple[str, ...] = ()
    keep: Ranges | None = None
    delete: Ranges = ()
    join: tuple[int, ...] = ()
    split_at: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    split: Mapping[str, float | Ranges | None] = field(default_factory=dict)
    split_seed: int = 0
    mend_flags: bool = False
    drop_steps: Mapping[int, Ranges] = field(default_factory=dict)
    trim: tuple[int, int] = (0, 0)
    drop_idle: tuple[float, float] | None = None
    idle_dims: tuple[int, ...] = ()
    resample: float | None = None
    displacement_dims: tuple[int, ...] = ()
    rate: float | None = None
    rename_prompt: Mapping[str, str] = field(default_factory=dict)
    set_prompt: Mapping[int, str] = field(default_factory=dict)
    clean_prompts: bool = False
    set_success: Mapping[int, bool] = field(default_factory=dict)
    clip_actions: tuple[float, float] | None = None
    drop_columns: tuple[str, ...] = ()
    rename_camera: Mapping[str, str] = field(default_factory=dict)
    add_camera: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    encoding: ImageEncoding | None = None

    def __post_init__(self) -> None:
        for name in self.drop_columns:
            if name in REQUIRED:
                raise DataError(f"--drop_columns {name}: every row needs it (docs/data_format.md)")
        for name, value in (("resample", self.resample), ("rate", self.rate)):
            if value is not None and value <= 0:
                raise DataError(f"--{name} is {value}; give rows a second, more than 0")
        if self.drop_idle and (self.drop_idle[0] <= 0 or self.drop_idle[1] < 0):
            raise DataError(f"--drop_idle is {self.drop_idle}; give a speed above 0, and seconds, 0 or more")
        if min(self.trim) < 0:
            raise DataError(f"--trim is {self.trim}; give numbers of steps, 0 or more")
        if self.clip_actions and self.clip_actions[0] >= self.clip_actions[1]:
            raise DataError(f"--clip_actions is {self.clip_actions}; give LOW HIGH with LOW < HIGH")
        if self.displacement_dims and self.resample is None:
            raise DataError("--displacement_dims says how --resample treats actions; give both")
        if self.idle_dims and self.drop_idle is None:
            raise DataError("--idle_dims says what --drop_idle measures; give both")
        if self.resample is not None and (self.drop_idle or self.drop_steps):
            raise DataError("--resample and dropping steps each change the time of rows: do one after the other")
        if self.join and (self.keep or self.delete or self.split_at or self.drop_steps or self.set_prompt):
            raise DataError("--join changes the episodes' numbers: edit its result with what names episodes")

    def settings(self) -> dict[str, Any]:
        """What was asked for, for the record of a file; JSON-able."""
        found = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
            if value != default:
                value = value.settings() if isinstance(value, ImageEncoding) else value
                found[item.name] = {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else value
        return json.loads(json.dumps(found))  # lists, as they are read back


def parse_ranges(texts: Iterable[str], flag: str) -> Ranges:
    """`["3", "7-9"]` as ((3, 3), (7, 9)); commas separate too.

    Raises:
        DataError: another form.
    """
    ranges = []
    for text in ",".join(texts).split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise DataError(f"{flag} {text!r}: wanted a number or a range such as 3-7")
        ranges.append((int(match[1]), int(match[2] or match[1])))
    return tuple(ranges)


def parse_pairs(texts: Sequence[str] | None, flag: str, form: str, separator: str = "=") -> list[tuple[str, str]]:
    """`["a=b"]` as [("a", "b")].

    Raises:
        DataError: no separator, or nothing beside it.
    """
    pairs = []
    for text in texts or ():
        key, found, value = text.partition(separator)
        if not found or not key or not value:
            raise DataError(f"{flag} {text!r}: wanted {form}")
        pairs.append((key, value))
    return pairs


def numbers(ranges: Ranges) -> list[int]:
    """Every number of some ranges, ascending."""
    return sorted({number for first, last in ranges for number in range(first, last + 1)})
