"""Prompts of pi0 and pi0.5, against LeRobot's own."""

from __future__ import annotations

import numpy as np
import pytest

from data.prompts import prompt_texts, state_bins
from tests.pi_fixtures import arrays, plain


def test_pi0_appends_a_newline_and_changes_nothing_else() -> None:
    prompts = plain("pi0", "prompts.json")
    assert [prompt_texts(task, "pi0") for task in prompts["tasks"]] == [(text,) for text in prompts["prompts"]]
    assert prompt_texts(" pick_up  it", "pi0") == (" pick_up  it\n",)


def test_pi05_says_the_state_in_bins() -> None:
    prompts = plain("pi05", "prompts.json")
    bins = state_bins(arrays("pi05", "processors")["state_normalized"].numpy())
    texts = [prompt_texts(task, "pi05", row) for task, row in zip(prompts["tasks"], bins, strict=True)]
    assert texts == [(text,) for text in prompts["prompts"]]


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_bins_are_numpys_with_values_outside_kept(kind: str) -> None:
    found = arrays(kind, "processors")
    np.testing.assert_array_equal(state_bins(found["bins_in"].numpy()), found["bins_out"].numpy())
    edges = np.array([-1.5, -1, 0, 127 / 128, 1, 7], np.float32)
    np.testing.assert_array_equal(state_bins(edges), [-1, 0, 128, 255, 255, 255])


def test_the_other_formats() -> None:
    assert prompt_texts(" open  the\ndoor ", "paligemma") == ("open the door\n",)
    assert prompt_texts(" pick_up\nit ", "openpi_pi0") == ("pick up it", "\n")
