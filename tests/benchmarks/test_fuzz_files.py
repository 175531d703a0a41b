"""The fuzzer of files, small: everything refused or harmless, nothing run, nothing read outside."""

from __future__ import annotations

import pytest

from benchmarks.crafted_files import KINDS
from benchmarks.fuzz_files import fuzz


@pytest.mark.parametrize("kind", KINDS)
def test_crafted_files(kind):
    result = fuzz(14, seed=3, kinds=[kind])
    assert not any(result["counts"].values()) and not result["too_slow"], result["faults"]
