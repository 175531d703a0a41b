"""Names that may be a local folder or the id of a Hugging Face hub repository.

The hub's own client tries an unreachable hub for up to a minute, with a warning at every attempt, before it looks for
what was downloaded earlier. `hub_options` asks once.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

SECONDS = 5  # that the hub may take to answer at all


def is_local(name_or_path: str | Path) -> bool:
    """Whether it is a path and no hub id: it exists, starts like a path, or has more than one slash."""
    text = str(name_or_path)
    return text.startswith(("/", "./", "../", "~")) or text.count("/") > 1 or Path(text).exists()


def hub_options(name_or_path: str | Path) -> dict[str, Any]:
    """What to add to a call of a Hugging Face library that takes a folder or a hub id.

    Returns:
        `local_files_only` for a repository that was downloaded earlier, where the hub cannot be reached; else nothing.

    Raises:
        OSError: a path that does not exist, or an id that was not downloaded while the hub cannot be reached.
    """
    if is_local(name_or_path):
        if not Path(name_or_path).exists():
            raise OSError("no such file or folder")
        return {}
    problem = unreachable()
    if problem is None:
        return {}
    from huggingface_hub import constants

    if not Path(constants.HF_HUB_CACHE, f"models--{str(name_or_path).replace('/', '--')}").is_dir():
        raise OSError(f"no such folder here, nor was it downloaded before, and {problem}")
    return {"local_files_only": True}


@functools.cache
def unreachable() -> str | None:
    """Why the hub cannot be reached, asked once in a process; None where it can."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # of whichever library the hub's client takes its sessions from
        return f"{constants.ENDPOINT} does not answer ({(str(error).splitlines() or [type(error).__name__])[0]})"
    return None
