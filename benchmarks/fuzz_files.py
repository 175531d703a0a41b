"""Whether a crafted or damaged file harms who loads it: checkpoints, exported folders, configurations, data folders.

    python benchmarks/fuzz_files.py [--cases 1000] [--seed 0] [--quick] [--json fuzz_files.json]

Every case is a copy of a good file or folder (those of tests/fixtures), changed by benchmarks/crafted_files.py. It has
to be refused by an error of this program, or to load as the original does: damage that no checksum covers must not
change a value, and a changed description must still describe a policy of finite actions. A file outside of the case's
folder must not be read, nothing may be executed, and no case may take more than 5 seconds.

JSON keys: cases, seed, outcomes per kind, uncaught, wrong_values, code_run, read_outside, slowest_s, too_slow.
"""

from __future__ import annotations

import collections
import json
import logging
import os
import pathlib
import random
import sys
import tempfile
import time
from typing import Any

import torch

if not __package__:
    import _repository  # noqa: F401

from benchmarks.crafted_files import KINDS, OURS, WrongValueError
from benchmarks.crafted_folders import LeakError
from benchmarks.memory import limit_memory, peak_mb
from benchmarks.time_limit import TooSlowError, within
from utils.arguments import CommandParser

LIMIT_S = 5.0


class Watch:
    """What the process opens and starts while a case runs."""

    def __init__(self, secret: pathlib.Path) -> None:
        self.secret, self.active = str(secret), False
        self.opened: list[str] = []
        self.started: list[str] = []
        sys.addaudithook(self._seen)

    def _seen(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open" and isinstance(arguments[0], str | os.PathLike) and self.secret in str(arguments[0]):
            self.opened.append(str(arguments[0]))
        if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork"):
            self.started.append(f"{event} {str(arguments)[:100]}")


def fuzz(cases: int, seed: int, kinds: list[str] | None = None) -> dict[str, Any]:
    """Make and load `cases` files in turn of the kinds; see the module."""
    names = kinds or list(KINDS)
    outcomes: dict[str, dict[str, int]] = {name: collections.Counter() for name in names}
    faults: dict[str, list[str]] = {"uncaught": [], "wrong_values": [], "code_run": [], "read_outside": []}
    slowest, too_slow = (0.0, ""), []
    with tempfile.TemporaryDirectory() as top:
        secret = pathlib.Path(top) / "secret"
        secret.mkdir()
        (secret / "content").write_bytes(b"top secret bytes of another file" * 100)
        watch, marker = Watch(secret), pathlib.Path(top) / "code_ran"
        for number in range(cases):
            name = names[number % len(names)]
            rng = random.Random(f"{seed}/{name}/{number}")
            with tempfile.TemporaryDirectory(dir=top) as folder:
                load = KINDS[name](rng, pathlib.Path(folder), secret / "content", marker)
                started = time.perf_counter()
                watch.active = True
                try:
                    with within(4 * LIMIT_S):
                        load()
                    outcome = "accepted"
                except OURS:
                    outcome = "refused"
                except (WrongValueError, LeakError) as error:
                    outcome = "wrong"
                    faults["wrong_values"].append(f"{name} {number}: {error}")
                except TooSlowError:
                    outcome = "too slow"
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    outcome = "uncaught"
                    faults["uncaught"].append(f"{name} {number}: {type(error).__name__}: {str(error)[:200]}")
                watch.active = False
                seconds = time.perf_counter() - started
            outcomes[name][outcome] += 1
            slowest = max(slowest, (seconds, f"{name} {number}"))
            if seconds > LIMIT_S:
                too_slow.append(f"{name} {number}: {seconds:.1f} s")
            if marker.exists():
                faults["code_run"].append(f"{name} {number}")
                marker.unlink()
            faults["code_run"] += [f"{name} {number}: {started}" for started in watch.started]
            faults["read_outside"] += [f"{name} {number}: {path}" for path in watch.opened]
            watch.started, watch.opened = [], []
    counts = {key: len(found) for key, found in faults.items()}
    result = {"cases": cases, "seed": seed, "outcomes": {name: dict(count) for name, count in outcomes.items()}}
    result |= {"counts": counts, "too_slow": too_slow, "slowest_s": slowest[0], "slowest": slowest[1]}
    return result | {"faults": {key: found[:20] for key, found in faults.items()}, "peak_mb": peak_mb()}


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), help="default: all in turn")
    parser.add_argument("--quick", action="store_true", help="60 cases")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    limit_memory(6000)
    result = fuzz(60 if args.quick else args.cases, args.seed, args.kinds)
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    if any(result["counts"].values()) or result["too_slow"]:
        sys.exit("error: a case was not refused as it should be; see above")


if __name__ == "__main__":
    main()
