"""The figures of benchmarks/failure_alarm.py, on episodes whose outcome is known; and the sensitivity of policies whose
truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import sensitivity_truth
from benchmarks.failure_alarm import SIGNALS, alarms, at_moment, auroc, tables


def episodes(count: int, seed: int, telling: bool = True):
    """Half of them fail after 200 steps; the others succeed after 40 to 119. `spread` tells failures from step 8 on."""
    rng, found = np.random.default_rng(seed), []
    for i in range(count):
        success = i % 2 == 0
        length = int(rng.integers(40, 120)) if success else 200
        steps = list(range(0, length, 4))
        values = rng.uniform(0, 1, len(steps))
        told = values + (2.0 if telling and not success else 0.0) * (np.array(steps) >= 8)
        signals = {"velocity": values, "distance": values[::-1], "spread": told, "time": np.array(steps, float)}
        found.append(
            {"success": success, "steps": length, "plan_steps": steps, **{k: list(v) for k, v in signals.items()}}
        )
    return found


def test_auroc_counts_pairs():
    failed, score = np.array([True, True, False, False]), np.array([3.0, 1.0, 1.0, 0.0])
    assert auroc(failed, score) == (1 + 1 + 0.5 + 1) / 4
    assert np.isnan(auroc(np.array([True, True]), np.array([1.0, 2.0])))


def test_at_one_moment_time_knows_nothing_and_a_signal_all():
    judged = episodes(120, 1)
    assert at_moment(judged, "time", 48)["auroc"] == 0.5
    assert at_moment(judged, "spread", 48)["auroc"] == 1.0
    chance = at_moment(judged, "velocity", 48)
    assert chance["low"] < 0.5 < chance["high"] and chance["failures"] == 60 < chance["of"] < 120
    before = at_moment(judged, "spread", 4)  # the signal begins at step 8
    assert before["low"] < 0.5 < before["high"]


def test_an_alarm_of_time_finds_every_failure_and_late():
    fitted, judged = episodes(100, 2), episodes(200, 3)
    found = {name: alarms(fitted, judged, name) for name in SIGNALS}
    assert found["time"]["found"] == 100 and min(found["time"]["steps"]) > 100
    assert found["spread"]["found"] == 100 and max(found["spread"]["steps"]) <= 16
    for alarm in found.values():
        assert alarm["false_alarms"] <= 12 and alarm["successes"] == 100  # 5 expected
    text, values = tables(fitted, judged)
    assert "found before time rings" in text and values["alarms"]["spread"]["found"] == 100


@pytest.mark.slow
def test_sensitivity_agrees_with_the_truth(tmp_path):
    """Each policy's actions follow what shows the position, and nothing else."""
    for name in sensitivity_truth.POLICIES:
        result = sensitivity_truth.sensitivity(tmp_path, name, steps=500, samples=160)
        least, most = sensitivity_truth.judged(name, result)
        assert least > 0.3 and most < 0.15 and least > 4 * most, (name, least, most)
        states = {row["change"] for row in result["rows"] if row["group"] == "state"}
        assert bool(states) == (name != "no state")
