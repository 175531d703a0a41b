"""The page of an evaluation over recorded data, through main_eval.py, and what a sensitivity report adds to it."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

import main_eval
from inference.page import sensitivity_sections
from tests.browser import chromium, needs_browser, opened, overflow, quiet  # noqa: F401
from tests.helpers import write_episodes
from tests.inference.checkpoints import train_tiny
from utils.page.content import Charts, Pictures, Table


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, tiny_paligemma_dir):
    """(page, output folder) of two files, one with a name that is markup."""
    folder = tmp_path_factory.mktemp("evaluated")
    files = [write_episodes(folder / "a.parquet", [5, 7]), write_episodes(folder / "<b>b.parquet", [6], seed=1)]
    policy = train_tiny(folder, tiny_paligemma_dir, files)
    flags = ["--checkpoint_path", policy, "--eval_data_path", *files, "--output_dir", folder / "out", "--device", "cpu"]
    flags += ["--num_samples", "3", "--num_plots", "0", "--num_workers", "0", "--html", folder / "page.html"]
    main_eval.main([*map(str, flags), "--sensitivity", "4"])
    return folder / "page.html", folder / "out"


def viewer(path):
    """The episodes of a page's viewer."""
    return json.loads(re.search(r'class="data">(.*?)</script>', path.read_text(), re.DOTALL)[1])


def test_predictions_stand_beside_what_was_done(evaluated):
    path, folder = evaluated
    episodes = viewer(path)
    assert [(episode["title"].split(",")[0], episode["steps"]) for episode in episodes] == [
        ("a.parquet episode 0", 5),
        ("a.parquet episode 1", 7),
        ("<b>b.parquet episode 0", 6),
    ]
    groups = [curve["group"] for curve in episodes[0]["curves"]]
    assert groups == ["policy"] * 2 + ["action"] * 4 + ["state"] * 4
    action = episodes[0]["curves"][2]
    assert action["predicted"] != action["values"] and len(action["low"]) == 5
    bands = [action[name] for name in ("low", "predicted", "high")]
    assert all(low <= value <= high for low, value, high in zip(*bands, strict=True))
    assert episodes[0]["marks"][0]["text"].startswith("largest error of this episode")
    text = path.read_text()
    assert "The policy is " in text and "What it looks at" in text and "Do the statistics fit a.parquet?" in text
    assert json.loads((folder / "sensitivity.json").read_text())["rows"][0]["change"] in text


@pytest.mark.parametrize("mark", [pytest.param(None, marks=needs_browser())])
def test_in_a_browser(chromium, evaluated, mark):  # noqa: F811
    for width in (390, 1280):
        view = opened(chromium, evaluated[0], width)
        assert "<b>b.parquet" in view.page.inner_text("body") and overflow(view.page) == 0
        assert view.page.locator(".curve .line-1").count() >= 4 and view.page.locator(".legend .predicted").is_visible()
        quiet(view, evaluated[0])


def test_sensitivity_is_of_the_same_policy(tmp_path):
    assert sensitivity_sections(tmp_path, {"checkpoint_stamp": [1, 2.0]}) == []
    (tmp_path / "sensitivity").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "sensitivity" / "a.png")
    steps = {"per_step_in_spread": [1.0, None], "per_step_in_variation": [0.5, None]}
    rows = [{"change": "image_1 blank", "group": "camera", "in_spread": None, "in_variation": 0.5, **steps}]
    maps = [{"camera": "image_1", "episode": 3, "row": 8, "image": f"sensitivity/{name}.png"} for name in ("a", "gone")]
    found = {"checkpoint_stamp": [1, 2.0], "samples": 9, "rows": rows, "maps": maps}
    (tmp_path / "sensitivity.json").write_text(json.dumps(found))
    (section,) = sensitivity_sections(tmp_path, {"checkpoint_stamp": [1, 2.0]})
    assert [type(block) for block in section.blocks] == [Table, Charts, Pictures]
    assert [picture.caption for picture in section.blocks[2].pictures] == ["image_1, episode 3, row 8"]
    assert sensitivity_sections(tmp_path, {"checkpoint_stamp": [1, 3.0]}) == [], "of another policy"


def test_a_single_observation_has_no_page(capsys):
    with pytest.raises(SystemExit):
        main_eval.main(["--checkpoint_path", "c", "--image1_paths", "a.png", "--prompt", "p", "--html", "page.html"])
    assert "--html shows an evaluation; a single observation has none" in capsys.readouterr().err
