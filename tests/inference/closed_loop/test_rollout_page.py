"""The page of a closed-loop evaluation: its controls, its outcomes, recorded episodes, uncertainty, videos."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

import main_eval
from data.convert.rollouts import RolloutRecorder
from data.viewer import rollout_episodes
from inference.closed_loop.evaluation import evaluate_tasks
from inference.closed_loop.page import read_evaluation, rollout_page, rollout_verdict
from inference.closed_loop.policies import ReplayPolicy
from tests.browser import chromium, needs_browser, opened, overflow, quiet  # noqa: F401
from tests.inference.closed_loop.simple_env import DriftEnv
from utils.page.build import write_page
from utils.page.content import Charts, Rates, Videos

EVIL = "</script><script>alert(1)</script>"


def evaluated(folder, control="policy", recorder=None, prompts=None, tasks=("to_3", "to_100"), seeds=(0, 1, 2)):
    """An evaluation in which what counts as the policy plays actions back; without the actions nothing moves."""
    moves = 1.0 if control == "policy" else 0.0
    actions = [[[moves, 0.0, 0.0, 0.0]] * 12]
    settings = {"checkpoint": "policy.pth.tar", "checkpoint_stamp": [1, 2.0], "control": control, "prompts": "own"}
    settings |= {"env": "drift", "env_options": {}, "demos_path": None}
    policy = {task: ReplayPolicy([np.array(a, np.float32) for a in actions]) for task in tasks}
    evaluate_tasks(
        folder,
        dict.fromkeys(tasks),
        list(seeds),
        DriftEnv,
        policy,
        settings,
        prompts=prompts or {},
        num_envs=1,
        num_videos=1,
        restart=False,
        recorder=recorder,
    )
    return read_evaluation(folder)


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory):
    """(the policy's with recorded episodes, its control's, the recorder)."""
    folder = tmp_path_factory.mktemp("evaluations")
    recorder = RolloutRecorder(folder / "record")
    main = evaluated(folder / "main", recorder=recorder, prompts={"to_3": EVIL})
    return main, evaluated(folder / "blind", "blind"), recorder


def test_success_stands_beside_its_controls(evaluations):
    main, control, _ = evaluations
    page = rollout_page(main, [control])
    (rates,) = [block for block in page.sections[0].blocks if isinstance(block, Rates)]
    assert [(rate.group, rate.name, rate.main) for rate in rates.rates] == [
        ("to_3", "the policy", True),
        ("to_3", "the policy without looking", False),
        ("to_100", "the policy", True),
        ("to_100", "the policy without looking", False),
    ]
    assert rates.rates[0].successes == 3 and rates.rates[1].low == control.result["tasks"]["to_3"]["wilson_95"][0]
    assert "All ran from the same seeds." in rates.caption
    assert page.verdict.startswith("The policy succeeds in 3 of 6 episodes (50 %, 95 % interval 19 to 81 %).")
    (videos,) = [block for section in page.sections for block in section.blocks if isinstance(block, Videos)]
    assert [video.tone for video in videos.videos] == ["error", "good"], "failures first"


def test_the_page_says_what_was_told_and_which_mujoco_ran(evaluations):
    main, *_ = evaluations
    settings = main.result["settings"]
    for prompts, wanted in (
        ("paraphrase 1", "the policy, paraphrase 1 of each instruction"),
        ("swapped", "the policy, another task’s instruction"),
        ("push it", "the policy, instruction “push it”"),
    ):
        told = dataclasses.replace(main, result=main.result | {"settings": settings | {"prompts": prompts}})
        assert told.name == wanted
    environment = settings["env_settings"] | {"mujoco": "3.3.0"}
    versioned = dataclasses.replace(main, result=main.result | {"settings": settings | {"env_settings": environment}})
    assert ("MuJoCo", "3.3.0") in rollout_page(versioned).facts


def test_a_control_that_is_as_good_is_said(evaluations):
    main, control, _ = evaluations
    text, tone = rollout_verdict(main, [control])
    assert "That is not clearly more than the policy without looking (0 of 6)." in text and tone == "warning"
    summary = main.result["summary"] | {"successes": 6, "wilson_95": [0.6, 1.0]}
    better = dataclasses.replace(main, result=main.result | {"summary": summary})
    text, tone = rollout_verdict(better, [control])
    assert text.endswith("The best control, the policy without looking, succeeds in 0 of 6.") and tone == "good"
    assert rollout_verdict(main)[1] == "plain"


def test_uncertainty_and_alarms_are_marked(evaluations):
    main, _, recorder = evaluations
    lines = [
        line | {"uncertainty": [0.5, math.nan, 0.25][: line["plans"]] + [0.1] * (line["plans"] - 3), "alarm_step": 0}
        for line in main.lines
    ]
    lines[0] |= {"uncertainty": [None] * lines[0]["plans"], "alarm_step": None}
    unsure = dataclasses.replace(main, lines=lines)
    page = rollout_page(unsure)
    (section,) = [section for section in page.sections if section.title == "Uncertainty"]
    (charts,) = [block for block in section.blocks if isinstance(block, Charts)]
    assert sum(len(chart.lines) for chart in charts.charts) == len(lines) - 1, "none where a head has none"
    assert all(line.marks == [0] for chart in charts.charts for line in chart.lines)
    # A plan at every step, and an alarm at the second to last: the axis and the circle follow the steps, not a rule.
    dense = [line | {"plan_steps": list(range(line["plans"])), "alarm_step": line["plans"] - 2} for line in lines[1:]]
    earlier = [{key: value for key, value in line.items() if key != "plan_steps"} for line in lines[1:2]]
    for some, wanted in ((dense, [line["plans"] - 2 for line in dense]), (earlier, [0])):
        page = rollout_page(dataclasses.replace(main, lines=some))
        (section,) = [section for section in page.sections if section.title == "Uncertainty"]
        drawn = [line for chart in section.blocks[0].charts for line in chart.lines]
        assert sorted(line.marks[0] for line in drawn) == sorted(wanted)
        if some is dense:
            assert all(list(line.x) == list(range(len(line.x))) for line in drawn)
    episodes = rollout_episodes(recorder.path, lines)
    marked = next(episode for episode in episodes if episode.marks)
    assert marked.marks[0].text.startswith("alarm") and marked.curves[0].name == "uncertainty"
    assert "Uncertainty" not in [section.title for section in rollout_page(main).sections]


@pytest.mark.parametrize("mark", [pytest.param(None, marks=needs_browser())])
def test_in_a_browser(chromium, evaluations, tmp_path, mark):  # noqa: F811
    """Recorded episodes scrub, videos play from the file, a hostile instruction is text."""
    main, control, recorder = evaluations
    path = tmp_path / "page.html"
    write_page(path, rollout_page(main, [control], rollout_episodes(recorder.path, main.lines)))
    for width in (390, 1280):
        view = opened(chromium, path, width)
        view.page.wait_for_timeout(300)
        lengths = view.page.evaluate("[...document.querySelectorAll('video')].map((v) => v.error ? 0 : v.duration)")
        assert len(lengths) == 2 and all(length > 0 for length in lengths)
        assert EVIL in view.page.inner_text("body") and overflow(view.page) == 0
        view.page.focus(".step")
        view.page.keyboard.press("End")
        last = int(view.page.get_attribute(".step", "max"))
        assert view.page.get_attribute(".films canvas", "data-frame") == str(last) and last > 0
        quiet(view, path)


def test_episodes_that_are_not_part_of_the_result_are_left_out(tmp_path):
    evaluated(tmp_path, seeds=(0, 1, 2))
    again = evaluated(tmp_path, tasks=("to_3",), seeds=(1,))
    assert [(line["task"], line["seed"]) for line in again.lines] == [("to_3", 1)]


def test_what_is_no_evaluation_is_named(tmp_path, evaluations):
    with pytest.raises(ValueError, match="has no rollouts.json; give the --output_dir of a finished closed-loop"):
        read_evaluation(tmp_path)
    with pytest.raises(ValueError, match="is an evaluation of to_3, to_100, and of none of reach-v3"):
        read_evaluation(evaluations[0].folder, ["reach-v3"])


def test_beside_needs_a_page(capsys):
    flags = ["--checkpoint_path", "c", "--env", "metaworld", "--tasks", "reach-v3", "--beside", "results"]
    with pytest.raises(SystemExit):
        main_eval.main(flags)
    assert "--beside belongs to --html, the page that shows them" in capsys.readouterr().err


@pytest.mark.parametrize("beside", [["a", "a/"], ["a", "results"]])
def test_an_evaluation_is_named_once(capsys, beside):
    flags = ["--checkpoint_path", "c", "--env", "metaworld", "--tasks", "reach-v3", "--html", "page.html"]
    with pytest.raises(SystemExit):
        main_eval.main([*flags, "--output_dir", "results", "--beside", *beside])
    assert "--beside names a folder twice, or --output_dir; name each other evaluation once" in capsys.readouterr().err


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path):
    evaluated(tmp_path)
    path = tmp_path / "episodes.jsonl"
    path.write_text(path.read_text()[:-9])
    assert len(read_evaluation(tmp_path).lines) == 5
