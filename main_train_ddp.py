"""Train a policy on several GPUs: `training.strategy` ddp (the whole model on each) or fsdp (sharded over them).

python main_train_ddp.py --config_path configs/vla_config_ddp.yaml              # one process per GPU of this machine
python main_train_ddp.py --config_path configs/vla_config_ddp.yaml --nproc 2    # so many; on the CPU through gloo
torchrun --nproc_per_node=8 main_train_ddp.py --config_path configs/vla_config_ddp.yaml
"""

from __future__ import annotations

import sys

from training.launch import is_rank, launch, member_of_group
from utils.cli import config_from_args, train_parser
from utils.config_utils import ConfigError


def main() -> int:
    parser = train_parser(__doc__)
    parser.add_argument("--nproc", type=int, help="processes that this command starts (not under torchrun)")
    args = parser.parse_args()
    config = config_from_args(args)
    if not is_rank():
        return launch([sys.executable, *sys.argv], args.nproc)
    from main_train import train  # here, so that the process that starts the others need not wait for transformers
    from training.trainer_ddp import VLATrainerDDP

    with member_of_group(config.training.distributed_timeout_s) as place:
        train(args, config, place.device, VLATrainerDDP, place.rank, place.world_size)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigError as error:
        sys.exit(f"error: {error}")
