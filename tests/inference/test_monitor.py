"""The monitor: what a robot sends beside what training saw, said once a kind, cheap, silent where nothing differs."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from PIL import Image

from data.comparison.profile import profile_of
from data.episode_store import EpisodeStore
from data.processing import VLAImageProcessor
from inference.monitor import CHECK, COST, Monitor
from tests.data.comparison.synthetic import SIZE, draw, motion, write_session

CAMERAS = ("image_1", "image_2")


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    path = write_session(folder / "train.parquet", 24, seed=0)
    store = EpisodeStore([path], state_dim=3, per_action_dim=3, cameras=CAMERAS, cache_dir=folder)
    processor = VLAImageProcessor(SIZE, SIZE, [0.5] * 3, [0.5] * 3, Image.Resampling.BICUBIC)
    return profile_of(store, CAMERAS, processor)


def told(training, *, seed=3, steps=96, frame=lambda p: p, state=lambda s: s, swap=False, prompt="push the blob"):
    """What a monitor says of a stream of observations, looked at without a limit on its cost."""
    monitor = Monitor(training)
    monitor.predicted(1e9)
    states = motion(np.random.default_rng(seed), steps)
    for values in states:
        pictures = [frame(draw(camera, values)) for camera in ((1, 0) if swap else (0, 1))]
        images = {
            name: torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)
            for name, picture in zip(CAMERAS, pictures, strict=True)
        }
        texts = monitor.look(images, state(values.astype(np.float32)), prompt)
    assert sorted(key.split()[0] for key in texts) == sorted(monitor.new_kinds()) and not monitor.new_kinds()
    return texts


MISTAKES = {
    "red_and_blue_exchanged": {"frame": lambda p: p[..., ::-1]},
    "upside_down": {"frame": lambda p: p[::-1]},
    "camera_black": {"frame": lambda p: p * 0},
    "darker": {"frame": lambda p: (p * 0.5).astype(np.uint8)},
    "cameras_exchanged": {"swap": True},
    "thousandfold": {"state": lambda s: s * np.array([1000, 1000, 1], np.float32)},
    "instruction_unknown": {"prompt": "shove the blob"},
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_said_within_a_few_seconds(kind, training):
    texts = told(training, **MISTAKES[kind])
    assert kind in {key.split()[0] for key in texts}
    assert all(key.split()[0] == kind for key in texts), texts


def test_a_camera_that_hangs_is_told_while_the_robot_moves(training):
    still = draw(0, np.array([0.1, 0.5, 0.5]))
    monitor = Monitor(training)
    monitor.predicted(1e9)
    for values in motion(np.random.default_rng(4), 2 * CHECK):
        images = {"image_1": still, "image_2": draw(1, values)}
        images = {name: torch.from_numpy(picture).permute(2, 0, 1) for name, picture in images.items()}
        texts = monitor.look(images, values.astype(np.float32), "push the blob")
    assert list(texts) == ["camera_frozen image_1"]


@pytest.mark.parametrize("seed", range(20, 40))
def test_what_is_as_in_training_raises_nothing(seed, training):
    assert told(training, seed=seed, steps=64) == {}


def test_looking_keeps_to_its_share_of_the_predictions(training):
    monitor, values = Monitor(training), np.array([0.1, 0.5, 0.5], np.float32)
    image = torch.from_numpy(draw(0, values)).permute(2, 0, 1)
    spent = 0.0
    for _ in range(600):
        before = time.perf_counter()
        monitor.look({"image_1": image, "image_2": image}, values, "push the blob")
        spent += time.perf_counter() - before
        monitor.predicted(0.002)
    first = CHECK * 0.01  # the first observations are looked at whatever it costs
    assert spent < 2 * COST * 600 * 0.002 + first + 600 * 20e-6
    assert monitor._looked_at >= CHECK


def test_a_robot_that_waits_is_not_stuck(training):
    values = np.array([0.1, 0.5, 0.5], np.float32)
    images = {name: torch.from_numpy(draw(i, values)).permute(2, 0, 1) for i, name in enumerate(CAMERAS)}
    monitor = Monitor(training)
    monitor.predicted(1e9)
    for _ in range(3 * CHECK):
        assert monitor.look(images, values, "push the blob") == {}


def test_missing_cameras_and_states_are_no_obstacle(training):
    monitor = Monitor(training)
    for _ in range(2 * CHECK):
        assert monitor.look({}, None, "push the blob") == {}


def asked(training, interval, *, every=1, slower=1.0, unsteady=0.0, pauses=(), horizon=8, hz=20.0):
    """What a monitor says of the rate of requests that come so many seconds apart, each `every` steps of a motion."""
    monitor, rng, now = Monitor({**training, "control_hz": hz}, horizon), np.random.default_rng(0), 0.0
    path = motion(np.random.default_rng(7), 4000)
    for number in range(200):
        now += interval * (1 + unsteady * rng.uniform(-1, 1)) + (30.0 if number in pauses else 0.0)
        monitor._keep_time(now, path[int(number * every * slower)].astype(np.float32))
    return [text for key, text in monitor._told.items() if key.startswith("another_rate")]


@pytest.mark.parametrize(
    "stream",
    [
        {"interval": 0.05},  # one request a step
        {"interval": 0.2, "every": 4},  # as many actions of each plan as the policy is meant to execute
        {"interval": 0.1, "every": 2},  # fewer
        {"interval": 0.4, "every": 8},  # all of them
        {"interval": 0.2, "every": 4, "pauses": (50, 90, 120)},
        {"interval": 0.2, "every": 4, "unsteady": 0.4},
        {"interval": 0.05, "unsteady": 1.0},
        {"interval": 0.2, "every": 4, "slower": 0.4},  # a policy that moves slowly
        {"interval": 1.0, "every": 4, "hz": None},
    ],
)
def test_requests_at_the_training_datas_rate_raise_nothing(stream, training):
    assert asked(training, **stream) == []


@pytest.mark.parametrize(
    ("stream", "evidence"),
    [
        ({"interval": 0.6, "every": 4}, "12.0 steps, and a plan has 8"),  # the robot waits for its plans
        ({"interval": 0.025}, "more than one request a step"),
        ({"interval": 0.05, "every": 3}, "as fast as it does at most in training"),  # three times the rate
    ],
)
def test_requests_at_another_rate_are_said_once(stream, evidence, training):
    (text,) = asked(training, **stream)
    assert evidence in text and "run the control loop at the training data's rate" in text


def test_a_stream_that_keeps_no_time_has_no_rate(training):
    assert asked(training, 5.0, horizon=None) == []
