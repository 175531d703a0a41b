"""What clients send wrongly, message by message and socket by socket: a clear reply, and the server goes on."""

from __future__ import annotations

import io
import re
import socket
import struct
import time

import msgpack
import numpy as np
import pytest
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from inference.serving.wire import pack, unpack
from tests.inference.serving.servers import STATE, expected, frame, observation, running, still_serves


def nan_state():
    return np.array([0, np.nan, 0, 0], np.float32)


def bomb():
    encoded = io.BytesIO()
    Image.new("RGB", (3000, 3000)).save(encoded, "PNG")
    return encoded.getvalue()


PICKLED = b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."
OBJECTS = {b"__ndarray__": True, b"data": PICKLED, b"dtype": "|O", b"shape": [1]}
MALFORMED = {
    "text": ("hello", "text message"),
    "no msgpack": (b"\xc1\x00", "no msgpack"),
    "pickle": (PICKLED, "no msgpack|holds a"),
    "a list": (pack([1, 2]), "holds a list"),
    "cut off": (pack(observation())[:-3], "no msgpack"),
    "object array": (msgpack.packb({"observation/image": OBJECTS}), r"dtype '\|O'"),
    "size that lies": (
        msgpack.packb({"a": {b"__ndarray__": True, b"data": b"", b"dtype": "|u1", b"shape": [9, 9, 3]}}),
        "wanted 243 bytes",
    ),
    "no image": (pack(observation(**{"observation/image": None})), "'observation/image' is missing"),
    "no prompt": (pack(observation(prompt=None)), "'prompt' is missing"),
    "no state": (pack(observation(**{"observation/state": None})), "state is missing"),
    "empty prompt": (pack(observation(prompt=" ")), "prompt is ' '"),
    "endless prompt": (pack(observation(prompt="open " * 2000)), "10000 characters; at most 4096 are taken"),
    "prompt of bytes": (pack(observation(prompt=b"open")), "'prompt' is a bytes"),
    "float image": (pack(observation(**{"observation/image": frame() / 255.0})), "float64"),
    "channels first": (
        pack(observation(**{"observation/image": frame().transpose(2, 0, 1).copy()})),
        r"\(3, 40, 40\); wanted uint8 \(H, W, 3\)",
    ),
    "empty image": (pack(observation(**{"observation/image": frame()[:0]})), r"\(0, 40, 3\)"),
    "image as text": (pack(observation(**{"observation/image": "a.png"})), "holds a str"),
    "broken jpeg": (pack(observation(**{"observation/image": b"\xff\xd8\xff\xe0 no"})), "no readable JPEG or PNG"),
    "image bomb": (pack(observation(**{"observation/image": bomb()})), "max_image_pixels"),
    "no frame": (pack(observation(**{"observation/image": []})), "0 frames; wanted 1 to max_seq_len 1"),
    "reset of text": (pack(observation(reset="yes")), "'reset' is 'yes'; wanted true at an episode's first request"),
    "short state": (pack(observation(**{"observation/state": STATE[:2]})), "this policy takes 4"),
    "state of text": (pack(observation(**{"observation/state": ["a"] * 4})), "wanted 4 numbers"),
    "NaN in state": (pack(observation(**{"observation/state": nan_state()})), r"state\[1\] is nan"),
    "infinite state": (pack(observation(**{"observation/state": np.full(4, np.inf)})), r"state\[0\] is inf"),
    "seed of text": (pack(observation(seed="x")), "'seed' is 'x'"),
    "endless seed": (pack(observation(seed="x" * 100_000)), r"'seed' is 'x{400,500} \.\.\.$"),
    "too many lists": (msgpack.packb([[[]] * 1000] * 2), "more than 1024 lists"),
    "negative seed": (pack(observation(seed=-1)), "'seed' is -1"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_message_gets_a_clear_reply_and_the_connection_goes_on(server, predictor, kind):
    message, reason = MALFORMED[kind]
    with connect(f"ws://127.0.0.1:{server.port}", compression=None) as connection:
        connection.recv()
        connection.send(message)
        reply = connection.recv(timeout=10)
        assert isinstance(reply, str) and reply.startswith("error: ") and re.search(reason, reply), reply
        connection.send(pack(observation(3)))
        np.testing.assert_allclose(unpack(connection.recv(timeout=10))["actions"], expected(predictor, 3), atol=1e-6)


def test_openpis_client_shows_the_reason(server):
    with pytest.raises(RuntimeError, match="'prompt' is missing"):
        WebsocketClientPolicy("127.0.0.1", server.port).infer(observation(prompt=None))


def test_an_oversized_message_closes_that_connection_alone(server, predictor):
    with connect(f"ws://127.0.0.1:{server.port}", compression=None) as connection:
        connection.recv()
        with pytest.raises(ConnectionClosed) as closed:
            connection.send(pack(observation(**{"observation/image": frame(size=600)})))
            connection.recv(timeout=10)
        assert closed.value.rcvd.code == 1009
    still_serves(server, predictor)


HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


@pytest.mark.parametrize("kind", ["never speaks", "no http", "slow frame", "half closed", "vanishes"])
def test_bad_sockets_are_closed_and_forgotten(predictor, kind):
    with running(predictor, timeout_s=2) as server, socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.settimeout(15)
        if kind == "no http":
            raw.sendall(b"\x16\x03\x01\x00\xa5 this is not http\r\n\r\n")
        if kind in ("slow frame", "half closed", "vanishes"):
            raw.sendall(HANDSHAKE)
            assert b"101" in raw.recv(4096)
            raw.sendall(b"\x82\xfe\x10\x00abcd" + b"x")  # a frame of 4096 bytes, of which one is sent
        if kind == "half closed":
            raw.shutdown(socket.SHUT_WR)
        if kind == "vanishes":
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raw.close()
        else:
            while raw.recv(4096):  # until the server closes: at most the handshake's or the ping's timeout
                pass
        deadline = time.monotonic() + 10
        while server.metrics.num_clients and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.metrics.num_clients == 0
        still_serves(server, predictor)
