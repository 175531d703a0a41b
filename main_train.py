"""Train a policy: config, data, model, trainer, fit.

python main_train.py --config_path configs/vla_config.yaml

On one GPU (or the CPU) by default; as one rank of several where torchrun's environment variables are set, which
main_train_ddp.py sets too.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from data.comparison.against import announce_fit, training_profiles
from data.loader import build_loaders
from data.processing import processors_from_config
from data.statistics import require_statistics_of
from data.trained_processors import processors_to_train_on
from envs import env_maker, expand_tasks
from model.checkpointing import require_same_architecture
from model.transfer import policy_from_parts
from model.vla_model import VLAModel
from training.dry_run import dry_run, without_traces
from training.launch import USER_ERRORS, Place, training_place
from training.origin import announce_changes, goes_on, settings_to_go_on, statistics_of_new_run
from training.trainer import VLATrainer
from training.trainer_ddp import VLATrainerDDP
from training.trainer_fsdp import VLATrainerFSDP
from utils.checkpoint import load_checkpoint
from utils.cli import config_from_args, key_values, refuse_to_overwrite, resume_path, train_parser
from utils.config_utils import Config
from utils.misc import derive_seed, end_in_log_file, errors_in_one_line, set_up_logging
from utils.run_lock import only_run
from utils.statistics import load_statistics

TRAINERS = {"ddp": VLATrainerDDP, "fsdp": VLATrainerFSDP}  # training.strategy -> how several processes train


def main(argv: Sequence[str] | None = None) -> None:
    args = train_parser(__doc__).parse_args(argv)
    config = config_from_args(args)
    with training_place(config.training.distributed_timeout_s) as place, end_in_log_file():
        if args.dry_run:
            with without_traces(config) as trial:
                report = dry_run(build_trainer(args, trial, place), config.experiment_dir)
            if place.rank == 0:
                print(report)
        else:
            with only_run(config.experiment_dir) if place.rank == 0 else contextlib.nullcontext():
                build_trainer(args, config, place).fit()


def build_trainer(args: argparse.Namespace, config: Config, place: Place) -> VLATrainer:
    """Data, policy and trainer of one of three cases, ready for `fit`."""
    set_up_logging(config.experiment_dir / "logs" / "train.log", is_main=place.rank == 0)
    if config.training.num_threads is not None:
        torch.set_num_threads(config.training.num_threads)
    torch.manual_seed(derive_seed("init", config.training.seed))  # of the weights that nothing is loaded into

    resumed = resume_path(args, config)  # with its optimizer: to go on with its run, or to fine-tune
    source = resumed or args.init_checkpoint
    checkpoint = load_checkpoint(source, for_inference=not resumed) if source else None
    same_run = resumed and goes_on(checkpoint, resumed, config)
    if same_run:
        config = settings_to_go_on(checkpoint, resumed, config, args.config_path)
        require_same_architecture(checkpoint["config"], config, resumed)
    else:
        refuse_to_overwrite(config)

    # Data come before weights: their faults are found in seconds.
    processors = processors_to_train_on(checkpoint, config) if source else processors_from_config(config)
    if source:
        announce_changes(checkpoint, source, config)
    loaders = build_loaders(config, *processors, rank=place.rank, world_size=place.world_size)

    if same_run:  # go on where it stopped
        policy = VLAModel.from_checkpoint(checkpoint, config, use_ema=False)
    elif source:  # a new run from a checkpoint's weights, by default with the statistics of its own data
        statistics = statistics_of_new_run(checkpoint, source, config, args)
        processors[1].read_states(config, statistics)
        policy = policy_from_parts(checkpoint, source, config, statistics, args.init_parts, use_ema=not resumed)
    else:  # a new run from a pretrained backbone
        statistics = load_statistics(config.data.normalization_stats_path, config, args.config_path)
        processors[1].read_states(config, statistics)
        policy = VLAModel.from_pretrained(config, statistics, processors[0].mean, processors[0].std)

    require_statistics_of(loaders[0].dataset, policy.statistics, config.data.action_mode)
    trainer_class = TRAINERS[config.training.strategy] if place.in_group else VLATrainer
    kept = {"image_processor": processors[0].to_settings(), "tokenizer_files": processors[1].to_files()}
    if place.rank == 0:  # which writes the checkpoints
        if not same_run:
            announce_fit(loaders[0].dataset, policy.statistics, config, kept=args.statistics == "pretrained")
        known = checkpoint.get("training_data") if same_run else None
        kept["training_data"] = known or training_profiles(loaders[0].dataset)
    trainer = trainer_class(config, policy, *loaders, place.device, kept)
    trainer.rollouts = build_rollouts(config, processors)
    if resumed:
        trainer.resume(checkpoint, resumed)
    return trainer


def build_rollouts(config: Config, processors: tuple[Any, Any]) -> Any:
    """The closed-loop episodes of `training.eval_every_n_epochs`; None where nobody asks for them."""
    if config.training.eval_every_n_epochs is None:
        return None
    loop = config.closed_loop
    tasks, options = expand_tasks(loop.env, loop.tasks), key_values(loop.env_options, "closed_loop.env_options")
    make = env_maker(loop.env, options, processors[0].height, config.cameras)
    from inference.closed_loop.in_training import TrainingRollouts  # which needs gymnasium; most runs do without

    rollouts = TrainingRollouts(config, processors, tasks, make)
    rollouts.check()
    return rollouts


if __name__ == "__main__":
    with errors_in_one_line(*USER_ERRORS, OSError):
        main()
