"""One self-contained checkpoint file: written whole or not at all, read without executing any pickle.

A file is a torch zip archive. Its index (`data.pkl`) holds the dict and says which record holds which tensor;
torch numbers the records in the order of the dict. `optimizer` is the last entry, so that a reader that only wants
the weights knows where to stop.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pickle
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.misc import atomic_path, disk_full_named, flush_to_disk
from utils.shards import ShardError, check_shards, load_shards, remove_unused_shards, verify_shards

logger = logging.getLogger(__name__)

FORMAT = "paligemma-vla/1"
SUFFIX = ".pth.tar"
REQUIRED = (
    "format",
    "step",
    "config",
    "model",
    "statistics",
    "cameras",
    "backbone_config",
    "image_processor",
    "tokenizer_files",
)


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, unsafe, or of another architecture."""


def save_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write to a temporary name, flush to disk, read back against the checksums, rename.

    A crash or a full disk at any moment leaves the previous file as it was.

    Raises:
        DiskFullError: no space for it, naming the bytes needed and free.
        CheckpointError: the disk gave back something else than was written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    last = {"optimizer": checkpoint["optimizer"]} if "optimizer" in checkpoint else {}
    checkpoint = {"format": FORMAT, "saved_at": time.time(), **{k: v for k, v in checkpoint.items() if k not in last}}
    needed = sum(storage.nbytes() for storage in _storages([checkpoint, last]))
    with disk_full_named(path, needed):
        if shutil.disk_usage(path.parent).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with atomic_path(path, durable=True) as temporary:
            _write({**checkpoint, **last}, temporary)
            flush_to_disk(temporary)
            verify_checkpoint(temporary)
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        logger.warning("%s: another checkpoint needs %s bytes, %s are free", path.parent, f"{needed:,}", f"{free:,}")


def link_checkpoint(source: Path, path: Path) -> None:
    """Give a checkpoint a second name: a hard link, or a copy where the file system has none."""
    with disk_full_named(path, source.stat().st_size), atomic_path(path, durable=True) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
            flush_to_disk(temporary)
            verify_checkpoint(temporary)


def load_checkpoint(
    path: str | Path, map_location: str | torch.device = "cpu", *, for_inference: bool = False
) -> dict[str, Any]:
    """Read a checkpoint with `weights_only=True`, checked against its checksums.

    Tensors are mapped from the file: what is never touched never takes memory.

    Args:
        path: `*.pth.tar`.
        map_location: where to put the tensors.
        for_inference: leave the optimizer's state out; nothing of it is read.

    Returns:
        The dict that `save_checkpoint` was given: weights, optimizer, step, resolved config, statistics,
        camera names, backbone config, tokenizer and image-processor files.

    Raises:
        CheckpointError: no such file, truncated, holds a pickled object, or was not written by this program.
    """
    path = Path(path)
    checkpoint = _read(path, map_location)
    missing = [key for key in REQUIRED if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise CheckpointError(f"{path}: not a checkpoint of this program (no {', '.join(missing)})")
    if checkpoint["format"] != FORMAT:
        raise CheckpointError(f"{path}: format {checkpoint['format']!r}; this version reads {FORMAT!r}")
    if for_inference:
        checkpoint.pop("optimizer", None)
    verify_checkpoint(path, records=sum(1 for _ in _storages(checkpoint)) if for_inference else None)
    if "shards" in checkpoint:
        with _as_checkpoint_error():
            return load_shards(checkpoint, path, map_location, leave_out="optimizer" if for_inference else None)
    return checkpoint


def evaluation_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The weights that validation judged: their average (`training.ema_decay`) where the checkpoint has one."""
    if "ema" not in checkpoint:
        return checkpoint["model"]
    logger.info("the weights are their average over %d updates (EMA)", checkpoint["ema"]["updates"])
    return {**checkpoint["model"], **checkpoint["ema"]["weights"]}


def verify_checkpoint(path: str | Path, records: int | None = None) -> None:
    """Read a checkpoint file against its checksums, without keeping anything in memory.

    Args:
        path: the file.
        records: check only the first `records` tensors, besides everything that is no tensor.

    Raises:
        CheckpointError: naming the record that is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                folder, _, number = name.rpartition("/")
                if records is None or not (folder.endswith("/data") and int(number) >= records):
                    with archive.open(name) as record:
                        while record.read(1 << 24):
                            pass
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); use an earlier checkpoint of the run") from None


def newest_checkpoint(folder: str | Path, experiment_name: str) -> Path | None:
    """The checkpoint of an experiment that was written last and is whole; None where there is none at all.

    Unreadable files, and those of another experiment, are named in a warning and passed over.

    Raises:
        CheckpointError: there are checkpoints, and none is readable: starting anew would bury them.
    """
    found, unreadable = [], []
    for path in sorted(Path(folder).glob(f"*{SUFFIX}")):
        try:
            found.append((written_at(path, experiment_name), path))
        except CheckpointError as error:
            unreadable.append(error)
    for _, path in sorted(found, reverse=True):
        try:
            verify_checkpoint(path)
            content = _read(path)
            with _as_checkpoint_error():
                if "shards" in content:
                    verify_shards(content, path)
        except CheckpointError as error:
            unreadable.append(error)
            continue
        for error in unreadable:
            logger.warning("passed over %s", error)
        return path
    if unreadable:
        raise CheckpointError(
            f"{folder}: no checkpoint is readable: {'; '.join(map(str, unreadable))}; move it aside to start anew"
        )
    return None


def written_at(path: Path, experiment_name: str) -> float:
    """When a checkpoint of an experiment was written, in seconds since 1970; it travels with a copied file.

    Raises:
        CheckpointError: unreadable, or of another experiment.
    """
    checkpoint = _read(path)
    if not isinstance(checkpoint, dict) or not {"saved_at", "config"} <= checkpoint.keys():
        raise CheckpointError(f"{path}: not a checkpoint of this program, or of an earlier version of it")
    with _as_checkpoint_error():
        if "shards" in checkpoint:
            check_shards(checkpoint, path)
    name = checkpoint["config"]["training"]["experiment_name"]
    if name != experiment_name:
        raise CheckpointError(f"{path}: belongs to the experiment {name!r}, not to {experiment_name!r}")
    return checkpoint["saved_at"]


def prune_checkpoints(folder: Path, keep: int, experiment_name: str) -> None:
    """Remove all but the `keep` newest `checkpoint_*` files of an experiment; the best model always stays."""
    written = []
    for path in folder.glob(f"checkpoint_*{SUFFIX}"):
        try:
            written.append((written_at(path, experiment_name), path))
        except CheckpointError as error:
            logger.warning("not counted by training.keep_last_k: %s", error)
    for _, path in sorted(written, reverse=True)[keep:]:
        path.unlink(missing_ok=True)
        logger.info("removed %s (training.keep_last_k %d)", path, keep)


def shards_of(path: Path) -> Path | None:
    """The folder beside a checkpoint file that holds its sharded tensors; None where all is in the file.

    Raises:
        CheckpointError: the file can't be read.
    """
    content = _read(path)
    return path.parent / content["shards"]["folder"] if "shards" in content else None


def remove_unreferenced_shards(folder: Path) -> None:
    """Remove the folders of shards that no checkpoint file beside them names."""
    used = set()
    for path in folder.glob(f"*{SUFFIX}"):
        try:
            shards = shards_of(path)
        except CheckpointError as error:
            logger.warning("shards stay because %s", error)
            return
        used |= set() if shards is None else {shards.name}
    remove_unused_shards(folder, used)


@contextlib.contextmanager
def _as_checkpoint_error() -> Iterator[None]:
    try:
        yield
    except ShardError as error:
        raise CheckpointError(str(error)) from None


def _read(path: Path, map_location: str | torch.device = "cpu") -> Any:
    """The content, tensors mapped; only the index is checked."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; give a *.pth.tar file written by main_train.py")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path}: not a whole checkpoint ({path.stat().st_size} bytes, no archive inside): truncated, or another "
            "kind of file; use an earlier checkpoint of the run"
        )
    verify_checkpoint(path, records=0)  # so that a damaged index is told from an unsafe one
    try:
        return torch.load(path, map_location=map_location, mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: holds something other than tensors and plain values, which is never unpickled ({reason}); "
            "convert it with the program that wrote it, and do not trust it"
        ) from None
    except (RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); use an earlier checkpoint of the run") from None


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    """torch.save, whose own error hides what the operating system said."""
    with open(path, "wb", buffering=0) as file:
        output = _Output(file)
        try:
            torch.save(checkpoint, output)
        except RuntimeError:
            if output.error is not None:
                raise output.error from None
            raise


class _Output:
    """A file that remembers why a write failed."""

    def __init__(self, file: Any) -> None:
        self.file, self.error = file, None

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        total = len(rest)
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            self.error = error
            raise
        return total

    def flush(self) -> None:
        """Unbuffered: nothing is held back."""


def _storages(value: Any, seen: set[int] | None = None) -> Iterator[torch.UntypedStorage]:
    """Every piece of memory behind the tensors of a nested value, once."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            yield storage
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _storages(item, seen)
