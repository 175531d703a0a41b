"""The parity table on the fixtures: every array within its tolerance."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import pi0_parity
from tests.pi_fixtures import KINDS, folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_array_is_within_its_tolerance(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--policy_dir",
        folder(kind) / "policy",
        "--reference",
        folder(kind),
        "--json",
        tmp_path / "table.json",
    ]
    monkeypatch.setattr("sys.argv", ["pi0_parity.py", *map(str, arguments)])
    pi0_parity.main()
    rows = json.loads((tmp_path / "table.json").read_text())
    assert len(rows) > 55 and all(row["difference"] <= row["allowed"] for row in rows)
    assert f"{len(rows)} of {len(rows)} within their tolerance" in capsys.readouterr().out
