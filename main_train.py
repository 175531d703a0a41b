"""Train a policy on one GPU (or CPU): config, loaders, model, trainer, fit.

python main_train.py --config_path configs/vla_config.yaml
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Sequence

import torch

from data.loader import build_datasets, build_sampler, make_loader
from data.processing import processors_from_checkpoint, processors_from_config
from data.sampler import PassBatchSampler
from model.checkpointing import require_same_architecture
from model.vla_model import VLAModel
from training.fit_estimate import dry_run, without_traces
from training.trainer import NonFiniteLossError, VLATrainer
from utils.checkpoint import load_checkpoint
from utils.cli import config_from_args, refuse_to_overwrite, resume_path, train_parser
from utils.config_utils import Config
from utils.misc import derive_seed, pick_device, set_up_logging, user_message
from utils.statistics import load_statistics

logger = logging.getLogger(__name__)


def train(
    args: argparse.Namespace,
    config: Config,
    device: torch.device,
    trainer_class: type[VLATrainer] = VLATrainer,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """The whole run, as one process or as one rank of several; with --dry_run one step and a report instead.

    Args:
        args: of `train_parser`.
        config: of `config_from_args(args)`.
        device: where this process trains.
        trainer_class, rank, world_size: how the run is spread over processes.
    """
    if not args.dry_run:
        build_trainer(args, config, device, trainer_class, rank, world_size).fit()
        return
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(args, without_traces(config, folder), device, trainer_class, rank, world_size)
        report = dry_run(trainer)
    if rank == 0:
        print(report)


def build_trainer(
    args: argparse.Namespace,
    config: Config,
    device: torch.device,
    trainer_class: type[VLATrainer],
    rank: int,
    world_size: int,
) -> VLATrainer:
    """Loaders, model and trainer, ready to start or to go on; see `train`."""
    set_up_logging(config.experiment_dir / "logs" / "train.log", is_main=rank == 0)
    resumed = resume_path(args, config)
    start = resumed or args.init_checkpoint
    checkpoint = load_checkpoint(start, for_inference=not resumed) if start else None
    refuse_to_overwrite(config, checkpoint if resumed else None)
    if config.training.num_threads is not None:
        torch.set_num_threads(config.training.num_threads)

    if checkpoint is not None:
        require_same_architecture(checkpoint["config"], config, start)
    image_processor, tokenizer = (
        processors_from_config(config) if checkpoint is None else processors_from_checkpoint(checkpoint)
    )

    train_set, val_set = build_datasets(config, image_processor, tokenizer)
    data, training = config.data, config.training
    sampler = build_sampler(config, train_set, rank=rank, world_size=world_size)
    train_loader = make_loader(train_set, num_workers=data.num_workers, batch_sampler=sampler, seed=training.seed)
    val_loader = None
    if val_set is not None:
        share = PassBatchSampler(len(val_set), data.batch_size // world_size, rank=rank, world_size=world_size)
        val_loader = make_loader(val_set, num_workers=data.num_workers, batch_sampler=share)

    torch.manual_seed(derive_seed("init", training.seed))
    if resumed:
        model = VLAModel.from_checkpoint(checkpoint, config, use_ema=False)
    else:
        statistics = load_statistics(data.normalization_stats_path, config, args.config_path)
        if checkpoint is not None:
            model = VLAModel.from_checkpoint(checkpoint, config, statistics=statistics)
        else:
            model = VLAModel.from_pretrained(config, statistics, image_processor.mean, image_processor.std)

    processors = {"image_processor": image_processor.to_settings(), "tokenizer_files": tokenizer.to_files()}
    trainer = trainer_class(config, model, train_loader, val_loader, device, processors)
    if resumed:
        trainer.resume(checkpoint, resumed)
    return trainer


def main(argv: Sequence[str] | None = None) -> None:
    args = train_parser(__doc__).parse_args(argv)
    train(args, config_from_args(args), pick_device())


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ImportError, NonFiniteLossError, torch.OutOfMemoryError) as error:
        logger.debug("traceback", exc_info=True)
        sys.exit(f"error: {user_message(error)}")
