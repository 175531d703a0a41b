"""Is this machine ready for distributed training? Devices, backends, shared memory, ports, and a real all-reduce.

python diagnose_ddp.py                        # one process per GPU; without a GPU two, through gloo
python diagnose_ddp.py --nproc 4 --size_mb 256
torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 diagnose_ddp.py

The last form, on every machine, tries the exchange between several of them.
Prints a line per check and a verdict; the exit status is 0 when nothing stands in the way.
"""

from __future__ import annotations

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
from utils.arguments import CommandParser, at_least, run_command
from utils.config_utils import ConfigError

SHARED_MEMORY = Path("/dev/shm")
ENOUGH_SHARED_MEMORY = 1 << 30  # bytes; for NCCL, and batches larger than the memory that a loader shares itself
ROUNDS = 5  # all-reduces per timing, after one that is not timed


@dataclass(frozen=True)
class Check:
    """One line of the report: a problem keeps training from working, a warning makes it slow or fragile."""

    kind: str  # ok, warning or problem
    text: str

    def __str__(self) -> str:
        return f"{self.kind:>7}  {self.text}"


def devices(nproc: int | None) -> list[Check]:
    """The GPUs of this machine, or that there is none."""
    checks = [Check("ok", f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores")]
    count = torch.cuda.device_count()
    if not count:
        why = "torch was built without CUDA" if torch.version.cuda is None else "no driver, or CUDA_VISIBLE_DEVICES"
        checks.append(Check("warning", f"no GPU is visible ({why}): training runs on the CPU, through gloo"))
    for i in range(count):
        properties = torch.cuda.get_device_properties(i)
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(i))
        kind = "ok" if free > 0.9 * total else "warning"
        busy = "" if kind == "ok" else ": another process uses it (nvidia-smi shows which)"
        checks.append(Check(kind, f"GPU {i}: {properties.name}, {free:.1f} of {total:.1f} GiB free{busy}"))
    pairs = [(a, b) for a in range(count) for b in range(count) if a < b]
    apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if apart:
        text = f"{len(apart)} of {len(pairs)} GPU pairs have no peer access (first {apart[0]}): they exchange"
        checks.append(Check("warning", f"{text} through the host, slowly; virtualization or ACS may be the reason"))
    if count and (nproc or 0) > count:
        checks.append(Check("problem", f"--nproc is {nproc}, but {count} GPUs are visible; give at most {count}"))
    return checks


def backends() -> list[Check]:
    """The libraries through which ranks exchange tensors."""
    if not dist.is_available():
        return [Check("problem", "this torch has no torch.distributed; install the wheel from pytorch.org")]
    gloo, nccl = dist.is_gloo_available(), dist.is_nccl_available()
    checks = [Check("ok" if gloo else "problem", "gloo is available" if gloo else "gloo is missing from this torch")]
    if torch.cuda.is_available() and not nccl:
        checks.append(Check("problem", "GPUs but no NCCL in this torch: install the Linux wheel for CUDA"))
    elif nccl:
        checks.append(Check("ok", f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))} is available"))
    return checks


def shared_memory(folder: Path = SHARED_MEMORY, enough: int = ENOUGH_SHARED_MEMORY) -> list[Check]:
    """Shared memory, through which loader workers hand over batches."""
    if not folder.is_dir():
        return [Check("warning", f"{folder} does not exist: set data.num_workers 0, or mount a tmpfs there")]
    usage = shutil.disk_usage(folder)
    text = f"{folder}: {usage.free / 2**30:.2f} of {usage.total / 2**30:.2f} GiB free"
    if usage.free >= enough:
        return [Check("ok", text)]
    remedy = "start the container with --shm-size=8g (or --ipc=host), or lower data.num_workers and data.batch_size"
    return [Check("warning", f"{text}, {enough / 2**30:.2f} wanted; {remedy}")]


def ports() -> list[Check]:
    """The port and the host name through which ranks find each other."""
    try:
        port_setting = master_port()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port_setting))
            port = probe.getsockname()[1]
    except ConfigError as error:
        return [Check("problem", str(error))]
    except OSError as error:
        return [
            Check("problem", f"MASTER_PORT is {port_setting}, which is in use ({error}); unset it or choose another")
        ]
    checks = [Check("ok", f"MASTER_PORT {port} is free" if port_setting else f"a free port was found ({port})")]
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        remedy = f"add it to /etc/hosts (127.0.0.1 {socket.gethostname()}), or set GLOO_SOCKET_IFNAME=lo on one machine"
        checks.append(Check("warning", f"the host name {socket.gethostname()} does not resolve; {remedy}"))
    return checks


def all_reduce(device: torch.device, megabytes: float) -> list[Check]:
    """Compare sums over all ranks with the known result, and time them; every rank returns the same checks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    checks, wrong = [], 0
    for count in (1, 1000, 1_000_003):
        values = torch.arange(count, device=device, dtype=torch.float32) % 1000
        total = values + rank
        dist.all_reduce(total)
        wrong += int((total != world * values + world * (world - 1) / 2).sum())
    all_wrong = torch.tensor(float(wrong), device=device)
    dist.all_reduce(all_wrong)
    if all_wrong:
        remedy = "try NCCL_P2P_DISABLE=1; if that helps, peer access between these GPUs is broken"
        checks.append(Check("problem", f"all-reduce over {world} ranks gave {int(all_wrong)} wrong values; {remedy}"))
    else:
        checks.append(Check("ok", f"all-reduce over {world} ranks ({dist.get_backend()}) gives the right sums"))
    for size in (megabytes / 64, megabytes):
        tensor = torch.zeros(max(1, int(size * 2**20 / 4)), device=device)
        seconds = _seconds(tensor)
        speed = tensor.nbytes * 2 * (world - 1) / world / seconds / 1e9  # bus bandwidth, as nccl-tests define it
        checks.append(
            Check("ok", f"all-reduce of {size:.4g} MiB: {1000 * seconds:.2f} ms, {speed:.2f} GB/s on the bus")
        )
    return checks


def _seconds(tensor: torch.Tensor) -> float:
    """Seconds of one all-reduce of the tensor, on average, on the slowest rank."""
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
    parser = CommandParser(__doc__)
    parser.add_argument("--nproc", type=at_least(1), help="processes; default: one per GPU, two without a GPU")
    parser.add_argument("--size_mb", type=float, default=64.0, help="largest all-reduce, in MiB")
    parser.add_argument("--timeout_s", type=float, default=60.0, help="how long a rank waits for the others")
    args = parser.parse_args()
    for name, least in (("size_mb", 0.001), ("timeout_s", 1)):
        value = getattr(args, name)
        if not least <= value < float("inf"):
            parser.error(f"--{name} is {value}; give {least} or more")
    if is_rank():
        with member_of_group(args.timeout_s) as place:
            checks = all_reduce(place.device, args.size_mb)
            if place.rank == 0:
                print(*checks, sep="\n", flush=True)
            if any(check.kind == "problem" for check in checks):
                raise ConfigError("the ranks do not agree on sums")
        return 0
    checks = devices(args.nproc) + backends() + shared_memory() + ports()
    print(*checks, sep="\n", flush=True)
    if not any(check.kind == "problem" for check in checks):
        nproc = args.nproc or torch.cuda.device_count() or 2
        status = launch([sys.executable, *sys.argv], nproc)
        if status:
            remedy = "the message above says why; NCCL_DEBUG=INFO or TORCH_DISTRIBUTED_DEBUG=DETAIL tell more"
            checks.append(Check("problem", f"{nproc} ranks could not exchange tensors (status {status}); {remedy}"))
            print(checks[-1], flush=True)
    problems = [check for check in checks if check.kind == "problem"]
    if problems:
        print(f"verdict: not ready, {len(problems)} problem{'s' if len(problems) > 1 else ''}: {problems[0].text}")
        return 1
    print(f"verdict: ready; python main_train_ddp.py --config_path ... --nproc {nproc}")
    return 0


if __name__ == "__main__":
    run_command(main)
