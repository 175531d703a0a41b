"""What an export to LeRobot takes along of a file's further columns, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data.convert.lerobot_export import Layout
from data.schema import (
    ACTION,
    FLAGS,
    INDICES,
    LABELS,
    NOISE_SEED,
    PLAN,
    PROMPT,
    SEED,
    TIMESTAMP,
    image_columns,
    is_state,
)
from utils.parquet_utils import DataError, open_parquet


def left_behind(files: Sequence[Path], layout: Layout) -> dict[str, str]:
    """Columns of the files that have no place in the dataset -> the flag that would bring them there, "" for none."""
    exported = {*layout.cameras, *layout.state_columns, *layout.labels, *FLAGS, *INDICES, ACTION, PROMPT, TIMESTAMP}
    found: dict[str, str] = {}
    for path in files:
        with open_parquet(path) as file:
            schema = file.schema_arrow
        cameras = image_columns(schema)
        for column in schema:
            name = column.name.removesuffix("_bytes")
            if name in cameras:
                flag = "--cameras"
            elif column.name in LABELS:
                name, flag = column.name, "--labels"
            else:
                name = column.name
                sensor = name not in (PLAN, SEED, NOISE_SEED) and is_state(column.type)
                flag = f"--state_columns state {name}" if sensor else ""
            if name not in exported:
                found[column.name] = flag
    return found


def labels_of(files: Sequence[Path]) -> tuple[str, ...]:
    """Those of LABELS that the files have.

    Raises:
        DataError: none of them, or one that some files lack.
    """
    having = {name: [] for name in LABELS}
    for path in files:
        with open_parquet(path) as file:
            for name in set(LABELS) & set(file.schema_arrow.names):
                having[name].append(path)
    found = tuple(name for name, some in having.items() if some)
    if not found:
        raise DataError(f"--labels: {files[0]} and the others have neither {' nor '.join(LABELS)}; leave it out")
    for name in found:
        if lacking := [path for path in files if path not in having[name]]:
            raise DataError(
                f"--labels: {lacking[0]} has no {name}, which {having[name][0]} has; export them apart, or leave it out"
            )
    return found
