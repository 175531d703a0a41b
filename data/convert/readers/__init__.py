"""One reader a recording format. `FORMATS` names them; a reader's module is imported when its format is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.convert.conversion import check_names
from data.convert.readers.base import Reader
from utils.parquet_utils import DataError

FORMATS = {  # format -> (module, class)
    "rlds": ("rlds", "RldsReader"),
    "hdf5": ("hdf5", "Hdf5Reader"),
    "zarr": ("zarr", "ZarrReader"),
    "rosbag": ("rosbag", "RosbagReader"),
    "lerobot": ("lerobot", "LeRobotReader"),
    "calvin": ("calvin", "CalvinReader"),
}


def reader_options(name: str) -> tuple[str, ...]:
    """The options that the reader of a format takes, beside those of every mapping."""
    return _reader_class(name).OPTIONS


def open_reader(name: str, path: Path, options: Mapping[str, Any], follow_links: bool = False) -> Reader:
    """The reader of a format, opened on a file or folder.

    Args:
        name: one of FORMATS.
        path: what was recorded.
        options: those of the reader's OPTIONS that were given.
        follow_links: read files that are links to others outside of the folder.

    Raises:
        DataError: another format, no such path, an option that the format does not have, or no recording of it there.
    """
    kind = _reader_class(name)
    check_names(options, kind.OPTIONS, "option", f"--from {name}")
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; give the {kind.WANTED}")
    return kind(path, dict(options), follow_links)


def _reader_class(name: str) -> type[Reader]:
    check_names([name], list(FORMATS), "format", "--from")
    module, attribute = FORMATS[name]
    return getattr(importlib.import_module(f"data.convert.readers.{module}"), attribute)
