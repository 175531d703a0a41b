"""What can be wrong with demonstrations: the kinds of fault, and the list of those that were found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from data.doctor.remedies import Edit, command, edit_for
from data.doctor.rows import Rows, runs
from utils.config_data import is_lerobot

Severity = Literal["error", "warning"]
MAX_MARKS = 1000  # values that are marked in plots, per check and column
MAX_PER_FILE = 50  # findings of one kind that are listed for one file; further ones are counted


@dataclass(frozen=True)
class Kind:
    """A kind of fault. Errors: training would not start, or would learn something wrong. Warnings: look at it."""

    severity: Severity
    remedy: str


def _error(remedy: str) -> Kind:
    return Kind("error", remedy)


def _warning(remedy: str) -> Kind:
    return Kind("warning", remedy)


KINDS = {
    # files and columns
    "unreadable_file": _error("record, convert or copy the file again"),
    "corrupt_data": _error("record, convert or copy the file again"),
    "empty_file": _error("remove the file or record it again"),
    "duplicated_file": _warning("keep one of the two files, or every episode in it counts twice"),
    "missing_column": _error("write the column; docs/data_format.md has the schema"),
    "ambiguous_image_column": _error("keep one of the two columns"),
    "wrong_type": _error("write the column with the type of docs/data_format.md"),
    "camera_missing": _warning("record the camera everywhere, or leave it out; where it is absent it is masked"),
    # rows
    "null_value": _error("write a value in every row, or drop the episode"),
    "width_varies": _error("write the same number of values in every row, or drop the episode"),
    "width_differs_between_files": _error("train on files of one robot, or convert them to one width"),
    "width_differs_from_config": _error("correct data.state_dim or per_action_dim in the config, or the file"),
    "nan": _error("mend the recorder or drop the episode"),
    "infinity": _error("mend the recorder or drop the episode"),
    "float32_precision": _warning("subtract an offset or choose another unit: the model sees float32"),
    # flags and episodes
    "begins_without_is_first": _error("set is_first in the first row of every episode"),
    "missing_is_first": _error("set is_first in the first row of every episode"),
    "unexpected_is_first": _error("clear is_first here, or set is_last in the row before"),
    "missing_is_last": _error("set is_last in the last row of every episode"),
    "unexpected_is_last": _error("clear is_last here, or set is_first in the next row"),
    "ends_without_is_last": _error("set is_last in the last row, or drop the unfinished episode"),
    "terminal_without_is_last": _error("set is_last with is_terminal, or clear is_terminal"),
    "episode_index_contradicts": _error("make is_first and is_last agree with episode_index, or drop that column"),
    "frame_index_contradicts": _warning("look for dropped or reordered rows, or drop that column"),
    "short_episode": _warning("drop the episode: most of what it teaches is padding"),
    "unclosed_episode": _warning(
        "see that the recorder closes its episodes (is_last): split them where they begin anew"
    ),
    "episode_length_outlier": _warning("look at the episode: a failed or forgotten recording is often so"),
    "duplicated_episode": _warning("drop one of the two, or it counts twice"),
    "split_overlap": _error("take the episode out of one of the two splits: validation would measure memory"),
    # prompts
    "empty_prompt": _error("write the instruction in every row"),
    "invalid_text": _error("write prompts as UTF-8"),
    "prompt_changes": _warning("check that the instruction really changes at this step, or split the episode"),
    "prompt_whitespace": _warning("write the instruction without stray whitespace, line breaks or control characters"),
    "prompt_variants": _warning("write one instruction in one way, unless the variety is meant"),
    "prompt_too_long": _warning("shorten the instruction or raise data.prompt_max_len: the rest is cut off"),
    # labels
    "label_contradicts": _warning("write success alike in all rows of an episode, and labels as true or false"),
    # time
    "timestamp_missing": _warning("write a finite timestamp in every row, or drop the column"),
    "timestamp_not_increasing": _warning("look for reordered or doubled rows"),
    "timestamp_gap": _warning("look for dropped frames; split the episode at a long pause"),
    "irregular_rate": _warning("record at a fixed rate, or resample: the model takes steps to be equally long"),
    "rate_differs": _warning("resample the files to one rate, or train on one rate only"),
    # numbers
    "state_outlier": _warning("mend or drop the episode: one outlier stretches min_max normalization for all"),
    "action_outlier": _warning("mend or drop the episode: one outlier stretches min_max normalization for all"),
    "action_out_of_bounds": _warning("store actions as they were executed, clipped to their range"),
    "state_jump": _warning("look for a dropped stretch or a sensor fault; split or drop the episode"),
    "action_jump": _warning("look for a glitch of the controller or the recorder; drop the episode"),
    "angle_wraps": _warning("store the angle unwrapped, or as sine and cosine: across the seam differences are false"),
    "frozen_dimension": _warning("check the sensor or channel; if it is meant to be constant, all is well"),
    "stuck_dimension": _warning("check the sensor or channel here; drop the episode if it was stuck"),
    "unit_mismatch": _warning("check the file's units (degrees and radians, millimetres and metres)"),
    "action_is_state": _warning("write the commands to action: a copy of the state teaches the robot to stay"),
    "idle": _warning("cut the stretch: a policy trained on it learns to wait"),
    "repeated_row": _warning("drop the repeated rows"),
    # images
    "undecodable_image": _error("drop or mend the episode"),
    "not_8_bit": _error("store colour images of 8 bits a channel: the loader refuses others"),
    "odd_sized_image": _warning("store one size per camera; images are resized without keeping their proportions"),
    "blank_image": _warning("drop the frames: check cable, exposure and lens cap"),
    "not_rgb": _warning("store RGB: alpha is dropped, grey is repeated, CMYK is converted"),
    "image_format": _warning("store JPEG or PNG"),
    "turned_image": _warning("they are turned as EXIF says; see that the robot's own frames are, or turn the pixels"),
    "camera_gap": _warning("check the camera's connection; at these steps it is masked"),
    "frozen_camera": _warning("check the camera: the robot moves but the picture does not"),
    "slow_camera": _warning("record rows at the camera's rate: policies learn from repeated frames that nothing moves"),
    "identical_cameras": _warning("check the cameras' names: two columns hold the same pictures"),
}


@dataclass(frozen=True)
class Finding:
    """One fault.

    Attributes:
        file: path of the Parquet file.
        episode: index of the episode within its split, None where the finding concerns no single episode.
        row: zero-based row in the file, the first one where several follow each other; None where the finding
            concerns a whole file or column.
        severity, kind, remedy: see `KINDS`.
        message: what was found there.
        edit: what makes it go away (`data.doctor.remedies`); () where that takes judgement.
        data: what is to be edited: of each split concerned its name, and what it was read from.
        command: the edit as a command line, or "".
    """

    file: str
    episode: int | None
    row: int | None
    severity: Severity
    kind: str
    message: str
    remedy: str
    edit: Edit = ()
    data: tuple[tuple[str, tuple[str, ...]], ...] = ()
    command: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class Findings:
    """A growing list of findings; at most `MAX_PER_FILE` of a kind in a file are kept, all are counted.

    Args:
        sources: per split what its files were read from, for commands; None: commands are not needed.
        split_of: of each file by its name.

    Attributes:
        listed: the findings that are kept.
        counts: all findings by kind.
        marks: vector column -> (global row, dimension) that plots point at.
    """

    def __init__(
        self, sources: Mapping[str, Sequence[str]] | None = None, split_of: Mapping[str, str] | None = None
    ) -> None:
        self._sources, self._split_of = sources or {}, split_of or {}
        self.listed: list[Finding] = []
        self.marks: dict[str, list[tuple[int, int]]] = {}
        self.counts: Counter[str] = Counter()
        self._per_file: Counter[tuple[str, str]] = Counter()

    def add(
        self,
        kind: str,
        message: str,
        *,
        file: object,
        row: int | None = None,
        episode: int | None = None,
        edit: Edit | None = None,
        splits: Sequence[str] = (),
    ) -> None:
        """Add one finding; `kind` is a key of `KINDS`, `edit` what mends it where its kind does not tell, and `splits`
        those that are to be edited where not the file's own alone."""
        self.counts[kind] += 1
        self._per_file[kind, str(file)] += 1
        if self._per_file[kind, str(file)] <= MAX_PER_FILE:
            about, mine = KINDS[kind], self._split_of.get(str(file), "")
            if edit is None:
                edit = edit_for(kind, file=str(file), episode=episode, step=None)
            if is_lerobot(file):
                edit = ()  # read in place; what is edited is a converted copy
            elif "--without" in edit and list(self._split_of.values()).count(mine) == 1:
                edit = ()  # nothing would be left
            data = tuple((split, tuple(self._sources[split])) for split in splits or [mine] if split in self._sources)
            text = command([(edit, data)])
            place = (str(file), episode, row)
            self.listed.append(Finding(*place, about.severity, kind, message, about.remedy, edit, data, text))

    def add_at(
        self, kind: str, rows: Rows, index: int, message: str, *, length: int = 1, edit: Edit | None = None
    ) -> None:
        """Add a finding at a global row, or at `length` rows from there on."""
        file, row, episode = rows.place(index)
        if edit is None:
            number = int(np.searchsorted(rows.episode_starts, index, side="right")) - 1
            where = rows.episode_rows(number)
            steps = {"step": index - where.start, "length": length, "episode_length": where.stop - where.start}
            edit = edit_for(kind, file=str(file), episode=episode, **steps)
        self.add(kind, message, file=file, row=row, episode=episode, edit=edit)

    def add_runs(
        self, kind: str, rows: Rows, indices: np.ndarray, describe: Callable[[int], str], unit: str = "row"
    ) -> None:
        """Add one finding per run of consecutive global rows of one episode and file.

        Args:
            indices: int64, ascending.
            describe: the message for a run, from its first global row.
            unit: what a row is called where the run's length is told.
        """
        for first, length in runs(indices, rows):
            more = f", and so in the {length - 1} {unit}{'s' if length > 2 else ''} after it" if length > 1 else ""
            self.add_at(kind, rows, first, describe(first) + more, length=length)

    def mark(self, column: str, wrong: np.ndarray) -> None:
        """Mark values of a vector column in plots; `wrong` is bool (N, width)."""
        self.marks.setdefault(column, []).extend((int(i), int(d)) for i, d in np.argwhere(wrong)[:MAX_MARKS])

    def ordered(self) -> list[Finding]:
        """Errors first, then by kind in the order of `KINDS`; within a kind as they were found."""
        rank = {kind: i for i, kind in enumerate(KINDS)}
        return sorted(self.listed, key=lambda finding: (finding.severity != "error", rank[finding.kind]))

    def count(self, severity: Severity) -> int:
        """How many findings of a severity there are, listed or not."""
        return sum(number for kind, number in self.counts.items() if KINDS[kind].severity == severity)
