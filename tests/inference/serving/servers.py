"""A policy server in a thread of the test process, what it is asked, and what it should answer."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from vla_client import PolicyClient

from inference.predictor import VLAPredictor
from inference.serving.recording import Recorder
from inference.serving.server import PolicyServer
from utils.config_utils import ServingConfig

STATE = np.array([0.1, -0.2, 0.3, 0.4], np.float32)


@contextlib.contextmanager
def running(
    predictor: VLAPredictor,
    token: str | None = None,
    *,
    host: str = "127.0.0.1",
    kind: type[PolicyServer] = PolicyServer,
    recorder: Recorder | None = None,
    **limits: Any,
) -> Iterator[PolicyServer]:
    """A server that listens on `server.port`, stopped on leaving; `limits` are fields of ServingConfig."""
    server = kind(predictor, ServingConfig(**limits), token, recorder=recorder)
    loop, stopping = asyncio.new_event_loop(), asyncio.Event()
    listening = threading.Event()

    async def run() -> None:
        task = asyncio.ensure_future(server.run(host, 0, stopping))
        while server.port is None and not task.done():
            await asyncio.sleep(0.01)
        listening.set()
        await task

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),), daemon=True)
    thread.start()
    assert listening.wait(20) and server.port is not None
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"
        loop.close()


def frame(seed=0, size=40):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def observation(number=0, **changes):
    keys = {"observation/image": frame(number), "observation/state": STATE, "prompt": "open it", "seed": number}
    return {key: value for key, value in (keys | changes).items() if value is not None}


def expected(predictor, seed=0):
    return predictor.predict(frame(seed), prompt="open it", state=STATE, seed=seed)


def still_serves(server, predictor):
    client = PolicyClient(port=server.port)
    np.testing.assert_allclose(client.predict(observation(3)), expected(predictor, 3), atol=1e-6)
    client.close()
