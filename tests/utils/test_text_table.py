"""The one printer of tables."""

from __future__ import annotations

import pytest

from utils.text_table import markdown_table, text_table


def test_figures_to_the_right_text_to_the_left():
    rows = [["press", "3/20", 0.123456, None], ["open the window", "12/20", 1e-07, -4], ["all", "-", float("nan"), 12]]
    assert text_table(["task", "success", "error", "moved"], rows).splitlines() == [
        "task             success   error  moved",
        "---------------  -------  ------  -----",
        "press               3/20  0.1235      -",
        "open the window    12/20   1e-07     -4",
        "all                    -     nan     12",
    ]


def test_a_column_with_one_text_is_text():
    assert text_table(["a", "b"], [[1, "none"], ["x", 22]]).splitlines() == ["a  b", "-  ----", "1  none", "x  22"]
    assert text_table(["name", "b"], []).splitlines() == ["name  b", "----  -"]


def test_rows_of_another_length_are_an_error():
    with pytest.raises(ValueError):
        text_table(["a", "b"], [[1]])


def test_markdown():
    table = markdown_table(["task", "rate"], [["press", 0.25], ["open", None]])
    assert table.splitlines() == ["| task | rate |", "| --- | --- |", "| press | 0.25 |", "| open | - |"]
