"""scripts/report_run.py: a run's folder as a page."""

from __future__ import annotations

import json
import math
import shutil

import pytest

from scripts.report_run import main
from tests.browser import chromium, needs_browser, opened, overflow, quiet  # noqa: F401
from tests.inference.closed_loop.test_rollout_page import evaluated
from tests.trainers import make_trainer
from training.page import run_page, run_verdict
from utils.config_utils import ConfigError


@pytest.fixture
def run(make_config):
    """The folder of a run of twelve steps with validations."""
    trainer = make_trainer(make_config(training={"val_num_samples": 2}))
    trainer.fit()
    return trainer.config.experiment_dir


@pytest.mark.parametrize("mark", [pytest.param(None, marks=needs_browser())])
def test_page_of_a_run(chromium, run, tmp_path, capsys, mark):  # noqa: F811
    path = tmp_path / "page.html"
    main(["--run", str(run), "--html", str(path)])
    assert capsys.readouterr().out == f"wrote {path}\n"
    for width in (390, 1280):
        view = opened(chromium, path, width)
        titles = view.page.locator("main h2").all_inner_texts()
        wanted = ["Curves", "Validation", "Predictions of held-out samples", "Do the statistics fit?", "Settings"]
        assert [title.split("\u2002")[-1] for title in titles] == wanted and overflow(view.page) == 0
        assert view.page.locator(".chart path.line").count() >= 6
        assert view.page.locator(".verdict").inner_text().startswith("After 12 steps the validation loss is ")
        assert "no evaluation of the policy was found" in view.page.inner_text("footer")
        quiet(view, path)


def test_data_that_are_gone_are_said(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "copy")
    (folder / "checkpoints" / "model_best.pth.tar").unlink()
    main(["--run", str(folder), "--html", str(tmp_path / "page.html")])
    assert "Whether the statistics fit the data: there is no" in (tmp_path / "page.html").read_text()


def test_what_is_no_run_is_named(run, tmp_path):
    with pytest.raises(ConfigError, match="is no folder of a run: it lacks config.yaml or logs/metrics.jsonl"):
        run_page(tmp_path)
    folder = shutil.copytree(run, tmp_path / "copy")
    (folder / "logs" / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="has no line yet"):
        run_page(folder)


def test_an_evaluation_in_the_run_s_folder_is_shown_once(run, tmp_path):
    named = ["--evaluations", str(evaluated(run / "eval", tasks=("to_3",)).folder / ".." / "eval")]
    pages = [tmp_path / "named.html", tmp_path / "found.html"]
    for page, flags in zip(pages, (named, []), strict=True):
        main(["--run", str(run), "--html", str(page), *flags])
    assert pages[0].read_text() == pages[1].read_text()


def lines(*values, name="val_loss"):
    return [{"step": 10 * (i + 1), "loss": 1.0, name: value} for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("found", "text", "tone"),
    [
        ([{"step": 10, "success": 0.5}], "After 10 steps no loss was logged yet.", "plain"),
        (lines(0.5), "After 10 steps the validation loss is 0.5; there is no earlier one", "plain"),
        (lines(0.5, 0.25), "After 20 steps the validation loss is 0.25, its lowest so far.", "good"),
        (lines(0.2, 0.25), "it was lowest at step 10 with 0.2, and has risen by 25 % since.", "warning"),
        (lines(0.2, 0.21), "has risen by 5 % since.", "good"),
        (lines(1.0, math.nan, name="loss"), "The loss is not finite from step 20 on.", "error"),
        (lines(1.0, 0.5, name="loss"), "nothing held out says how well it generalizes", "warning"),
    ],
)
def test_verdicts(found, text, tone):
    said, how = run_verdict(json.loads(json.dumps(found)))
    assert text in said and how == tone
