"""Experiment trackers: same names everywhere, one run across resumes, and nothing that they raise stops training."""

from __future__ import annotations

import sys

import av
import numpy as np
import pytest
from PIL import Image

from tests.trainers import make_trainer, resumed_trainer
from training.trackers import TensorBoardTracker, Trackers
from utils.config_utils import ConfigError


@pytest.fixture
def local_trackio(tmp_path, monkeypatch):
    """Trackio with its store in the test's folder; it reads where that is when it is imported."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    import trackio

    yield trackio
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        del sys.modules[name]


@pytest.fixture
def video(tmp_path):
    """Twelve frames at 20 frames/s that grow brighter, as MP4."""
    path = tmp_path / "rollout.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=20)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for value in range(0, 240, 20):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), value, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def events(directory):
    """The scalars {name: {step: value}} and pictures {name: [PIL image]} of TensorBoard's files in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(directory), {"images": 0, "scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()
    scalars = {name: {e.step: e.value for e in accumulator.Scalars(name)} for name in tags["scalars"]}
    return scalars, {name: accumulator.Images(name) for name in tags["images"]}


def test_tensorboard_has_what_the_log_has(make_config):
    config = make_config(training={"max_steps": 2, "log_interval": 1, "trackers": ["tensorboard"]})
    trainer = make_trainer(config)
    trainer.run_log.rewind(0)
    for step in (1, 2):
        trainer.run_log.write({"step": step, "loss": 0.5 * step, "val/mse": 2.0})
    picture = config.experiment_dir / "picture.png"
    Image.new("RGB", (10, 6)).save(picture)
    trainer.run_log.trackers.picture(2, "val/trajectories", picture)
    trainer.run_log.finish()
    scalars, pictures = events(config.experiment_dir / "logs" / "tensorboard")
    assert scalars["loss"] == {1: 0.5, 2: 1.0} and scalars["val/mse"] == {1: 2.0, 2: 2.0}
    (image,) = pictures["val/trajectories"]
    assert (image.width, image.height, image.step) == (10, 6, 2)


def test_tensorboard_drops_what_is_trained_again(make_config):
    training = {"max_steps": 4, "log_interval": 1, "save_every_n_steps": 2, "trackers": ["tensorboard"]}
    first = make_trainer(make_config(training=training))
    first.fit()
    again = resumed_trainer(make_config(training=training), first.checkpoints / "checkpoint_step_2.pth.tar")
    again.fit()
    scalars, _ = events(first.config.experiment_dir / "logs" / "tensorboard")
    assert sorted(scalars["loss"]) == [1, 2, 3, 4]


def test_a_video_in_tensorboard_is_an_animation(make_config, video):
    config = make_config()
    tracker = TensorBoardTracker(config)
    tracker.video(7, "closed_loop/reach", video)
    tracker.finish()
    _, pictures = events(config.experiment_dir / "logs" / "tensorboard")
    (stored,) = pictures["closed_loop/reach"]
    path = video.with_suffix(".gif")
    path.write_bytes(stored.encoded_image_string)
    animation = Image.open(path)
    assert (stored.width, stored.height, animation.n_frames, animation.info["duration"]) == (64, 48, 12, 50)


def test_trackio_continues_one_run(make_config, local_trackio, video, tmp_path):
    """Same folder, same run; another experiment of that name elsewhere is another run."""
    from trackio.sqlite_storage import SQLiteStorage

    config = make_config(training={"trackers": ["trackio"]}, trackio={"project": "towels"})
    for step in (1, 2):
        trackers = Trackers(config)
        trackers.rewind(step - 1)
        trackers.scalars(step, {"loss": 0.5 * step})
        trackers.video(step, "closed_loop/reach", video)
        trackers.finish()
    (run,) = SQLiteStorage.get_runs("towels")
    lines = [line for line in SQLiteStorage.get_logs("towels", run) if "loss" in line]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 1.0)]
    assert len(list((tmp_path / "trackio").rglob("*.mp4"))) == 2


def test_a_space_out_of_reach_leaves_the_run_here(make_config, local_trackio, monkeypatch, caplog):
    from trackio.sqlite_storage import SQLiteStorage

    init = local_trackio.init

    def unreachable(project, space_id=None, **settings):
        if space_id is not None:
            raise ConnectionError("no route to the hub\nmore")
        return init(project, **settings)

    monkeypatch.setattr(local_trackio, "init", unreachable)
    trackers = Trackers(make_config(training={"trackers": ["trackio"]}, trackio={"space_id": "me/runs"}))
    trackers.scalars(1, {"loss": 1.0})
    trackers.finish()
    assert "Trackio's Space me/runs can't be reached (no route to the hub): the run is kept" in caplog.text
    assert "trackio sync --project paligemma-vla --space-id me/runs" in caplog.text
    assert len(SQLiteStorage.get_runs("paligemma-vla")) == 1


def test_a_tracker_that_fails_is_dropped_and_training_ends_well(make_config, monkeypatch, caplog):
    def fail(self, step, values):
        raise OSError("the server went away\nTraceback")

    monkeypatch.setattr(TensorBoardTracker, "scalars", fail)
    training = {"max_steps": 3, "log_interval": 1, "trackers": ["tensorboard"]}
    trainer = make_trainer(make_config(training=training))
    trainer.fit()
    assert trainer.step == 3 and len(trainer.run_log.metrics_path.read_text().splitlines()) >= 3
    warnings = [record.getMessage() for record in caplog.records if "training.trackers" in record.getMessage()]
    assert len(warnings) == 1 and "tensorboard failed (the server went away) and gets nothing more" in warnings[0]


def test_a_missing_package_names_itself(make_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match="training.trackers: tensorboard is not installed; pip install tensorboard"):
        Trackers(make_config(training={"trackers": ["tensorboard"]}))


def test_wandb_enabled_is_a_spelling(make_config):
    both = make_config(training={"trackers": ["wandb", "tensorboard"]}, wandb={"enabled": True})
    assert both.trackers == ("wandb", "tensorboard")
    assert make_config(wandb={"enabled": True}).trackers == ("wandb",) and make_config().trackers == ()
