"""Is this machine ready for distributed training? Devices, backends, shared memory, ports, and a real all-reduce.

python diagnose_ddp.py                        # one process per GPU; without a GPU two, through gloo
python diagnose_ddp.py --nproc 4 --size_mb 256
torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 diagnose_ddp.py

The last form, on every machine, tries the exchange between several of them.
Prints a line per finding and a verdict; the exit status is 0 when nothing stands in the way.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from training.launch import is_rank, launch, master_port, member_of_group
from utils.config_utils import ConfigError

SHARED_MEMORY = Path("/dev/shm")
ENOUGH_SHARED_MEMORY = 1 << 30  # bytes; for NCCL, and batches larger than the memory that a loader shares itself
ROUNDS = 5  # all-reduces per timing, after one that is not timed


@dataclass(frozen=True)
class Finding:
    """One line of the report; a problem keeps training from working, a warning makes it slow or fragile."""

    kind: str  # ok, warning or problem
    text: str

    def __str__(self) -> str:
        return f"{self.kind:>7}  {self.text}"


def devices(nproc: int | None) -> list[Finding]:
    """What there is to train on."""
    found = [Finding("ok", f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores")]
    count = torch.cuda.device_count()
    if not count:
        why = "torch was built without CUDA" if torch.version.cuda is None else "no driver, or CUDA_VISIBLE_DEVICES"
        found.append(Finding("warning", f"no GPU is visible ({why}): training runs on the CPU, through gloo"))
    for i in range(count):
        properties = torch.cuda.get_device_properties(i)
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(i))
        kind = "ok" if free > 0.9 * total else "warning"
        busy = "" if kind == "ok" else ": another process uses it (nvidia-smi shows which)"
        found.append(Finding(kind, f"GPU {i}: {properties.name}, {free:.1f} of {total:.1f} GiB free{busy}"))
    pairs = [(a, b) for a in range(count) for b in range(count) if a < b]
    apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if apart:
        text = f"{len(apart)} of {len(pairs)} GPU pairs have no peer access (first {apart[0]}): they exchange"
        found.append(Finding("warning", f"{text} through the host, slowly; virtualization or ACS may be the reason"))
    if count and (nproc or 0) > count:
        found.append(Finding("problem", f"--nproc is {nproc}, but {count} GPUs are visible; give at most {count}"))
    return found


def backends() -> list[Finding]:
    """What ranks can talk through."""
    if not dist.is_available():
        return [Finding("problem", "this torch has no torch.distributed; install the wheel from pytorch.org")]
    gloo, nccl = dist.is_gloo_available(), dist.is_nccl_available()
    found = [Finding("ok" if gloo else "problem", "gloo is available" if gloo else "gloo is missing from this torch")]
    if torch.cuda.is_available() and not nccl:
        found.append(Finding("problem", "GPUs but no NCCL in this torch: install the Linux wheel for CUDA"))
    elif nccl:
        found.append(Finding("ok", f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))} is available"))
    return found


def shared_memory(folder: Path = SHARED_MEMORY, enough: int = ENOUGH_SHARED_MEMORY) -> list[Finding]:
    """Room where loader workers hand over batches."""
    if not folder.is_dir():
        return [Finding("warning", f"{folder} does not exist: set data.num_workers 0, or mount a tmpfs there")]
    usage = shutil.disk_usage(folder)
    text = f"{folder}: {usage.free / 2**30:.2f} of {usage.total / 2**30:.2f} GiB free"
    if usage.free >= enough:
        return [Finding("ok", text)]
    remedy = "start the container with --shm-size=8g (or --ipc=host), or lower data.num_workers and data.batch_size"
    return [Finding("warning", f"{text}, {enough / 2**30:.2f} wanted; {remedy}")]


def ports() -> list[Finding]:
    """Whether ranks can meet."""
    try:
        wanted = master_port()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", wanted))
            port = probe.getsockname()[1]
    except ConfigError as error:
        return [Finding("problem", str(error))]
    except OSError as error:
        return [Finding("problem", f"MASTER_PORT is {wanted}, which is in use ({error}); unset it or choose another")]
    found = [Finding("ok", f"MASTER_PORT {port} is free" if wanted else f"a free port was found ({port})")]
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        remedy = f"add it to /etc/hosts (127.0.0.1 {socket.gethostname()}), or set GLOO_SOCKET_IFNAME=lo on one machine"
        found.append(Finding("warning", f"the host name {socket.gethostname()} does not resolve; {remedy}"))
    return found


def all_reduce(device: torch.device, megabytes: float) -> list[Finding]:
    """Sums over all ranks against the known result, and their speed; the same findings on every rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    found, wrong = [], 0
    for count in (1, 1000, 1_000_003):
        values = torch.arange(count, device=device, dtype=torch.float32) % 1000
        total = values + rank
        dist.all_reduce(total)
        wrong += int((total != world * values + world * (world - 1) / 2).sum())
    all_wrong = torch.tensor(float(wrong), device=device)
    dist.all_reduce(all_wrong)
    if all_wrong:
        remedy = "try NCCL_P2P_DISABLE=1; if that helps, peer access between these GPUs is broken"
        found.append(Finding("problem", f"all-reduce over {world} ranks gave {int(all_wrong)} wrong values; {remedy}"))
    else:
        found.append(Finding("ok", f"all-reduce over {world} ranks ({dist.get_backend()}) gives the right sums"))
    for size in (megabytes / 64, megabytes):
        tensor = torch.zeros(max(1, int(size * 2**20 / 4)), device=device)
        seconds = _seconds(tensor)
        speed = tensor.nbytes * 2 * (world - 1) / world / seconds / 1e9  # bus bandwidth, as nccl-tests define it
        found.append(
            Finding("ok", f"all-reduce of {size:.4g} MiB: {1000 * seconds:.2f} ms, {speed:.2f} GB/s on the bus")
        )
    return found


def _seconds(tensor: torch.Tensor) -> float:
    """Of one all-reduce, the slowest rank's mean."""
    for i in range(ROUNDS + 1):
        if i == 1:
            _finish(tensor)
            began = time.perf_counter()
        dist.all_reduce(tensor)
    _finish(tensor)
    spent = torch.tensor((time.perf_counter() - began) / ROUNDS, device=tensor.device)
    dist.all_reduce(spent, op=dist.ReduceOp.MAX)
    return spent.item()


def _finish(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc", type=int, help="processes; default: one per GPU, two without a GPU")
    parser.add_argument("--size_mb", type=float, default=64.0, help="largest all-reduce, in MiB")
    parser.add_argument("--timeout_s", type=float, default=60.0, help="how long a rank waits for the others")
    args = parser.parse_args()
    if is_rank():
        with member_of_group(args.timeout_s) as place:
            found = all_reduce(place.device, args.size_mb)
            if place.rank == 0:
                print(*found, sep="\n", flush=True)
            if any(finding.kind == "problem" for finding in found):
                raise ConfigError("the ranks do not agree on sums")
        return 0
    found = devices(args.nproc) + backends() + shared_memory() + ports()
    print(*found, sep="\n", flush=True)
    if not any(finding.kind == "problem" for finding in found):
        nproc = args.nproc or torch.cuda.device_count() or 2
        status = launch([sys.executable, *sys.argv], nproc)
        if status:
            remedy = "the message above says why; NCCL_DEBUG=INFO or TORCH_DISTRIBUTED_DEBUG=DETAIL tell more"
            found.append(Finding("problem", f"{nproc} ranks could not exchange tensors (status {status}); {remedy}"))
            print(found[-1], flush=True)
    problems = [finding for finding in found if finding.kind == "problem"]
    if problems:
        print(f"verdict: not ready, {len(problems)} problem{'s' if len(problems) > 1 else ''}: {problems[0].text}")
        return 1
    print(f"verdict: ready; python main_train_ddp.py --config_path ... --nproc {nproc}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as error:
        sys.exit(f"error: {error}")
