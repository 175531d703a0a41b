"""One self-contained checkpoint file: written whole or not at all, read without executing any pickle.

A file is a torch zip archive, which `utils/torch_archive.py` reads: its index (`data.pkl`) holds the dict and says
which record holds which tensor. What may stand in the dict is checked here.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.config_data import is_camera_name
from utils.foreign_files import ForeignFileError, check_tokenizer_files, refuse_custom_code
from utils.misc import atomic_path, disk_full_named, flush_to_disk
from utils.shards import ShardError, check_shards, load_shards, remove_unused_shards, verify_shards
from utils.text import printable
from utils.torch_archive import Archive, ArchiveError, UnsafeArchiveError, open_archive

logger = logging.getLogger(__name__)

FORMAT = "paligemma-vla/1"
SUFFIX = ".pth.tar"
REQUIRED = {
    "format": str,
    "step": int,
    "config": dict,
    "model": dict,
    "statistics": list,
    "cameras": list,
    "backbone_config": dict,
    "image_processor": dict,
    "tokenizer_files": dict,
}
OPTIONAL = {"training_data": list, "saved_at": float, "ema": dict, "base": dict, "shards": dict, "optimizer": dict}


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


def load_checkpoint(path: str | Path, *, for_inference: bool = False) -> dict[str, Any]:
    """Read a checkpoint without executing anything of it, checked against its checksums.

    Tensors are mapped from the file: what is never touched never takes memory.

    Args:
        path: `*.pth.tar`.
        for_inference: leave the optimizer's state out; nothing of it is read.

    Returns:
        The dict that `save_checkpoint` was given: weights, optimizer, step, resolved config, statistics,
        camera names, backbone config, tokenizer and image-processor files.

    Raises:
        CheckpointError: no such file, truncated, damaged, holds a pickled object or a file that may carry code, or was
            not written by this program.
    """
    path = Path(path)
    archive = _open(path)
    checkpoint = archive.value
    missing = [key for key in REQUIRED if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise CheckpointError(f"{path}: not a checkpoint of this program (no {', '.join(missing)})")
    if checkpoint["format"] != FORMAT:
        raise CheckpointError(f"{path}: format {_quoted(checkpoint['format'])}; this version reads {FORMAT!r}")
    check_content(checkpoint, path)
    if for_inference:
        checkpoint.pop("optimizer", None)
    with _as_checkpoint_error(path):
        archive.verify(leave_out="optimizer" if for_inference else None)
    if "shards" in checkpoint:
        with _as_checkpoint_error(path):
            return load_shards(checkpoint, path, leave_out="optimizer" if for_inference else None)
    return checkpoint


def check_content(checkpoint: dict[str, Any], place: Path) -> None:
    """Check what a checkpoint holds, before anything is built from it.

    Args:
        checkpoint: a dict with every key of REQUIRED, of plain values and tensors.
        place: the file or folder that it was read from.

    Raises:
        CheckpointError: naming the part that is of another kind, or a file in it that may carry code.
    """
    for key, kind in (REQUIRED | OPTIONAL).items():
        value = checkpoint.get(key)
        absent = value is None and key in OPTIONAL
        right = isinstance(value, kind) and not isinstance(value, bool) or kind is float and type(value) is int
        if not absent and not right:
            raise CheckpointError(
                f"{place}: {key} is {_quoted(value)}; wanted a {kind.__name__}; it is not of this program"
            )
    if checkpoint["step"] < 0:
        raise CheckpointError(f"{place}: step is {checkpoint['step']}; wanted 0 or more; it is not of this program")
    averaged = (checkpoint.get("ema") or {}).get("weights", {})
    for name, weights in (("model", checkpoint["model"]), ("ema.weights", averaged)):
        sharded = "shards" in checkpoint
        if not isinstance(weights, dict) or not all(
            isinstance(key, str) and (isinstance(value, Tensor) or value is None and sharded)
            for key, value in weights.items()
        ):
            raise CheckpointError(f"{place}: {name} holds something other than tensors; it is not of this program")
    if not all(isinstance(camera, str) and is_camera_name(camera) for camera in checkpoint["cameras"]):
        raise CheckpointError(f"{place}: cameras are {_quoted(checkpoint['cameras'])}; wanted names such as image_1")
    base = checkpoint.get("base")
    if base is not None and not (
        base.keys() >= {"name_or_path", "fingerprint", "included"} and isinstance(base["fingerprint"], str)
    ):
        raise CheckpointError(f"{place}: base is {_quoted(base)}; it is not of this program")
    try:
        check_tokenizer_files(checkpoint["tokenizer_files"])
        refuse_custom_code(checkpoint["backbone_config"], "backbone_config")
        refuse_custom_code(checkpoint["image_processor"], "image_processor")
    except ForeignFileError as error:
        raise CheckpointError(f"{place}: {error}; do not use it") from None


def check_finite(weights: dict[str, Tensor], place: str | Path) -> None:
    """Raise a CheckpointError at the first weight that is NaN or infinite: a policy of such acts at random."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and tensor.numel() and not all(map(torch.isfinite, torch.aminmax(tensor))):
            raise CheckpointError(
                f"{place}: weight {printable(name)} holds values that are not finite; training had gone wrong by then, "
                "so use an earlier checkpoint of the run"
            )


def evaluation_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The weights that validation judged: their average (`training.ema_decay`) where the checkpoint has one."""
    if "ema" not in checkpoint:
        return checkpoint["model"]
    logger.info("the weights are their average over %d updates (EMA)", checkpoint["ema"]["updates"])
    return {**checkpoint["model"], **checkpoint["ema"]["weights"]}


def verify_checkpoint(path: str | Path) -> None:
    """Read a checkpoint file against its checksums, without keeping anything in memory.

    Raises:
        CheckpointError: naming the record that is damaged.
    """
    with _as_checkpoint_error(Path(path)):
        open_archive(Path(path), with_value=False).verify()


def newest_checkpoint(folder: str | Path, experiment_name: str) -> Path | None:
    """The checkpoint of an experiment of the highest step that is whole; None where there is none at all.

    Unreadable files, and those of another experiment, are named in a warning and passed over. Where all are of one
    other experiment, the folder was renamed, and they are its own.

    Raises:
        CheckpointError: there are checkpoints, and none is readable: starting anew would bury them.
    """
    found: dict[str, list[tuple[tuple[int, float], Path]]] = {}
    unreadable = []
    for path in sorted(Path(folder).glob(f"*{SUFFIX}")):
        try:
            name, progress = _progress(path)
            found.setdefault(name, []).append((progress, path))
        except CheckpointError as error:
            unreadable.append(error)
    if experiment_name not in found and len(found) == 1:
        experiment_name = next(iter(found))
    own = found.pop(experiment_name, [])
    unreadable += [_stranger(path, name, experiment_name) for name, files in found.items() for _, path in files]
    for _, path in sorted(own, reverse=True):
        try:
            archive = _open(path)
            with _as_checkpoint_error(path):
                archive.verify()
                if "shards" in archive.value:
                    verify_shards(archive.value, path)
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


def _progress(path: Path) -> tuple[str, tuple[int, float]]:
    """A checkpoint's experiment, and how far it is: its step, and among equal ones when it was written.

    The step comes first because clocks go wrong: one that is set back would make every later checkpoint an old one.

    Raises:
        CheckpointError: unreadable.
    """
    checkpoint = _open(path).value
    if not isinstance(checkpoint, dict) or not {"step", "saved_at", "config"} <= checkpoint.keys():
        raise CheckpointError(f"{path}: not a checkpoint of this program, or of an earlier version of it")
    with _as_checkpoint_error(path):
        if "shards" in checkpoint:
            check_shards(checkpoint, path)
    training = checkpoint["config"].get("training") if isinstance(checkpoint["config"], dict) else None
    name = training.get("experiment_name") if isinstance(training, dict) else None
    step, saved_at = checkpoint["step"], checkpoint["saved_at"]
    if not isinstance(name, str) or type(step) is not int or not isinstance(saved_at, int | float):
        raise CheckpointError(
            f"{path}: step {_quoted(step)} of {_quoted(name)} saved at {_quoted(saved_at)}; it is not of this program"
        )
    return name, (step, saved_at)


def _stranger(path: Path, name: str, experiment_name: str) -> CheckpointError:
    return CheckpointError(f"{path}: belongs to the experiment {_quoted(name)}, not to {experiment_name!r}")


def prune_checkpoints(folder: Path, keep: int, experiment_name: str, spared: Collection[Path] = frozenset()) -> None:
    """Remove all but the `keep` furthest `checkpoint_*` files of an experiment; the best model always stays.

    Args:
        folder, keep, experiment_name: where, how many, and whose.
        spared: files that stay and are not counted.
    """
    written = []
    for path in set(folder.glob(f"checkpoint_*{SUFFIX}")) - set(spared):
        try:
            name, progress = _progress(path)
            if name != experiment_name:
                raise _stranger(path, name, experiment_name)
            written.append((progress, path))
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
    content = _open(path).value
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
def _as_checkpoint_error(path: Path) -> Iterator[None]:
    try:
        yield
    except ShardError as error:
        raise CheckpointError(str(error)) from None
    except ArchiveError as error:
        raise CheckpointError(f"{path}: damaged ({error}); use an earlier checkpoint of the run") from None


def _open(path: Path) -> Archive:
    """The archive, its tensors mapped; only the index is checked."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; give a *.pth.tar file written by main_train.py")
    try:
        return open_archive(path)
    except UnsafeArchiveError as error:
        raise CheckpointError(
            f"{path}: holds something other than tensors and plain values, which is never unpickled ({error}); "
            "convert it with the program that wrote it, and do not trust it"
        ) from None
    except ArchiveError as error:
        raise CheckpointError(
            f"{path}: not a whole checkpoint, or not one of this program ({path.stat().st_size:,} bytes: {error}); use "
            "an earlier checkpoint of the run"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{path}: can't be read ({error.strerror}); see its permissions, or copy it again"
        ) from None


def _quoted(value: Any) -> str:
    return printable(repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}", 80)


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
