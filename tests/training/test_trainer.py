"""The training loop on a real tiny model and real files: exact resume, masks, faults, learning."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.loader import build_datasets, build_sampler, make_loader
from data.processing import processors_from_checkpoint, processors_from_config
from model.vla_model import VLAModel, require_same_architecture
from tests.helpers import write_episodes
from training.run_log import read_metrics
from training.trainer import NonFiniteLossError, VLATrainer
from utils.calculate_normalization_stats import calculate_statistics
from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from utils.config_utils import Config, ConfigError, config_from_dict


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return base | {
        key: merge(base.get(key, {}), value) if isinstance(value, dict) else value for key, value in changes.items()
    }


@pytest.fixture
def make_config(tmp_path, tiny_paligemma_dir):
    train = write_episodes(tmp_path / "train.parquet", [9, 7, 6], image_size=32)
    val = write_episodes(tmp_path / "val.parquet", [5], seed=50, image_size=32)

    def make(**changes) -> Config:
        base = {
            "data": {
                "train_parquet_files": [str(train)],
                "val_parquet_files": [str(val)],
                "state_dim": 4,
                "batch_size": 4,
                "num_workers": 0,
                "cache_dir": str(tmp_path / "cache"),
            },
            "model": {
                "vlm_config": {"model_name_or_path": str(tiny_paligemma_dir), "dtype": "float32"},
                "action_head_config": {
                    "horizon": 4,
                    "per_action_dim": 4,
                    "hidden_dim": 32,
                    "num_layers": 1,
                    "num_heads": 4,
                    "dropout_prob": 0.1,
                },
            },
            "training": {
                "checkpoint_dir": str(tmp_path / "experiments"),
                "experiment_name": "run",
                "max_steps": 12,
                "epochs": 100,
                "log_interval": 1,
                "val_every_n_epochs": 2,
            },
            "optimizer": {"lr": 1e-3},
            "lr_scheduler": {"warmup_steps": 3},
            "inference": {"num_inference_steps": 2},
        }
        return config_from_dict(merge(base, changes))

    return make


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


def metrics_of(trainer: VLATrainer) -> list[dict[str, float]]:
    lines = read_metrics(trainer.run_log.metrics_path)
    return [{k: v for k, v in line.items() if k not in ("samples_per_second", "data_wait")} for line in lines]


def assert_same_state(a: VLATrainer, b: VLATrainer) -> None:
    for (name, x), y in zip(a.policy.state_dict().items(), b.policy.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    left, right = a.optimizer.state_dict(), b.optimizer.state_dict()
    assert left["param_groups"] == right["param_groups"] and left["state"].keys() == right["state"].keys()
    for index, values in left["state"].items():
        assert all(torch.equal(value, right["state"][index][key]) for key, value in values.items())


@pytest.mark.parametrize("workers", [0, 1])
def test_resume_is_bitwise(make_config, workers):
    """12 steps = 5 (mid-epoch) + resume + 7, in weights, optimizer state and every logged number."""
    whole = make_trainer(make_config(training={"experiment_name": "whole"}, data={"num_workers": workers}))
    whole.fit()

    config = make_config(data={"num_workers": workers})
    first = make_trainer(config)
    for step, micro_batches in zip(range(5), first.train_loader, strict=False):
        first.log({k: v for k, v in first.train_step([micro_batches]).items()})
        assert first.step == step + 1
    path = first.save("checkpoint_epoch_1.pth.tar")
    for _, micro_batches in zip(range(2), first.train_loader, strict=False):
        first.log(first.train_step([micro_batches]))  # two more steps that the crash makes void

    checkpoint = load_checkpoint(path)
    resumed = make_trainer(config, checkpoint)
    resumed.resume(checkpoint, str(path))
    assert resumed.step == 5
    resumed.fit()
    assert_same_state(whole, resumed)
    assert metrics_of(whole) == metrics_of(resumed), "also the lines after the checkpoint are not there twice"


def test_fit_writes_what_it_promises(make_config, caplog):
    trainer = make_trainer(make_config())
    with caplog.at_level("INFO"):
        trainer.fit()
    root = trainer.config.experiment_dir
    names = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert names == {
        "config.yaml",
        "logs/metrics.jsonl",
        "logs/validation.jsonl",
        "plots/loss_curve.png",
        "plots/validation_step_000012.png",
        "checkpoints/model_best.pth.tar",
        "checkpoints/checkpoint_epoch_1.pth.tar",
        "checkpoints/checkpoint_epoch_2.pth.tar",
        "checkpoints/checkpoint_epoch_3.pth.tar",
    }
    lines = metrics_of(trainer)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    validations = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in validations] == [12]  # two epochs end at step 11, too near the end to validate
    assert {"val_loss", "val_action_mse", "val_action_mae", "val/endpoint_error"} <= validations[0].keys()
    assert "val_action_mse" in caplog.text and "val/" not in caplog.text
    best = load_checkpoint(root / "checkpoints/model_best.pth.tar")
    assert best["best"]["value"] == min(line["val_loss"] for line in validations)
    assert "steps 0 to 12, 22 samples" in caplog.text


def test_one_batch_overfits(make_config):
    config = make_config(
        model={"action_head_config": {"dropout_prob": 0.0, "num_layers": 2, "noise_draws_per_sample": 8}},
        optimizer={"lr": 3e-3, "weight_decay": 0.0},
        training={"max_steps": 250},
    )
    trainer = make_trainer(config)
    batch = next(iter(trainer.train_loader))
    losses = [trainer.train_step([batch])["loss"] for _ in range(250)]
    trainer.policy.eval()
    predicted = trainer.policy.predict(batch, torch.Generator().manual_seed(0), 10)
    valid = ~batch["action_is_pad"]
    error = (predicted - batch["action"])[valid].abs().mean()
    assert np.mean(losses[-20:]) < 0.15 * losses[0] and error < 0.15


def test_micro_batches_equal_one_batch_with_uneven_padding(make_config):
    """Gradients are sums over valid steps divided by their number over all micro-batches."""
    plain = {"model": {"action_head_config": {"dropout_prob": 0.0, "num_layers": 1, "time_clamp": [0.5, 0.500001]}}}
    trainer = make_trainer(make_config(**plain))
    batch = next(iter(trainer.train_loader))
    batch["action_is_pad"][0, 1:] = True
    grads = []
    for parts in ([slice(0, 4)], [slice(0, 1), slice(1, 4)]):
        trainer.optimizer.step = lambda: None  # keep the weights: only gradients are compared
        trainer.optimizer.zero_grad = lambda set_to_none=True: None
        trainer.clip_gradients = lambda: 1.0
        trainer.policy.action_head._noise = lambda shape, generator, device: torch.zeros(shape)
        trainer.policy.zero_grad()
        trainer.train_step([{key: value[part] for key, value in batch.items()} for part in parts])
        grads.append([p.grad.clone() for p in trainer.policy.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_padded_steps_do_not_reach_loss_or_gradient(make_config):
    trainer = make_trainer(make_config(model={"action_head_config": {"dropout_prob": 0.0}}))
    batch = next(iter(trainer.train_loader))
    batch["action_is_pad"][:, 2:] = True
    results = []
    for value in (0.0, 1e6):
        batch["action"][:, 2:] = value
        torch.manual_seed(0)
        trainer.policy.zero_grad()
        loss = trainer.policy(batch).sum()
        loss.backward()
        results.append((loss.item(), [p.grad.clone() for p in trainer.policy.parameters() if p.grad is not None]))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_non_finite_loss_stops_before_the_step_and_names_the_samples(make_config):
    trainer = make_trainer(make_config())
    batch = next(iter(trainer.train_loader))
    batch["state"][2, 1] = float("nan")
    before = {name: value.clone() for name, value in trainer.policy.state_dict().items()}
    episode, frame = batch["episode_index"][2].item(), batch["frame_index"][2].item()
    where = rf"samples with a non-finite loss: default: \S*train.parquet row \d+ \(episode {episode}, step {frame}\)\."
    with pytest.raises(
        NonFiniteLossError, match=rf"step 0: loss is nan.*{where}.*failures/step_0_rank_0.pt"
    ) as failure:
        trainer.train_step([batch])
    assert "inspect_parquet.py" in str(failure.value)
    dump = torch.load(trainer.config.experiment_dir / "failures/step_0_rank_0.pt", weights_only=True)
    assert dump["batches"][0].keys() == batch.keys() and dump["batches"][0]["state"][2].isnan().any()
    assert dump["losses"][0].isnan().any(dim=1).tolist() == [False, False, True, False]
    assert trainer.step == 0
    assert all(torch.equal(value, before[name]) for name, value in trainer.policy.state_dict().items())


def test_fine_tuning_starts_anew_and_says_so(make_config, caplog):
    trainer = make_trainer(make_config(training={"max_steps": 4}))
    trainer.fit()
    path = trainer.config.experiment_dir / "checkpoints/checkpoint_epoch_1.pth.tar"
    checkpoint = load_checkpoint(path)

    tuned = make_trainer(make_config(training={"experiment_name": "tuned"}, optimizer={"lr": 5e-4}), checkpoint)
    with caplog.at_level("INFO"):
        tuned.resume(checkpoint, str(path))
    assert tuned.step == 0 and "weights and optimizer carried over, step and schedule start at 0" in caplog.text
    assert "optimizer.lr 0.001 -> 0.0005" in caplog.text
    assert_same_state_weights(trainer, tuned)
    assert tuned.optimizer.state_dict()["state"][0]["step"] == 4
    batch = next(iter(tuned.train_loader))
    assert tuned.train_step([batch])["lr"] == pytest.approx(5e-4 / 3)

    caplog.clear()
    faster = make_trainer(make_config(optimizer={"lr": 7e-4}), checkpoint)
    with caplog.at_level("INFO"):
        faster.resume(checkpoint, str(path))
    assert faster.step == 4 and "resumed" in caplog.text and "optimizer.lr 0.001 -> 0.0007" in caplog.text


def assert_same_state_weights(a: VLATrainer, b: VLATrainer) -> None:
    for (name, x), y in zip(a.policy.state_dict().items(), b.policy.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_checkpoint_of_another_architecture(make_config):
    trainer = make_trainer(make_config(training={"max_steps": 1}))
    path = trainer.save("c.pth.tar")
    checkpoint = load_checkpoint(path)
    other = make_config(model={"action_head_config": {"horizon": 8}})
    with pytest.raises(ConfigError, match=re.escape("action_head_config.horizon: checkpoint 4, config 8")):
        require_same_architecture(checkpoint["config"], other, str(path))
    with pytest.raises(CheckpointError, match=r"another architecture: action_head\.position is \(4, 32\), wanted \(8"):
        VLAModel.from_checkpoint(checkpoint, other)
    require_same_architecture(checkpoint["config"], make_config(optimizer={"lr": 1.0}), str(path))
    with pytest.raises(ConfigError, match="optimizer state does not fit .* --init_checkpoint"):
        frozen = make_config(model={"vlm_config": {"freeze_language_model": True}})
        make_trainer(frozen, checkpoint).resume(checkpoint, str(path))


def test_checkpoint_is_plain_and_self_contained(make_config):
    trainer = make_trainer(make_config())
    path = trainer.save("c.pth.tar")
    checkpoint = load_checkpoint(path)
    json.dumps({key: checkpoint[key] for key in ("config", "statistics", "cameras", "backbone_config", "step")})
    model = VLAModel.from_checkpoint(checkpoint)
    batch = next(iter(trainer.train_loader))
    a, b = (m.eval().predict(batch, torch.Generator().manual_seed(0), 3) for m in (trainer.policy, model))
    assert torch.equal(a, b)
    checkpoint["model"].popitem()
    save_checkpoint({k: v for k, v in checkpoint.items() if k != "format"}, path)
    with pytest.raises(CheckpointError, match="is missing"):
        VLAModel.from_checkpoint(load_checkpoint(path))


def test_bfloat16_keeps_float32_masters_and_trains(make_config):
    trainer = make_trainer(make_config(model={"vlm_config": {"dtype": "bfloat16", "freeze_vision_tower": True}}))
    dtypes = {p.dtype for p in trainer.policy.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}
    batch = next(iter(trainer.train_loader))
    first = trainer.train_step([batch])
    assert np.isfinite(first["loss"])
    state = next(iter(trainer.optimizer.state.values()))
    assert state["exp_avg"].dtype == torch.float32


def test_a_rewound_log_keeps_what_came_before(make_config):
    trainer = make_trainer(make_config())
    for step in (1, 2, 3):
        trainer.run_log.write({"step": step})
    with open(trainer.run_log.metrics_path, "a") as file:
        file.write('{"step": 4, "lo')  # a crash in the middle of a line
    trainer.run_log.rewind(2)
    assert [line["step"] for line in read_metrics(Path(trainer.run_log.metrics_path))] == [1, 2]
