"""The robot's side of the policy server."""

from vla_client.client import PolicyClient, PolicyError
from vla_client.wire import WireError, pack, unpack

__all__ = ["PolicyClient", "PolicyError", "WireError", "pack", "unpack"]
