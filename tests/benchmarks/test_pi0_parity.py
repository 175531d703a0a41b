"""The parity table on the fixtures: every array of theirs, within its tolerance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import pi0_parity
from tests.pi_fixtures import FOLDER

# What the model is given, and the settings of a part; the rest is compared.
INPUTS = {
    "processors": {"raw_image_", "raw_state", "raw_action", "post_in", "bins_in"},
    "relative": {"post_in"},
    "model": {"image_", "image_mask", "tokens", "token_mask", "noise", "time"},
    "policy": {"noise", "forward_noise", "forward_time", "select_action_noise"},
    "rtc": {"prev_chunk_left_over", "inference_delay", "execution_horizon", "max_guidance_weight"},
    "training": set(),
    "openpi": set(),
    "bfloat16": set(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pi0_tiny", "pi05_tiny", "pi0_odd"])
def test_every_array_is_within_its_tolerance(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, table = FOLDER / name, tmp_path / "table.json"
    arguments = ["--policy_dir", folder / "policy", "--reference", folder, "--json", table]
    monkeypatch.setattr("sys.argv", ["pi0_parity.py", *map(str, arguments)])
    pi0_parity.main()
    rows = json.loads(table.read_text())
    assert all(row["difference"] <= row["allowed"] for row in rows)
    assert f"{len(rows)} of {len(rows)} within their tolerance" in capsys.readouterr().out
    for part, inputs in INPUTS.items():
        compared = [row["array"] for row in rows if row["part"] == part]
        for array in np.load(folder / f"{part}.npz"):
            key = array.rpartition(".")[2] if array.startswith("grad:") else array
            given = array in inputs or array.rstrip("0123456789") in inputs
            assert given or any(key in label or label.startswith(key) for label in compared), (part, array)
