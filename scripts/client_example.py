"""A robot's side of the policy server: numpy, msgpack and websockets, no torch.

    python scripts/client_example.py --port 8000 --prompt "open the window"

On a robot: pip install ./clients/python, and copy this file. Here, random pixels stand for the camera and a zero state
for the robot: replace `observe` and `execute`.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # of this checkout, where there is one; a robot has the package installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "clients/python"))

from vla_client import PolicyClient, PolicyError


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
    parser.add_argument("--host", default="127.0.0.1", help="name or address of the server, IPv6 as well")
    parser.add_argument("--port", type=int, default=8000, help="of the server (default %(default)s)")
    parser.add_argument("--token", help="that the server asks for (--token_env there)")
    parser.add_argument("--prompt", required=True, help="the instruction")
    parser.add_argument("--predictions", type=int, default=3, help="how many chunks to ask for")
    args = parser.parse_args()
    logging.basicConfig(format="%(levelname)s %(message)s")
    with PolicyClient(args.host, args.port, args.token) as client:
        for number in range(args.predictions):
            started = time.perf_counter()
            actions = client.predict(observe(client.policy, args.prompt), reset=number == 0)
            print(f"{actions.shape[0]} actions in {1000 * (time.perf_counter() - started):.1f} ms")
            for action in actions[: client.policy["n_action_steps"]]:
                execute(action)


if __name__ == "__main__":
    try:
        main()
    except PolicyError as error:
        sys.exit(f"error: {error}")
