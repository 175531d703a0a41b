"""Whether anything that a stranger sends harms the policy server: in process, over sockets, and under mixed load.

    python benchmarks/fuzz_server.py [--checkpoint_path C] [--messages 200000] [--socket_messages 5000] [--seconds 300]
        [--seed 0] [--quick] [--json fuzz.json]

In process: messages of benchmarks/fuzz_messages.py through everything but the model, with a limit on the memory of the
process. Over sockets: the same kind of messages to a server process while good clients ask and compare every answer.
Mixed load: 8 good clients (which reconnect now and then), 3 that send garbage, 100 that say nothing, and one that reads
nothing; then SIGTERM.

JSON keys: in_process (messages, outcomes, uncaught, slowest_s, peak_growth_mb), sockets (messages, replies, closed,
wrong_answers, slowest_good_s, memory_mb), mixed (answers, wrong_answers, refused, slowest_good_s, memory_mb, stop_s).
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import os
import pathlib
import random
import re
import signal
import socket
import sys
import threading
import time
from typing import Any

import numpy as np
import torch
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.sync.client import connect

if not __package__:
    import _repository  # noqa: F401

from benchmarks.fuzz_messages import good_request, message
from benchmarks.memory import limit_memory, peak_of, reset_peak, resident_mb
from benchmarks.served import open_client, start_server
from data.processing import ObservationError
from inference.predictor import VLAPredictor
from inference.serving.requests import History, RequestError, RequestReader
from inference.serving.wire import WireError, pack
from utils.arguments import CommandParser
from utils.config_utils import ServingConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]
OURS = (WireError, RequestError, ObservationError)
PEAK_GROWTH_MB = 600  # of this process over all messages: the bound that SECURITY.md states for one message at a time
STOP_S = 25.0  # serving.timeout_s and STOP_MARGIN_S
TOLERANCE = 1e-4  # a batch of several rounds differently than one alone


def fuzz_in_process(predictor: VLAPredictor, count: int, seed: int, config: ServingConfig) -> dict[str, Any]:
    """Read `count` messages; every outcome that is new makes its message one to change further."""
    rng, reader = random.Random(seed), RequestReader(predictor, config, seed)
    corpus: list[bytes] = []
    history = History()
    seen: set[str] = set()
    outcomes: collections.Counter[str] = collections.Counter()
    uncaught, slowest, accepted, before = [], 0.0, 0, resident_mb(os.getpid())
    reset_peak()
    for _ in range(count):
        sent = message(rng, predictor.state_dim, corpus)
        started = time.perf_counter()
        try:
            request = reader.read(sent)
            reader.sample(request, history, {}, lambda: True)
            outcome, text = "accepted", "accepted"
            accepted += 1
            if accepted % 50 == 0:
                predict(predictor, request)
        except OURS as error:
            outcome, text = type(error).__name__, f"{type(error).__name__} {re.sub(r'[^a-z ]+', '', str(error))[:60]}"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome = text = "uncaught"
            uncaught.append({"error": repr(error)[:200], "message": sent[:200].hex()})
        slowest = max(slowest, time.perf_counter() - started)
        outcomes[outcome] += 1
        if text not in seen and len(sent) < 100_000:
            seen.add(text)
            corpus.append(sent)
    result = {
        "messages": count,
        "seed": seed,
        "outcomes": dict(outcomes),
        "kinds": len(seen),
        "uncaught": uncaught[:20],
    }
    return result | {
        "uncaught_count": len(uncaught),
        "slowest_s": slowest,
        "peak_growth_mb": peak_of(os.getpid()) - before,
    }


def predict(predictor: VLAPredictor, request: Any) -> None:
    """The model on an accepted request; its actions must be finite."""
    images = request.images
    actions = predictor.predict(
        images["image_1"], images["image_2"], prompt=request.prompt, state=request.state, seed=0
    )
    if not np.isfinite(actions).all():
        raise AssertionError("actions that are not finite")


class GoodClient(threading.Thread):
    """Asks again and again, and compares every answer."""

    def __init__(self, port: int, asked: list[Any], expected: list[Any], stop: threading.Event, every: int = 0) -> None:
        super().__init__(daemon=True)
        self.port, self.asked, self.expected, self.stop, self.every = port, asked, expected, stop, every
        self.answers = self.wrong = self.refused = 0
        self.slowest, self.errors = 0.0, []

    def run(self) -> None:
        client = None
        while not self.stop.is_set():
            try:
                client = client or open_client(self.port)
                i = self.answers % len(self.asked)
                started = time.monotonic()
                actions = client.predict(self.asked[i])
                self.slowest = max(self.slowest, time.monotonic() - started)
                self.wrong += not np.allclose(actions, self.expected[i], atol=TOLERANCE)
                self.answers += 1
                if self.every and self.answers % self.every == 0:
                    client.close()
                    client = None
            except (InvalidHandshake, RuntimeError, ConnectionClosed, OSError, TimeoutError) as error:
                self.refused += 1
                self.errors = [*self.errors[:4], repr(error)[:200]]
                client = None
                time.sleep(0.1)


def garbage(port: int, seed: int, state_dim: int, count: int, stop: threading.Event, tally: dict[str, int]) -> None:
    """Send messages and read a reply to each, over new connections where one was closed."""
    rng, sent = random.Random(seed), 0
    while sent < count and not stop.is_set():
        try:
            with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None) as connection:
                connection.recv(timeout=60)
                while sent < count and not stop.is_set():
                    sent += 1
                    connection.send(message(rng, state_dim, []))
                    tally["text" if isinstance(connection.recv(timeout=60), str) else "actions"] += 1
        except (ConnectionClosed, InvalidHandshake, OSError, TimeoutError) as error:
            sent += 1
            tally[type(error).__name__] += 1


@contextlib.contextmanager
def policy_server(checkpoint: str, result: dict[str, Any]):
    """A server process; afterwards its memory and how long SIGTERM took are in `result`."""
    server, port = start_server(checkpoint)
    try:
        time.sleep(1)
        result["memory_mb"] = [resident_mb(server.pid)]
        yield server, port
        result["memory_mb"] += [resident_mb(server.pid), peak_of(server.pid)]
        started = time.monotonic()
        server.send_signal(signal.SIGTERM)
        result["exit_status"], result["stop_s"] = server.wait(timeout=60), time.monotonic() - started
    finally:
        server.kill()
        server.wait()


def gathered(good: list[GoodClient]) -> dict[str, Any]:
    """What the good clients saw."""
    return {
        "answers": sum(client.answers for client in good),
        "wrong_answers": sum(client.wrong for client in good),
        "refused": sum(client.refused for client in good),
        "errors": [error for client in good for error in client.errors][:10],
        "slowest_good_s": max(client.slowest for client in good),
    }


def fuzz_sockets(checkpoint: str, asked: list, expected: list, count: int, seed: int, state_dim: int) -> dict[str, Any]:
    """`count` messages from three clients beside two good ones."""
    result: dict[str, Any] = {"messages": count, "seed": seed}
    tally: dict[str, int] = collections.Counter()
    stop = threading.Event()
    with policy_server(checkpoint, result) as (_, port):
        good = [GoodClient(port, asked, expected, stop) for _ in range(2)]
        bad = [
            threading.Thread(target=garbage, args=(port, seed + i, state_dim, count // 3 + 1, stop, tally), daemon=True)
            for i in range(3)
        ]
        for thread in [*good, *bad]:
            thread.start()
        for thread in bad:
            thread.join()
        stop.set()
        for thread in good:
            thread.join(60)
    return result | {"replies": dict(tally)} | gathered(good)


def mixed_load(
    checkpoint: str, asked: list, expected: list, seconds: float, seed: int, state_dim: int
) -> dict[str, Any]:
    """Good, garbage, silent and slow clients at once; memory is read halfway and at the end."""
    result: dict[str, Any] = {"seconds": seconds, "seed": seed}
    tally: dict[str, int] = collections.Counter()
    stop = threading.Event()
    with policy_server(checkpoint, result) as (server, port), contextlib.ExitStack() as stack:
        good = [GoodClient(port, asked, expected, stop, every=50) for _ in range(8)]
        threads: list[threading.Thread] = [*good]
        for i in range(3):
            threads.append(
                threading.Thread(target=garbage, args=(port, seed + i, state_dim, 10**9, stop, tally), daemon=True)
            )
        threads += [threading.Thread(target=silent, args=(port, i, stop), daemon=True) for i in range(100)]
        threads.append(threading.Thread(target=never_reads, args=(port, asked[0], stop), daemon=True))
        stack.callback(stop.set)
        for thread in threads:
            thread.start()
        time.sleep(seconds / 2)
        halfway = resident_mb(server.pid)
        time.sleep(seconds / 2)
        stop.set()
        for thread in good:
            thread.join(60)
        result["memory_halfway_mb"] = halfway
    return result | {"garbage": dict(tally)} | gathered(good)


def silent(port: int, number: int, stop: threading.Event) -> None:
    """Hold a connection and say nothing: every second one not even a handshake; connect again when dropped."""
    while not stop.is_set():
        try:
            with contextlib.ExitStack() as stack:
                if number % 2:
                    raw = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
                    raw.settimeout(1)
                    while not stop.is_set():
                        with contextlib.suppress(TimeoutError):
                            if not raw.recv(100):
                                break
                else:
                    held = stack.enter_context(connect(f"ws://127.0.0.1:{port}", compression=None))
                    while not stop.is_set():
                        with contextlib.suppress(TimeoutError):
                            held.recv(timeout=1)
        except (InvalidHandshake, ConnectionClosed, OSError):
            stop.wait(0.5)


def never_reads(port: int, observation: Any, stop: threading.Event) -> None:
    """Ask and never read an answer."""
    while not stop.is_set():
        try:
            with connect(f"ws://127.0.0.1:{port}", compression=None, max_queue=1) as connection:
                while not stop.is_set():
                    connection.send(pack(observation))
        except (InvalidHandshake, ConnectionClosed, OSError):
            stop.wait(0.5)


def faults(results: dict[str, Any]) -> list[str]:
    """Every limit that was missed, in words."""
    found = []
    inside = results.get("in_process")
    if inside and inside["uncaught_count"]:
        found.append(f"{inside['uncaught_count']} uncaught exceptions in process")
    if inside and inside["peak_growth_mb"] > PEAK_GROWTH_MB:
        found.append(f"memory grew by {inside['peak_growth_mb']:.0f} MB in process")
    for name in ("sockets", "mixed"):
        part = results.get(name)
        if part is None:
            continue
        if part["wrong_answers"] or not part["answers"]:
            found.append(f"{name}: {part['wrong_answers']} wrong answers of {part['answers']}")
        if part["exit_status"] or part["stop_s"] > STOP_S:
            found.append(f"{name}: SIGTERM took {part['stop_s']:.1f} s, status {part['exit_status']}")
    return found


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--checkpoint_path", default=str(ROOT / "tests/fixtures/policies/flow.pth.tar"))
    parser.add_argument("--messages", type=int, default=200_000, help="in process")
    parser.add_argument("--socket_messages", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=300.0, help="of the mixed load; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="2,000 and 100 messages, 5 seconds")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    args = parser.parse_args()
    counts = (2000, 100, 5.0) if args.quick else (args.messages, args.socket_messages, args.seconds)
    logging.getLogger("data.prompt_tokenizer").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    predictor = VLAPredictor.from_checkpoint(args.checkpoint_path, device="cpu")
    rng = random.Random(args.seed)
    asked = [good_request(rng, predictor.state_dim) for _ in range(8)]
    expected = [
        predictor.predict(a["observation/image"], prompt=a["prompt"], state=a["observation/state"], seed=a["seed"])
        for a in asked
    ]
    load = (args.checkpoint_path, asked, expected)
    results: dict[str, Any] = {}
    if counts[1]:
        results["sockets"] = fuzz_sockets(*load, counts[1], args.seed, predictor.state_dim)
        print(json.dumps(results["sockets"]), flush=True)
    if counts[2]:
        results["mixed"] = mixed_load(*load, counts[2], args.seed, predictor.state_dim)
        print(json.dumps(results["mixed"]), flush=True)
    if counts[0]:
        limit_memory(3000)
        results["in_process"] = fuzz_in_process(predictor, counts[0], args.seed, ServingConfig())
        print(json.dumps(results["in_process"]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    if found := faults(results):
        sys.exit("error: " + "; ".join(found))


if __name__ == "__main__":
    main()
