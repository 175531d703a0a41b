"""The alarm: when it goes on and off, what share of episodes it takes, and its file beside a policy."""

from __future__ import annotations

import json
import logging
import math
import os

import numpy as np
import pytest

from data.loader import open_for_evaluation
from inference.alarm import Alarm, Calibration, CalibrationError, alarm_score, calibrated
from inference.calibrate import recorded_uncertainty, rollout_uncertainty
from inference.closed_loop.record import RolloutRecord
from inference.page import sensitivity_sections
from inference.policy_files import MANIFEST, policy_stamp, read_alarm, read_policy, restamped, write_alarm
from inference.predictor import VLAPredictor
from inference.serving.export import export_policy
from scripts import calibrate_alarm
from tests.helpers import write_episodes
from tests.inference.checkpoints import train_tiny
from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint


def calibration(threshold=1.0, release=0.5, needed=2, window=3, **settings):
    return Calibration(threshold, release, needed, window, 0.05, 40, "test", settings)


def test_on_above_the_threshold_off_below_the_lower_one():
    alarm = Alarm(calibration())
    found = [alarm.add(value) for value in (2, 0, 0, 2, 2, 0.7, 0.7, 0.7, 0.4, 0.4, 2)]
    #             2 of 3 above 1: ........................^  stays while 2 of 3 are above 0.5 ..^
    assert found == [False, False, False, False, True, True, True, True, True, False, False]
    assert alarm.add(2) is True and alarm.on
    alarm.restart()
    assert not alarm.on and alarm.add(2) is False
    assert not Alarm(calibration(needed=1)).add(math.nan)


@pytest.mark.parametrize(("needed", "window"), [(1, 1), (2, 3), (3, 3), (2, 5)])
def test_the_score_is_where_the_alarm_would_still_go_on(needed, window):
    rng = np.random.default_rng(0)
    for length in (1, 2, 3, 12):
        values = rng.uniform(size=length).tolist()
        values[0] = math.nan
        score = alarm_score(values, needed, window)
        for threshold in rng.uniform(size=20):
            alarm = Alarm(calibration(threshold, threshold, needed, window))
            assert any([alarm.add(value) for value in values]) == (score > threshold)
    assert alarm_score([], 1, 1) == alarm_score([None, None], 1, 1) == -math.inf


def test_at_most_the_stated_share_of_successful_episodes_alarms():
    """Over many calibrations with few episodes each, an episode more raises an alarm in at most 10 % of them."""
    rng, false = np.random.default_rng(0), []
    for _ in range(400):
        episodes = [rng.normal(size=rng.integers(5, 20)).tolist() for _ in range(30)]
        found = calibrated(episodes[:-1], 0.1, 2, 3, source="test", settings={})
        false.append(alarm_score(episodes[-1], 2, 3) > found.threshold)
        assert found.release <= found.threshold and found.episodes == 29
    assert 0.04 < np.mean(false) <= 0.13  # 0.1 is the bound; 0.13 leaves two standard errors


def test_too_few_episodes_and_episodes_without_numbers_are_refused():
    with pytest.raises(CalibrationError, match=r"18 successful episodes can't hold .* 0.05, which takes 19 or more"):
        calibrated([[1.0, 2.0]] * 18, 0.05, 1, 1, source="test", settings={})
    assert calibrated([[1.0, 2.0]] * 19, 0.05, 1, 1, source="test", settings={}).threshold == 2
    with pytest.raises(CalibrationError, match=r"have no uncertainty.*--best_of 8"):
        calibrated([[math.nan] * 5] * 19, 0.05, 1, 1, source="test", settings={})


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    return write_episodes(tmp_path_factory.mktemp("demos") / "many.parquet", [7] * 22)


@pytest.fixture
def checkpoint(tmp_path, tiny_paligemma_dir, demos):
    return train_tiny(tmp_path, tiny_paligemma_dir, [demos])


def calibrate(monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["calibrate_alarm.py", *map(str, flags)])
    monkeypatch.setattr(calibrate_alarm, "set_up_logging", lambda: None)
    calibrate_alarm.main()


def test_one_command_calibrates_and_predictor_and_export_have_the_alarm(
    checkpoint, demos, tmp_path, monkeypatch, capsys
):
    before = VLAPredictor.from_checkpoint(checkpoint, "cpu")
    assert before.alarm is None and "was never calibrated: no alarm (scripts/calibrate_alarm.py)" in before.no_alarm
    calibrate(monkeypatch, "--checkpoint_path", checkpoint, "--data_path", demos, "--device", "cpu")
    assert "of episodes that succeed, from 22 recorded episodes" in capsys.readouterr().out
    calibrate(monkeypatch, "--checkpoint_path", checkpoint, "--data_path", demos, "--best_of", 3, "--rate", 0.2)
    predictor = VLAPredictor.from_checkpoint(checkpoint, "cpu")
    assert predictor.alarm.calibration.settings["kind"] == "velocity" and predictor.no_alarm == ""
    several = VLAPredictor.from_checkpoint(checkpoint, "cpu", best_of=3)
    assert several.alarm.calibration.settings["kind"] == "spread"
    assert several.alarm.calibration.false_alarm_rate == 0.2
    other = VLAPredictor.from_checkpoint(checkpoint, "cpu", num_inference_steps=2)
    assert other.alarm is None and "num_inference_steps 3, now 2" in other.no_alarm
    one_step = VLAPredictor.from_checkpoint(checkpoint, "cpu", num_inference_steps=1)
    assert "have no uncertainty" in one_step.no_alarm
    content = load_checkpoint(checkpoint)
    folder = export_policy({**content, "alarm": read_alarm(checkpoint, content)}, tmp_path / "policy")
    exported = VLAPredictor.from_checkpoint(folder, "cpu")
    assert exported.alarm.calibration == predictor.alarm.calibration
    # an exported folder can be calibrated as well, and stays whole
    calibrate(monkeypatch, "--checkpoint_path", folder, "--data_path", demos, "--best_of", 2)
    assert [found.settings["best_of"] for found in read_policy(folder)["alarm"]] == [1, 3, 2]


def test_an_alarm_of_other_weights_is_not_used_and_a_damaged_one_is_named(checkpoint, demos, monkeypatch, caplog):
    calibrate(monkeypatch, "--checkpoint_path", checkpoint, "--data_path", demos)
    path = checkpoint.with_name(f"{checkpoint.name}.alarm.json")
    content = load_checkpoint(checkpoint)
    for key in ("format", "saved_at"):
        content.pop(key)
    save_checkpoint(content, checkpoint)
    with caplog.at_level(logging.WARNING):
        assert VLAPredictor.from_checkpoint(checkpoint, "cpu").alarm is None
    assert "was calibrated with other weights than tiny.pth.tar has now: it is not used" in caplog.text
    for spoil in (
        lambda entry: entry | {"release": 1e9},
        lambda entry: entry | {"settings": None},
        lambda entry: entry | {"threshold": "high"},
        lambda entry: entry | {"needed": 0},
        lambda entry: entry | {"threshold": 1e999},
        lambda entry: entry | {"extra": 1},
        lambda entry: [],
    ):
        value = json.loads(path.read_text())
        value["calibrations"] = [spoil(value["calibrations"][0])]
        (checkpoint.parent / "spoilt.json").write_text(json.dumps(value))
        spoilt = checkpoint.with_name("other.pth.tar")
        spoilt.with_name("other.pth.tar.alarm.json").write_text(json.dumps(value))
        with pytest.raises(CheckpointError, match=r"other.pth.tar.alarm.json: not of this program, or damaged.*remove"):
            read_alarm(spoilt, content)


def test_wrong_requests_are_refused(checkpoint, demos, tmp_path, monkeypatch, capsys):
    common = ("--checkpoint_path", checkpoint)
    for flags, message in (
        (("--rate", "0"), "--rate is 0; give a share above 0, and at most 0.5"),
        (("--rate", "0.7"), "--rate is 0.7; give a share above 0, and at most 0.5: the alarm ends at the median"),
        (("--needed", "4"), "--needed 4 of --window 3: give 1 <= needed <= window"),
        (("--window", "2000"), "--needed 2 of --window 2000: give 1 <= needed <= window <= 1000"),
        (("--rollouts", tmp_path, "--best_of", 2), "--best_of: the results of --rollouts say what they were run with"),
        (("--rollouts", tmp_path, "--data_path", demos), "--rollouts and --data_path are two sources"),
        (("--rollouts", tmp_path, f"{tmp_path}/../{tmp_path.name}"), "--rollouts names a folder twice"),
    ):
        with pytest.raises(SystemExit):
            calibrate(monkeypatch, *common, *flags)
        assert message in capsys.readouterr().err
    with pytest.raises(CalibrationError, match="no closed-loop results of a policy; give an --output_dir"):
        calibrate(monkeypatch, *common, "--rollouts", tmp_path)
    with pytest.raises(CalibrationError, match="22 successful episodes can't hold a false-alarm rate of 0.01"):
        calibrate(monkeypatch, *common, "--data_path", demos, "--rate", "0.01")
    with pytest.raises(CalibrationError, match=r"with rtc a plan continues the one before.*--rollouts"):
        calibrate(monkeypatch, *common, "--data_path", demos, "--execution", "rtc")


def write_rollouts(folder, checkpoint, stamp):
    """Closed-loop results of 20 successes and 5 failures; returns their settings."""
    execution = {"strategy": "synchronous", "n_action_steps": 2, "latency_steps": 0}
    settings = {"checkpoint": str(checkpoint), "checkpoint_stamp": stamp, "control": "policy"}
    settings |= {"prompts": "own", "num_inference_steps": 3, "dataset": "default", "execution": execution}
    folder.mkdir(exist_ok=True)
    (folder / "rollout_settings.json").write_text(json.dumps(settings))
    lines = [{"success": i < 20, "uncertainty": [None, 0.1 * i, 0.1 * i]} for i in range(25)]
    (folder / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return settings


def test_calibration_on_closed_loop_results(checkpoint, tmp_path, monkeypatch):
    folder = tmp_path / "results"
    settings = write_rollouts(folder, checkpoint, policy_stamp(checkpoint))
    calibrate(monkeypatch, "--checkpoint_path", checkpoint, "--rollouts", folder)
    predictor = VLAPredictor.from_checkpoint(checkpoint, "cpu")
    found = predictor.alarm.calibration
    assert found.episodes == 20 and found.threshold == pytest.approx(1.9) and found.release == pytest.approx(0.95)
    write_alarm(checkpoint, load_checkpoint(checkpoint), [])
    for changed, message in (
        ({"control": "blind"}, "results of 'blind'"),
        ({"checkpoint_stamp": [1, 2]}, "not of the weights in"),
    ):
        (folder / "rollout_settings.json").write_text(json.dumps(settings | changed))
        with pytest.raises(CalibrationError, match=message):
            calibrate(monkeypatch, "--checkpoint_path", checkpoint, "--rollouts", folder)


@pytest.mark.parametrize(
    ("execution", "steps"),
    [
        ({"execution": "ensemble"}, range(7)),
        ({"execution": "ensemble", "latency_steps": 2}, range(0, 7, 2)),
        ({"execution": "naive_async", "n_action_steps": 1, "latency_steps": 2}, range(0, 7, 2)),
        ({"execution": "synchronous", "n_action_steps": 2, "latency_steps": 3}, range(0, 7, 2)),  # it stands meanwhile
    ],
)
def test_recorded_episodes_are_planned_as_often_as_the_execution_plans(checkpoint, demos, execution, steps):
    predictor = VLAPredictor.from_checkpoint(checkpoint, "cpu", **execution)
    processors = predictor.image_processor, predictor.prompt_tokenizer
    (data,) = open_for_evaluation(predictor.config, *processors, [str(demos)], predictor.dataset_index).values()
    found = recorded_uncertainty(predictor, data)
    assert [len(episode) for episode in found] == [len(steps)] * 22


def test_an_interrupted_evaluation_calibrates_with_the_episodes_that_finished(tmp_path, caplog):
    assert calibrated([[value] for value in (3.0, 1.0, 2.0)], 0.5, 1, 1, source="test", settings={}).threshold == 2
    write_rollouts(tmp_path, "policy.pth.tar", [1, 2.0])
    path = tmp_path / "episodes.jsonl"
    path.write_text(path.read_text()[:-7])
    with caplog.at_level(logging.WARNING):
        assert len(rollout_uncertainty([tmp_path])) == 20
    assert f"{path}: a line cut off by a crash is left out" in caplog.text
    path.unlink()
    with pytest.raises(CalibrationError, match=rf"{tmp_path}: no episode has finished; run that main_eval.py --env"):
        rollout_uncertainty([tmp_path])


def test_calibrating_an_export_leaves_its_results_its_own(checkpoint, tmp_path, monkeypatch):
    """Also the results of earlier versions, which stamped an export by its policy.json."""
    folder, results = export_policy(load_checkpoint(checkpoint), tmp_path / "policy"), tmp_path / "results"
    earlier = [(folder / MANIFEST).stat().st_size, (folder / MANIFEST).stat().st_mtime]
    for stamp in (earlier, policy_stamp(folder)):
        settings = write_rollouts(results, folder, stamp)
        (results / "sensitivity.json").write_text(json.dumps(settings | {"samples": 9, "rows": []}))
        for rate in (0.1, 0.2):
            calibrate(monkeypatch, "--checkpoint_path", folder, "--rollouts", results, "--rate", rate)
        assert [found.false_alarm_rate for found in read_policy(folder)["alarm"]] == [0.2]
        now = settings | {"checkpoint_stamp": policy_stamp(folder)}
        assert restamped(settings) == now and sensitivity_sections(results, now)
        assert RolloutRecord(results, now).settings == settings, "recordings hold the earlier stamp"
    write_rollouts(results, folder, [earlier[0], earlier[1] + 1])
    with pytest.raises(CalibrationError, match="not of the weights in"):
        calibrate(monkeypatch, "--checkpoint_path", folder, "--rollouts", results)
    os.utime(folder / "model.safetensors", (0, 0))
    assert restamped(settings) == settings, "of the weights before"
