"""Tensors of a checkpoint that every rank writes its part of, in a folder beside the checkpoint file.

`torch.distributed.checkpoint` writes and reads them in the safetensors format, so no pickle is involved. The
checkpoint file keeps everything else; as `shards` it names the folder, the files in it and where each tensor belongs.
It is written last: a crash leaves a folder that no file names. Any process can read the whole again, on its own.
"""

from __future__ import annotations

import shutil
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

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
        files = {path.name: [path.stat().st_size, checksum(path)] for path in sorted(folder.glob("*.safetensors"))}
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
    folder = path.parent / checkpoint["shards"]["folder"]
    for name, (size, _) in checkpoint["shards"]["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            found = f"{file.stat().st_size:,} bytes" if file.is_file() else "nothing"
            raise ShardError(f"{path}: its part {file} should have {size:,} bytes, found {found}; keep them together")
    return folder


def verify_shards(checkpoint: dict[str, Any], path: Path) -> Path:
    """`check_shards`, and every file against its checksum.

    Raises:
        ShardError: naming the file that is missing or damaged.
    """
    folder = check_shards(checkpoint, path)
    for name, (_, expected) in checkpoint["shards"]["files"].items():
        if checksum(folder / name) != expected:
            raise ShardError(f"{folder / name}: damaged (checksum); use an earlier checkpoint of the run")
    return folder


def remove_unused_shards(folder: Path, used: set[str]) -> None:
    """Remove the folders of shards that are not among `used`: of overwritten, pruned and never finished checkpoints."""
    for path in folder.glob(f"*{SUFFIX}"):
        if path.name not in used:
            shutil.rmtree(path)


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


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
