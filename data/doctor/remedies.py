"""Which edit mends which kind of fault: flags of scripts/edit_dataset.py, for faults that need no judgement of content.

Where a finding's remedy offers a choice ("split or drop the episode"), the edit here is the one that loses least.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

Edit = tuple[str, ...]  # flags, each followed by its values
COMMAND = "python scripts/edit_dataset.py"

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


def command(edits: Iterable[Edit], sources: Sequence[str]) -> str:
    """One command for several edits of the same data; "" for none.

    Args:
        edits: see `edit_for`.
        sources: files, folders or globs that the data were read from.
    """
    flags: dict[str, dict[str, None]] = {}
    for edit in edits:
        for word in edit:
            if word.startswith("--"):
                values = flags.setdefault(word, {})
            else:
                values[word] = None
    if not flags:
        return ""
    output = f"{str(sources[0]).rstrip('/')}_edited" if len(sources) == 1 and _is_folder(sources[0]) else "edited"
    words = [word for flag, values in flags.items() for word in (flag, *values)]
    data = shlex.join(["--data_path", *map(str, sources), "--output_dir", output])
    return f"{COMMAND} {data} {shlex.join(words)}"


def _is_folder(source: str) -> bool:
    return Path(source).is_dir()
