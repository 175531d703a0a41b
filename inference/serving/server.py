"""A policy behind a websocket, in the protocol of openpi's client: safe to leave running beside a robot.

On connection the server sends a dict that describes the policy. Then, for every observation dict, it answers with
`{"actions": float32 (horizon, per_action_dim), "server_timing": {..}}`, with `uncertainty` and `alarm` (None where
there is none, see `inference.alarm`), and with `warnings`, a list of texts, where something speaks against the
observation; or with a text that says what was wrong with the request. The connection stays usable. `GET /healthz` and
`GET /metrics` (Prometheus) answer on the same port.

    clients ─► Room (who may) ─► RequestReader, threads ─► RequestBatcher ─► VLAPredictor, one thread ─► clients

SECURITY.md lists what is promised, and every limit with its test.
"""

from __future__ import annotations

import asyncio
import functools
import http
import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
from websockets.asyncio.server import Request as HttpRequest
from websockets.asyncio.server import Response, serve
from websockets.exceptions import ConnectionClosed

from data.processing import ObservationError, Sample, collate_fn
from inference.predictor import VLAPredictor
from inference.serving.batching import BusyError, Prediction, PredictionError, RequestBatcher
from inference.serving.connections import Connection, IdleError, Room
from inference.serving.metrics import ServerMetrics
from inference.serving.recording import Recorder
from inference.serving.requests import Request, RequestError, RequestReader
from inference.serving.wire import WireError, pack
from utils.config_utils import ServingConfig
from utils.text import printable

logger = logging.getLogger(__name__)
_quiet = logging.getLogger(f"{__name__}.websockets")  # its tracebacks of broken handshakes are any stranger's to cause
_quiet.setLevel(logging.CRITICAL)

GOING_AWAY, TRY_AGAIN = 1001, 1013
MAX_TEXT = 500  # characters of a reply or a log line that quotes a request
MAX_TOLD = 60  # different warnings that the log has of one client
LIGHT_PIXELS = 4_000_000  # requests with more to decode wait for each other, in a thread of their own
STOP_MARGIN_S = 5.0  # the server has stopped so long after `serving.timeout_s` at the latest
CLOSE_S = 2.0  # for a client's own part in closing its connection


class PolicyServer:
    """Serves one policy to several clients until it is stopped."""

    def __init__(
        self,
        predictor: VLAPredictor,
        config: ServingConfig,
        token: str | None = None,
        seed: int = 0,
        recorder: Recorder | None = None,
    ) -> None:
        """
        Args:
            predictor: the policy.
            config: names of the keys in requests, and every limit.
            token: what clients must send as `Authorization: Api-Key <token>` (or Bearer); None: nothing.
            seed: of the sampling noise of requests that carry none.
            recorder: keeps what the policy sees and plans; None: nobody does.
        """
        self.predictor, self.config, self.recorder = predictor, config, recorder
        self.metrics = ServerMetrics(waiting=lambda: len(self.batcher.waiting), recorder=recorder)
        self.room = Room(config, token)
        self.reader = RequestReader(predictor, config, seed)
        self.port: int | None = None  # while running

    async def run(self, host: str, port: int, stopping: asyncio.Event | None = None) -> None:
        """Serve until `stopping` is set; then take no more clients, finish what is in flight, and return.

        That takes at most `serving.timeout_s` and STOP_MARGIN_S; what is not finished then is given up.

        Args:
            host, port: where to listen; port 0 takes a free one (`self.port`).
            stopping: None: for ever.

        Raises:
            OSError: the port can't be listened on.
        """
        config = self.config
        self.stopping = stopping or asyncio.Event()
        self._stopped = asyncio.ensure_future(self.stopping.wait())
        self.batcher = RequestBatcher(
            self._predict,
            window=config.batch_window_ms / 1000,
            max_batch=config.max_batch_size,
            max_waiting=config.max_waiting,
            clients=lambda: self.metrics.num_clients,
        )
        self._light = ThreadPoolExecutor(2, thread_name_prefix="requests")
        self._heavy = ThreadPoolExecutor(1, thread_name_prefix="large requests")
        server = await serve(
            self._connection,
            host,
            port,
            create_connection=functools.partial(Connection, self.room),
            process_request=self._before_handshake,
            max_size=config.max_message_bytes,
            max_queue=2,
            compression=None,
            open_timeout=config.timeout_s,
            ping_interval=config.timeout_s / 2,
            ping_timeout=config.timeout_s / 2,
            close_timeout=min(CLOSE_S, config.timeout_s),
            server_header=None,
            logger=_quiet,
        )
        tasks = [asyncio.create_task(self.batcher.run()), asyncio.create_task(self.room.watch())]
        try:
            self.port = server.sockets[0].getsockname()[1]
            logger.info("serving on %s port %d", host, self.port)
            await asyncio.wait({self._stopped, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            logger.info("stopping: no new clients, finishing %d connections", self.metrics.num_clients)
            server.close(close_connections=False)
            self.room.close(with_clients=False)
            closed = asyncio.ensure_future(server.wait_closed())
            await asyncio.wait({closed}, timeout=config.timeout_s + CLOSE_S)
            self.room.close(with_clients=True)
            await asyncio.wait({closed}, timeout=CLOSE_S)
        finally:
            for task in tasks:
                task.cancel()
            self.batcher.close()
            for pool in (self._light, self._heavy):
                pool.shutdown(wait=False, cancel_futures=True)
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in tasks:
            if not task.cancelled() and task.exception() is not None:
                raise task.exception()

    async def _before_handshake(self, connection: Connection, request: HttpRequest) -> Response | None:
        """HTTP requests, and clients that may not come in."""
        if request.path in ("/healthz", "/health"):
            return connection.respond(http.HTTPStatus.OK, "ok\n")
        refusal = self.room.refusal(request)
        if refusal is None and request.path == "/metrics":
            return connection.respond(http.HTTPStatus.OK, self.metrics.render())
        if refusal is None and not self.room.take_place(connection):
            text = f"{self.config.max_clients} clients are connected, which is serving.max_clients; try again later\n"
            refusal = "full", http.HTTPStatus.SERVICE_UNAVAILABLE, text
        if refusal is None:
            return None
        reason, status, text = refusal
        self.metrics.refused(reason)
        self.room.log.warning("turned away: %s", printable(text.strip(), MAX_TEXT))
        return connection.respond(status, text)

    async def _connection(self, connection: Connection) -> None:
        """One client, from the description to its end."""
        gone = asyncio.ensure_future(connection.wait_closed())
        with self.metrics.client():
            try:
                if (greeting := self._greeting()) is not None:
                    await asyncio.wait_for(connection.send(greeting), self.config.timeout_s)
                while (message := await self._next_message(connection)) is not None:
                    reply = await self._answer(message, connection, gone)
                    del message
                    if reply:
                        await asyncio.wait_for(connection.send(reply), self.config.timeout_s)
                    connection.done()
                await connection.close(GOING_AWAY, "the server is stopping")
            except ConnectionClosed:
                pass  # for whatever reason: there is nobody left to tell
            except IdleError:
                text = f"no request for {self.config.idle_timeout_s:g} s (serving.idle_timeout_s)"
                await connection.close(TRY_AGAIN, text)
            except TimeoutError:
                await connection.close(GOING_AWAY, f"no reply was read within {self.config.timeout_s:g} s")
            finally:
                gone.cancel()
                if self.recorder is not None:
                    self.recorder.end(id(connection))

    async def _next_message(self, connection: Connection) -> bytes | str | None:
        """What the client sends next; None when the server stops first."""
        connection.waiting_since = asyncio.get_running_loop().time()
        receiving = asyncio.ensure_future(connection.recv())
        ends = {receiving, self._stopped}
        await asyncio.wait(ends, timeout=self.config.idle_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        connection.waiting_since = None
        if receiving.done():
            return receiving.result()
        receiving.cancel()
        if not self._stopped.done():
            raise IdleError
        return None

    async def _answer(self, message: bytes | str, connection: Connection, gone: asyncio.Future[None]) -> bytes | str:
        """The reply to one message: packed actions, or a text that names the fault.

        Reading, decoding, waiting and predicting together may take `serving.timeout_s`, and end when the client does.
        """
        started = time.perf_counter()
        work = asyncio.ensure_future(self._predicted(message, connection))
        await asyncio.wait({work, gone}, timeout=self.config.timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
            if gone.done():
                self.metrics.refused("gone")
                return ""
            return self._refuse(f"no prediction within {self.config.timeout_s:g} s (serving.timeout_s)", "timeout")
        error = work.exception()
        if error is None:
            seconds = time.perf_counter() - started
            connection.answered += 1
            self.metrics.answered(seconds, work.result()[0].batch_size)
            prediction, warnings = work.result()
            reply = {"actions": prediction.actions, "server_timing": _timing(prediction, seconds)}
            unsure = prediction.uncertainty
            reply |= {"uncertainty": None if math.isnan(unsure) else unsure, "alarm": prediction.alarm}
            return pack({**reply, "warnings": [printable(text, MAX_TEXT) for text in warnings]} if warnings else reply)
        if isinstance(error, BusyError):
            return self._refuse(str(error), "busy")
        if isinstance(error, (WireError, RequestError, ObservationError)):
            return self._refuse(str(error), "bad_request")
        self.room.log.warning(
            "a prediction failed", exc_info=error.__cause__ or error
        )  # as torch does for want of memory
        reason = str(error if isinstance(error, PredictionError) else type(error).__name__).partition("\n")[0]
        return self._refuse(f"the prediction failed ({reason}); the server's log has the whole of it", "failed")

    async def _predicted(self, message: bytes | str, connection: Connection) -> tuple[Prediction, list[str]]:
        """Read a message and wait for its actions, with what speaks against it; whatever is wrong with it is raised."""
        wanted, warnings = True, {}
        try:
            rest = connection.history, warnings, lambda: wanted
            request, sample = await self._in(self._light, self._read, message, *rest)
            if sample is None:
                sample = await self._in(self._heavy, self.reader.sample, request, *rest)
            warnings |= {key: f"requests carry keys that nothing reads: {key}" for key in request.unread}
            if self.recorder is not None and self.recorder.trouble and "recording" not in connection.told:
                warnings["recording"] = self.recorder.trouble
            for kind in list(warnings.keys() - connection.told)[: MAX_TOLD - len(connection.told)]:
                self.room.log.warning("%s", printable(warnings[kind], MAX_TEXT))
                connection.told.add(kind)
            if (monitor := connection.history.monitor) is not None:
                self.metrics.suspected(monitor.new_kinds())
            prediction = await self.batcher.submit(sample, request.seed)
            if monitor is not None:
                monitor.predicted(prediction.model_seconds / prediction.batch_size)
        finally:
            wanted = False
        if not np.isfinite(prediction.actions).all():
            raise RequestError("the policy predicted actions that are not finite; nothing was sent to the robot")
        prediction.alarm = connection.history.alarmed(self.predictor, prediction.uncertainty, request.reset)
        if self.recorder is not None:
            self._record(self.recorder, connection, request, sample, prediction)
        return prediction, list(warnings.values())

    def _record(
        self, recorder: Recorder, connection: Connection, request: Request, sample: Sample, prediction: Prediction
    ) -> None:
        """Keep a request and its answer."""
        frames = {camera: request.images.get(camera) for camera in self.predictor.cameras}
        newest = {camera: given[-1] for camera, given in frames.items() if given}
        state = sample["state"].numpy()[: self.predictor.state_dim]
        where = id(connection), newest, state, request.prompt
        recorder.add(*where, prediction.actions, request.seed, begins=request.reset)

    def _in(self, pool: Executor, work: Any, *arguments: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().run_in_executor(pool, work, *arguments)

    def _read(self, message: bytes | str, *rest: Any) -> tuple[Any, Sample | None]:
        """A request, and its sample unless there is much to decode; `rest` is what `RequestReader.sample` takes."""
        request = self.reader.read(message)
        light = request.encoded_pixels <= LIGHT_PIXELS
        return request, self.reader.sample(request, *rest) if light else None

    def _refuse(self, text: str, reason: str) -> str:
        self.metrics.refused(reason)
        text = printable(text, MAX_TEXT)
        self.room.log.warning("refused a request: %s", text)
        return f"error: {text}"

    def _greeting(self) -> bytes | None:
        """What a client is sent when it connects; None: nothing."""
        return pack(self.describe())

    def describe(self) -> dict[str, Any]:
        """What a client learns when it connects: the policy's name, keys, widths and rates."""
        predictor, config = self.predictor, self.config
        return {
            "policy": predictor.config.training.experiment_name,
            "dataset": predictor.dataset.name,
            "cameras": {camera: self.reader.keys[camera] for camera in predictor.cameras},
            "state_columns": predictor.state_widths,
            "state_key": config.state_key,
            "prompt_key": config.prompt_key,
            "image_size": [predictor.image_processor.height, predictor.image_processor.width],
            "max_seq_len": predictor.max_seq_len,
            "state_dim": predictor.state_dim,
            "horizon": predictor.horizon,
            "per_action_dim": predictor.per_action_dim,
            "n_action_steps": predictor.n_action_steps,
            "alarm": None if predictor.alarm is None else asdict(predictor.alarm.calibration),
            "num_inference_steps": predictor.num_inference_steps,
            "quantization": predictor.quantization,
            "fingerprint": predictor.fingerprint,
        }

    def _predict(self, samples: Sequence[Sample], seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        actions, uncertainty = self.predictor.predict_measured(collate_fn(samples), [seeds])
        return actions[0], uncertainty[0]


def _timing(prediction: Prediction, seconds: float) -> dict[str, float]:
    return {
        "infer_ms": 1000 * prediction.model_seconds,
        "queue_ms": 1000 * prediction.queue_seconds,
        "total_ms": 1000 * seconds,
        "batch_size": prediction.batch_size,
    }
