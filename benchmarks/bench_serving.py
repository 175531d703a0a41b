"""What serving costs beside predicting in the same process, and whether it holds under load.

    python benchmarks/bench_serving.py --checkpoint_path C [--seconds 60] [--clients 8] [--quick] [--json serving.json]

Latency: the same observations through `VLAPredictor.predict`, through a server process on loopback, and through another
that records what it sees and plans (--record), in turns; overhead is the difference of the medians. Load: several
clients ask as fast as they can; every answer is compared with the one of the same process, and the server's resident
memory is read at the start and at the end.

JSON keys: in_process_ms, served_ms, overhead_ms, recording_ms (wanted below 1), wrong_answers (wanted 0), memory_growth
(wanted below 1.05).
"""

from __future__ import annotations

import json
import pathlib
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable

import numpy as np
import torch

if not __package__:
    import _repository  # noqa: F401

from benchmarks.memory import resident_mb
from benchmarks.served import open_client, start_server
from inference.predictor import VLAPredictor
from utils.arguments import CommandParser
from utils.text_table import text_table

LIMITS = {"wrong_answers": 0, "memory_growth": 1.05}
TOLERANCE = 1e-4  # a batch of several rounds differently than one alone


def observations(predictor: VLAPredictor, count: int) -> list[dict[str, object]]:
    """Random frames and states, each with the seed of its noise."""
    random = np.random.default_rng(0)
    size = (predictor.image_processor.height, predictor.image_processor.width, 3)
    return [
        {
            **{camera: random.integers(0, 256, size, dtype=np.uint8) for camera in predictor.cameras},
            "state": random.normal(size=predictor.state_dim).astype(np.float32),
            "prompt": "open the window",
            "seed": seed,
        }
        for seed in range(count)
    ]


def predict(predictor: VLAPredictor, observation: dict[str, object]) -> np.ndarray:
    """The actions of an observation in this process."""
    images = [observation.get("image_1"), observation.get("image_2")]
    named = {key: observation[key] for key in ("prompt", "state", "seed")}
    return predictor.predict(*images, **named)


def measure_latency(calls: dict[str, Callable], asked: list, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each prediction by each of `calls`, in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 5):
        observation = asked[i % len(asked)]
        for name, call in calls.items():
            started = time.perf_counter()
            call(observation)
            if i >= 5:
                times[name].append(1000 * (time.perf_counter() - started))
    return times


def latencies(checkpoint: str, predictor: VLAPredictor, port: int, asked: list, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each prediction: in process, by the server at `port`, and by one that records, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        recording, other_port = start_server(checkpoint, "--record", folder)
        try:
            clients = {"served": open_client(port), "recorded": open_client(other_port)}
            calls = {name: client.predict for name, client in clients.items()}
            times = measure_latency({"in_process": lambda o: predict(predictor, o), **calls}, asked, rounds)
            for client in clients.values():
                client.close()
        finally:
            recording.send_signal(signal.SIGTERM)
            recording.wait(timeout=30)
    return times


def load(port: int, asked: list, expected: list, seconds: float, results: list[tuple[int, int]]) -> None:
    """One client: ask until the time is over; appends (answers, wrong answers)."""
    client, answers, wrong = open_client(port), 0, 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        i = (answers * 7 + threading.get_ident()) % len(asked)
        wrong += not np.allclose(client.predict(asked[i]), expected[i], atol=TOLERANCE)
        answers += 1
    client.close()
    results.append((answers, wrong))


def run_clients(port: int, clients: int, asked: list, expected: list, seconds: float) -> tuple[int, int]:
    """(answers, wrong answers) of several clients at once."""
    results: list[tuple[int, int]] = []
    arguments = (port, asked, expected, seconds, results)
    threads = [threading.Thread(target=load, args=arguments) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(results) < clients:
        raise RuntimeError(f"{clients - len(results)} of {clients} clients failed; see above")
    return sum(answers for answers, _ in results), sum(wrong for _, wrong in results)


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--checkpoint_path", required=True)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the load")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="3 seconds of load")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here")
    args = parser.parse_args()
    seconds, rounds = (3.0, 20) if args.quick else (args.seconds, 200)
    torch.set_num_threads(1)
    predictor = VLAPredictor.from_checkpoint(args.checkpoint_path)
    asked = observations(predictor, 16)
    expected = [predict(predictor, observation) for observation in asked]
    server, port = start_server(args.checkpoint_path)
    try:
        times = latencies(args.checkpoint_path, predictor, port, asked, rounds)
        run_clients(
            port, args.clients, asked, expected, min(5.0, seconds)
        )  # buffers of every client exist from here on
        before = resident_mb(server.pid)
        answers, wrong = run_clients(port, args.clients, asked, expected, seconds)
        after = resident_mb(server.pid)
    finally:
        server.send_signal(signal.SIGTERM)
        status = server.wait(timeout=30)
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "in_process_ms": medians["in_process"],
        "served_ms": medians["served"],
        "overhead_ms": medians["served"] - medians["in_process"],
        "recording_ms": medians["recorded"] - medians["served"],
        "clients": args.clients,
        "seconds": seconds,
        "answers": answers,
        "answers_per_second": answers / seconds,
        "wrong_answers": wrong,
        "memory_mb": [before, after],
        "memory_growth": after / before,
        "exit_status": status,
    }
    rows = [[name, medians[name], float(np.percentile(values, 95))] for name, values in times.items()]
    print(text_table(["", "p50 ms", "p95 ms"], rows))
    print(f"overhead of serving: {result['overhead_ms']:.2f} ms (median)")
    print(f"of recording besides: {result['recording_ms']:.2f} ms (median; wanted below 1)")
    print(
        f"\n{args.clients} clients, {seconds:.0f} s: {answers} answers ({result['answers_per_second']:.0f} per second)"
    )
    rows = [
        ["wrong answers", wrong, LIMITS["wrong_answers"]],
        [f"memory growth, to {after:.0f} MB", after / before, LIMITS["memory_growth"]],
    ]
    print(text_table(["", "found", "at most"], rows))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    if wrong or after / before > LIMITS["memory_growth"] or status:
        sys.exit("error: a limit was missed")


if __name__ == "__main__":
    main()
