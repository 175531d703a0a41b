"""Train a policy on several GPUs: `training.strategy` ddp (the whole model on each) or fsdp (sharded over them).

python main_train_ddp.py --config_path configs/vla_config_ddp.yaml              # one process per GPU of this machine
python main_train_ddp.py --config_path configs/vla_config_ddp.yaml --nproc 2    # so many; on the CPU through gloo
torchrun --nproc_per_node=8 main_train_ddp.py --config_path configs/vla_config_ddp.yaml
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from training.launch import is_rank, launch
from utils.arguments import CommandParser, run_command
from utils.cli import config_from_args, train_parser

MAIN_TRAIN = str(Path(__file__).resolve().with_name("main_train.py"))  # what every rank runs


def main() -> int:
    full, launcher = train_parser(__doc__), CommandParser(None, add_help=False)
    for parser in (full, launcher):
        parser.add_argument("--nproc", type=int, help="processes that this command starts (not under torchrun)")
    args = full.parse_args()
    arguments = launcher.parse_known_args()[1]  # those of main_train.py
    if is_rank():  # torchrun has started the processes
        sys.argv = [MAIN_TRAIN, *arguments]
        runpy.run_path(MAIN_TRAIN, run_name="__main__")
        return 0
    config_from_args(args)  # an error of the configuration is shown before any rank starts
    return launch([sys.executable, MAIN_TRAIN, *arguments], args.nproc)


if __name__ == "__main__":
    run_command(main)
