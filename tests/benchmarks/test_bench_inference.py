"""The latency benchmark as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_cached_prediction_is_three_times_as_fast_as_the_naive_loop(tmp_path):
    command = [sys.executable, "benchmarks/bench_inference.py", "--device", "cpu", "--quick", "--rounds", "5"]
    done = subprocess.run([*command, "--json", str(tmp_path / "b.json")], capture_output=True, text=True, check=True)
    report = json.loads((tmp_path / "b.json").read_text())
    assert report["cached_speedup"] >= 3
    view = report["views"]["1"]
    assert view["ways"]["cached"]["difference"] < 1e-5 and view["ways"]["context once"]["difference"] < 1e-5
    assert view["floor_ms"] == pytest.approx(sum(part["floor_ms"] for part in view["parts"].values()))
    assert list(view["parts"]) == ["vision", "language", "action head"]
    assert "graph: not available on this device" in done.stdout
