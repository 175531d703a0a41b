"""One training run at a time in a run's folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from utils.config_reader import ConfigError
from utils.text import printable

logger = logging.getLogger(__name__)

NAME = ".lock"
_HELD_BY_ANOTHER = (errno.EACCES, errno.EAGAIN)


@contextlib.contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold a run's folder: two runs in it would mix their logs and prune each other's checkpoints.

    The lock belongs to this process alone, not to its loader workers, and ends with it, however it ends.

    Args:
        folder: of the run, {checkpoint_dir}/{experiment_name}; made where it is not there.

    Raises:
        ConfigError: another process holds it, naming that process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / NAME, "a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # POSIX: not inherited by a fork
        except OSError as error:
            if error.errno not in _HELD_BY_ANOTHER:
                logger.warning("%s: this file system has no locks (%s); start no second run there", folder, error)
                yield
                return
            file.seek(0)
            holder = printable(file.read().strip()) or "another process"
            raise ConfigError(
                f"{folder}: a run is writing there ({holder}); wait for it, stop it, or choose another "
                "training.experiment_name"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
