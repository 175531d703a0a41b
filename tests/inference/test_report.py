"""What an evaluation leaves behind."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from inference.evaluate import Predictions
from inference.report import write_actions, write_evaluation, write_predictions


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
        action_names=["x"],
    )
    write_predictions(tmp_path / "predictions.csv", {"@dataset": part})
    rows = list(csv.reader((tmp_path / "predictions.csv").open()))
    assert rows[1][:2] == ["'@dataset", "'=cmd()"] and rows[1][5] == "0"


def predictions(steps: int, dims: int) -> Predictions:
    truth = np.zeros((steps, 2, dims), np.float32)
    place = np.zeros(steps, int), np.arange(steps)
    names = [f"joint_{a}" for a in range(dims)]
    return Predictions(
        truth[None], truth, np.zeros((steps, 2), bool), np.zeros((steps, 4)), *place, ["a"] * steps, names
    )


def evaluation(checkpoint: str) -> dict:
    return {"checkpoint": checkpoint, "checkpoint_stamp": [1, 2.5], "settings": {"seed": 0, "bin_range": [[0.1], [2]]}}


def test_a_report_does_not_overwrite_another_evaluations(tmp_path, caplog):
    data, shown = {"demos": predictions(3, 1)}, tmp_path / "metrics.json"
    write_evaluation(tmp_path, evaluation("a"), data, True, 1)
    write_evaluation(tmp_path, evaluation("a"), data, True, 1)  # the same one again: replaced
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "plots", "predictions.csv"]
    with caplog.at_level("INFO"):
        write_evaluation(tmp_path, evaluation("b"), data, False, 1)
        write_evaluation(tmp_path, evaluation("b"), {"other": predictions(3, 1)}, False, 1)
    assert "metrics.json was of another evaluation (checkpoint differs): kept as metrics_1.json" in caplog.text
    assert json.loads(shown.read_text())["data"] == ["other"]
    assert [json.loads((tmp_path / f"metrics_{n}.json").read_text())["checkpoint"] for n in (1, 2)] == ["a", "b"]
    kept = ["metrics.json", "metrics_1.json", "metrics_2.json", "plots", "plots_1", "plots_2", "predictions_1.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    (tmp_path / "plots_1" / "trajectory_demos_episode_000000.png").stat()
    shown.write_text("cut o")
    write_evaluation(tmp_path, evaluation("b"), data, False, 1)
    assert (tmp_path / "metrics_3.json").read_text() == "cut o"


def test_actions_of_another_observation_are_kept(tmp_path):
    for prompt in ("open", "open", "close"):
        write_actions(tmp_path, np.zeros((2, 1)), {"prompt": prompt, "state": None, "seed": 0, "images": ("a", "b")})
    found = {path.name: json.loads(path.read_text())["prompt"] for path in tmp_path.glob("*.json")}
    assert found == {"actions.json": "close", "actions_1.json": "open"}
    assert (tmp_path / "actions_1.csv").is_file()


@pytest.mark.parametrize("dims", [1, 4, 5, 7])
def test_trajectories_are_labelled_with_names_and_steps(dims, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("inference.report.save_figure", lambda figure, path: figures.append(figure))
    write_evaluation(tmp_path, evaluation("a"), {"demos $1$": predictions(3, dims)}, False, 1)
    (figure,) = figures
    drawn = [axis for axis in figure.axes if axis.axison]
    assert [axis.get_ylabel() for axis in drawn if axis.get_ylabel()] and len(drawn) == dims
    assert {axis.get_ylabel() for axis in drawn} == {f"joint_{a}" for a in range(dims)}
    figure.draw_without_rendering()
    for column in {axis.get_subplotspec().colspan.start for axis in drawn}:
        of_column = [axis for axis in drawn if axis.get_subplotspec().colspan.start == column]
        lowest = max(of_column, key=lambda axis: axis.get_subplotspec().rowspan.start)
        assert lowest.get_xlabel() == "step"
        assert [label.get_text() for label in lowest.get_xticklabels() if label.get_visible()]
