"""Who may connect to the policy server, how many at once, and what each of them may make it hold.

    socket ─► handshake: Origin, Host, token ─► a place ─► messages

Nothing that a client does is waited for without an end, and nothing that it sends is kept without a bound: bytes that
wait to be read or answered are counted over all connections, and the connection that holds most of them is the one
that goes when there are too many.
"""

from __future__ import annotations

import asyncio
import hmac
import http
import ipaddress
import logging
import resource
import socket
from collections import deque
from collections.abc import Sequence
from typing import Any

from websockets.asyncio.server import Request, ServerConnection
from websockets.frames import DATA_OPCODES, Frame

from inference.serving.metrics import LimitedLog
from inference.serving.requests import History
from utils.config_utils import ServingConfig
from utils.text import printable

logger = logging.getLogger(__name__)

MAX_HANDSHAKES = 128  # sockets without a place, in their handshake or being turned away; the oldest goes first
MAX_UNREAD_BYTES = 8_000_000  # that the server has written and a client does not take, pongs included
OTHER_FILES = 128  # that the process has open besides
FRAME_BYTES = 256  # memory of a frame besides its content
PATIENCE_S = 2.0  # a client that said nothing for so long and was never answered yields its place when all are taken


def allow_open_files(number: int) -> None:
    """Raise this process's limit on open files where it is lower; say so where the system does not let it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < number:
        most = number if hard == resource.RLIM_INFINITY else min(number, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        if most < number:
            logger.warning("only %d files may be open, serving.max_clients needs %d; raise ulimit -n", most, number)


class IdleError(Exception):
    """A client sent nothing for too long."""


class Connection(ServerConnection):
    """One client's connection, which counts what it makes the server hold.

    Attributes:
        has_place: whether it is past its handshake and counts among `serving.max_clients`.
        held: bytes of its messages that are incomplete, wait, or are being answered.
        waiting_since: since when the server waits for its next message (loop time); None while one is answered.
        answered: how many of its requests got actions.
        told: what the log has said of this client's requests already: kinds of warnings, keys that nothing reads.
        history: the frames of its last requests.
    """

    def __init__(self, room: Room, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.room, self.has_place, self.dropped = room, False, False
        self.held, self.answered = 0, 0
        self.waiting_since: float | None = None
        self.told: set[str] = set()
        self.history = History()
        self._partial = self._message = 0  # bytes of a frame, and of the frames of a message, that is not whole yet
        self._whole: deque[int] = deque()  # bytes of the messages that wait or are being answered
        self._began: float | None = None  # when the first byte of an incomplete message came

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.room.entered(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.room.left(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._partial += len(data)
        super().data_received(data)
        incomplete = self._partial > 0 or self._message > 0
        self._began = (self._began or self.loop.time()) if incomplete else None
        self._count()
        if self.transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            self.drop("it does not read what it is sent")

    def process_event(self, event: Any) -> None:
        self._partial = 0
        if isinstance(event, Frame) and event.opcode in DATA_OPCODES:
            self._message += len(event.data) + FRAME_BYTES
            if event.fin:
                self._whole.append(self._message)
                self._message = 0
        super().process_event(event)

    def done(self) -> None:
        """The oldest message was answered: its bytes are no longer held."""
        if self._whole:
            self._whole.popleft()
            self._count()

    def overdue(self, seconds: float) -> bool:
        """Whether a message that began to come has not become whole within `seconds`, while the server waited."""
        if self._began is None or self.waiting_since is None:
            return False
        return self.loop.time() - max(self._began, self.waiting_since) > seconds

    def is_silent(self, seconds: float) -> bool:
        """Whether nothing at all came for `seconds`, and nothing before was answered."""
        waits = self.waiting_since is not None and self._began is None and not self.answered
        return waits and self.loop.time() - self.waiting_since > seconds

    def drop(self, reason: str) -> None:
        """End the connection at once, without a word to the client."""
        if not self.dropped:
            self.dropped, self.has_place = True, False
            self.room.log.warning("a connection was dropped: %s", reason)
            self.transport.abort()

    def _count(self) -> None:
        held = self._partial + self._message + sum(self._whole)
        self.room.held += held - self.held
        self.held = held
        if self.room.held > self.room.config.max_buffered_bytes:
            self.room.make_room()


class Room:
    """All connections of one server, and the rules for them."""

    def __init__(self, config: ServingConfig, token: str | None) -> None:
        allow_open_files(config.max_clients + MAX_HANDSHAKES + OTHER_FILES)
        self.config, self.token, self.log = config, token, LimitedLog(logger)
        self.connections: dict[Connection, None] = {}  # in the order of their arrival
        self.held = 0  # bytes, over all connections
        self._hosts = {"localhost", socket.gethostname().lower(), *(host.lower() for host in config.allowed_hosts)}

    def entered(self, connection: Connection) -> None:
        """A socket was opened; beyond MAX_HANDSHAKES without a place, the oldest of them goes."""
        self.connections[connection] = None
        waiting = [other for other in self.connections if not other.has_place and not other.dropped]
        if len(waiting) > MAX_HANDSHAKES:
            waiting[0].drop(f"more than {MAX_HANDSHAKES} are in their handshake")

    def left(self, connection: Connection) -> None:
        """A socket was closed."""
        self.connections.pop(connection, None)
        self.held -= connection.held
        connection.held, connection.has_place = 0, False

    def refusal(self, request: Request) -> tuple[str, http.HTTPStatus, str] | None:
        """Why a handshake or an HTTP request is turned away: metric, status and text; None where it may go on."""
        origins, hosts = request.headers.get_all("Origin"), request.headers.get_all("Host")
        strangers = [origin for origin in origins if origin not in self.config.allowed_origins]
        if strangers:
            text = f"a web page of {printable(strangers[0])} may not use this policy; to let it, name it in"
            return "origin", http.HTTPStatus.FORBIDDEN, f"{text} serving.allowed_origins\n"
        if self.token is None and not (len(hosts) == 1 and self._is_own_name(hosts[0])):
            text = f"this server was asked for as {printable(', '.join(hosts))}; wanted an address, a name without"
            remedy = "dots, or one of serving.allowed_hosts; or start it with --token_env"
            return "host", http.HTTPStatus.FORBIDDEN, f"{text} {remedy}\n"
        if self.token is not None and not self._authorized(request.headers.get_all("Authorization")):
            text = "missing or wrong token; send the header 'Authorization: Api-Key <token>'\n"
            return "token", http.HTTPStatus.UNAUTHORIZED, text
        return None

    def take_place(self, connection: Connection) -> bool:
        """Give a connection one of `serving.max_clients` places; False where all are taken by clients in use."""
        holders = [other for other in self.connections if other.has_place]
        if len(holders) >= self.config.max_clients:
            silent = [other for other in holders if other.is_silent(PATIENCE_S)]
            if not silent:
                return False
            min(silent, key=lambda other: other.waiting_since).drop("all places were taken, and it had said nothing")
        connection.has_place = True
        return True

    def make_room(self) -> None:
        """Drop the connections that hold most until the others are within `serving.max_buffered_bytes`."""
        limit = self.config.max_buffered_bytes
        staying = sorted((c for c in self.connections if not c.dropped), key=lambda c: c.held)
        while staying and sum(connection.held for connection in staying) > limit:
            staying.pop().drop(f"it held most of {limit} bytes of requests (serving.max_buffered_bytes)")

    async def watch(self) -> None:
        """Drop connections whose messages do not come to an end, until cancelled."""
        while True:
            await asyncio.sleep(min(1.0, self.config.timeout_s / 2))
            for connection in list(self.connections):
                if connection.overdue(self.config.timeout_s):
                    connection.drop(f"a message was not whole after {self.config.timeout_s:g} s (serving.timeout_s)")

    def close(self, *, with_clients: bool) -> None:
        """End every connection that is left, or only those that are not clients yet."""
        for connection in list(self.connections):
            if with_clients or not connection.has_place:
                connection.drop("the server ends")

    def _authorized(self, headers: Sequence[str]) -> bool:
        kind, _, given = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
        right = hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self.token.encode())
        return kind.lower() in ("api-key", "bearer") and right

    def _is_own_name(self, host: str) -> bool:
        """Whether a Host header can't be the name of a web page that an attacker points at this machine."""
        name, _, port = host.lower().rpartition(":")
        name = name if name and port.isdigit() else host.lower()
        try:
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            return bool(name) and ("." not in name or name in self._hosts or name.endswith(".local"))
        return True
