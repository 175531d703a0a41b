"""The processes of a run: where each one trains, starting one per GPU, and what the user sees when one of them fails.

`torchrun` starts and watches the ranks of several machines. `launch` does the same on one machine and prints less.
Either way a rank lives inside `member_of_group`, which joins the process group and reports errors: of all the ranks of
a machine only the first to fail prints its message. A rank that dies ends the job within `GRACE_S` seconds, a rank that
hangs ends it after `training.distributed_timeout_s`.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from training.failure import NonFiniteLossError
from training.stopping import STOP_SIGNALS
from utils.config_utils import ConfigError
from utils.misc import pick_device, user_message

GRACE_S = 10.0  # from the first failure to the end of ranks that do not stop by themselves
LAUNCHED = "PALIGEMMA_VLA_LAUNCHED"  # set in ranks that `launch` started: the file that takes the first error
# Errors that a user can mend: their message is shown in one line, without a traceback.
USER_ERRORS = (ValueError, ImportError, NonFiniteLossError, torch.OutOfMemoryError)
# How gloo and NCCL word the loss of another rank.
LOST = re.compile(r"Connection (closed|reset|refused)|Timed out|timed out|Broken pipe|remote process|Socket Timeout")


@dataclass(frozen=True)
class Place:
    """Where a process trains, and among how many.

    Attributes:
        device: its GPU, or the CPU.
        rank, world_size: which process it is, of how many.
        in_group: whether there is a process group, even of one rank.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    in_group: bool = False


def is_rank() -> bool:
    """Whether torchrun, or `launch`, started this process as one rank of several."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


@contextlib.contextmanager
def training_place(timeout_s: float) -> Iterator[Place]:
    """Where this process trains: as a rank of a group, see `member_of_group`, or else alone."""
    if is_rank():
        with member_of_group(timeout_s) as place:
            yield place
    else:
        yield Place(pick_device())


def launch(command: list[str], nproc: int | None, grace_s: float = GRACE_S) -> int:
    """Run `command` as `nproc` ranks of this machine and wait for them.

    SIGTERM, SIGINT and SIGHUP are passed on, and the ranks get all the time that they need to save and stop. If this
    process is killed, the ranks end as well.

    Args:
        command: of each rank; it finds RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its environment.
        nproc: ranks; None: one per GPU, or one on the CPU.
        grace_s: from the first failure to SIGKILL for the other ranks.

    Returns:
        The exit status: 0 when all ranks succeeded.

    Raises:
        ConfigError: `nproc` is below 1 or above the number of GPUs, or MASTER_PORT is no free port.
    """
    gpus = torch.cuda.device_count()
    nproc = max(1, gpus) if nproc is None else nproc
    if nproc < 1:
        raise ConfigError(f"--nproc is {nproc}; give 1 or more")
    if gpus and nproc > gpus:
        raise ConfigError(f"--nproc is {nproc}, but {gpus} GPUs are visible; give at most {gpus}")
    store = _host_store()
    with tempfile.TemporaryDirectory(prefix="paligemma_vla_") as folder:
        error_file = Path(folder) / "first_error"
        shared = {
            "WORLD_SIZE": str(nproc),
            "LOCAL_WORLD_SIZE": str(nproc),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            # Ranks use the store above, which outlives them all, instead of one in rank 0. torchrun does the same.
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc))),
            LAUNCHED: str(error_file),
        }
        # In a session of its own a rank gets Ctrl-C from this process alone, not from the terminal too. Its standard
        # input closes when this process ends, however it ends; see `_die_with_launcher`.
        ranks = [
            subprocess.Popen(
                command,
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                start_new_session=True,
            )
            for rank in range(nproc)
        ]
        with _pass_on_signals(ranks) as stopped:
            try:
                failed = _wait(ranks)
            finally:
                forced = _stop(ranks, grace_s)
        if failed is None:
            return 0
        code = ranks[failed].returncode
        if stopped and code == -stopped[0]:
            return 128 + stopped[0]  # the signal came before the ranks were ready to handle it
        print(_verdict(failed, code, error_file, [rank for rank in forced if rank != failed]), file=sys.stderr)
        return code if code > 0 else 128 - code


@contextlib.contextmanager
def member_of_group(timeout_s: float) -> Iterator[Place]:
    """Join the process group as the rank that the environment names; gives its place.

    An error inside ends the process with status 1. The first rank of this machine to fail reports its error.

    Args:
        timeout_s: how long a collective waits for the other ranks.
    """
    rank = int(os.environ["RANK"])
    if LAUNCHED in os.environ:
        threading.Thread(target=_die_with_launcher, daemon=True).start()
    failed = False
    try:
        device = _join(timeout_s)
        yield Place(device, dist.get_rank(), dist.get_world_size(), in_group=True)
        dist.barrier()  # no rank leaves before the first has written the last checkpoint
        dist.destroy_process_group()
    except Exception as error:
        _report(rank, error)
        traceback.clear_frames(error.__traceback__)
        failed = True
    if failed:
        gc.collect()  # finalizers of what the cleared frames held, such as the one that removes a temporary cache
        logging.shutdown()
        os._exit(1)  # a normal exit would wait for the other ranks, or abort because of unfinished collectives


def master_port() -> int:
    """The port that MASTER_PORT names; 0, which stands for any free port, where it is not set.

    Raises:
        ConfigError: MASTER_PORT is no port number.
    """
    text = os.environ.get("MASTER_PORT") or "0"
    if not (text.isdecimal() and int(text) < 1 << 16):
        raise ConfigError(f"MASTER_PORT is {text!r}; give a number below 65536, or unset it")
    return int(text)


def _join(timeout_s: float) -> torch.device:
    local_rank, timeout = int(os.environ.get("LOCAL_RANK", 0)), datetime.timedelta(seconds=timeout_s)
    if not torch.cuda.is_available():
        dist.init_process_group("gloo", timeout=timeout)
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} are visible; start one process per GPU"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", timeout=timeout, device_id=device)
    return device


def _host_store() -> dist.TCPStore:
    port = master_port()
    try:
        return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"MASTER_PORT is {port}, which can't be opened ({reason}); unset it or choose another"
        ) from None


def _die_with_launcher() -> None:
    # Blocks until the launcher ends. sys.stdin.read would hold a lock, which forked loader workers would inherit.
    os.read(0, 1)
    os._exit(1)


@contextlib.contextmanager
def _pass_on_signals(ranks: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Send the signals that ask for a stop on to the ranks; gives the growing list of the signals received."""
    received: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        received.append(number)
        for rank in ranks:
            rank.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int | None:
    """Wait until a rank has failed, and return its number, or until all have succeeded (None)."""
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            # When a rank dies the others fail too, because they lost it. Report the killed one (its code is negative).
            return min(failed, key=lambda rank: (codes[rank] > 0, rank))
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.1)


def _stop(ranks: list[subprocess.Popen[bytes]], grace_s: float) -> list[int]:
    """End the ranks that still run, after `grace_s` by SIGKILL; returns the numbers of those that had to be killed."""
    deadline, forced = time.monotonic() + grace_s, []
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
    for number, rank in enumerate(ranks):
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            forced.append(number)
            rank.kill()
            rank.wait()
    return forced


def _verdict(failed: int, code: int, error_file: Path, forced: list[int]) -> str:
    """What to print of a job that failed: the first error that a rank reported, or how the rank `failed` ended."""
    text = error_file.read_text(encoding="utf-8") if error_file.is_file() else ""
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (the kernel does that when memory runs out)" if name == "SIGKILL" else ""
        text = f"error: rank {failed} was ended by {name}{hint}; the other ranks were stopped"
    elif not text:
        text = f"error: rank {failed} ended with status {code} and no message; the other ranks were stopped"
    if forced:
        text += f"\nerror: rank {', '.join(map(str, forced))} did not react and had to be killed"
    return text


def _report(rank: int, error: Exception) -> None:
    """Hand the message to the launcher, or print it; only the first rank of a machine that fails does either."""
    if isinstance(error, USER_ERRORS):
        text = f"error: {user_message(error)}"
    elif LOST.search(str(error)):
        text = (
            f"error: rank {rank} lost another rank ({str(error).splitlines()[0]}); that rank died or hangs. If it only "
            "needs longer, raise training.distributed_timeout_s"
        )
    else:
        text = "".join(traceback.format_exception(error)) + f"error: rank {rank} failed with the traceback above"
    path = os.environ.get(LAUNCHED)
    if path is None and "TORCHELASTIC_ERROR_FILE" in os.environ:
        path = str(Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parents[1] / "first_error")
    if path is not None:
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return
    if LAUNCHED not in os.environ:
        print(text, file=sys.stderr, flush=True)
