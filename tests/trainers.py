"""Trainers as main_train.py builds them, in this process, and what two of them must have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from data.loader import build_datasets, build_sampler, make_loader
from data.processing import processors_from_checkpoint, processors_from_config
from model.vla_model import VLAModel
from training.origin import announce_changes
from training.trainer import VLATrainer
from utils.calculate_normalization_stats import calculate_statistics
from utils.checkpoint import load_checkpoint
from utils.config_utils import Config
from utils.misc import read_json_lines


def make_trainer(config: Config, checkpoint: dict[str, Any] | None = None) -> VLATrainer:
    """What main_train.py does."""
    processors = processors_from_config(config) if checkpoint is None else processors_from_checkpoint(checkpoint)
    train_set, val_set = build_datasets(config, *processors)
    sampler = build_sampler(config, train_set)
    train_loader = make_loader(train_set, num_workers=config.data.num_workers, batch_sampler=sampler)
    val_loader = None if val_set is None else make_loader(val_set, num_workers=0, batch_size=3)
    torch.manual_seed(0)
    if checkpoint is None:
        statistics = [calculate_statistics(train_set.datasets[0].store.files, 4, 4)]
        model = VLAModel.from_pretrained(config, statistics, processors[0].mean, processors[0].std)
    else:
        model = VLAModel.from_checkpoint(checkpoint, config, use_ema=False)
    files = {"image_processor": processors[0].to_settings(), "tokenizer_files": processors[1].to_files()}
    return VLATrainer(config, model, train_loader, val_loader, torch.device("cpu"), files)


def resumed_trainer(config: Config, path: Path) -> VLATrainer:
    """What `--resume_checkpoint path` gives."""
    checkpoint = load_checkpoint(path)
    announce_changes(checkpoint, str(path), config)
    trainer = make_trainer(config, checkpoint)
    trainer.resume(checkpoint, str(path))
    return trainer


def metrics_of(trainer: VLATrainer) -> list[dict[str, float]]:
    lines = read_json_lines(trainer.run_log.metrics_path)
    return [{k: v for k, v in line.items() if k not in ("samples_per_second", "data_wait")} for line in lines]


def assert_same_state(a: VLATrainer, b: VLATrainer) -> None:
    for (name, x), y in zip(a.policy.state_dict().items(), b.policy.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    left, right = a.state.optimizer.state_dict(), b.state.optimizer.state_dict()
    assert left["param_groups"] == right["param_groups"] and left["state"].keys() == right["state"].keys()
    for index, values in left["state"].items():
        assert all(torch.equal(value, right["state"][index][key]) for key, value in values.items())
    assert (a.state.ema is None) == (b.state.ema is None)
    if a.state.ema is not None:
        assert a.state.ema.updates == b.state.ema.updates
        assert all(torch.equal(value, b.state.ema.average[name]) for name, value in a.state.ema.average.items())
