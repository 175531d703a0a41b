"""Serve a policy to robots over a websocket, in the protocol of openpi's client.

    python scripts/serve_policy.py --checkpoint_path C --port 8000
    python scripts/serve_policy.py --checkpoint_path C --host 0.0.0.0 --token_env POLICY_TOKEN \\
        --set serving.image_1_key=observation/front serving.image_2_key=observation/wrist

    python scripts/serve_policy.py --checkpoint_path C --protocol vla-eval --set serving.image_1_key=agentview

Clients: the openpi-client package, or scripts/client_example.py; with --protocol vla-eval AllenAI's evaluation harness.
SIGTERM or Ctrl-C finishes what is in flight.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import threading

import torch

if not __package__:
    import _repository  # noqa: F401

from inference.predictor import VLAPredictor
from inference.serving.harness import HarnessServer
from inference.serving.server import PolicyServer
from utils.arguments import CommandParser, at_least, run_command
from utils.cli import add_setting_flags
from utils.config_utils import ConfigError, InferenceConfig, override_config
from utils.misc import set_up_logging

logger = logging.getLogger(__name__)
PROTOCOLS = {"openpi": PolicyServer, "vla-eval": HarnessServer}
SETTINGS = ("num_inference_steps", "best_of", "compile", "quantization", "expert_quantization")  # of `inference`


def port_number(text: str) -> int:
    """A port, for argparse."""
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; give a whole number from 0 to 65535")
    return int(text)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(__doc__)
    parser.add_argument("--checkpoint_path", required=True, help="*.pth.tar, an exported folder, or a hub id of one")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    help_text = "openpi: robots; vla-eval: vla-evaluation-harness, which evaluates the policy in its simulators"
    parser.add_argument("--protocol", choices=PROTOCOLS, default="openpi", help=f"{help_text} (default %(default)s)")
    parser.add_argument("--port", type=port_number, default=8000, help="0 takes a free one and logs it")
    parser.add_argument("--token_env", help="environment variable with the token that clients must send")
    parser.add_argument("--dataset", help="for a policy trained on a mixture: the dataset whose robot is driven")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--use_amp", action=argparse.BooleanOptionalAction, help="bfloat16; default: as trained")
    add_setting_flags(parser.add_argument_group("instead of the checkpoint's settings"), InferenceConfig, SETTINGS)
    parser.add_argument("--num_threads", type=at_least(1), help="CPU threads of torch")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the noise of requests that carry no seed")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="serving.key=value", dest="set_args")
    return parser.parse_args()


def read_token(name: str | None, host: str) -> str | None:
    """The token in an environment variable.

    Raises:
        ConfigError: the variable is not set, or empty.
    """
    if name is None:
        if host not in ("127.0.0.1", "localhost", "::1"):
            logger.warning("no --token_env: whoever reaches %s may use this policy", host)
        return None
    if not os.environ.get(name):
        raise ConfigError(f"--token_env {name}: no such environment variable, or it is empty; export {name}=...")
    return os.environ[name]


def check_set_args(items: list[str]) -> None:
    """Raise a ConfigError where --set names another section than `serving`: the policy is served as it was trained."""
    for item in items:
        if not item.startswith("serving."):
            raise ConfigError(
                f"--set {item}: only serving.key=value is read here; how the policy predicts is chosen by "
                f"{', '.join(f'--{name}' for name in SETTINGS)} and --use_amp"
            )


async def serve(server: PolicyServer, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ConfigError: the port can't be listened on.
    """
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    address = host.removeprefix("[").removesuffix("]")
    try:
        if not address:  # which sockets take for every address of this machine
            raise OSError("no address")
        await server.run(address, port, stopping)
    except (OSError, UnicodeError) as error:
        remedy = "give an address of this machine as --host (127.0.0.1, 0.0.0.0, ::), and a --port that nothing uses"
        raise ConfigError(f"can't listen on {host} port {port} ({error}); {remedy}") from None


def end_at_once() -> None:
    """End the process although a thread hangs in a prediction or an image: the interpreter would wait for it."""
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread() and not thread.daemon]
    for thread in others:
        thread.join(0.5)
    if any(thread.is_alive() for thread in others):
        logging.shutdown()
        os._exit(0)


def main() -> None:
    args = parse_args()
    set_up_logging()
    logging.getLogger("websockets").setLevel(logging.WARNING)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    token = read_token(args.token_env, args.host)
    check_set_args(args.set_args)
    settings = {name: getattr(args, name) for name in SETTINGS}
    where = args.checkpoint_path, args.device, args.dataset
    predictor = VLAPredictor.from_checkpoint(*where, use_amp=args.use_amp, **settings)
    serving = override_config(predictor.config, args.set_args).serving
    if predictor.compile != "none":  # no client should wait for a compiler
        for batch_size in range(2, serving.max_batch_size + 1):
            predictor.warm_up(batch_size)
    asyncio.run(serve(PROTOCOLS[args.protocol](predictor, serving, token, args.seed), args.host, args.port))
    end_at_once()


if __name__ == "__main__":
    run_command(main)
