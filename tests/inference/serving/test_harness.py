"""vla-evaluation-harness as a client: its own package, and a recorded exchange with it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import msgpack
import numpy as np
import pytest
from websockets.sync.client import connect

from inference.predictor import VLAPredictor
from inference.serving.harness import HarnessServer
from inference.serving.requests import RequestError
from tests.helpers import needs, write_episodes
from tests.inference.checkpoints import train_tiny
from tests.inference.serving.servers import running
from utils.misc import derive_seed

# Messages that vla-eval 0.8.0 sent for one episode of four observations; see tests/fixtures/README.md
EXCHANGE = Path(__file__).resolve().parents[2] / "fixtures" / "vla_eval_exchange.msgpack"
TASK = {"name": "press the button", "suite": "tests", "episode_idx": 3}


@pytest.fixture(scope="module")
def predictor(tmp_path_factory, tiny_paligemma_dir):
    folder = tmp_path_factory.mktemp("run")
    return VLAPredictor.from_checkpoint(
        train_tiny(folder, tiny_paligemma_dir, [write_episodes(folder / "demos.parquet", [6, 5])]), device="cpu"
    )


@pytest.fixture(scope="module")
def server(predictor):
    with running(predictor, kind=HarnessServer) as server:
        yield server


def observation(step):
    frame = np.random.default_rng(step).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    state = np.array([0.1, -0.2, 0.3, 0.1 * step], np.float32)
    return {"images": {"agentview": frame}, "states": state, "task_description": "press the button"}


def wanted_actions(predictor, steps):
    """What the policy plans from the observations at which a plan ends, with the seeds that the server gives."""
    episode = derive_seed("vla-eval", 0, json.dumps({"task": TASK}, sort_keys=True))
    each = predictor.n_action_steps or predictor.horizon
    actions = []
    for plan, step in enumerate(range(0, steps, each)):
        seen = observation(step)
        chunk = predictor.predict(
            seen["images"]["agentview"],
            prompt=seen["task_description"],
            state=seen["states"],
            seed=derive_seed("vla-eval", episode, plan),
        )
        actions += list(chunk[:each])
    return np.stack(actions[:steps])


def test_a_recorded_exchange(server, predictor):
    """Every message of the recording is answered as the harness reads it; arrays and frames are in its encoding."""
    with connect(f"ws://127.0.0.1:{server.port}", compression=None) as client:
        actions = []
        for message in msgpack.unpackb(EXCHANGE.read_bytes()):
            sent = msgpack.unpackb(message)
            client.send(message)
            if sent["type"] in ("episode_start", "episode_end"):
                continue
            reply = msgpack.unpackb(client.recv(timeout=20))
            assert reply.keys() == {"type", "payload", "seq", "timestamp"} and reply["seq"] == sent["seq"]
            if sent["type"] == "hello":
                assert reply["type"] == "hello" and reply["payload"]["protocol_version"] == 1
                assert reply["payload"]["observation_params"] == {"send_state": True}
                continue
            array = reply["payload"]["actions"]
            assert reply["type"] == "action" and array["__ndarray__"] is True and array["dtype"] == "<f4"
            actions.append(np.frombuffer(array["data"], array["dtype"]).reshape(array["shape"]))
    np.testing.assert_allclose(np.stack(actions), wanted_actions(predictor, 4), atol=1e-5)


class Bench:
    """As much of a benchmark of the harness as its runner calls."""

    def __init__(self, steps):
        self.steps, self.actions = steps, []

    async def start_episode(self, task, recorder=None):
        self.actions = []

    async def get_observation(self):
        return observation(len(self.actions))

    async def apply_action(self, action):
        self.actions.append(action["actions"])

    async def is_done(self):
        return len(self.actions) == self.steps

    async def get_time(self):
        return 1.0

    async def get_result(self):
        return {"success": True}


class TestThePackage:
    pytestmark = needs("vla_eval")[1:]

    def test_its_runner_drives_the_policy(self, server, predictor):
        from vla_eval.connection import Connection
        from vla_eval.runners.sync_runner import SyncEpisodeRunner

        steps = predictor.horizon + 2  # a second plan begins within

        async def episodes():
            bench, runner = Bench(steps), SyncEpisodeRunner()
            async with Connection(f"ws://127.0.0.1:{server.port}") as connection:
                seen = []
                for _ in range(2):
                    result = await runner.run_episode(bench, TASK, connection)
                    seen.append(np.stack(bench.actions))
                return connection.server_info, result, seen

        info, result, (first, again) = asyncio.run(episodes())
        assert info["model_server"] == "HarnessServer" and result["steps"] == steps
        np.testing.assert_allclose(first, wanted_actions(predictor, steps), atol=1e-5)
        np.testing.assert_array_equal(first, again)

    def test_what_is_wrong_reaches_the_harness(self, server):
        from vla_eval.connection import Connection

        async def say(observation):
            async with Connection(f"ws://127.0.0.1:{server.port}") as connection:
                await connection.start_episode({"task": TASK})
                with pytest.raises(RuntimeError) as error:
                    await connection.act(observation)
                return str(error.value)

        whole = observation(0)
        for change, message in (
            ({"images": {}}, "an observation has no images; wanted those of image_1"),
            ({"states": np.zeros(7, np.float32)}, "this policy takes 4"),
            ({"task_description": None}, "is missing; wanted the instruction as text"),
        ):
            assert message in asyncio.run(say({**whole, **change}))


def test_no_picture_is_taken_for_two_cameras():
    """What a camera has by name is not given to another one by its place."""
    server = SimpleNamespace(
        predictor=SimpleNamespace(cameras=("front", "wrist")),
        reader=SimpleNamespace(keys={"front": "observation/front", "wrist": "hand"}),
    )
    for images, wanted in (
        ({"wrist": 1, "agentview": 2}, {"front": 2, "wrist": 1}),
        ({"hand": 1, "agentview": 2}, {"front": 2, "wrist": 1}),
        ({"agentview": 1, "eye": 2}, {"front": 1, "wrist": 2}),
        ({"front": 1, "eye": 2}, {"front": 1, "wrist": 2}),
    ):
        assert HarnessServer._images(server, images) == wanted
    with pytest.raises(RequestError, match="has the images wrist, and none for front"):
        HarnessServer._images(server, {"wrist": 1})


@pytest.mark.parametrize("reads_state", [True, False])
def test_the_state_is_asked_for_where_anything_reads_it(reads_state):
    """Actions relative to the state need it, also where the head does not see it."""
    config = SimpleNamespace(reads_state=reads_state)
    server = SimpleNamespace(predictor=SimpleNamespace(cameras=("image_1",), config=config))
    wanted = {"send_state": True} if reads_state else {}
    assert HarnessServer._hello(server)["observation_params"] == wanted


def test_messages_of_another_kind(server):
    with connect(f"ws://127.0.0.1:{server.port}", compression=None) as client:
        keys = msgpack.packb({"type": "episode_start", "payload": {"task": {b"a": 1, "b": 2}}})
        for message in ("hello", msgpack.packb([1]), msgpack.packb({"type": "observation"}), keys, b"\xc1"):
            client.send(message)
            reply = msgpack.unpackb(client.recv(timeout=20))
            assert reply["type"] == "error" and "error: " in reply["payload"]["error"]
        bad = {"__ndarray__": True, "data": b"123", "dtype": "<f4", "shape": [4]}
        client.send(msgpack.packb({"type": "observation", "payload": {"states": bad}, "seq": 9, "timestamp": 0.0}))
        reply = msgpack.unpackb(client.recv(timeout=20))
        assert reply["type"] == "error" and "wanted 16 bytes" in reply["payload"]["error"]
