"""The server's fuzzer, small: nothing uncaught, no wrong answer, memory within the stated bound."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.fuzz_server import PEAK_GROWTH_MB, faults, fuzz_in_process
from inference.predictor import VLAPredictor
from utils.config_utils import ServingConfig


def test_messages_in_process():
    predictor = VLAPredictor.from_checkpoint("tests/fixtures/policies/flow.pth.tar", device="cpu")
    result = fuzz_in_process(predictor, 3000, 1, ServingConfig())
    assert not result["uncaught"] and result["peak_growth_mb"] < PEAK_GROWTH_MB and result["slowest_s"] < 5
    assert result["outcomes"]["accepted"] > 100 and result["kinds"] > 80, "it reaches most of what can be refused"


@pytest.mark.slow
def test_sockets_and_mixed_load(tmp_path):
    command = [sys.executable, "benchmarks/fuzz_server.py", "--quick", "--json", str(tmp_path / "fuzz.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    results = json.loads((tmp_path / "fuzz.json").read_text())
    assert done.returncode == 0 and not faults(results), (done.stderr[-500:], results)
