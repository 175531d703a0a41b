"""One self-contained checkpoint file: written whole or not at all, read without executing any pickle."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from utils.misc import atomic_path

FORMAT = "paligemma-vla/1"
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
    """Write to a temporary name, flush to disk, rename; a crash leaves the previous file as it was."""
    with atomic_path(path) as temporary:
        torch.save({"format": FORMAT, **checkpoint}, temporary)


def load_checkpoint(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint with `weights_only=True`.

    Returns:
        The dict that `save_checkpoint` was given: weights, optimizer, step, resolved config, statistics,
        camera names, backbone config, tokenizer and image-processor files.

    Raises:
        CheckpointError: no such file, truncated, holds a pickled object, or was not written by this program.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; give a *.pth.tar file written by main_train.py")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path}: not a whole checkpoint ({path.stat().st_size} bytes, no archive inside): truncated, or another "
            "kind of file; use an earlier checkpoint of the run"
        )
    try:
        _verify_index(path)
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: holds something other than tensors and plain values, which is never unpickled ({reason}); "
            "convert it with the program that wrote it, and do not trust it"
        ) from None
    except (RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: damaged ({error}); use an earlier checkpoint of the run") from None
    missing = [key for key in REQUIRED if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise CheckpointError(f"{path}: not a checkpoint of this program (no {', '.join(missing)})")
    if checkpoint["format"] != FORMAT:
        raise CheckpointError(f"{path}: format {checkpoint['format']!r}; this version reads {FORMAT!r}")
    return checkpoint


def _verify_index(path: Path) -> None:
    """Read the archive's index record against its checksum, so that a damaged one is told from an unsafe one."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("/data.pkl"):
                archive.read(name)
