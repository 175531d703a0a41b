"""The training loop on a real tiny model and real files: exact resume, masks, faults, learning."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from data.loader import build_loaders
from data.processing import processors_from_config
from model.checkpointing import require_same_architecture
from model.vla_model import VLAModel
from tests.policies import act
from tests.trainers import make_trainer, metrics_of, resumed_trainer
from training.failure import dump_batches
from training.trainer import NonFiniteLossError
from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from utils.config_utils import ConfigError
from utils.misc import read_json_lines


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


def test_the_first_loss_is_shown_at_once(make_config, caplog):
    trainer = make_trainer(make_config(training={"max_steps": 6, "log_interval": 4, "val_every_n_epochs": 9}))
    with caplog.at_level("INFO"):
        trainer.fit()
    assert re.search(r"step 1: loss \d\S+; a line every 4 steps", caplog.text) and "step 2: loss" not in caplog.text
    assert [line["step"] for line in metrics_of(trainer) if "loss" in line] == [4, 6]


def test_without_held_out_data_the_log_says_which_checkpoint_is_the_policy(make_config, caplog):
    config = make_config(data={"val_parquet_files": []}, training={"max_steps": 1})
    with caplog.at_level("INFO"):
        make_trainer(config).fit()
    assert [path.name for path in (config.experiment_dir / "checkpoints").iterdir()] == ["checkpoint_epoch_1.pth.tar"]
    assert "no model_best is chosen, the last checkpoint_* is the policy" in caplog.text


def test_compiling_without_a_compiler(make_config, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="training.compile is true: torch.compile builds .* or set it to false"):
        make_trainer(make_config(training={"compile": True}))


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
    predicted = act(trainer.policy, batch, 10)
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
        trainer.state.optimizer.step = lambda: None  # keep the weights: only gradients are compared
        trainer.state.optimizer.zero_grad = lambda set_to_none=True: None
        trainer.clip_gradients = lambda: 1.0
        trainer.policy.action_head._noise = lambda shape, generator, device: torch.zeros(shape)
        trainer.policy.zero_grad()
        trainer.train_step([{key: value[part] for key, value in batch.items()} for part in parts])
        grads.append([p.grad.clone() for p in trainer.policy.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_training_sees_as_many_steps_as_prediction(make_config, monkeypatch):
    """A policy that notices which steps are missing learns from it that the end is near, and then never ends."""
    trainer = make_trainer(make_config())
    batch = next(iter(trainer.train_loader))
    batch["action_is_pad"][:] = False
    batch["action_is_pad"][0, 1:] = True
    seen = []
    monkeypatch.setattr(trainer.policy.action_head, "loss", lambda context, *shown: seen.append(shown))
    trainer.policy(batch)
    ((action_BTA, is_pad_BT),) = seen
    assert not is_pad_BT.any()
    assert torch.equal(action_BTA[0], action_BTA[0, :1].expand_as(action_BTA[0])) and action_BTA[0].any()
    whole = trainer.policy.normalizer.normalize_action(batch["action"], batch["state"], batch["dataset_index"])
    assert torch.equal(action_BTA[1:], whole[1:])
    batch["action_is_pad"][0] = True  # a sample that only fills a batch
    trainer.policy(batch)
    assert seen[1][1][0].all() and not seen[1][1][1:].any()


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


def test_validation_takes_micro_batches_of_the_training_size(make_config):
    """Accumulation halves the batches; `val_max_batches` still covers as many samples, and their errors are equal."""
    found = {}
    for accumulation in (1, 2):
        training = {"gradient_accumulation_steps": accumulation, "val_max_batches": 1, "val_num_plots": 0}
        config = make_config(training={**training, "experiment_name": f"of_{accumulation}"})
        loaders = build_loaders(config, *processors_from_config(config))
        sizes = [len(next(iter(loader))["action"]) for loader in loaders]
        assert sizes == [4 // accumulation] * 2
        trainer = make_trainer(config)
        trainer.val_loader = loaders[1]
        found[accumulation] = trainer.evaluate()
        (line,) = read_json_lines(trainer.run_log.validation_path)
        assert line["samples"] == 4
    sampled = {name for name in found[1] if name != "val_loss"}  # whose noise is drawn per batch
    assert {name: found[2][name] for name in sampled} == pytest.approx({name: found[1][name] for name in sampled})


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


def test_a_dump_that_can_not_be_written_does_not_hide_the_failure(tmp_path):
    (tmp_path / "failures").write_text("a file where the folder should be")
    found = dump_batches(tmp_path / "failures" / "step_3.pt", 3, [{"state": torch.zeros(1)}], [torch.zeros(1)])
    assert re.match(r"no file \(.*step_3.pt could not be written: .*\)", found)


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
    a, b = (act(m.eval(), batch, 3) for m in (trainer.policy, model))
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
    state = next(iter(trainer.state.optimizer.state.values()))
    assert state["exp_avg"].dtype == torch.float32


def test_float16_trains_close_to_float32(make_config):
    losses = {}
    for dtype in ("float32", "float16"):
        trainer = make_trainer(make_config(model={"vlm_config": {"dtype": dtype}}))
        batches = iter(trainer.train_loader)
        losses[dtype] = [trainer.train_step([next(batches)])["loss"] for _ in range(8)]
    assert losses["float16"] == pytest.approx(losses["float32"], rel=0.05)
    assert trainer.state.scaler.is_enabled() and trainer.state.scaler.get_scale() == 2.0**16
    assert {p.dtype for p in trainer.policy.parameters() if p.requires_grad} == {torch.float32}


def test_a_float16_overflow_takes_the_batch_again_at_a_lower_scale(make_config, caplog):
    """The same step, from a scale that overflows and from one that does not; neither loses a sample."""
    low, high = (make_trainer(make_config(model={"vlm_config": {"dtype": "float16"}})) for _ in range(2))
    low.state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    high.state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    batch = next(iter(low.train_loader))
    expected = low.train_step([batch])
    with caplog.at_level("INFO"):
        found = high.train_step([batch])
    assert found["loss"] == expected["loss"] and found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.01)
    assert high.step == 1 and high.state.scaler.get_scale() < 2.0**40
    assert "step 0: float16 gradients overflowed; loss scale" in caplog.text
    for a, b in zip(low.policy.parameters(), high.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=3e-3, rtol=0)  # Adam's first step is +-lr, whatever the gradient

    path = high.save("c.pth.tar")
    resumed = resumed_trainer(make_config(model={"vlm_config": {"dtype": "float16"}}), path)
    assert resumed.state.scaler.get_scale() == high.state.scaler.get_scale(), (
        "a resumed run need not search for it again"
    )


def test_a_float16_overflow_at_every_scale_is_an_error(make_config):
    trainer = make_trainer(make_config(model={"vlm_config": {"dtype": "float16"}}))
    trainer.clip_gradients = lambda: float("inf")
    trainer.state.scaler = torch.amp.GradScaler("cpu", init_scale=0.5)
    with pytest.raises(NonFiniteLossError, match="gradient norm inf; no sample's loss alone: the gradient overflowed"):
        trainer.train_step([next(iter(trainer.train_loader))])
