"""What the two programs that compare_lerobot.py times have in common: questions in, answers and processor time out.

It reads nothing but the standard library, since one of them runs in another Python.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

MARK = "answer "  # of lines that are for the driver; libraries print others


def serve(answers: dict[str, Callable[..., Any]]) -> None:
    """Answer one JSON object per line of standard input, {"ask": name, ...}, until it ends.

    Args:
        answers: name -> function of the rest of the object; what it returns is the answer.
    """
    for line in sys.stdin:
        question = json.loads(line)
        answer = answers[question.pop("ask")](**question)
        print(MARK + json.dumps(answer), flush=True)


def processor_seconds(function: Callable[[], Any]) -> float:
    """Processor time of one call."""
    began = time.process_time()
    function()
    return time.process_time() - began
