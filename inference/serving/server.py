"""A policy behind a websocket, in the protocol of openpi's client: safe to leave running beside a robot.

On connection the server sends a dict that describes the policy. Then, for every observation dict, it answers with
`{"actions": float32 (horizon, per_action_dim), "server_timing": {..}}`, or with a text that says what was wrong with
the request; the connection stays usable. `GET /healthz` and `GET /metrics` (Prometheus) answer on the same port.

    clients ─► unpack, check, decode ─► RequestBatcher ─► VLAPredictor, one thread ─► pack ─► clients
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import http
import io
import itertools
import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from websockets.asyncio.server import Request, Response, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from data.processing import ObservationError, Sample, collate_fn
from inference.predictor import VLAPredictor
from inference.serving.batching import BusyError, Prediction, RequestBatcher
from inference.serving.metrics import ServerMetrics
from inference.serving.wire import WireError, pack, unpack
from utils.config_utils import ServingConfig
from utils.misc import derive_seed

logger = logging.getLogger(__name__)

GOING_AWAY = 1001
MAX_TEXT = 500  # characters of a reply or a log line that quotes a request


class RequestError(ValueError):
    """An observation that the policy can't use."""


class PolicyServer:
    """Serves one policy to several clients until it is stopped."""

    def __init__(self, predictor: VLAPredictor, config: ServingConfig, token: str | None = None, seed: int = 0) -> None:
        """
        Args:
            predictor: the policy.
            config: names of the keys in requests, and every limit.
            token: what clients must send as `Authorization: Api-Key <token>` (or Bearer); None: nothing.
            seed: of the sampling noise of requests that carry none.
        """
        self.predictor, self.config, self.token, self.seed = predictor, config, token, seed
        self.metrics = ServerMetrics(waiting=lambda: len(self.batcher.waiting))
        self.port: int | None = None  # while running
        self._numbers = itertools.count()
        self._warned: set[str] = set()

    async def run(self, host: str, port: int, stopping: asyncio.Event | None = None) -> None:
        """Serve until `stopping` is set; then take no more clients, finish what is in flight, and return.

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
        batching = asyncio.create_task(self.batcher.run())
        async with serve(
            self._connection,
            host,
            port,
            process_request=self._before_handshake,
            max_size=config.max_message_bytes,
            compression=None,
            open_timeout=config.timeout_s,
            ping_interval=config.timeout_s / 2,
            ping_timeout=config.timeout_s / 2,
            close_timeout=config.timeout_s,
            server_header=None,
        ) as server:
            self.port = server.sockets[0].getsockname()[1]
            logger.info("serving on %s port %d", host, self.port)
            await self._stopped
            logger.info("stopping: no new clients, finishing %d connections", self.metrics.num_clients)
            server.close(close_connections=False)
            await server.wait_closed()
        batching.cancel()
        self.batcher.close()

    async def _before_handshake(self, connection: ServerConnection, request: Request) -> Response | None:
        """HTTP requests, and clients that may not come in."""
        if request.path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "ok\n")
        if self.token is not None and not self._authorized(request.headers.get_all("Authorization")):
            self.metrics.refused("token")
            text = "missing or wrong token; send the header 'Authorization: Api-Key <token>'\n"
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, text)
        if request.path == "/metrics":
            return connection.respond(http.HTTPStatus.OK, self.metrics.render())
        if self.metrics.num_clients >= self.config.max_clients:
            self.metrics.refused("full")
            text = f"{self.config.max_clients} clients are connected, which is serving.max_clients; try again later\n"
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, text)
        return None

    def _authorized(self, headers: Sequence[str]) -> bool:
        kind, _, given = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
        return kind.lower() in ("api-key", "bearer") and hmac.compare_digest(given.encode(), self.token.encode())

    async def _connection(self, connection: ServerConnection) -> None:
        """One client, from the description to its end."""
        with self.metrics.client():
            try:
                await connection.send(pack(self.describe()))
                while (message := await self._next_message(connection)) is not None:
                    reply = await self._answer(message)
                    await asyncio.wait_for(connection.send(reply), self.config.timeout_s)
                await connection.close(GOING_AWAY, "the server is stopping")
            except ConnectionClosed:
                pass  # for whatever reason: there is nobody left to tell
            except TimeoutError:
                await connection.close(GOING_AWAY, f"no reply was read within {self.config.timeout_s:g} s")

    async def _next_message(self, connection: ServerConnection) -> bytes | str | None:
        """What the client sends next; None when the server stops first."""
        receiving = asyncio.ensure_future(connection.recv())
        await asyncio.wait({receiving, self._stopped}, return_when=asyncio.FIRST_COMPLETED)
        if receiving.done():
            return receiving.result()
        receiving.cancel()
        return None

    async def _answer(self, message: bytes | str) -> bytes | str:
        """The reply to one message: packed actions, or a text that names the fault."""
        started = time.perf_counter()
        try:
            sample, seed = await asyncio.to_thread(self._read, message)
            prediction = await asyncio.wait_for(self.batcher.submit(sample, seed), self.config.timeout_s)
            if not np.isfinite(prediction.actions).all():
                raise RequestError("the policy predicted actions that are not finite; nothing was sent to the robot")
        except (WireError, RequestError, ObservationError, BusyError) as error:
            return self._refuse(str(error), "busy" if isinstance(error, BusyError) else "bad_request")
        except TimeoutError:
            return self._refuse(f"no prediction within {self.config.timeout_s:g} s (serving.timeout_s)", "timeout")
        except RuntimeError as error:  # torch's, such as a GPU without memory for this batch
            logger.exception("a prediction failed")
            reason = str(error).partition("\n")[0]
            return self._refuse(f"the prediction failed ({reason}); the server's log has the whole of it", "failed")
        seconds = time.perf_counter() - started
        self.metrics.answered(seconds, prediction.batch_size)
        return pack({"actions": prediction.actions, "server_timing": _timing(prediction, seconds)})

    def _refuse(self, text: str, reason: str) -> str:
        self.metrics.refused(reason)
        text = _short(text)
        logger.warning("refused a request: %s", text)
        return f"error: {text}"

    def describe(self) -> dict[str, Any]:
        """What a client learns when it connects: the policy's name, keys, widths and rates."""
        predictor, config = self.predictor, self.config
        return {
            "policy": predictor.config.training.experiment_name,
            "dataset": predictor.dataset.name,
            "cameras": {camera: config.keys[camera] for camera in predictor.cameras},
            "state_key": config.state_key,
            "prompt_key": config.prompt_key,
            "image_size": [predictor.image_processor.height, predictor.image_processor.width],
            "max_seq_len": predictor.max_seq_len,
            "state_dim": predictor.state_dim,
            "horizon": predictor.horizon,
            "per_action_dim": predictor.per_action_dim,
            "n_action_steps": predictor.n_action_steps,
        }

    def _read(self, message: bytes | str) -> tuple[Sample, int]:
        """A request as a sample and the seed of its noise.

        Raises:
            WireError, RequestError, ObservationError: with the fault and what is wanted.
        """
        if isinstance(message, str):
            raise RequestError("a text message; wanted a binary one, packed with msgpack")
        request = unpack(message)
        if not isinstance(request, dict):
            raise RequestError(f"the message holds a {type(request).__name__}; wanted a dict with {self._wanted()}")
        take = functools.partial(self._take, request)
        prompt, state, seed = take("prompt"), take("state"), request.get("seed")
        if not isinstance(prompt, str):
            found = "missing" if prompt is None else f"a {type(prompt).__name__}"
            raise RequestError(f"{self.config.prompt_key!r} is {found}; wanted the instruction as text")
        if len(prompt) > (limit := self.config.max_prompt_chars):
            found = f"{self.config.prompt_key!r} has {len(prompt)} characters"
            raise RequestError(f"{found}; at most {limit} are taken (serving.max_prompt_chars)")
        if seed is None:
            seed = derive_seed("serving", self.seed, next(self._numbers))
        elif not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise RequestError(f"'seed' is {seed!r}; wanted a whole number, 0 or more and below 2**63")
        images = {camera: self._frames(take(camera), self.config.keys[camera]) for camera in ("image_1", "image_2")}
        if images["image_1"] is None:
            raise RequestError(f"{self.config.image_1_key!r} is missing; wanted {self._wanted()}")
        self._warn_unread(request)
        sample = self.predictor.observation(
            images["image_1"], images["image_2"], prompt=prompt, state=self._state(state)
        )
        return sample, int(seed)

    def _take(self, request: dict[Any, Any], name: str) -> Any:
        """A request's value under the configured key, or under the name that the batch contract uses."""
        key = self.config.keys[name]
        return request.get(key, request.get(name))

    def _frames(self, value: Any, key: str) -> list[Any] | None:
        if value is None:
            return None
        several = isinstance(value, list) or (isinstance(value, np.ndarray) and value.ndim == 4)
        frames = list(value) if several else [value]
        for frame in frames:
            if isinstance(frame, bytes):
                self._check_pixels(*_encoded_size(frame, key), key)
            elif not isinstance(frame, np.ndarray):
                kind = type(frame).__name__
                raise RequestError(f"{key!r} holds a {kind}; wanted uint8 (H, W, 3), or JPEG or PNG as bytes")
            elif frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or not frame.size:
                raise RequestError(f"{key!r} is {frame.dtype} {frame.shape}; wanted uint8 (H, W, 3), RGB")
            else:
                self._check_pixels(frame.shape[1], frame.shape[0], key)
        return frames

    def _check_pixels(self, width: int, height: int, key: str) -> None:
        limit = self.config.max_image_pixels
        if width * height > limit:
            found = f"{key!r} is {height} x {width} pixels"
            raise RequestError(f"{found}; at most {limit} are taken (serving.max_image_pixels)")

    def _state(self, value: Any) -> np.ndarray | None:
        if value is None:
            return None
        key, width = self.config.state_key, self.predictor.state_dim
        if isinstance(value, list) and all(type(item) in (int, float) for item in value):
            value = np.array(value, np.float64)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf":
            found = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
            raise RequestError(f"{key!r} is {found}; wanted {width} numbers")
        return value

    def _warn_unread(self, request: dict[Any, Any]) -> None:
        unread = {str(key) for key in request} - set(self.config.keys) - set(self.config.keys.values()) - {"seed"}
        if len(self._warned) < 100 and unread - self._warned:
            named = _short(", ".join(sorted(unread - self._warned)[:5]))
            logger.warning("requests carry keys that nothing reads: %s", named)
            self._warned |= unread

    def _wanted(self) -> str:
        keys = [self.config.keys[name] for name in (*self.predictor.cameras, "state", "prompt")]
        return ", ".join(map(repr, keys))

    def _predict(self, samples: Sequence[Sample], seeds: Sequence[int]) -> np.ndarray:
        return self.predictor.predict_batch(collate_fn(samples), seeds)


def _short(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} ..."


def _encoded_size(frame: bytes, key: str) -> tuple[int, int]:
    """(width, height) of an encoded image, from its header alone."""
    try:
        with Image.open(io.BytesIO(frame)) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else error
        raise RequestError(f"{key!r}: {len(frame)} bytes are no readable JPEG or PNG ({reason})") from None


def _timing(prediction: Prediction, seconds: float) -> dict[str, float]:
    return {
        "infer_ms": 1000 * prediction.model_seconds,
        "queue_ms": 1000 * prediction.queue_seconds,
        "total_ms": 1000 * seconds,
        "batch_size": prediction.batch_size,
    }
