"""Whether odd or damaged data ever end in anything but a right reading or a clear error.

    python benchmarks/fuzz_data.py [--cases 20000] [--seed 0] [--quick] [--json fuzz_data.json] [--num_workers 2]

Every case changes a small good folder at random (benchmarks/odd_data.py) and reads it as the program does: opening and
decoding, the doctor, statistics, converters, normalization, configurations. It has to be refused by one of our errors,
which commands print in one line, or to be read as a plain reading of the same files says. A case is a function of seed
and number. Cases run in processes, so that a crash of a library is counted too.

JSON keys: cases, seed, outcomes per kind, uncaught, wrong_rows, too_slow, crashed, slowest_s, seconds.
"""

from __future__ import annotations

import argparse
import collections
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
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

if not __package__:
    import _repository  # noqa: F401

from benchmarks.odd_data import KINDS, OURS, WrongRowError
from benchmarks.time_limit import TooSlowError, within

LIMIT_S = 60.0  # of one case, from which it hangs; pyarrow looks for a damaged page header for up to 10 s
CASES_PER_TASK = 50


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


def _task(seed: int, numbers: list[int], kinds: list[str]) -> list[tuple[int, str, str, str, float]]:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    return [(number, *fuzz_case(seed, number, kinds)) for number in numbers]


def fuzz(cases: int, seed: int, kinds: list[str] | None = None, num_workers: int = 1) -> dict[str, Any]:
    """Run the cases 0 to `cases` - 1 of a seed; see the module."""
    started, kinds = time.perf_counter(), kinds or list(KINDS)
    tasks = [list(range(i, min(i + CASES_PER_TASK, cases))) for i in range(0, cases, CASES_PER_TASK)]
    done: list[tuple[int, str, str, str, float]] = []
    crashed: list[str] = []
    while tasks:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(num_workers, mp_context=context) as executor:
            futures = [(task, executor.submit(_task, seed, task, kinds)) for task in tasks]
            tasks = []
            for task, future in futures:
                try:
                    done += future.result()
                except BrokenProcessPool:  # halve what was under way, down to the case that crashes
                    if len(task) == 1:
                        crashed.append(f"{kinds[task[0] % len(kinds)]} {task[0]}")
                    else:
                        tasks += [task[: len(task) // 2], task[len(task) // 2 :]]
    outcomes: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in kinds}
    faults: dict[str, list[str]] = {"wrong row": [], "too slow": [], "uncaught": []}
    for number, kind, outcome, fault, _ in done:
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
        "crashed": crashed,
        "slowest_s": max((seconds for *_, seconds in done), default=0.0),
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
