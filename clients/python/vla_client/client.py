"""A connection to scripts/serve_policy.py: observations there, actions back."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import re
from types import TracebackType
from typing import Any

import numpy as np
from websockets.exceptions import (
    ConnectionClosed,
    InvalidHandshake,
    InvalidProxy,
    InvalidStatus,
    InvalidURI,
    WebSocketException,
)
from websockets.sync.client import connect

from vla_client.wire import WireError, pack, unpack

logger = logging.getLogger(__name__)

MAX_REPLY_BYTES = 32_000_000
MAX_ERROR_CHARS = 1000
MAX_TOLD = 100  # different warnings that are logged


class PolicyError(RuntimeError):
    """The server is not reached, does not let this client in, refused an observation, or sent no usable actions."""


class PolicyClient:
    """A connection to a policy server, for one robot.

    Attributes:
        policy: what the server says of itself: keys, widths, horizon, n_action_steps.
        warnings: what spoke against the last observation; each is logged once, numbers aside.
        uncertainty: of the last actions; None where the policy has none.
        alarm: whether the policy will probably fail, since the last `reset`; None where nobody calibrated that.
    """

    def __init__(
        self, host: str = "127.0.0.1", port: int = 8000, token: str | None = None, timeout_s: float = 30.0
    ) -> None:
        """
        Args:
            host: a name or an address, IPv6 with or without brackets.
            port: of the server.
            token: that the server asks for.
            timeout_s: for connecting, and for every answer.

        Raises:
            PolicyError: nobody answers there, or it is no policy server, wants another token, or is full.
        """
        self.uri, self.timeout_s, self.warnings = server_uri(host, port), timeout_s, list[str]()
        self.uncertainty: float | None = None
        self.alarm: bool | None = None
        self._told: set[str] = set()
        self._closing = contextlib.ExitStack()
        headers = {"Authorization": f"Api-Key {token}"} if token else None
        options = {"additional_headers": headers, "compression": None, "max_size": MAX_REPLY_BYTES}
        try:
            # True: the proxy that the environment names, if any.
            server = connect(self.uri, proxy=None if is_local(host) else True, open_timeout=timeout_s, **options)
            self._connection = self._closing.enter_context(server)
            self.policy: dict[str, Any] = unpack(self._connection.recv(timeout_s))
        except InvalidStatus as error:
            reason = _printable(error.response.body.decode(errors="replace")) if error.response.body else ""
            raise PolicyError(
                f"{self.uri} does not let this client in: HTTP {error.response.status_code} {reason}"
            ) from None
        except InvalidProxy as error:
            raise PolicyError(f"{self.uri}: the environment names a proxy that can't be used ({error})") from None
        except (OSError, EOFError, InvalidHandshake, ConnectionClosed, WireError) as error:
            raise PolicyError(
                f"no policy server at {self.uri} ({_printable(str(error)) or type(error).__name__}); start "
                "scripts/serve_policy.py there, and check host and port"
            ) from None
        except (InvalidURI, ValueError):
            raise PolicyError(f"{self.uri} is no address; give a host name or an address, and a port") from None

    def predict(self, observation: dict[str, Any], reset: bool = False) -> np.ndarray:
        """The next actions, float32 (horizon, per_action_dim), physical units.

        Args:
            observation: under the keys of `policy`: frames uint8 (H, W, 3), state (state_dim,), prompt; `seed` if
                the noise is to be repeatable.
            reset: an episode begins: a policy that sees several frames forgets those of earlier requests.

        Raises:
            PolicyError: the server refused the observation, and says why; it sent something else than finite actions;
                the connection broke.
        """
        try:
            self._connection.send(pack({**observation, "reset": True} if reset else observation))
            reply = self._connection.recv(self.timeout_s)
        except TimeoutError:
            self.close()  # an answer that comes later would be taken for the next one's
            found = f"{self.uri} did not answer within {self.timeout_s:g} s"
            raise PolicyError(f"{found}; don't move, connect anew") from None
        except WebSocketException as error:
            raise PolicyError(f"the connection to {self.uri} ended ({_printable(str(error))}); connect anew") from None
        if isinstance(reply, str):
            raise PolicyError(_printable(reply))
        answer = unpack(reply)
        actions = answer.get("actions") if isinstance(answer, dict) else None
        shape = self.policy.get("horizon"), self.policy.get("per_action_dim")
        if not isinstance(actions, np.ndarray) or actions.shape != shape or not np.isfinite(actions).all():
            raise PolicyError(f"the server sent no finite actions of shape {shape}; don't move")
        self.warnings = [_printable(text) for text in answer.get("warnings", ()) if isinstance(text, str)]
        for text in self.warnings:
            kind = re.sub(r"[\d.+-]+", "", text)
            if kind not in self._told and len(self._told) < MAX_TOLD:
                self._told.add(kind)
                logger.warning("%s", text)
        unsure, alarm = answer.get("uncertainty"), answer.get("alarm")
        self.uncertainty = unsure if isinstance(unsure, float) else None
        self.alarm = alarm if isinstance(alarm, bool) else None
        return actions

    def close(self) -> None:
        """End the connection."""
        self._closing.close()

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def server_uri(host: str, port: int) -> str:
    """The websocket address of a host name, an IPv4 or an IPv6 address, the last with or without brackets."""
    bare = host.removeprefix("[").removesuffix("]")
    return f"ws://[{bare.replace('%', '%25')}]:{port}" if ":" in bare else f"ws://{bare}:{port}"


def is_local(host: str) -> bool:
    """Whether a host is this machine or of its own network, where no proxy stands between."""
    bare = host.removeprefix("[").removesuffix("]")
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        return "." not in bare or bare.endswith((".local", ".localhost"))
    return address.is_loopback or address.is_private or address.is_link_local or address.is_unspecified


def _printable(text: str) -> str:
    """What another machine sent, as one line of a log."""
    return "".join(c if c.isprintable() else " " for c in text[:MAX_ERROR_CHARS]).strip()
