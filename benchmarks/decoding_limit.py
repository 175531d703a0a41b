"""How fast processes decode that do nothing else: the limit beside which loading is measured."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any


def rate_of_processes(worker: Callable[..., None], content: Any, count: int, number: int) -> float:
    """Frames/s of `number` processes that start together.

    Args:
        worker: (content, barrier, results, frames of this process); it waits at the barrier, decodes, and puts the
            times at which it began and ended into `results`.
        content: what is decoded; forked, so that nothing is copied.
        count: frames of all of them.
    """
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(number), context.SimpleQueue()
    arguments = (content, barrier, results, count // number)
    workers = [context.Process(target=worker, args=arguments) for _ in range(number)]
    for process in workers:
        process.start()
    spans = [results.get() for _ in workers]
    for process in workers:
        process.join()
    return count // number * number / (max(end for _, end in spans) - min(start for start, _ in spans))
