"""What an evaluation leaves behind."""

from __future__ import annotations

import csv

import numpy as np

from inference.evaluate import Predictions
from inference.report import write_predictions


def test_a_csv_of_predictions_holds_no_formula(tmp_path):
    truth = np.zeros((1, 1, 1), np.float32)
    part = Predictions(
        truth[None],
        truth,
        np.zeros((1, 1), bool),
        np.zeros((1, 4)),
        np.zeros(1, int),
        np.zeros(1, int),
        file_N=["=cmd()"],
    )
    write_predictions(tmp_path / "predictions.csv", {"@dataset": part})
    rows = list(csv.reader((tmp_path / "predictions.csv").open()))
    assert rows[1][:2] == ["'@dataset", "'=cmd()"] and rows[1][5] == "0"
