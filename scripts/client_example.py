"""A robot's side of the policy server: numpy, msgpack and websockets, no torch.

    python scripts/client_example.py --port 8000 --prompt "open the window"

Copy this file and inference/serving/wire.py to the robot. Here, random pixels stand for the camera and a zero state for
the robot: replace `observe` and `execute`.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

if not __package__:  # a robot has this file and inference/serving/wire.py alone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inference.serving.wire import pack, unpack

MAX_REPLY_BYTES = 32_000_000
MAX_ERROR_CHARS = 1000


class PolicyClient:
    """A connection to scripts/serve_policy.py.

    Attributes:
        policy: what the server says of itself: keys, widths, horizon, n_action_steps.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 8000, token: str | None = None) -> None:
        """
        Raises:
            OSError: nobody listens there.
            websockets.exceptions.InvalidStatus: the server wants a (or another) token, or is full.
        """
        headers = {"Authorization": f"Api-Key {token}"} if token else None
        self._closing = contextlib.ExitStack()
        server = connect(f"ws://{host}:{port}", additional_headers=headers, compression=None, max_size=MAX_REPLY_BYTES)
        self._connection = self._closing.enter_context(server)
        self.policy: dict[str, Any] = unpack(self._connection.recv())

    def predict(self, observation: dict[str, Any]) -> np.ndarray:
        """The next actions, float32 (horizon, per_action_dim), physical units.

        Args:
            observation: under the keys of `policy`: frames uint8 (H, W, 3), state (state_dim,), prompt; `seed` if
                the noise is to be repeatable.

        Raises:
            RuntimeError: the server refused the observation; its text says why. Or it sent something else than finite
                actions.
        """
        self._connection.send(pack(observation))
        reply = self._connection.recv()
        if isinstance(reply, str):
            raise RuntimeError("".join(c if c.isprintable() else " " for c in reply[:MAX_ERROR_CHARS]))
        actions = unpack(reply)
        actions = actions.get("actions") if isinstance(actions, dict) else None
        shape = self.policy.get("horizon"), self.policy.get("per_action_dim")
        if not isinstance(actions, np.ndarray) or actions.shape != shape or not np.isfinite(actions).all():
            raise RuntimeError(f"the server sent no finite actions of shape {shape}; don't move")
        return actions

    def close(self) -> None:
        """End the connection."""
        self._closing.close()


def observe(policy: dict[str, Any], prompt: str) -> dict[str, Any]:
    """One observation; a robot reads its cameras and joints here."""
    height, width = policy["image_size"]
    pixels = np.random.default_rng().integers(0, 256, (height, width, 3), dtype=np.uint8)
    observation = {key: pixels for key in policy["cameras"].values()}
    state = np.zeros(policy["state_dim"], np.float32)
    return {**observation, policy["state_key"]: state, policy["prompt_key"]: prompt}


def execute(action: np.ndarray) -> None:
    """One action; a robot moves here, at its control rate."""
    print(" ".join(f"{value:+.3f}" for value in action))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--token")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--predictions", type=int, default=3, help="how many chunks to ask for")
    args = parser.parse_args()
    client = PolicyClient(args.host, args.port, args.token)
    for _ in range(args.predictions):
        started = time.perf_counter()
        actions = client.predict(observe(client.policy, args.prompt))
        print(f"{actions.shape[0]} actions in {1000 * (time.perf_counter() - started):.1f} ms")
        for action in actions[: client.policy["n_action_steps"]]:
            execute(action)
    client.close()


if __name__ == "__main__":
    try:
        main()
    except (OSError, RuntimeError, WebSocketException) as error:
        sys.exit(f"error: {error}")
