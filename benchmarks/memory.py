"""The memory of processes, in MB."""

from __future__ import annotations

import pathlib
import re
import resource


def resident_mb(pid: int) -> float:
    """Resident memory of a process."""
    return _status(pid, "VmRSS")


def peak_of(pid: int) -> float:
    """The largest resident memory that a process has had."""
    return _status(pid, "VmHWM")


def peak_mb() -> float:
    """The largest resident memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def reset_peak() -> None:
    """Let `peak_of` this process begin at what it has now."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def limit_memory(megabytes: int) -> None:
    """Let this process map so much more than it has now."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _status(pid: int, name: str) -> float:
    text = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE)[1]) / 1024
