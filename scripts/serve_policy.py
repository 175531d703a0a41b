"""Serve a policy to robots over a websocket, in the protocol of openpi's client.

    python scripts/serve_policy.py --checkpoint_path C --port 8000
    python scripts/serve_policy.py --checkpoint_path C --host 0.0.0.0 --token_env POLICY_TOKEN \\
        --set serving.image_1_key=observation/front serving.image_2_key=observation/wrist

    python scripts/serve_policy.py --checkpoint_path C --protocol vla-eval --set serving.image_1_key=agentview

    python scripts/serve_policy.py --checkpoint_path C --record sessions/monday --record_max_mb 20000

Clients: the openpi-client package, or scripts/client_example.py; with --protocol vla-eval AllenAI's evaluation harness.
SIGTERM or Ctrl-C finishes what is in flight.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

if not __package__:
    import _repository  # noqa: F401

from data.convert.episode_writer import ImageEncoding
from data.convert.served import FULL, OLDEST, ServedFolder, start_writer
from inference.predictor import VLAPredictor
from inference.serving.harness import HarnessServer
from inference.serving.recording import Recorder
from inference.serving.server import PolicyServer
from utils.arguments import CommandParser, at_least, run_command
from utils.cli import add_setting_flags
from utils.config_utils import ConfigError, InferenceConfig, override_config
from utils.misc import set_up_logging

logger = logging.getLogger(__name__)
PROTOCOLS = {"openpi": PolicyServer, "vla-eval": HarnessServer}
RECORDING_DEFAULTS = {"record_max_mb": 10_000, "record_when_full": FULL, "record_images": "png"}
RECORDING_END_S = 10.0  # for the last episodes to be written when the server ends
SETTINGS = ("num_inference_steps", "best_of", "compile", "quantization", "expert_quantization")  # of `inference`
PLAN_SETTINGS = ("n_action_steps", "execution", "latency_steps")  # of whoever executes plans: vla-eval's server does


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
    group = parser.add_argument_group("the same, of --protocol vla-eval, where the server executes plans")
    add_setting_flags(group, InferenceConfig, PLAN_SETTINGS)
    parser.add_argument("--num_threads", type=at_least(1), help="CPU threads of torch")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the noise of requests that carry no seed")
    add_recording_flags(parser.add_argument_group("recording: what the policy sees and plans, as training data"))
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="serving.key=value", dest="set_args")
    args = parser.parse_args()
    if args.record is None:
        given = [name for name in RECORDING_DEFAULTS if getattr(args, name) is not None]
        if given:
            parser.error(f"--{given[0]} needs --record FOLDER")
    given = [name for name in PLAN_SETTINGS if getattr(args, name) is not None]
    if given and args.protocol != "vla-eval":
        parser.error(f"--{given[0]} needs --protocol vla-eval; robots get whole plans, and their client executes them")
    return args


def add_recording_flags(group: argparse._ArgumentGroup) -> None:
    """The flags of --record; None where they are not given (`RECORDING_DEFAULTS`)."""
    group.add_argument("--record", type=Path, metavar="FOLDER", help="write an episode from each reset to the next")
    group.add_argument("--record_max_mb", type=at_least(1), help="of the folder's episodes (default 10000)")
    text = "stop: keep the oldest episodes; drop_oldest: make room for new ones (default stop)"
    group.add_argument("--record_when_full", choices=(FULL, OLDEST), help=text)
    text = "of frames that come as pixels: png keeps every bit, jpeg a tenth of the size (default png)"
    group.add_argument("--record_images", choices=("png", "jpeg"), help=text)


@contextlib.contextmanager
def recording(args: argparse.Namespace, predictor: VLAPredictor) -> Iterator[Recorder | None]:
    """The recorder that --record asks for, and the process behind it; None where it does not.

    Raises:
        WriteError: the folder can't be written to.
    """
    if args.record is None:
        yield None
        return
    chosen = {name: default if (given := getattr(args, name)) is None else given
              for name, default in RECORDING_DEFAULTS.items()}  # fmt: skip
    served = {
        "checkpoint": str(args.checkpoint_path),
        "policy": predictor.config.training.experiment_name,
        "fingerprint": predictor.fingerprint,
        "horizon": predictor.horizon,
        "n_action_steps": predictor.n_action_steps,
    }
    folder = ServedFolder(
        args.record,
        served,
        ImageEncoding(chosen["record_images"]),
        chosen["record_max_mb"] * 1_000_000,
        chosen["record_when_full"],
    )
    pipe, process = start_writer(folder)
    recorder = Recorder(pipe)
    try:
        yield recorder
    finally:
        recorder.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # it ends by itself, later
            process.wait(timeout=RECORDING_END_S)


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
    settings = {name: getattr(args, name) for name in (*SETTINGS, *PLAN_SETTINGS)}
    where = args.checkpoint_path, args.device, args.dataset
    predictor = VLAPredictor.from_checkpoint(*where, use_amp=args.use_amp, **settings)
    serving = override_config(predictor.config, args.set_args).serving
    if predictor.compile != "none":  # no client should wait for a compiler
        for batch_size in range(2, serving.max_batch_size + 1):
            predictor.warm_up(batch_size)
    with recording(args, predictor) as recorder:
        server = PROTOCOLS[args.protocol](predictor, serving, token, args.seed, recorder)
        asyncio.run(serve(server, args.host, args.port))
    end_at_once()


if __name__ == "__main__":
    run_command(main)
