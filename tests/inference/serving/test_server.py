"""The policy server over real sockets: the same actions as in process, and nothing that a client sends breaks it."""

from __future__ import annotations

import contextlib
import io
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from PIL import Image
from vla_client import PolicyClient, PolicyError
from vla_client.client import is_local, server_uri
from websockets.sync.client import connect

from inference.alarm import Calibration
from inference.predictor import VLAPredictor
from inference.serving.wire import pack, unpack
from inference.uncertainty import alarm_settings
from tests.helpers import write_episodes
from tests.inference.checkpoints import train_tiny
from tests.inference.serving.servers import STATE, expected, frame, observation, running, still_serves


def test_openpis_client_gets_the_actions_of_the_process(server, predictor):
    client = WebsocketClientPolicy("127.0.0.1", server.port)
    assert client.get_server_metadata()["horizon"] == predictor.horizon
    for seed in range(3):
        reply = client.infer(observation(seed))
        np.testing.assert_allclose(reply["actions"], expected(predictor, seed), atol=1e-6)
        assert reply["server_timing"]["infer_ms"] > 0


def test_a_reply_says_how_unsure_and_each_connection_has_its_alarm(checkpoint):
    policy = VLAPredictor.from_checkpoint(checkpoint, "cpu")
    settings = alarm_settings(policy.model.action_head, policy.settings, policy.dataset.name)
    with running(policy) as server, PolicyClient(port=server.port) as client:
        client.predict(observation(1))
        policy.predict(frame(1), prompt="open it", state=STATE, seed=1)
        assert client.uncertainty == pytest.approx(policy.uncertainty, rel=1e-3) and client.uncertainty > 0
        assert client.alarm is None and client.policy["alarm"] is None  # never calibrated
    policy.calibrations = [Calibration(0.0, 0.0, 2, 3, 0.05, 40, "test", settings)]
    policy.alarm, _ = policy.new_alarm()
    with running(policy) as server, PolicyClient(port=server.port) as client:
        assert client.policy["alarm"]["needed"] == 2
        found = []
        for reset in (True, False, False, True, False):
            client.predict(observation(1), reset=reset)
            found.append(client.alarm)
        assert found == [False, True, True, False, True]
        with PolicyClient(port=server.port) as other:
            other.predict(observation(1))
            assert other.alarm is False


def test_encoded_frames_own_names_and_lists(server, predictor):
    encoded = io.BytesIO()
    Image.fromarray(frame()).save(encoded, "PNG")
    client = PolicyClient(port=server.port)
    own = {"image_1": [encoded.getvalue()], "state": STATE.tolist(), "prompt": "open it", "seed": 0}
    np.testing.assert_allclose(client.predict(own), expected(predictor), atol=1e-6)
    first, second = (client.predict(observation(seed=None, **{"observation/image": frame()})) for _ in range(2))
    assert not np.array_equal(first, second), "requests without a seed draw their own noise"


def test_two_cameras_with_a_history_under_mapped_names(tmp_path, tiny_paligemma_dir, caplog):
    demos = write_episodes(tmp_path / "two.parquet", [6, 5], cameras=("image_1", "image_2"))
    settings = {"vlm": {"use_aux_camera": True}, "data": {"max_seq_len": 2}, "steps": 20}  # the head begins blind
    predictor = VLAPredictor.from_checkpoint(train_tiny(tmp_path, tiny_paligemma_dir, [demos], **settings), "cpu")
    front, wrist = np.stack([frame(0), frame(1)]), np.stack([frame(2), frame(3)])
    common = {"prompt": "open it", "seed": 0}
    with running(predictor, image_1_key="front", image_2_key="wrist", state_key="joints") as server:
        client = PolicyClient(port=server.port)
        assert client.policy["cameras"] == {"image_1": "front", "image_2": "wrist"}
        both = client.predict({"front": front, "wrist": wrist, "joints": STATE, **common})
        one = client.predict({"front": front, "joints": STATE, "depth": front, **common})
        with pytest.raises(RuntimeError, match="image_2: 1 frames but image_1 has 2"):
            client.predict({"front": front, "wrist": wrist[0], "joints": STATE, **common})
        client.close()
    np.testing.assert_allclose(both, predictor.predict(front, wrist, state=STATE, **common), atol=1e-6)
    np.testing.assert_allclose(one, predictor.predict(front, state=STATE, **common), atol=1e-6)
    assert np.abs(both - one).max() > 5e-5  # far more than rounding
    logged = [record.message for record in caplog.records if record.name.startswith("inference")]
    assert logged.count("requests carry keys that nothing reads: depth") == 1


def test_what_speaks_against_an_observation_is_in_the_reply_and_once_in_the_log(server, caplog):
    client = WebsocketClientPolicy("127.0.0.1", server.port)
    assert "warnings" not in client.infer(observation())
    long = "open it and then " * 40 + "stop"
    for _ in range(2):
        texts = client.infer(observation(**{"observation/state": 1000 * STATE}))["warnings"]
        assert len(texts) == 1 and re.match(r"state\[\d\] is -?\d+, in training it was .* check the units", texts[0])
        texts = client.infer(observation(prompt=long, unknown=1))["warnings"]
        assert len(texts) == 2 and re.search("data.prompt_max_len .* does not read its end '.* open it", texts[0])
        assert texts[1] == "requests carry keys that nothing reads: unknown"
        texts = client.infer(observation(**{"observation/image": [frame(1), frame(2), frame()]}))["warnings"]
        assert texts == ["image_1: 3 frames, of which the policy takes max_seq_len 1: the newest (last) are used"]
    for text in ("check the units", "does not read its end", "nothing reads: unknown", "the newest (last) are used"):
        assert caplog.text.count(text) == 1


@pytest.fixture(scope="module")
def history_predictor(tmp_path_factory, tiny_paligemma_dir):
    folder = tmp_path_factory.mktemp("history")
    demos = write_episodes(folder / "demos.parquet", [6, 5])
    return VLAPredictor.from_checkpoint(train_tiny(folder, tiny_paligemma_dir, [demos], data={"max_seq_len": 3}), "cpu")


def test_single_frames_become_a_history_of_their_connection(history_predictor, caplog):
    encoded = io.BytesIO()
    Image.fromarray(frame(2)).save(encoded, "PNG")
    sent = [frame(0), frame(1, size=64), encoded.getvalue(), frame(3)]

    def wanted(frames):
        return history_predictor.predict(frames, prompt="open it", state=STATE, seed=0)

    with running(history_predictor) as server:
        first, other = (WebsocketClientPolicy("127.0.0.1", server.port) for _ in range(2))
        for i in range(4):
            reply = first.infer(observation(**{"observation/image": sent[i]}))
            np.testing.assert_allclose(reply["actions"], wanted(sent[max(0, i - 2) : i + 1]), atol=1e-5)
            assert ("warnings" in reply) == (i > 0)
            reply = other.infer(observation(**{"observation/image": sent[3 - i]}, reset=i % 2 == 0))
            np.testing.assert_allclose(reply["actions"], wanted([*sent[4 - i :][: i % 2], sent[3 - i]]), atol=1e-5)
            assert "warnings" not in reply
        with pytest.raises(RuntimeError, match="'prompt' is missing"):
            first.infer(observation(prompt=None))  # a refused request is no step of the episode
        reply = first.infer(observation(**{"observation/image": [sent[0], sent[1]]}))
        np.testing.assert_allclose(reply["actions"], wanted(sent[:2]), atol=1e-5)
        reply = first.infer(observation(**{"observation/image": sent[2]}))
        np.testing.assert_allclose(reply["actions"], wanted(sent[:3]), atol=1e-5)
    assert caplog.text.count("send 'reset': true with the first request of every episode") == 1


def get(server, path, **headers):
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.read().decode()


def test_health_and_metrics(server, predictor):
    still_serves(server, predictor)
    assert get(server, "/healthz") == "ok\n"
    text = get(server, "/metrics")
    assert float(re.search(r'vla_requests_total{outcome="ok"} (\S+)', text)[1]) >= 1
    assert float(re.search(r'vla_request_seconds_recent{percentile="95"} (\S+)', text)[1]) > 0
    assert "vla_queue 0.0" in text and "vla_clients" in text


def test_the_token_is_asked_for(predictor):
    with running(predictor, token="sesame") as server:
        for wrong in (None, "open", "sesam"):
            with pytest.raises(PolicyError, match="does not let this client in: HTTP 401 missing or wrong token"):
                PolicyClient(port=server.port, token=wrong)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(server, "/metrics")
        assert get(server, "/healthz") == "ok\n"
        assert "vla_requests" in get(server, "/metrics", Authorization="Bearer sesame")
        client = WebsocketClientPolicy("127.0.0.1", server.port, api_key="sesame")
        np.testing.assert_allclose(client.infer(observation())["actions"], expected(predictor), atol=1e-6)


def test_the_example_says_in_one_line_why_it_is_not_let_in(predictor):
    with running(predictor, token="sesame") as server:
        command = [sys.executable, "scripts/client_example.py", "--port", str(server.port), "--prompt", "wave"]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "does not let this client in: HTTP 401 missing or wrong token" in done.stderr
    assert "Traceback" not in done.stderr


def can_listen_on(address):
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as free:
        free.bind((address, 0))
        return True
    return False


@pytest.mark.skipif(not can_listen_on("::1"), reason="no IPv6 here")
@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_ipv6_addresses(predictor, host):
    with running(predictor, host="::1") as server, PolicyClient(host, server.port) as client:
        np.testing.assert_allclose(client.predict(observation()), expected(predictor), atol=1e-6)


def test_addresses():
    assert server_uri("::1", 80) == server_uri("[::1]", 80) == "ws://[::1]:80"
    assert server_uri("fe80::1%eth0", 80) == "ws://[fe80::1%25eth0]:80" and server_uri("robot", 80) == "ws://robot:80"
    near = (
        "localhost",
        "robot",
        "robot.local",
        "127.0.0.1",
        "192.168.0.7",
        "10.1.2.3",
        "::1",
        "[::1]",
        "fe80::1",
        "0.0.0.0",
    )
    assert all(map(is_local, near)) and not any(map(is_local, ("robot.example.org", "8.8.8.8", "2a00:1450:4001::1")))


@pytest.mark.parametrize("name", ["http_proxy", "https_proxy", "all_proxy", "socks_proxy"])
def test_a_proxy_in_the_environment_does_not_answer_for_a_local_server(server, predictor, monkeypatch, name):
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    still_serves(server, predictor)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 9}, r"no policy server at ws://127.0.0.1:9 \(.*refused\); start scripts/serve_policy.py there"),
        ({"host": "no.such.invalid"}, "no policy server at ws://no.such.invalid:8000"),
        ({"port": 99999}, "ws://127.0.0.1:99999 is no address; give a host name or an address, and a port"),
        ({"host": "a b"}, "ws://a b:8000"),
    ],
)
def test_a_server_that_is_not_there(options, message):
    with pytest.raises(PolicyError, match=message):
        PolicyClient(**options)


def test_the_client_gives_up_waiting_and_shows_warnings_once(predictor, caplog, monkeypatch):
    with running(predictor, timeout_s=5) as server:
        client = PolicyClient(port=server.port, timeout_s=0.5)
        for _ in range(2):
            client.predict(observation(**{"observation/state": 1000 * STATE}), reset=True)
            assert len(client.warnings) == 1 and "check the units" in client.warnings[0]
        client.predict(observation())
        assert client.warnings == [] and [r.name for r in caplog.records].count("vla_client.client") == 1
        slow = threading.Event()
        monkeypatch.setattr(server.batcher, "predict", lambda samples, seeds: slow.wait(3) and None)
        with pytest.raises(PolicyError, match="did not answer within 0.5 s; don't move, connect anew"):
            client.predict(observation())
        with pytest.raises(PolicyError, match="the connection to .* ended"):
            client.predict(observation())
        slow.set()


def test_more_clients_than_wanted_are_turned_away(predictor):
    with running(predictor, max_clients=1) as server:
        client = PolicyClient(port=server.port)
        with pytest.raises(
            PolicyError, match="HTTP 503 1 clients are connected, which is serving.max_clients; try again"
        ):
            PolicyClient(port=server.port)
        client.close()
        still_serves(server, predictor)


def test_clients_share_a_pass_and_get_their_own_answers(predictor):
    with running(predictor, batch_window_ms=200) as server:
        answers = {}

        def ask(seed):
            with connect(f"ws://127.0.0.1:{server.port}", compression=None) as connection:
                connection.recv()
                ready.wait()
                connection.send(pack(observation(seed)))
                answers[seed] = unpack(connection.recv(timeout=20))

        ready = threading.Barrier(4)
        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert max(answer["server_timing"]["batch_size"] for answer in answers.values()) > 1
        for seed, answer in answers.items():
            np.testing.assert_allclose(answer["actions"], expected(predictor, seed), atol=1e-5)


def test_a_full_queue_and_a_late_prediction_are_told(predictor, monkeypatch):
    with running(predictor, max_waiting=1, max_batch_size=1, timeout_s=1) as server:
        slow, real = threading.Event(), server._predict
        monkeypatch.setattr(server.batcher, "predict", lambda *a: slow.wait(5) and real(*a))
        with contextlib.ExitStack() as stack:
            clients = [
                stack.enter_context(connect(f"ws://127.0.0.1:{server.port}", compression=None)) for _ in range(3)
            ]
            for client in clients:
                client.recv()
                client.send(pack(observation()))
                time.sleep(0.1)
            replies = [client.recv(timeout=10) for client in clients]
            assert "1 requests are waiting" in replies[2]
            assert "no prediction within 1 s" in replies[0] and "no prediction within 1 s" in replies[1]
            slow.set()
            still_serves(server, predictor)


def test_actions_that_are_not_finite_never_leave(predictor, monkeypatch):
    with running(predictor) as server:
        monkeypatch.setattr(server.batcher, "predict", lambda samples, seeds: np.full((1, 4, 4), np.nan))
        with pytest.raises(RuntimeError, match="not finite"):
            PolicyClient(port=server.port).predict(observation())


def test_a_prediction_that_fails_is_told_and_the_connection_goes_on(predictor, monkeypatch, caplog):
    def out_of_memory(samples, seeds):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    with running(predictor) as server:
        client = PolicyClient(port=server.port)
        with monkeypatch.context() as patch:
            patch.setattr(server.batcher, "predict", out_of_memory)
            with pytest.raises(RuntimeError, match="the prediction failed .CUDA out of memory..; the server's log"):
                client.predict(observation())
        assert "Tried to allocate" in caplog.text and 'outcome="failed"} 1.0' in get(server, "/metrics")
        np.testing.assert_allclose(client.predict(observation(3)), expected(predictor, 3), atol=1e-6)
