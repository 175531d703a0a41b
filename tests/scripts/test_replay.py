"""scripts/replay.py: whether a server and this process agree, why not, and which mistake explains a recording."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys

import numpy as np
import pytest
import torch

from data.comparison import distortions
from data.comparison.distortions import AS_RECORDED, Distortion, every_distortion
from data.convert.episode_writer import ImageEncoding
from data.convert.served import ServedEpisode, ServedFolder
from inference.predictor import VLAPredictor
from inference.serving.requests import RequestReader
from inference.serving.server import PolicyServer
from scripts import replay
from scripts._replaying import InProcess, Replay, pixels_of
from tests.helpers import write_episodes
from tests.inference.checkpoints import train_tiny
from tests.inference.serving.servers import running
from utils.parquet_utils import DataError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_paligemma_dir):
    folder = tmp_path_factory.mktemp("run")
    demos = write_episodes(folder / "demos.parquet", [12, 12])
    return train_tiny(folder, tiny_paligemma_dir, [demos], steps=60)


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return VLAPredictor.from_checkpoint(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def scene():
    rng = np.random.default_rng(5)
    frames = np.zeros((24, 48, 48, 3), np.uint8)
    frames[:, 8:40, 4:24, 0] = 220
    frames[:, :, 30:, 2] = rng.integers(60, 250, (24, 48, 18))
    return frames, np.cumsum(rng.normal(size=(24, 4)), axis=0).astype(np.float32) / 4


@pytest.fixture
def session(predictor, scene, tmp_path):
    """Writes a session whose plans were made from input with one mistake, and whose record has the input without it."""

    def write(mistake=AS_RECORDED):
        episode = ServedEpisode("served_0", {"image_1": []})
        frames, states = scene
        for i, (frame, state) in enumerate(zip(frames, states, strict=True)):
            seen = frames[max(0, i - mistake.images_late)]
            given = states[max(0, i - mistake.state_late)]
            given = given if mistake.state is None else mistake.state(given)
            plan = predictor.predict(mistake.frame("image_1", seen), prompt="open", state=given, seed=i)
            step = {"state": state, "plan": plan, "prompt": "open", "seed": i, "seconds": i / 10}
            episode.add({"image_1": ImageEncoding("png")(frame)}, step)
        folder = ServedFolder(tmp_path / "session", {}, ImageEncoding("png"), 10**9)
        folder.prepare()
        folder.write(episode)
        return str(folder.path)

    return write


@pytest.fixture
def run(monkeypatch, capsys, checkpoint):
    def call(*flags, with_checkpoint=True):
        first = ["--checkpoint", str(checkpoint)] if with_checkpoint else []
        monkeypatch.setattr(sys, "argv", ["replay.py", *first, "--device", "cpu", "--steps", "12", *flags])
        status = replay.main()
        return status, capsys.readouterr().out

    yield call
    for name in ("data.episode_store", "vla_client.client"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def test_a_server_and_this_process_agree_and_reproduce_the_record(session, predictor, run, tmp_path):
    with running(predictor) as server:
        address = f"ws://127.0.0.1:{server.port}"
        status, said = run("--data", session(), "--server", address, "--json", str(tmp_path / "out.json"))
    assert status == 0 and "server and process agree in all 12 steps" in said
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["agreement"]["agree"] == 12
    assert [row["plans_of"] for row in result["recorded"]] == ["this process", "the server"]
    assert all(row["beside"] == "planned" and row["largest"] < 1e-4 for row in result["recorded"])


def test_a_server_alone_is_asked_what_its_policy_reads(session, predictor, run):
    with running(predictor) as server:
        flags = ("--data", session(), "--server", f"ws://127.0.0.1:{server.port}")
        status, said = run(*flags, with_checkpoint=False)
    assert status == 0 and "the server" in said and "this process" not in said


def reader(change):
    """A server that reads requests in another way."""

    class Reader(RequestReader):
        def sample(self, request, *rest):
            return super().sample(change(request), *rest)

    class Server(PolicyServer):
        def __init__(self, predictor, config, token=None, seed=0, recorder=None):
            super().__init__(predictor, config, token, seed, recorder)
            self.reader = Reader(predictor, config, seed)

    return Server


def without_seed(request):
    return dataclasses.replace(request, seed=int(torch.randint(2**40, ())))


def with_another_state(request):
    return dataclasses.replace(request, state=request.state * np.float32(1.5))


def with_turned_images(request):
    images = {
        name: [pixels_of(frame)[::-1] for frame in frames or []] or None for name, frames in request.images.items()
    }
    return dataclasses.replace(request, images=images)


class Reseeding(PolicyServer):
    def _predict(self, samples, seeds):
        return super()._predict(samples, [int(torch.randint(2**40, ())) for _ in seeds])


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        (Reseeding, "cause: seed: the server answers the same request differently each time"),
        (reader(with_another_state), "cause: state: both agree when it is held"),
        (reader(with_turned_images), "cause: images of image_1: both agree when it is plain grey"),
    ],
)
def test_the_first_difference_names_its_cause(kind, cause, session, predictor, run):
    with running(predictor, kind=kind) as server:
        status, said = run("--data", session(), "--server", f"ws://127.0.0.1:{server.port}", "--tolerance", "1e-5")
    assert status == 1 and cause in said and "first at episode 0 step" in said


def test_settings_and_ways_of_sending_are_causes(session, predictor, run):
    data = session()
    with running(predictor) as server:
        address = f"ws://127.0.0.1:{server.port}"
        status, said = run("--data", data, "--server", address, "--num_inference_steps", "1")
        assert status == 1 and "cause: settings: num_inference_steps is 3 at the server, 1 in this process" in said
        status, said = run("--data", data, "--server", address, "--send", "jpeg", "--tolerance", "1e-5")
        assert status == 1 and "cause: image bytes: with frames sent as they were recorded both agree" in said


MISTAKES = {
    "image_1 red and blue exchanged": Distortion("", picture=distortions.swapped_channels),
    "image_1 upside down": Distortion("", picture=lambda frame: np.ascontiguousarray(frame[::-1])),
    "state[1] with the other sign": Distortion("", state=distortions.negated(1)),
    "state[0] and [2] exchanged": Distortion("", state=distortions.reordered([2, 1, 0, 3])),
    "state 1 steps late": Distortion("", state_late=1),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_mistake_behind_a_session_is_found_among_all(name, session, run):
    status, said = run("--data", session(MISTAKES[name]), "--explain")
    assert status == 0 and f"best explained by: {name}\n" in said


def test_a_clean_session_has_nothing_to_explain_and_named_ones_are_tried_alone(session, run):
    status, said = run("--data", session(), "--explain")
    assert status == 0 and "nothing has to be explained" in said and "beside the training data" in said
    flags = ("--swap_channels", "--crop", "0.8", "--camera", "image_1", "--state_scale", "57.3", "--shift", "2")
    status, said = run("--data", session(MISTAKES["image_1 red and blue exchanged"]), *flags)
    assert "4 single mistakes tried" in said and "best explained by: --swap_channels of image_1" in said


def test_demonstrations_without_plans_are_held_against_what_was_done(tmp_path, run):
    status, said = run("--data", str(write_episodes(tmp_path / "demos.parquet", [9, 9])))
    assert status == 0 and " done " in said


def test_what_a_user_gets_wrong(session, predictor, run, tmp_path, capsys):
    data = session()
    with pytest.raises(ValueError, match="no policy server at ws://127.0.0.1:1 .*; start scripts/serve_policy"):
        run("--data", data, "--server", "ws://127.0.0.1:1")
    with pytest.raises(ValueError, match="--server is 'http://x'; give ws://HOST:PORT"):
        run("--data", data, "--server", "http://x")
    with running(predictor, token="secret") as server:
        address = f"ws://127.0.0.1:{server.port}"
        with pytest.raises(ValueError, match="does not let this client in: HTTP 401 missing or wrong token"):
            run("--data", data, "--server", address)
        with pytest.raises(ValueError, match="--token_env NO_SUCH: no such environment variable"):
            run("--data", data, "--server", address, "--token_env", "NO_SUCH")
        assert run("--data", data, "--server", address, "--token", "secret")[0] == 0
    for flags, text in (
        (("--camera", "wrist", "--mirror"), "there is no camera 'wrist'; the recording and the policy have image_1"),
        (("--camera", "image_1"), "--camera says whose pictures"),
        (("--state_order", "0", "1"), "wanted each of 0 to 3 once"),
        (("--state_negate", "9"), "the state has 4 values, 0 to 3"),
        (("--crop", "2"), "--crop is 2; wanted 0.05 to 1"),
        (("--blur", "-1"), "--blur is -1; wanted 0 to 224"),
        (("--state_scale", "nan"), "--state_scale is nan; wanted -1e\\+06 to 1e\\+06"),
        (("--shift", "0"), "--shift is 0; wanted by how many steps"),
    ):
        with pytest.raises(ValueError, match=text):
            run("--data", data, *flags)
    narrow = write_episodes(tmp_path / "narrow.parquet", [5], state_dim=3)
    with pytest.raises(DataError, match="narrow.parquet"):
        run("--data", str(narrow))
    with pytest.raises(DataError, match="--data"):
        run("--data", str(tmp_path / "nothing"))
    for flags, text in (
        ((), "nobody to ask: give --checkpoint, --server, or both"),
        (("--checkpoint", "C", "--token", "t"), "--token is for --server, which is not given"),
        (("--checkpoint", "C", "--send", "jpeg"), "--send is for --server"),
        (("--server", "s", "--num_inference_steps", "2"), "--num_inference_steps is for --checkpoint"),
    ):
        with pytest.raises(SystemExit):
            run("--data", data, *flags, with_checkpoint=False)
        assert text in capsys.readouterr().err


def test_another_policy_at_the_server(session, predictor, run, tmp_path, tiny_paligemma_dir):
    demos = write_episodes(tmp_path / "demos.parquet", [8])
    other = VLAPredictor.from_checkpoint(
        train_tiny(tmp_path, tiny_paligemma_dir, [demos], head={"horizon": 6}), device="cpu"
    )
    with running(other) as server, pytest.raises(ValueError, match="another policy: horizon 6, in --checkpoint .* 4"):
        run("--data", session(), "--server", f"ws://127.0.0.1:{server.port}")


def test_distortions_of_several_cameras_and_wide_states():
    tried = list(every_distortion(["front", "wrist"], np.random.default_rng(0).normal(size=(50, 14)), ["go"], True))
    names = [distortion.name for distortion in tried]
    assert len(names) == len(set(names)) and "front and wrist exchanged" in names and "told 'go'" in names
    frame = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    for distortion in tried:
        changed = distortion.frame("front", frame)
        assert changed.dtype == np.uint8 and changed.ndim == 3
        assert (changed is frame) == (not distortion.changes("front"))


def test_late_pictures_stay_within_their_episode(session, predictor):
    replayed = Replay(session(), InProcess(predictor).needs(), 24)
    late = Distortion("late", images_late=3)
    first = replayed.shown(replayed.steps[0]).frames["image_1"]
    assert replayed.shown(replayed.steps[2], late).frames["image_1"] == first
    assert replayed.shown(replayed.steps[5], Distortion("frozen", frozen=True)).frames["image_1"] == first
