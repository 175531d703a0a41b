"""A few rounds of benchmarks/fault_injection.py."""

from __future__ import annotations

import pytest

from benchmarks.fault_injection import Run, damage_newest, fill_disk, kill_often, write_project


@pytest.mark.slow
def test_kills_damage_and_a_full_disk(tmp_path):
    config_path = write_project(tmp_path, steps=40)
    reference = Run(config_path, "reference")
    assert reference.finish() == 0, reference.log.read_text()
    found = kill_often(config_path, reference, start_s=2.0, kills=6, seed=1)
    assert found["kills"] == 6 and found["kills_during_save"] >= 1
    wrong = ("failed_resumes", "unreadable_checkpoints", "repeated_or_skipped_steps", "differing_losses")
    assert {key: found[key] for key in wrong} == dict.fromkeys(wrong, 0) and found["final_state_bitwise"]
    damaged, full = damage_newest(config_path, reference), fill_disk(config_path, reference)
    assert damaged["passed"], damaged
    assert full["passed"], full
