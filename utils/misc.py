"""Small helpers shared by every part: seeds, logging, atomic files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import traceback
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from utils.library_noise import drop_library_noise

logger = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota or a file is full
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, the same on every machine and in every process.

    Randomness in training is a function of (seed, step, rank) through this, so a resumed run needs no saved
    random state.
    """
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def set_up_logging(log_file: str | Path | None = None, *, is_main: bool = True) -> None:
    """Log to the terminal and, when given, to a file; ranks other than the first log errors only."""
    sys.stdout, sys.stderr = _Output.around(sys.stdout), _Output.around(sys.stderr)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if log_file is not None and is_main:
        Path(log_file).parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
    logging.basicConfig(
        level=logging.INFO if is_main else logging.ERROR,
        handlers=handlers,
        force=True,
    )
    for handler in handlers:
        handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S"))
    drop_library_noise()


class _Formatter(logging.Formatter):
    """Log lines without control characters: text from outside may be in them, and a terminal obeys escape codes."""

    def format(self, record: logging.LogRecord) -> str:
        return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", super().format(record))


class _Output:
    """Standard output or error that somebody may stop reading (`| head`): what is written then is lost, and no error.

    A training, or a library's progress bar, would end by BrokenPipeError otherwise.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    @classmethod
    def around(cls, stream: Any) -> Any:
        """The stream, wrapped once."""
        return stream if isinstance(stream, cls) or stream is None else cls(stream)

    def write(self, text: str) -> int:
        """Write, or lose, the text."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            return self._closed(len(text))

    def flush(self) -> None:
        """Flush, unless nobody reads."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._closed()

    def _closed(self, length: int = 0) -> int:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        return length

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def end_in_log_file() -> Iterator[None]:
    """Write the error that ends the program to the log file too; where the terminal is gone, it is all that is left."""
    try:
        yield
    except BaseException as error:
        text = f"ended by {type(error).__name__}: {user_message(error)}"
        if not isinstance(error, ValueError | OSError | KeyboardInterrupt):
            text += "\n" + "".join(traceback.format_exception(error)).rstrip()
        record = logging.LogRecord(__name__, logging.ERROR, __file__, 0, text, None, None)
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handle(record)
        raise


@contextlib.contextmanager
def atomic_path(path: str | Path, *, durable: bool = False) -> Iterator[Path]:
    """Give a temporary name beside `path`; rename it into place on success, remove it on failure.

    A reader therefore finds the old file or the whole new one, never a part. With `durable` that holds through a
    power failure too: the new name is written to disk before this returns. The caller flushes the content
    (`flush_to_disk`).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
        if durable:
            flush_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Return when the content of a file, or the names in a folder, are on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


class WriteError(ValueError):
    """A file can't be written at the place that was named."""


class DiskFullError(WriteError):
    """There is no room for a file."""


@contextlib.contextmanager
def writing(path: str | Path, remedy: str = "make room there, or choose another place") -> Iterator[None]:
    """Turn the system's refusal to write a file or folder into one line.

    Raises:
        WriteError: naming `path`, the reason, and the remedy.
        DiskFullError: the disk or a quota is full; also naming the bytes that are free.
    """
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else " ".join(str(error).split())
        if error.filename and Path(error.filename) in Path(path).parents:  # a file where a folder should be
            reason += f": {error.filename}"
        if error.errno in FULL:
            free = shutil.disk_usage(next(folder for folder in Path(path).absolute().parents if folder.is_dir())).free
            reason += f", {free:,} bytes are free"
        kind = DiskFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else WriteError
        raise kind(f"{path}: not written ({reason}); {remedy}") from None


@contextlib.contextmanager
def disk_full_named(path: Path, needed: int) -> Iterator[None]:
    """Turn the system's word for a full disk, quota or file size limit into one that says what to do.

    Raises:
        DiskFullError: naming `path`, the bytes `needed` for it, and those that are free.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        free = shutil.disk_usage(path.parent).free
        raise DiskFullError(
            f"{path}: not written ({error.strerror}): it needs {needed:,} bytes, {free:,} are free; earlier "
            "checkpoints are as they were. Make room (training.keep_last_k keeps fewer of them; quotas and ulimit -f "
            "count too), then continue with --resume_checkpoint auto"
        ) from None


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of `atomic_path` that a killed process left in a folder or below it."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is the GPU when there is one, else the CPU; anything else is taken as torch spells it.

    Raises:
        ValueError: there is no such device, or this machine, or this torch, has none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}; give auto, cpu, cuda, cuda:1, ... or mps") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            found = f"this machine has {count} GPUs that torch {torch.__version__} can use"
            raise ValueError(f"device is {name!r}, but {found}; give auto, cpu or one of them")
    elif device.type != "cpu":
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, NotImplementedError):
            raise ValueError(f"device is {name!r}, which torch {torch.__version__} can't use here; give cpu") from None
    return device


def require_compiler(setting: str, remedy: str) -> None:
    """Raise a ValueError naming the setting that asks for torch.compile where no compiler is installed."""
    compilers = [os.environ.get(name) for name in ("CXX", "CC")] + ["g++", "gcc", "clang++", "clang", "cc"]
    if not any(shutil.which(name) for name in compilers if name):
        raise ValueError(
            f"{setting}: torch.compile builds its code with a C++ compiler, and this machine has none (g++, clang++, "
            f"$CXX); install one, or {remedy}"
        )


def count_parameters(module: torch.nn.Module) -> tuple[int, int]:
    """(all parameters, those that train)."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)


def user_message(error: BaseException) -> str:
    """The error's own words; a loader worker wraps them in its traceback, which is left out.

    To torch's words for a full GPU it adds what to do.
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        path = error.filename2 or error.filename
        return f"{path}: {error.strerror}; name another place, or see to its room and permissions"
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"{text.splitlines()[0]} Raise training.gradient_accumulation_steps or lower data.batch_size; "
            "model.vlm_config.gradient_checkpointing, LoRA (configs/vla_lora.yaml) and quantization need less, and "
            "main_train.py --dry_run tells what takes the memory"
        )
    if "Original Traceback" not in text:
        return text
    kind = type(error).__name__
    return text[text.rindex(f"{kind}: ") + len(kind) + 2 :].strip()


@contextlib.contextmanager
def errors_in_one_line(*mendable: type[BaseException], interrupted: str = "stopped") -> Iterator[None]:
    """What a script's `main` runs in: an error that its user can mend ends it with one line instead of a traceback.

    Args:
        mendable: kinds of errors whose message says what to do.
        interrupted: what Ctrl-C prints.
    """
    try:
        yield
    except mendable as error:
        sys.exit(f"error: {user_message(error)}")
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        sys.exit(130)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that grows by a line each; a last line that a crash cut off is left out, with a warning."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            logger.warning("%s: a line cut off by a crash is left out: %r", path, text[:60])
    return lines
