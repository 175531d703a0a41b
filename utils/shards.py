"""Tensors of a checkpoint that every rank writes its part of, in a folder beside the checkpoint file.

`torch.distributed.checkpoint` writes and reads them in the safetensors format, so no pickle is involved. The
checkpoint file keeps everything else; as `shards` it names the folder, the files in it and where each tensor belongs.
It is written last: a crash leaves a folder that no file names. Any process can read the whole again, on its own.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from utils.foreign_files import is_plain_name
from utils.misc import file_checksum
from utils.text import printable

SUFFIX = ".shards"


class ShardError(ValueError):
    """A folder of shards is missing, incomplete or damaged."""


def save_shards(checkpoint: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write the sharded tensors of a checkpoint; a collective.

    Args:
        checkpoint: nested dicts and lists in which each rank holds its part of the same sharded tensors.
        folder: a new one.

    Returns:
        The checkpoint without those tensors, but with `shards`; whole on the first rank.

    Raises:
        ShardError: a rank could not write its part.
    """
    places = {"/".join(map(str, place)): list(place) for place in _sharded(checkpoint, ())}
    tensors = {name: _at(checkpoint, place).detach() for name, place in places.items()}
    try:
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:  # no Exception to Python, so nothing else would catch it
        reasons = "; ".join(f"rank {rank}: {failure[0]!r}" for rank, failure in error.failures.items())
        raise ShardError(f"{folder}: not written ({reasons}); earlier checkpoints are as they were") from None
    files = {}
    if dist.get_rank() == 0:
        files = {path.name: [path.stat().st_size, file_checksum(path)] for path in sorted(folder.glob("*.safetensors"))}
    return {**_without(checkpoint), "shards": {"folder": folder.name, "places": places, "files": files}}


def load_shards(
    checkpoint: dict[str, Any], path: Path, device: str | torch.device = "cpu", *, leave_out: str | None = None
) -> dict[str, Any]:
    """The whole checkpoint of a file that names shards, in this process alone.

    Args:
        checkpoint: the file's content.
        path: the file.
        device: where to put the tensors.
        leave_out: first key of tensors that are not wanted.

    Raises:
        ShardError: the folder is missing, incomplete or damaged.
    """
    folder = verify_shards(checkpoint, path)
    found = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    wanted = {name: place for name, place in checkpoint["shards"]["places"].items() if place[0] != leave_out}
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise ShardError(f"{folder}: no tensor {printable(missing[0])} in it; use an earlier checkpoint of the run")
    declared = sum(found[name].size.numel() * found[name].properties.dtype.itemsize for name in wanted)
    there = sum(size for size, _ in checkpoint["shards"]["files"].values())
    if declared > there:
        raise ShardError(f"{folder}: describes {declared:,} bytes of tensors, its files have {there:,}; do not use it")
    tensors = {
        name: torch.empty(found[name].size, dtype=found[name].properties.dtype, device=device) for name in wanted
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is the intent
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    whole = {key: value for key, value in checkpoint.items() if key != "shards"}
    for name, place in wanted.items():
        _at(whole, place[:-1])[place[-1]] = tensors[name]
    return whole


def check_shards(checkpoint: dict[str, Any], path: Path) -> Path:
    """The folder of a file's shards, whose files are there in full size; contents are not read.

    Raises:
        ShardError: naming what is missing.
    """
    shards = checkpoint["shards"]
    if not _is_sound(shards):
        raise ShardError(f"{path}: does not say which shards belong to it as this program writes it; do not use it")
    folder = path.parent / shards["folder"]
    others = {file.name for file in folder.glob("*.safetensors")} - shards["files"].keys()
    if others:
        raise ShardError(f"{folder}: {printable(min(others))} is not a part of {path.name}; move it away")
    for name, (size, _) in shards["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            found = f"{file.stat().st_size:,} bytes" if file.is_file() else "nothing"
            raise ShardError(f"{path}: its part {file} should have {size:,} bytes, found {found}; keep them together")
    return folder


def _is_sound(shards: Any) -> bool:
    """Whether what a checkpoint says of its shards has the names and types that `save_shards` gives it."""
    if not isinstance(shards, dict) or not {"folder", "places", "files"} <= shards.keys():
        return False
    folder, places, files = shards["folder"], shards["places"], shards["files"]
    sound = isinstance(folder, str) and is_plain_name(folder) and isinstance(places, dict) and isinstance(files, dict)
    return (
        sound
        and all(isinstance(place, list) and place for place in places.values())
        and all(isinstance(key, str | int) for place in places.values() for key in place)
        and all(isinstance(name, str) and is_plain_name(name) and name.endswith(".safetensors") for name in files)
        and all(isinstance(entry, list | tuple) and [*map(type, entry)] == [int, int] for entry in files.values())
    )


def verify_shards(checkpoint: dict[str, Any], path: Path) -> Path:
    """`check_shards`, and every file against its checksum.

    Raises:
        ShardError: naming the file that is missing or damaged.
    """
    folder = check_shards(checkpoint, path)
    for name, (_, expected) in checkpoint["shards"]["files"].items():
        if file_checksum(folder / name) != expected:
            raise ShardError(f"{folder / name}: damaged (checksum); use an earlier checkpoint of the run")
    return folder


def remove_unused_shards(folder: Path, used: set[str]) -> None:
    """Remove the folders of shards that are not among `used`: of overwritten, pruned and never finished checkpoints."""
    for path in folder.glob(f"*{SUFFIX}"):
        if path.name not in used:
            shutil.rmtree(path)


def _sharded(value: Any, place: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, DTensor):
        yield place
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _sharded(item, (*place, key))


def _at(value: Any, place: tuple[Any, ...] | list[Any]) -> Any:
    for key in place:
        value = value[key]
    return value


def _without(value: Any) -> Any:
    """The same nested value with None for every sharded tensor."""
    if isinstance(value, dict):
        return {key: _without(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without(item) for item in value]
    return None if isinstance(value, DTensor) else value
