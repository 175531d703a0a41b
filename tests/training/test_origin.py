"""Which settings count where a run begins from a checkpoint: each is honoured, said, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.processing import ObservationError, processors_from_checkpoint, processors_from_config
from data.trained_processors import processors_to_train_on
from model.tiny.paligemma import make_tiny_paligemma
from tests.conftest import TINY
from training.origin import announce_changes, goes_on, position_warnings, settings_to_go_on
from training.schedule import RunLength
from utils.config_utils import Config, ConfigError, config_from_dict, config_to_dict
from utils.statistics import STATISTICS, StatisticsError

WHERE = "runs/a/checkpoints/checkpoint_step_40.pth.tar"


def saved(step: int = 40, num_samples: int = 128, **sections: Any) -> dict[str, Any]:
    """What these functions read of a checkpoint of run `a`: 4 epochs of 16 steps of 8 samples."""
    sections.setdefault("training", {"epochs": 4, "experiment_name": "a", "checkpoint_dir": "runs"})
    config = config_to_dict(config_from_dict(sections))
    column = {name: [0.5] * 7 for name in STATISTICS}
    statistics = [{"state": column, "action": column}]
    return {"step": step, "num_samples": num_samples, "config": config, "statistics": statistics}


def run(**sections: Any) -> Config:
    training = {"epochs": 4, "experiment_name": "a", "checkpoint_dir": "runs", **sections.pop("training", {})}
    return config_from_dict({"training": training, **sections})


def warnings(config: Config, checkpoint: dict[str, Any] | None = None, num_samples: int = 128) -> list[str]:
    return position_warnings(checkpoint or saved(), WHERE, config, RunLength.from_config(config, num_samples))


def test_nothing_changed_warns_of_nothing():
    assert warnings(run()) == []
    assert warnings(run(), saved(step=64)) == [], "a finished run that is started again"


def test_another_batch_size_says_what_becomes_of_position_and_rate():
    position, rate = warnings(run(data={"batch_size": 4}))
    assert "data.batch_size 8 -> 4" in position and "step 40 stays step 40" in position
    assert "from epoch 2.50 to 1.25, and what lies between is drawn again" in position
    assert "the run ends at step 128 instead of 64" in position
    assert "the learning rate goes on at 3.89e-05, where it would have been 1.54e-05" in rate
    forward, _ = warnings(run(data={"batch_size": 10}))
    assert "what lies between is not drawn" in forward


def test_more_epochs_say_what_becomes_of_the_rate():
    (told,) = warnings(run(training={"epochs": 8}), saved(step=64))
    assert "the learning rate goes on at 2.5e-05, where it would have been 0" in told
    assert "over 128 steps with optimizer.lr 5e-05, not that of the checkpoint over 64" in told


@pytest.mark.parametrize("change", [{"data": {"batch_size": 16}}, {"training": {"epochs": 2}}])
def test_a_run_that_would_be_over_is_refused(change):
    message = r"is at step 40, which is epoch .*, but this run ends at step 32: .* give --epochs \d or more to go on"
    with pytest.raises(ConfigError, match=message):
        warnings(run(**change))


def test_a_run_is_its_name_or_its_folder():
    assert goes_on(saved(), "elsewhere/model_best.pth.tar", run())
    renamed = run(training={"experiment_name": "b"})
    assert goes_on(saved(), "runs/b/checkpoints/model_best.pth.tar", renamed)
    assert not goes_on(saved(), WHERE, renamed), "fine-tuning"


def test_an_earlier_schedule_keeps_its_unit(caplog):
    """Checkpoints of before `T_max` counted epochs say `interval: step`."""
    checkpoint = saved(lr_scheduler={"type": "CosineAnnealingLR", "T_max": 50, "interval": "step"})
    config = run(lr_scheduler={"type": "CosineAnnealingLR", "T_max": 50})
    with caplog.at_level("INFO"):
        went_on = settings_to_go_on(checkpoint, WHERE, config, "c.yaml")
    assert went_on.lr_scheduler.interval == "step" and "lr_scheduler.interval: step, as the run began" in caplog.text
    given = run(lr_scheduler={"type": "CosineAnnealingLR", "T_max": 50, "interval": "epoch"})
    assert settings_to_go_on(checkpoint, WHERE, given, "c.yaml") == given


def test_statistics_made_anew_stop_a_run_that_goes_on(tmp_path, caplog):
    checkpoint, path = saved(), tmp_path / "stats.json"
    config = run(data={"normalization_stats_path": str(path)})
    with caplog.at_level("INFO"):
        settings_to_go_on(checkpoint, WHERE, config, "c.yaml")
        settings_to_go_on(checkpoint, WHERE, run(), "c.yaml")
    assert f"({path} is not there)" in caplog.text and "(data.normalization_stats_path is null)" in caplog.text

    content = {"action_mode": "absolute", "val_fraction": 0.0, "max_episodes": None}
    content["datasets"] = {"default": checkpoint["statistics"][0]}
    path.write_text(json.dumps(content))
    settings_to_go_on(checkpoint, WHERE, config, "c.yaml")
    content["datasets"] = json.loads(json.dumps(content["datasets"]))
    content["datasets"]["default"]["action"]["max"][2] = 26.0
    path.write_text(json.dumps(content))
    message = r"stats.json: not the statistics of .*action.max.*normalization_stats_path=null .*--init_checkpoint"
    with pytest.raises(StatisticsError, match=message):
        settings_to_go_on(checkpoint, WHERE, config, "c.yaml")


def test_every_change_is_said(caplog):
    with caplog.at_level("INFO"):
        announce_changes(saved(), WHERE, run(data={"prompt_max_len": 200}, model={"vlm_config": {"type": "paligemma"}}))
    assert "changed since the checkpoint: data.prompt_max_len 48 -> 200" in caplog.text
    with caplog.at_level("INFO"):
        announce_changes(saved(), WHERE, run(model={"vlm_config": {"model_name_or_path": "other"}}))
    assert "model.vlm_config.model_name_or_path './weight/paligemma-3b-pt-224' -> 'other'" in caplog.text
    assert "other is not read: the checkpoint holds every weight" in caplog.text


def test_tokenizer_and_image_processor_are_the_checkpoints(tmp_path, tiny_paligemma_dir):
    """`prompt_max_len` is the config's; a processor that the config names is the checkpoint's, or refused."""
    vlm = {"vlm_config": {"model_name_or_path": str(tiny_paligemma_dir)}}
    image_processor, tokenizer = processors_from_config(run(model=vlm, data={"prompt_max_len": 8}))
    checkpoint = saved(model=vlm, data={"prompt_max_len": 8}) | {
        "image_processor": image_processor.to_settings(),
        "tokenizer_files": tokenizer.to_files(),
    }
    long = run(model=vlm, data={"prompt_max_len": 200})
    assert processors_from_checkpoint(checkpoint)[1].max_len == 8
    assert len(processors_to_train_on(checkpoint, long)[1]("press the button " * 9)) > 8

    def named(path: Path | str) -> Config:
        names = {"tokenizer_name_or_path": str(path), "image_processor_name_or_path": str(path)}
        return run(model=vlm, data=names)

    processors_to_train_on(checkpoint, named(tiny_paligemma_dir))  # the same ones
    with pytest.raises(ObservationError, match="tokenizer: none at '/nowhere/tok'"):
        processors_to_train_on(checkpoint, named("/nowhere/tok"))
    make_tiny_paligemma(tmp_path / "other", **TINY | {"prompts": ("quite other words",)})
    with pytest.raises(ObservationError, match=r"data.tokenizer_name_or_path: .* is another one than the checkpoint's"):
        processors_to_train_on(checkpoint, named(tmp_path / "other"))
    gone = {**checkpoint, "config": config_to_dict(named("/nowhere/tok"))}
    processors_to_train_on(gone, named("/nowhere/tok"))  # a run that goes on needs nothing beside its checkpoint
