"""Which edit mends which kind of fault: flags of scripts/edit_dataset.py, for faults that need no judgement of content.

Where a finding's remedy offers a choice ("split or drop the episode"), the edit here is the one that loses least.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

Edit = tuple[str, ...]  # flags, each followed by its values
Data = Sequence[tuple[str, tuple[str, ...]]]  # of splits: name, and the files, folders or globs that it was read from
COMMAND = ("python", "scripts/edit_dataset.py")

_DELETE = (
    *("null_value", "width_varies", "nan", "infinity", "short_episode", "episode_length_outlier", "split_overlap"),
    *("duplicated_episode", "empty_prompt", "invalid_text", "state_outlier", "action_outlier", "action_jump"),
    *("stuck_dimension", "undecodable_image", "not_8_bit", "odd_sized_image", "camera_gap", "frozen_camera"),
    "timestamp_not_increasing",
)
_WITHOUT = (
    *("unreadable_file", "corrupt_data", "empty_file", "duplicated_file", "missing_column", "wrong_type"),
    "split_overlap",
)
_MEND_FLAGS = (
    *("begins_without_is_first", "missing_is_first", "missing_is_last", "ends_without_is_last"),
    "terminal_without_is_last",
)
_SPLIT = ("prompt_changes", "timestamp_gap", "state_jump")
_STEPS = ("blank_image", "idle", "repeated_row")
_ALWAYS: dict[str, Edit] = {
    "episode_index_contradicts": ("--drop_columns", "episode_index"),
    "frame_index_contradicts": ("--drop_columns", "frame_index"),
    "timestamp_missing": ("--drop_columns", "timestamp"),
    "prompt_whitespace": ("--clean_prompts",),
    "action_out_of_bounds": ("--clip_actions", "-1", "1"),
    "not_rgb": ("--reencode", "png"),
    "image_format": ("--reencode", "png"),
    "turned_image": ("--reencode", "png"),
}


def edit_for(
    kind: str, *, file: str, episode: int | None, step: int | None, length: int = 1, episode_length: int | None = None
) -> Edit:
    """The edit that makes a finding go away; () where none does without somebody's judgement.

    Args:
        kind: of the finding.
        file: where it is.
        episode: its number in its split, or None.
        step: in the episode, the first of `length` in a row; None where it concerns no step.
        episode_length: steps of the episode.
    """
    if kind in _ALWAYS:
        return _ALWAYS[kind]
    if episode is not None and kind in _STEPS and step is not None:
        whole = length == episode_length
        return ("--delete", str(episode)) if whole else ("--drop_steps", f"{episode}:{step}-{step + length - 1}")
    if episode is not None and kind in _SPLIT and step:
        if length > 1:  # what leaps away and back
            return "--delete", str(episode)
        return "--split_at", f"{episode}:{step}"
    if episode is not None and kind in ("unexpected_is_first", "unexpected_is_last"):
        return "--join", str(episode + (kind == "unexpected_is_last"))
    if kind in _MEND_FLAGS:
        return ("--mend_flags",)
    if episode is not None and kind in _DELETE:
        return "--delete", str(episode)
    if kind in _WITHOUT and episode is None:
        return "--without", file, "--mend_flags"  # an episode may go on into that file
    return ()


def command(edits: Iterable[tuple[Edit, Data]]) -> str:
    """One command line for several edits, one command for each split; "" for none.

    Args:
        edits: each with the data that it is of.
    """
    flags: dict[tuple[str, tuple[str, ...]], dict[str, dict[str, None]]] = {}
    for edit, data in edits:
        for part in data if edit else ():
            for word in edit:
                if word.startswith("--"):
                    values = flags.setdefault(part, {}).setdefault(word, {})
                else:
                    values[word] = None
    lines = []
    for (split, sources), of_split in flags.items():
        is_folder = len(sources) == 1 and Path(sources[0]).is_dir()
        output = f"{sources[0].rstrip('/')}_edited" if is_folder else f"edited_{split}"
        words = ["--data_path", *sources, "--output_dir", output]
        lines.append(shlex.join([*COMMAND, *words, *(w for flag, values in of_split.items() for w in (flag, *values))]))
    return " && ".join(lines)
