"""Mistakes planted between training data and a session, each named; sessions without one raise nothing."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data.comparison.delays import state_motion, unexplained_motion
from data.comparison.profile import profile_of
from data.episode_store import EpisodeStore
from data.processing import VLAImageProcessor
from tests.data.comparison.synthetic import SIZE, encoded, write_session
from utils.comparison.facts import is_profile
from utils.comparison.mismatch import _best_delay, _delay_of_pictures, mismatches

CAMERAS = ("image_1", "image_2")


def processor(fit="stretch"):
    return VLAImageProcessor(SIZE, SIZE, [0.5] * 3, [0.5] * 3, Image.Resampling.BICUBIC, fit)


def store(path, tmp_path):
    return EpisodeStore([path], state_dim=3, per_action_dim=3, cameras=CAMERAS, cache_dir=tmp_path / "cache")


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    path = write_session(folder / "train.parquet", 24, seed=0, control_hz=20.0)
    return profile_of(store(path, folder), CAMERAS, processor())


def named(tmp_path, training, seed=1, **mistake):
    path = write_session(tmp_path / f"session_{seed}.parquet", 3, seed=seed, steps=70, **mistake)
    session = profile_of(store(path, tmp_path), CAMERAS, processor(), against=training)
    return mismatches(session, training)


def changed(function):
    return lambda picture: np.asarray(function(Image.fromarray(picture)))


def boxed(image):
    canvas = Image.new("RGB", image.size)
    canvas.paste(image.resize((SIZE, SIZE * 3 // 4)), (0, SIZE // 8))
    return canvas


def column(d, function):
    def change(values):
        values[:, d] = function(values[:, d])
        return values

    return change


MISTAKES = {
    "red_and_blue_exchanged": ({"frame": lambda p: p[..., ::-1]}, "image_1"),
    "mirrored": ({"frame": lambda p: p[:, ::-1]}, "image_1"),
    "upside_down": ({"frame": lambda p: p[::-1]}, "image_1"),
    "turned_by_180_degrees": ({"frame": lambda p: p[::-1, ::-1]}, "image_1"),
    "turned_by_90_degrees": ({"frame": lambda p: np.rot90(p)}, "image_1"),
    "inverted_colours": ({"frame": lambda p: 255 - p}, "image_1"),
    "cropped": ({"frame": changed(lambda i: i.crop((5, 5, 43, 43)).resize((SIZE, SIZE)))}, "image_1"),
    "letterboxed": ({"frame": changed(boxed)}, "image_1"),
    "darker": ({"frame": lambda p: (p * 0.55).astype(np.uint8)}, "image_1"),
    "brighter": ({"frame": lambda p: np.minimum(p * 1.5, 255).astype(np.uint8)}, "image_1"),
    "blurred": ({"frame": changed(lambda i: i.filter(ImageFilter.GaussianBlur(1.5)))}, "image_1"),
    "strong_compression": ({"frame": lambda p: encoded(p, format="JPEG", quality=10)}, "image_1"),
    "camera_black": ({"frame": lambda p: p * 0}, "image_1"),
    "camera_frozen": ({"frozen": True}, "image_1"),
    "degrees_for_radians": ({"state": np.degrees}, "state"),
    "thousandfold": ({"state": lambda s: s * (1000, 1000, 1)}, "state"),
    "dimensions_exchanged": ({"state": lambda s: s[:, [1, 0, 2]]}, "state"),
    "inverted": ({"state": column(2, lambda v: 1 - v)}, "state[2]"),
    "sign_reversed": ({"state": column(0, lambda v: -v)}, "state[0]"),
    "stuck": ({"state": column(1, lambda v: v * 0 + v[0])}, "state[1]"),
    "state_late": ({"late_state": 1}, "state"),
    "images_late": ({"late_images": 1}, "image_1"),
    "another_rate": ({"every": 2}, "control rate"),
    "instruction_unknown": ({"prompt": "push that blob"}, "prompt"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_planted_mistake_is_named(kind, training, tmp_path):
    mistake, where = MISTAKES[kind]
    kinds = {(mismatch.kind, mismatch.where) for mismatch in named(tmp_path, training, **mistake)}
    assert (kind, where) in kinds, kinds
    allowed = {("images_late", "image_2")} if kind == "images_late" else set()
    assert kinds <= {(kind, where)} | allowed, "and nothing else is suspected"


def test_exchanged_cameras_are_named_as_such(training, tmp_path):
    kinds = {(mismatch.kind, mismatch.where) for mismatch in named(tmp_path, training, cameras=(1, 0))}
    assert kinds == {("cameras_exchanged", "image_1"), ("cameras_exchanged", "image_2")}


def test_the_rate_that_a_recorder_notes_is_compared(training, tmp_path):
    (mismatch,) = named(tmp_path, training, control_hz=10.0)
    assert mismatch.kind == "another_rate" and mismatch.evidence == "10 steps a second, in training 20"


@pytest.mark.parametrize("every", [2, 3])
def test_movement_says_nothing_where_both_rates_are_known_and_agree(every, training, tmp_path):
    assert named(tmp_path, training, every=every, control_hz=20.0) == []


def test_a_policy_that_moves_slowly_is_not_at_another_rate(training, tmp_path):
    def stretched(values):  # every step of the session is taken in three
        where = np.arange(len(values)) / 3
        return np.stack([np.interp(where, np.arange(len(values)), column) for column in values.T], axis=1)

    kinds = {mismatch.kind for mismatch in named(tmp_path, training, state=stretched)}
    assert "another_rate" not in kinds


def test_a_gripper_that_stays_open_is_not_stuck(tmp_path):
    train = write_session(tmp_path / "train.parquet", 24, seed=0, state=column(2, lambda v: np.clip(3 * v, 0, 1)))
    training = profile_of(store(train, tmp_path), CAMERAS, processor())
    assert training["state"]["quantiles"][2][5:] == [1.0] * 4 and training["state"]["steps"][2][0] >= 0
    training["state"]["steps"][2][0] = 0.01  # it moves at most steps
    kinds = {(m.kind, m.where) for m in named(tmp_path, training, state=column(2, lambda v: v * 0 + 1))}
    assert ("stuck", "state[2]") not in kinds
    kinds = {(m.kind, m.where) for m in named(tmp_path, training, seed=2, state=column(2, lambda v: v * 0 + 0.437))}
    assert ("stuck", "state[2]") in kinds


def test_a_delay_is_what_explains_more_of_the_dimensions_that_tell():
    curve = np.exp(np.abs(np.arange(5) - 2))[:, None] * [1.0, 1.0]  # least two steps late
    assert _best_delay(curve.tolist(), np.ones(2)) == (2, pytest.approx(1 - np.exp(-2)))
    assert _best_delay(curve[2:].tolist(), np.ones(2)) == (0, 0.0), "as in training"
    curve[:, 1] = 1.0
    assert _best_delay(curve.tolist(), np.array([1.0, 1.0])) == (2, pytest.approx(1 - np.exp(-1)))
    assert _best_delay(curve.tolist(), np.array([0.0, 1.0])) == (0, 0.0), "the other dimension tells nothing"
    assert _best_delay(curve.tolist(), np.zeros(2)) == (0, 0.0) == _best_delay([], np.ones(2))


def test_parts_of_a_session_have_to_agree_on_late_pictures():
    curve = np.exp(np.abs(np.arange(5) - 2) / 5)[:, None]
    assert _delay_of_pictures([curve, 1.1 * curve, curve], np.ones(1))[0] == 2
    assert _delay_of_pictures([curve**3, curve[::-1], 0 * curve + 1], np.ones(1)) == (0, 0.0), "one part alone says so"
    assert _delay_of_pictures([curve], np.ones(1)) == (0, 0.0) == _delay_of_pictures([], np.ones(1))


def walks(seed, late=0, number=6):
    """Episodes of smooth commands that a state follows with inertia, and the state as it arrives."""
    rng = np.random.default_rng(seed)
    for _ in range(number):
        actions = np.cumsum(rng.standard_normal((60, 3)) * 0.1, axis=0)
        states = np.zeros((60, 3))
        for t in range(1, 60):
            states[t] = states[t - 1] + 0.2 * actions[t - 1] + (0.5 * (states[t - 1] - states[t - 2]) if t > 1 else 0)
        states[:, 2] = rng.standard_normal()  # stands still
        yield np.concatenate([states[:1]] * late + [states[: 60 - late]]), actions


@pytest.mark.parametrize("late", [0, 1, 2, 3])
def test_the_way_that_a_state_moves_tells_how_late_it_comes(late):
    motion = state_motion(list(walks(0, number=24)))
    telling = np.array(motion["telling"])
    assert (telling[:2] > 1).all() and telling[2] == 0, "a dimension that stands still tells nothing"
    assert _best_delay(unexplained_motion(list(walks(1, late)), motion).tolist(), telling)[0] == late
    assert len(unexplained_motion(list(walks(1, late, number=1)), motion)) == 0, "too few steps"
    assert state_motion(list(walks(0, number=1))) == {}


def test_a_checkpoint_that_knows_no_motion_tells_no_late_state(training, tmp_path):
    earlier = {**training, "response": {"correlation": training["response"]["correlation"], "lags": []}}
    assert is_profile(earlier) and named(tmp_path, earlier, late_state=1) == []
    broken = {**training, "response": {**training["response"], "motion": {"mean": [0.0]}}}
    assert not is_profile(broken)


@pytest.mark.parametrize("seed", range(10, 30))
def test_a_clean_session_raises_nothing(seed, training, tmp_path):
    assert named(tmp_path, training, seed=seed) == []


def test_a_mismatch_reads_as_a_sentence(training, tmp_path):
    (mismatch,) = named(tmp_path, training, prompt="push that blob")
    text = "prompt: instruction unknown ('push that blob' was never trained on, the nearest is 'push the blob'); word"
    assert str(mismatch).startswith(text)


def test_a_profile_is_small_and_is_told_from_other_things(training):
    import json

    assert is_profile(training) and len(json.dumps(training)) < 70_000
    for other in (None, [], {}, {"cameras": {}}, training | {"state": {"quantiles": [["a"]]}}):
        assert not is_profile(other)
    broken = json.loads(json.dumps(training))
    broken["cameras"]["image_1"]["thumbnails"][0] = [[1, 2, 3]]
    assert not is_profile(broken)


def test_the_same_data_give_the_same_profile(tmp_path):
    path = write_session(tmp_path / "a.parquet", 3, seed=5)
    first, second = (profile_of(store(path, tmp_path), CAMERAS, processor()) for _ in range(2))
    assert first == second
