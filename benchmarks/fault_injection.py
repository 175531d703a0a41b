"""What training survives: kills at any moment, a damaged checkpoint, a full disk, ranks that die or hang.

    python benchmarks/fault_injection.py [--quick] [--kills 100] [--json faults.json]

Kills: `main_train.py --resume_checkpoint auto` is started and SIGKILLed again and again, every other time at a random
moment, else while a checkpoint is being written. After every kill all checkpoints are read in full. A run that reaches
its end is compared with one that was never interrupted: which samples every step took (`training.log_samples`), every
logged loss, and the weights, optimizer and average of the last checkpoint, to the bit.

The processes are forked from one that has imported the program and done nothing else, which saves the seconds that
importing takes; the kills are real. A kill counts as "during a save" only if it left a temporary file behind.

Full disk: checkpoints go to a small tmpfs, or where mounting is not permitted under a file size limit. Ranks: two
processes of `main_train_ddp.py`, one of which is killed, or stopped (SIGSTOP).

JSON keys: kills, kills_during_save, kills_while_starting, failed_resumes, unreadable_checkpoints,
repeated_or_skipped_steps, differing_losses, final_state_bitwise, full_disk, damaged_newest, rank_death_seconds,
hung_rank_seconds; passed.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pathlib
import random
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
import yaml

if not __package__:
    import _repository  # noqa: F401

from benchmarks.synthetic import jpeg_frames, write_dataset
from data.statistics import calculate_for_config
from model.tiny.paligemma import make_tiny_paligemma
from utils.arguments import CommandParser
from utils.checkpoint import CheckpointError, load_checkpoint, newest_checkpoint
from utils.config_utils import load_config
from utils.misc import read_json_lines
from utils.text_table import text_table

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS, QUICK_STEPS = 300, 60
TRAINING_S = 3.0  # how long a process trains at most before it is killed at a random moment
DEATH_LIMIT_S, HANG_TIMEOUT_S, HANG_MARGIN_S = 30.0, 10.0, 30.0
SLOW_IMPORTS = (
    "data.loader",
    "model.vla_model",
    "training.trainer_fsdp",
)  # of main_train.py, done once
UNTIMED = ("samples_per_second", "data_wait")


def write_project(folder: pathlib.Path, steps: int) -> pathlib.Path:
    """Data, backbone, statistics and the config of a run whose steps take some ten milliseconds."""
    make_tiny_paligemma(
        folder / "backbone",
        prompts=("pick up the red block",),
        image_size=32,
        patch_size=8,
        vision_width=32,
        vision_layers=1,
        vision_heads=2,
        text_width=32,
        text_layers=1,
        text_heads=2,
        text_kv_heads=1,
        vocab_size=512,
    )
    write_dataset(folder / "train.parquet", 200, jpeg_frames(20, 32), dims=4)
    config = {
        "data": {
            "train_parquet_files": str(folder / "train.parquet"),
            "normalization_stats_path": str(folder / "stats.json"),
            "val_fraction": 0.5,
            "state_dim": 4,
            "batch_size": 4,
            "num_workers": 1,
            "cache_dir": str(folder / "cache"),
        },
        "model": {
            "vlm_config": {"model_name_or_path": str(folder / "backbone"), "dtype": "float32"},
            "action_head_config": {
                "horizon": 4,
                "per_action_dim": 4,
                "hidden_dim": 32,
                "num_layers": 1,
                "num_heads": 2,
                "dropout_prob": 0.1,
            },
        },
        "training": {
            "checkpoint_dir": str(folder / "experiments"),
            "max_steps": steps,
            "epochs": 1000,
            "log_interval": 3,
            "save_every_n_steps": 4,
            "keep_last_k": 3,
            "val_max_batches": 2,
            "val_num_plots": 0,
            "ema_decay": 0.99,
            "log_samples": True,
            "num_threads": 1,
        },
        "inference": {"num_inference_steps": 2},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    statistics = calculate_for_config(load_config(path), num_workers=1)
    (folder / "stats.json").write_text(json.dumps(statistics), encoding="utf-8")
    return path


class Run:
    """One experiment of a project, started as often as need be."""

    def __init__(self, config_path: pathlib.Path, name: str, *settings: str) -> None:
        self.name, self.log = name, config_path.parent / f"{name}.log"
        self.folder = config_path.parent / "experiments" / name
        self.checkpoints = self.folder / "checkpoints"
        self.argv = ["--config_path", str(config_path), "--experiment_name", name, "--resume_checkpoint", "auto"]
        self.argv += ["--set", *settings] if settings else []

    def start(self, file_limit: int | None = None) -> multiprocessing.process.BaseProcess:
        """A process of main_train.py."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["benchmarks.fault_injection", *SLOW_IMPORTS])
        process = context.Process(target=_train, args=(self.argv, str(self.log), file_limit))
        process.start()
        return process

    def finish(self, file_limit: int | None = None) -> int:
        """Run to the end; the exit status."""
        process = self.start(file_limit)
        process.join()
        return process.exitcode

    def half_written(self) -> set[pathlib.Path]:
        """Temporary files of checkpoints."""
        return set(self.checkpoints.glob(".*.tmp"))

    def last_step(self) -> int:
        """The last optimizer step that the log of samples holds; 0 before the first."""
        path = self.folder / "logs" / "samples_rank_0.jsonl"
        return max((line["step"] for line in read_json_lines(path)), default=0) if path.is_file() else 0

    def unreadable(self) -> list[str]:
        """What is wrong with checkpoints that can't be read."""
        faults = []
        for path in self.checkpoints.glob("*.pth.tar"):
            try:
                load_checkpoint(path)
            except CheckpointError as error:
                faults.append(str(error))
        return faults

    def samples(self) -> dict[int, list[Any]]:
        """Step -> what it took, every line of the log."""
        taken: dict[int, list[Any]] = {}
        for line in read_json_lines(self.folder / "logs" / "samples_rank_0.jsonl"):
            taken.setdefault(line["step"], []).append(line["samples"])
        return taken

    def losses(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl without timings."""
        lines = read_json_lines(self.folder / "logs" / "metrics.jsonl")
        return [{key: value for key, value in line.items() if key not in UNTIMED} for line in lines]

    def final_state(self) -> dict[str, Any]:
        """What the newest checkpoint holds of weights, average and optimizer."""
        checkpoint = load_checkpoint(newest_checkpoint(self.checkpoints, self.name))
        return {key: checkpoint[key] for key in ("step", "model", "ema", "optimizer", "best")}


def _train(argv: list[str], log: str, file_limit: int | None) -> None:
    """main_train.py as a process of its own."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the loader's workers, as in a process of its own
    if file_limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = [str(ROOT / "main_train.py"), *argv]
    runpy.run_path(sys.argv[0], run_name="__main__")


def compare(run: Run, reference: Run) -> dict[str, Any]:
    """A run that was interrupted against one that was not."""
    ours, theirs = run.samples(), reference.samples()
    return {
        "repeated_or_skipped_steps": sum(ours.get(step) != theirs.get(step) for step in ours.keys() | theirs.keys()),
        "differing_losses": 0 if run.losses() == reference.losses() else 1,
        "final_state_bitwise": _equal(run.final_state(), reference.final_state()),
    }


def _equal(a: Any, b: Any) -> bool:
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(value, b[key]) for key, value in a.items())
    return a == b


def kill_often(config_path: pathlib.Path, reference: Run, start_s: float, kills: int, seed: int) -> dict[str, Any]:
    """Kill runs until `kills` kills are done, then let the last one finish; every run is compared.

    Args:
        start_s: about how long a process takes to its first step.
    """
    rng = random.Random(seed)
    found = dict.fromkeys(("kills", "kills_during_save", "kills_while_starting"), 0)
    found |= dict.fromkeys(("failed_resumes", "unreadable_checkpoints", "runs"), 0)
    totals = {"repeated_or_skipped_steps": 0, "differing_losses": 0, "final_state_bitwise": True}
    while found["kills"] < kills:
        run = Run(config_path, f"killed_{found['runs']}")
        found["runs"] += 1
        ended = False
        while not ended:
            leftovers, steps = run.half_written(), run.last_step()
            process = run.start()
            if found["kills"] < kills:
                _kill(process, run, rng.uniform(0, start_s + TRAINING_S), at_save=found["kills"] % 2 == 1)
            process.join()
            ended = process.exitcode == 0
            if process.exitcode == -signal.SIGKILL:
                found["kills"] += 1
                found["kills_during_save"] += bool(run.half_written() - leftovers)
                found["kills_while_starting"] += run.last_step() <= steps
            elif not ended:
                found["failed_resumes"] += 1
                print(f"exit status {process.exitcode}; see {run.log}", file=sys.stderr)
                return found | totals | {"final_state_bitwise": False}
            found["unreadable_checkpoints"] += len(run.unreadable())
        result = compare(run, reference)
        for key in ("repeated_or_skipped_steps", "differing_losses"):
            totals[key] += result[key]
        totals["final_state_bitwise"] &= result["final_state_bitwise"]
        print(f"run {found['runs']}: {found['kills']} kills, {found['kills_during_save']} during a save", flush=True)
    return found | totals


def _kill(process: multiprocessing.process.BaseProcess, run: Run, after_s: float, *, at_save: bool) -> None:
    """SIGKILL after a time, or then as soon as a checkpoint is half written."""
    wait_until(lambda: process.exitcode is not None, after_s)
    if at_save:
        leftovers = run.half_written()  # of an earlier kill, until the resume removes them
        wait_until(lambda: process.exitcode is not None or run.half_written() - leftovers, 60, 0.0005)
    process.kill()


def wait_until(condition: Any, timeout_s: float, every_s: float = 0.01) -> bool:
    """Whether a condition came true in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(every_s)
    return bool(condition())


def damage_newest(config_path: pathlib.Path, reference: Run) -> dict[str, Any]:
    """Stop a run by SIGTERM, turn over one bit of its newest checkpoint, and go on."""
    run = Run(config_path, "damaged")
    process = run.start()
    wait_until(lambda: len(list(run.checkpoints.glob("*.pth.tar"))) >= 3, 60)
    process.terminate()
    process.join()
    newest = newest_checkpoint(run.checkpoints, run.name)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    status = run.finish()
    named = f"passed over {newest}: damaged" in run.log.read_text(encoding="utf-8")
    result = compare(run, reference)
    passed = process.exitcode == 0 and status == 0 and named and not result["repeated_or_skipped_steps"]
    return {"passed": passed and result["final_state_bitwise"], "exit_after_sigterm": process.exitcode, "named": named}


def fill_disk(config_path: pathlib.Path, reference: Run) -> dict[str, Any]:
    """Two checkpoints fit, the third does not; then there is room, and the run goes on."""
    run = Run(config_path, "full", "training.keep_last_k=null")
    size = newest_checkpoint(reference.checkpoints, reference.name).stat().st_size
    with small_disk(run.checkpoints, int(2.5 * size)) as grow:
        status = run.finish(file_limit=size // 2 if grow is None else None)
        text = run.log.read_text(encoding="utf-8")
        said = "not written (" in text and "earlier checkpoints are as they were" in text
        unreadable, kept = run.unreadable(), len(list(run.checkpoints.glob("*.pth.tar")))
        if grow is not None:
            grow()
        result = {"status": run.finish(), **compare(run, reference)}
    passed = status == 1 and said and not unreadable and result["status"] == 0 and result["final_state_bitwise"]
    way = "file size limit" if grow is None else "tmpfs"
    return {"passed": passed, "way": way, "status": status, "said": said, "kept": kept, "unreadable": unreadable}


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, size: int) -> Iterator[Any]:
    """A file system of `size` bytes at `folder`; gives what makes it large, or None where mounting is not permitted."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], check=True)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def lose_rank(config_path: pathlib.Path, number: signal.Signals) -> dict[str, Any]:
    """Kill or stop one of two ranks; how long the job takes to end, and what it says."""
    run = Run(config_path, f"rank_{number.name.lower()}", f"training.distributed_timeout_s={HANG_TIMEOUT_S}")
    command = [sys.executable, "main_train_ddp.py", *run.argv, "training.max_steps=100000", "--nproc", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(run.log, "w", encoding="utf-8") as log:
        job = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
        began = wait_until(lambda: any(run.checkpoints.glob("*.pth.tar")) or job.poll() is not None, 180)
        children = pathlib.Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text(encoding="utf-8").split()
        os.kill(int(children[-1]), number)
        before = time.monotonic()
        try:
            status = job.wait(120)
        except subprocess.TimeoutExpired:
            job.kill()
            status = None
    seconds = time.monotonic() - before
    errors = [line for line in run.log.read_text(encoding="utf-8").splitlines() if line.startswith("error: ")]
    return {"began": began, "seconds": seconds, "status": status, "errors": errors, "unreadable": run.unreadable()}


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--quick", action="store_true", help="8 kills of a shorter run")
    parser.add_argument("--kills", type=int, help="default 100, with --quick 8")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers to this file")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fault_injection_") as name:
        config_path = write_project(pathlib.Path(name), QUICK_STEPS if args.quick else STEPS)
        reference = Run(config_path, "reference")
        started = time.monotonic()
        process = reference.start()
        wait_until(lambda: process.exitcode is not None or reference.last_step() > 0, 300)
        start_s = time.monotonic() - started
        process.join()
        if process.exitcode != 0:
            sys.exit(reference.log.read_text(encoding="utf-8"))
        report = {"start_seconds": start_s}
        report |= kill_often(config_path, reference, start_s, args.kills or (8 if args.quick else 100), args.seed)
        report["damaged_newest"] = damage_newest(config_path, reference)
        report["full_disk"] = fill_disk(config_path, reference)
        death, hang = lose_rank(config_path, signal.SIGKILL), lose_rank(config_path, signal.SIGSTOP)
    rows = [  # what, found, limit, whether it holds
        ("SIGKILLs, and as many resumes", report["kills"], "", True),
        ("of them during a save", report["kills_during_save"], "several", report["kills_during_save"] >= 2),
        ("of them before the first step", report["kills_while_starting"], "", True),
    ]
    for what, key in (
        ("resumes that failed", "failed_resumes"),
        ("unreadable checkpoints", "unreadable_checkpoints"),
        ("steps with other samples", "repeated_or_skipped_steps"),
        ("runs with other losses", "differing_losses"),
    ):
        rows.append((what, report[key], "0", report[key] == 0))
    for what, holds in (
        ("final state as uninterrupted", report["final_state_bitwise"]),
        ("newest checkpoint damaged: goes on", report["damaged_newest"]["passed"]),
        (f"full disk ({report['full_disk']['way']}): goes on", report["full_disk"]["passed"]),
    ):
        rows.append((what, "yes" if holds else "no", "yes", holds))
    for what, one, limit in (
        ("rank death, seconds to the end", death, DEATH_LIMIT_S),
        ("hung rank, seconds to the end", hang, HANG_TIMEOUT_S + HANG_MARGIN_S),
    ):
        rows.append((what, f"{one['seconds']:.1f}", f"{limit:.0f}", _ended(one, limit)))
    lines = [[what, value, limit, "" if holds else "FAILED"] for what, value, limit, holds in rows]
    print(f"\n{text_table(['', 'found', 'limit', ''], lines)}")
    print(f"{time.monotonic() - began:.0f} s on {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    report |= {"rank_death_seconds": death["seconds"], "hung_rank_seconds": hang["seconds"], "rank_death": death}
    report |= {"hung_rank": hang, "passed": all(holds for *_, holds in rows)}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sys.exit(0 if report["passed"] else 1)


def _ended(found: dict[str, Any], limit: float) -> bool:
    """Whether the job ended in time, with one error, and left whole checkpoints."""
    in_time = found["status"] not in (None, 0) and found["seconds"] <= limit
    return found["began"] and in_time and len(found["errors"]) >= 1 and not found["unreadable"]


if __name__ == "__main__":
    main()
