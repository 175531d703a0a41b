"""Odd and damaged data end in a right reading or in one of our errors; the whole is benchmarks/fuzz_data.py."""

from __future__ import annotations

import logging

import numpy as np
import pytest

import benchmarks.fuzz_data as fuzz_data
import benchmarks.odd_lerobot as odd_lerobot
import benchmarks.odd_parquet as odd_parquet
from benchmarks.fuzz_data import fuzz_case
from benchmarks.odd_data import KINDS
from data.episode_store import EpisodeStore


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("kind", KINDS)
def test_odd_data(kind):
    cases = [fuzz_case(1, number, [kind]) for number in range(25)]
    assert [case for case in cases if case[1] not in ("accepted", "refused")] == []
    assert {outcome for _, outcome, _, _ in cases} == {"accepted", "refused"}, "both happen"


def test_a_wrong_row_would_be_noticed(monkeypatch):
    class Wrong(EpisodeStore):
        def __init__(self, *args, **options) -> None:
            super().__init__(*args, **options)
            self.action = np.roll(self.action, 1, axis=0)

    monkeypatch.setattr(odd_parquet, "EpisodeStore", Wrong)
    outcomes = {fuzz_case(1, number, ["parquet_values"])[1] for number in range(10)}
    assert "wrong row" in outcomes


def test_an_uncaught_error_would_be_noticed(monkeypatch):
    def crash(*_, **__):
        raise KeyError("task")

    monkeypatch.setattr(odd_lerobot, "convert_lerobot", crash)
    kind, outcome, fault, _ = fuzz_case(1, 0, ["lerobot_metadata"])
    assert (kind, outcome) == ("lerobot_metadata", "uncaught") and fault.startswith(
        "KeyError: 'task' (test_fuzz_data.py"
    )


@pytest.mark.slow
def test_a_process_that_hangs_is_killed_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(fuzz_data, "LIMIT_S", 0.0)  # of this process, which waits; a case takes a little longer
    cases = list(fuzz_data._in_a_process(1, [0, 1], ["lerobot_metadata"]))
    assert [(case[0], case[2]) for case in cases] == [(0, "too slow"), (1, "too slow")]


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        *((1773, "lerobot_metadata"), (3835, "config_file"), (7230, "config_file")),
        *((16689, "parquet_bytes"), (17166, "lerobot_metadata"), (17208, "lerobot_metadata")),
    ],
)
def test_what_the_fuzzer_found(number, kind):
    """A crash in pyarrow's metadata of a damaged column, names with null bytes, huge widths."""
    assert fuzz_case(0, number, list(KINDS))[:2] == (kind, "refused")
