"""What a run says of its statistics before it trains: one line where they fit, each finding where they do not."""

from __future__ import annotations

import logging
import time

import numpy as np
import pytest

from data.comparison.against import announce_fit
from data.dataset import MixtureDataset
from tests.helpers import episode_rows, write_rows
from tests.policies import dataset_of, policy_config
from utils.calculate_normalization_stats import calculate_statistics


@pytest.fixture
def judged(tmp_path, tiny_paligemma_dir, caplog):
    def call(change=lambda state, action: (state, action), *, kept=False, episodes=12, **data):
        config = policy_config(tiny_paligemma_dir, tmp_path, data=data)
        rng, rows = np.random.default_rng(0), []
        for number in range(episodes):
            part = episode_rows(20, seed=number)
            path = np.cumsum(rng.normal(size=(20, 4)), axis=0).astype(np.float32)
            for row, state in zip(part, path, strict=True):
                row["state"], row["action"] = state.tolist(), (state + rng.normal(size=4) / 20).tolist()
            rows += part
        made_of = write_rows(tmp_path / "made_of.parquet", rows)
        relative = {"action_mode": config.data.action_mode, "horizon": config.model.action_head_config.horizon}
        statistics = calculate_statistics([made_of], 4, 4, **relative)
        for row in rows:
            state, action = change(np.array(row["state"]), np.array(row["action"]))
            row["state"], row["action"] = state.tolist(), action.tolist()
        dataset = dataset_of(config, [write_rows(tmp_path / "data.parquet", rows)])
        caplog.clear()
        with caplog.at_level(logging.INFO, "data.comparison.against"):
            started = time.perf_counter()
            announce_fit(MixtureDataset([dataset]), [statistics], config, kept=kept)
            assert time.perf_counter() - started < 2
        return [(record.levelname, record.message) for record in caplog.records if "against" in record.name]

    return call


@pytest.mark.parametrize(
    "data",
    [
        {"action_mode": "absolute"},
        {"action_mode": "delta"},
        {"normalization_arithmetic": "lerobot", "normalization_type": "identity"},
    ],
)
def test_statistics_that_fit_are_one_calm_line(judged, data):
    ((level, line),) = judged(**data)
    assert level == "INFO" and line.endswith("fit 240 of its steps in all 8 dimensions")


def test_each_finding_has_evidence_and_a_remedy(judged):
    said = judged(lambda state, action: (np.degrees(state), action))
    assert said[0][0] == "INFO" and "outside q01 to q99" in said[0][1] and "state[3]" in said[0][1]
    findings = [line for level, line in said if level == "WARNING"]
    assert any(
        "degrees for radians" in line and "in training" in line and "; send radians" in line for line in findings
    )


def test_kept_statistics_are_shown_beside_the_new_data_in_any_case(judged):
    ((level, line),) = judged(kept=True)
    assert level == "INFO" and "kept from the base policy" in line and len(line.splitlines()) == 11
    said = judged(lambda state, action: (state * 100, action), kept=True)
    assert "kept from the base policy" in said[0][1] and any("blown up" in line for _, line in said[1:])
