"""Whether odd or damaged data ever end in anything but a right reading or a clear error.

    python benchmarks/fuzz_data.py [--cases 20000] [--seed 0] [--quick] [--json fuzz_data.json] [--num_workers 2]

Every case changes a small good folder at random (benchmarks/odd_data.py) and reads it as the program does: opening and
decoding, the doctor, statistics, converters, normalization, configurations. It has to be refused by one of our errors,
which commands print in one line, or to be read as a plain reading of the same files says. A case is a function of seed
and number. Cases run in processes, so that a crash of a library is counted too.

JSON keys: cases, seed, outcomes per kind, uncaught, wrong_rows, too_slow, crashed, slowest_s, seconds.
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import multiprocessing
import pathlib
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

if not __package__:
    import _repository  # noqa: F401

from benchmarks.odd_data import KINDS, OURS
from benchmarks.odd_values import WrongRowError
from benchmarks.time_limit import TooSlowError, within
from utils.arguments import CommandParser

LIMIT_S = 60.0  # of one case, from which it hangs; pyarrow looks for a damaged page header for up to 10 s

Case = tuple[int, str, str, str, float]  # number, kind, outcome, what was wrong, seconds


def fuzz_case(seed: int, number: int, kinds: list[str]) -> tuple[str, str, str, float]:
    """(kind, outcome, what was wrong, seconds) of one case."""
    kind = kinds[number % len(kinds)]
    rng = random.Random(f"{seed}/{kind}/{number}")
    with tempfile.TemporaryDirectory() as folder:
        run = KINDS[kind](rng, pathlib.Path(folder))
        started = time.perf_counter()
        outcome, fault = "accepted", ""
        try:
            with within(LIMIT_S):
                run()
        except OURS:
            outcome = "refused"
        except WrongRowError as error:
            outcome, fault = "wrong row", str(error)[:300]
        except TooSlowError:
            outcome, fault = "too slow", f"more than {LIMIT_S} s"
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            outcome = "uncaught"
            fault = f"{type(error).__name__}: {str(error)[:200]} ({pathlib.Path(where.filename).name}:{where.lineno})"
        return kind, outcome, fault, time.perf_counter() - started


def _work(seed: int, numbers: list[int], kinds: list[str], results: Connection) -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    for number in numbers:
        results.send(number)
        results.send((number, *fuzz_case(seed, number, kinds)))


def _in_a_process(seed: int, numbers: list[int], kinds: list[str]) -> Iterator[Case]:
    """The cases one after the other in a process of their own, and in a new one after each that it did not survive."""
    context = multiprocessing.get_context("spawn")
    while numbers:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(seed, numbers, kinds, sender), daemon=True)
        process.start()
        sender.close()
        begun = done = numbers[0] - 1
        hangs = False
        with contextlib.suppress(EOFError):
            while done != numbers[-1]:
                begun = receiver.recv()
                hangs = not receiver.poll(2 * LIMIT_S)  # a library loops, which no signal of Python's interrupts
                if hangs:
                    process.kill()
                    break
                yield receiver.recv()
                done = begun
        process.join()
        if hangs:
            yield begun, kinds[begun % len(kinds)], "too slow", f"killed after {2 * LIMIT_S} s", 2 * LIMIT_S
        elif begun != done:
            yield begun, kinds[begun % len(kinds)], "crashed", f"exit code {process.exitcode}", 0.0
        elif begun < numbers[0]:
            raise RuntimeError(f"no case could be begun (exit code {process.exitcode})")
        numbers = [number for number in numbers if number > begun]


def fuzz(cases: int, seed: int, kinds: list[str] | None = None, num_workers: int = 1) -> dict[str, Any]:
    """Run the cases 0 to `cases` - 1 of a seed; see the module."""
    started, kinds = time.perf_counter(), kinds or list(KINDS)
    shares = [list(range(i, cases, num_workers)) for i in range(num_workers)]

    def work(share: list[int]) -> list[Case]:
        cases = []
        for case in _in_a_process(seed, share, kinds):
            cases.append(case)
            if case[2] not in ("accepted", "refused"):
                print(*case, file=sys.stderr, flush=True)
        return cases

    with ThreadPoolExecutor(num_workers) as executor:
        done = [case for part in executor.map(work, shares) for case in part]
    outcomes: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in kinds}
    faults: dict[str, list[str]] = {"wrong row": [], "too slow": [], "uncaught": [], "crashed": []}
    for number, kind, outcome, fault, _ in sorted(done):
        outcomes[kind][outcome] += 1
        if outcome in faults:
            faults[outcome].append(f"{kind} {number}: {fault}")
    return {
        "cases": cases,
        "seed": seed,
        "outcomes": {kind: dict(counts) for kind, counts in outcomes.items()},
        "uncaught": faults["uncaught"],
        "wrong_rows": faults["wrong row"],
        "too_slow": faults["too slow"],
        "crashed": faults["crashed"],
        "slowest_s": max((seconds for *_, seconds in done), default=0.0),
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), help="default: all in turn")
    parser.add_argument("--quick", action="store_true", help="140 cases")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    parser.add_argument("--num_workers", type=int, default=1)
    args = parser.parse_args()
    result = fuzz(140 if args.quick else args.cases, args.seed, args.kinds, args.num_workers)
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    if result["uncaught"] or result["wrong_rows"] or result["too_slow"] or result["crashed"]:
        sys.exit("error: a case was neither read rightly nor refused by an error of ours; see above")


if __name__ == "__main__":
    main()
