"""What strangers may send and hold: every limit of the policy server, by kind. SECURITY.md names these tests."""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
import socket
import threading
import time

import msgpack
import numpy as np
import pytest
from PIL import Image
from vla_client import PolicyClient, PolicyError
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from benchmarks.fuzz_messages import encoded
from inference.predictor import VLAPredictor
from inference.serving import connections
from inference.serving import server as server_module
from inference.serving.metrics import LOG_LINES
from inference.serving.requests import History
from inference.serving.wire import pack, unpack
from tests.inference.serving.servers import running
from utils.config_utils import ConfigError, ServingConfig
from utils.misc import user_message

POLICY = "tests/fixtures/policies/flow.pth.tar"


@pytest.fixture(scope="module")
def predictor():
    return VLAPredictor.from_checkpoint(POLICY, device="cpu")


@pytest.fixture
def observation(predictor):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    return {"image_1": pixels, "state": np.zeros(predictor.state_dim, np.float32), "prompt": "open it", "seed": 1}


@pytest.fixture
def expected(predictor, observation):
    return predictor.predict(observation["image_1"], prompt="open it", state=observation["state"], seed=1)


@contextlib.contextmanager
def connected(server, **options):
    with connect(f"ws://127.0.0.1:{server.port}", compression=None, **options) as connection:
        connection.recv(timeout=10)
        yield connection


def ask(connection, message):
    connection.send(message if isinstance(message, bytes) else pack(message))
    return connection.recv(timeout=20)


def actions_of(connection, observation):
    return unpack(ask(connection, observation))["actions"]


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


# --- sizes and formats


@pytest.mark.parametrize("number", [8_000_000, 2**31 - 1, 2**40])
def test_a_shape_without_elements_costs_nothing(predictor, observation, expected, number):
    lie = {b"__ndarray__": True, b"data": b"", b"dtype": "|u1", b"shape": [number, 0, 1, 3]}
    with running(predictor) as server, connected(server) as connection:
        started = time.monotonic()
        reply = ask(connection, msgpack.packb({"image_1": lie, "prompt": "a"}))
        assert "without elements" in reply and time.monotonic() - started < 1
        few = {**lie, b"shape": [4000, 0, 1, 3]}
        reply = ask(connection, msgpack.packb({"image_1": few, "prompt": "a"}))
        assert "4000 frames; at most 256 are read" in reply and time.monotonic() - started < 2
        np.testing.assert_allclose(actions_of(connection, observation), expected, atol=1e-6)


def test_many_tiny_frames_are_counted_before_each_is_an_object(predictor, observation):
    many = np.zeros((3_000_000, 1, 1, 3), np.uint8)
    with running(predictor) as server, connected(server) as connection:
        started = time.monotonic()
        assert "3000000 frames; at most 256 are read" in ask(connection, {**observation, "image_1": many})
        assert time.monotonic() - started < 2


def test_frames_are_counted_and_measured_before_any_is_opened(predictor, observation, monkeypatch):
    opened = []
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(a))
    icon, large = encoded("ICO", (256, 256)), encoded("PNG", (3000, 3000))
    with running(predictor, max_request_pixels=10_000_000) as server, connected(server) as connection:
        assert "no readable JPEG or PNG (another format" in ask(connection, {**observation, "image_1": icon})
        many = ask(connection, {**observation, "image_1": [encoded("PNG", (240, 240))] * 200})
        assert "11520000 pixels together; at most 10000000" in many
        two = {**observation, "image_1": large, "image_2": large}
        found = r"18000000 pixels together; at most 10000000 are taken \(serving.max_request_pixels\)"
        assert re.search(found, ask(connection, two))
    assert not opened


# --- time


@contextlib.contextmanager
def slow_decoding(predictor, monkeypatch, pixels):
    """Frames of more than `pixels` take until the event is set."""
    release, decoded, real = threading.Event(), [], predictor.image_processor.decode_into

    def decode_into(frame, out):
        if isinstance(frame, bytes) and frame == pixels:
            decoded.append(frame)
            release.wait(30)
        else:
            real(frame, out)

    with monkeypatch.context() as patch:
        patch.setattr(predictor.image_processor, "decode_into", decode_into)
        yield decoded
        release.set()


def test_dear_decoding_ends_at_the_time_out_and_holds_up_nobody(predictor, observation, expected, monkeypatch):
    buffer = io.BytesIO()
    Image.new("RGB", (2500, 2500)).save(buffer, "PNG")
    large = buffer.getvalue()
    monkeypatch.setattr(predictor, "max_seq_len", 3)
    with slow_decoding(predictor, monkeypatch, large) as decoded, running(predictor, timeout_s=2) as server:
        with contextlib.ExitStack() as stack:
            attackers = [stack.enter_context(connected(server)) for _ in range(4)]
            for attacker in attackers:
                attacker.send(pack({**observation, "image_1": [large, large, large]}))
            good = stack.enter_context(connected(server))
            for _ in range(5):
                started = time.monotonic()
                alone = actions_of(good, {**observation, "reset": True})
                np.testing.assert_allclose(alone[:1], expected[:1], atol=1e-6)
                assert time.monotonic() - started < 1.5
            assert all("no prediction within 2 s" in attacker.recv(timeout=10) for attacker in attackers)
            started = time.monotonic()
        assert len(decoded) == 1, "what nobody waits for any more is not decoded"
    assert time.monotonic() - started < 2 + server_module.STOP_MARGIN_S, "the server stops although a thread hangs"


def test_a_prediction_that_hangs_does_not_keep_the_server(predictor, observation, monkeypatch):
    release = threading.Event()
    with running(predictor, timeout_s=1) as server, connected(server) as connection:
        monkeypatch.setattr(server.batcher, "predict", lambda samples, seeds: release.wait(30))
        connection.send(pack(observation))
        assert "no prediction within 1 s" in connection.recv(timeout=10)
        started = time.monotonic()
    assert time.monotonic() - started < 1 + server_module.STOP_MARGIN_S
    release.set()


def test_an_idle_client_is_told_and_dropped(predictor, observation):
    with running(predictor, idle_timeout_s=1.5) as server, connected(server) as connection:
        for _ in range(4):  # longer than that in all, but never at a stretch
            time.sleep(0.5)
            ask(connection, observation)
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv(timeout=10)
        assert closed.value.rcvd.code == 1013 and "serving.idle_timeout_s" in closed.value.rcvd.reason
        until(lambda: server.metrics.num_clients == 0)


# --- places and memory


def test_who_says_nothing_yields_its_place(predictor, observation, monkeypatch):
    monkeypatch.setattr(connections, "PATIENCE_S", 0.3)
    with running(predictor, max_clients=3) as server, contextlib.ExitStack() as stack:
        used = stack.enter_context(connected(server))
        ask(used, observation)
        silent = [stack.enter_context(connected(server)) for _ in range(2)]
        with pytest.raises(PolicyError, match="HTTP 503"):
            PolicyClient(port=server.port)
        time.sleep(0.5)
        for _ in range(2):
            ask(stack.enter_context(connected(server)), observation)
        with pytest.raises(PolicyError, match="HTTP 503"):
            PolicyClient(port=server.port)
        for connection in silent:
            with pytest.raises(ConnectionClosed):
                connection.recv(timeout=10)
        ask(used, observation)


def test_sockets_without_a_handshake_are_bounded(predictor, observation, monkeypatch):
    monkeypatch.setattr(connections, "MAX_HANDSHAKES", 5)
    with running(predictor, token="sesame") as server, contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        until(lambda: len(server.room.connections) <= 5)
        client = PolicyClient(port=server.port, token="sesame")
        client.predict(observation)
        client.close()


def test_who_holds_most_is_dropped_and_nobody_else(predictor, observation, caplog):
    limits = {"max_message_bytes": 400_000, "max_buffered_bytes": 1_000_000}
    with running(predictor, **limits) as server, contextlib.ExitStack() as stack:
        good = stack.enter_context(connected(server))
        sockets = []
        for _ in range(4):  # each begins a frame of 390,000 bytes and stops short of its end
            raw = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            raw.sendall(
                b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
            )
            assert b"101" in raw.recv(4096)
            raw.sendall(b"\x82\xff" + (390_000).to_bytes(8, "big") + b"abcd" + bytes(380_000))
            sockets.append(raw)
            ask(good, observation)
        until(lambda: server.room.held < 1_000_000)
        assert "serving.max_buffered_bytes" in caplog.text
        ask(good, observation)
    assert server.room.held == 0


def test_a_client_that_reads_nothing_is_dropped(predictor, monkeypatch):
    monkeypatch.setattr(connections, "MAX_UNREAD_BYTES", 100_000)
    with running(predictor) as server, socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.settimeout(20)
        raw.sendall(
            b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        ping = b"\x89\xfd" + b"abcd" + bytes(125)  # each is answered by a pong of as many bytes
        with pytest.raises(OSError):
            for _ in range(100_000):
                raw.sendall(ping * 100)


def test_what_is_remembered_of_a_client_is_little_and_goes_with_it(predictor, observation, caplog):
    with running(predictor) as server, connected(server) as connection:
        for i in range(30):
            ask(connection, {**observation, "k" * 3_000_000 + str(i): i, f"key {i}": 0})
        (held,) = server.room.connections
        assert len(held.told) <= 60 and max(map(len, held.told)) < 80
    until(lambda: not server.room.connections)
    assert len(caplog.text) < 20_000


def test_the_kept_frames_of_a_client_are_few():
    history, frame = History(), np.zeros((8, 8, 3), np.uint8)
    for _ in range(50):
        shown = history.completed({"image_1": [frame], "image_2": [frame]}, False, {})
        history.keep(shown, 2)
        assert max(map(len, shown.values())) <= 3
    history.keep({"image_1": [frame] * 200}, 2)
    assert {camera: len(frames) for camera, frames in history._kept.items()} == {"image_1": 2}


# --- text


def test_nothing_sent_forges_a_line_of_the_log(predictor, observation, caplog):
    evil = "\n2026-01-01 00:00:00 INFO inference.server: forged\x1b[2J"
    with running(predictor) as server, connected(server) as connection:
        ask(connection, {**observation, evil: 1})
        assert "\x1b" not in ask(connection, {**observation, "seed": evil})
        ask(connection, {**observation, "prompt": {evil: evil}})
    text = caplog.text
    assert "\x1b" not in text and "\n2026" not in text and "forged\\x1b[2J" in text


def test_strangers_do_not_fill_the_log(predictor, caplog):
    with running(predictor) as server, connected(server) as connection:
        for _ in range(200):
            assert "no msgpack" in ask(connection, b"\xc1")
    assert caplog.text.count("refused a request") <= LOG_LINES


# --- browsers and tokens


def status(server, **headers):
    try:
        with connect(f"ws://127.0.0.1:{server.port}", compression=None, additional_headers=headers) as connection:
            connection.recv(timeout=10)
            return 101, b""
    except InvalidStatus as error:
        return error.response.status_code, error.response.body


def test_web_pages_are_kept_out_unless_named(predictor):
    with running(predictor, allowed_origins=("http://localhost:3000",)) as server:
        code, body = status(server, Origin="http://evil.example")
        assert code == 403 and b"http://evil.example may not use this policy" in body and b"allowed_origins" in body
        assert status(server, Origin="null")[0] == 403
        assert status(server, Origin="http://localhost:3000")[0] == 101
        assert status(server)[0] == 101


def raw_status(server, host, path="/"):
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.settimeout(10)
        raw.sendall(
            f"GET {path} HTTP/1.1\r\n{host}Upgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        return int(raw.recv(100).split()[1])


def test_names_that_a_web_page_can_have_are_refused(predictor):
    with running(predictor, allowed_hosts=("robots.example.com",)) as server:
        names = ["localhost", "127.0.0.1:8000", "[::1]:8000", "::1", "robot-server:8000", "gpu.local"]
        for name in [*names, "ROBOTS.example.com:8000"]:
            assert raw_status(server, f"Host: {name}\r\n") == 101, name
        for host in ("Host: evil.example:8000\r\n", "", "Host: a\r\nHost: b\r\n"):
            assert raw_status(server, host) == 403, host
        assert raw_status(server, "Host: evil.example\r\n", "/metrics") == 403
    with running(predictor, token="sesame") as server:
        assert raw_status(server, "Host: policies.example.com\r\nAuthorization: Bearer sesame\r\n") == 101
        assert raw_status(server, "Host: x\r\nAuthorization: Bearer s\udce9same\r\n".replace("\udce9", "é")) == 401


# --- predictions that go wrong


@pytest.mark.parametrize("error", [ValueError("bad"), MemoryError(), IndexError("out of range"), RuntimeError("CUDA")])
def test_whatever_a_prediction_raises_is_a_reply(predictor, observation, expected, monkeypatch, error):
    def fail(samples, seeds):
        raise error

    with running(predictor) as server, connected(server) as connection:
        with monkeypatch.context() as patch:
            patch.setattr(server.batcher, "predict", fail)
            assert "the prediction failed" in ask(connection, observation)
            patch.setattr(server.batcher, "predict", lambda samples, seeds: np.zeros((0, 4, 4)))
            assert "the prediction failed (actions of shape (0, 4, 4) for 1 requests)" in ask(connection, observation)
            patch.setattr(server.batcher, "predict", lambda samples, seeds: np.full((1, 4, 4), np.inf))
            assert "not finite" in ask(connection, observation)
        np.testing.assert_allclose(actions_of(connection, observation), expected, atol=1e-6)


def test_one_clients_observation_is_not_the_others_error(predictor, observation, expected, monkeypatch):
    with running(predictor, batch_window_ms=500) as server, contextlib.ExitStack() as stack:
        real = server.batcher.predict

        def poisoned(samples, seeds):
            if 13 in seeds:
                raise ValueError("poison")
            return real(samples, seeds)

        monkeypatch.setattr(server.batcher, "predict", poisoned)
        clients = [stack.enter_context(connected(server)) for _ in range(3)]
        for seed, client in zip((1, 13, 1), clients, strict=True):
            client.send(pack({**observation, "seed": seed}))
        replies = [client.recv(timeout=20) for client in clients]
        assert "poison" in replies[1]
        for reply in (replies[0], replies[2]):
            np.testing.assert_allclose(unpack(reply)["actions"], expected, atol=1e-5)


def test_a_fault_of_our_own_is_a_reply_too(predictor, observation, expected, monkeypatch):
    with running(predictor) as server, connected(server) as connection:
        with monkeypatch.context() as patch:
            patch.setattr(server.reader, "read", lambda message: {}["no such key"])
            assert "the prediction failed (KeyError)" in ask(connection, observation)
        np.testing.assert_allclose(actions_of(connection, observation), expected, atol=1e-6)


def test_the_server_ends_when_its_batching_does(predictor, monkeypatch):
    async def broken(self):
        raise KeyError("batching")

    monkeypatch.setattr("inference.serving.batching.RequestBatcher.run", broken)
    server = server_module.PolicyServer(predictor, ServingConfig(timeout_s=1))
    with pytest.raises(KeyError, match="batching"):
        asyncio.run(server.run("127.0.0.1", 0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_buffered_bytes": 10}, "max_buffered_bytes is 10, less than one message"),
        ({"idle_timeout_s": 0}, "serving.idle_timeout_s is 0"),
        ({"max_request_pixels": -1}, "serving.max_request_pixels is -1"),
    ],
)
def test_the_limits_of_limits(fields, message):
    with pytest.raises(ConfigError, match=message) as error:
        ServingConfig(**fields)
    assert user_message(error.value)
