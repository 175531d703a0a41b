"""Layers of 4 bits stay as they were stored, whatever the processor and the mode of the model."""

from __future__ import annotations

import pytest
import torch

from inference.predictor import VLAPredictor
from model.tiny.paligemma import make_tiny_paligemma
from tests.conftest import TINY
from tests.helpers import write_episodes
from tests.inference.checkpoints import train_tiny
from tests.policies import make_batch, make_policy, policy_config
from tests.trainers import make_trainer, metrics_of


@pytest.fixture(autouse=True)
def packing_processor(monkeypatch):
    """As on a processor with AVX512-BF16, where bitsandbytes would repack weights in evaluation mode."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True, raising=False)


@pytest.fixture(scope="module")
def backbone_of_width_96(tmp_path_factory):
    """As the quickstart's: not a multiple of 64, the weights that share a scale."""
    directory = tmp_path_factory.mktemp("width_96")
    make_tiny_paligemma(directory, **{**TINY, "vision_width": 96, "text_width": 96})
    return directory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluation_leaves_the_weights_alone(tmp_path, backbone_of_width_96, dtype):
    vlm = {"lora": {"rank": 2, "vision": True}, "quantization": "4bit", "dtype": dtype}
    policy = make_policy(policy_config(backbone_of_width_96, tmp_path, model={"vlm_config": vlm}))
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    parameters = {name: value.clone() for name, value in policy.named_parameters()}
    losses, gradients = [], []
    for _ in range(2):
        torch.manual_seed(0)
        loss = policy.train()(make_batch()).mean()
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
        policy.zero_grad()
        with torch.no_grad():
            policy.eval()(make_batch())
    assert losses[0] == losses[1] and gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
    assert all(torch.equal(value, parameters[name]) for name, value in policy.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_validation_changes_nothing_in_training(make_config, quantization):
    vlm = {"lora": {"rank": 4, "vision": True}, "quantization": quantization}
    lines = []
    for files in ({}, {"val_parquet_files": []}):
        training = {"max_steps": 24, "val_every_n_epochs": 1}
        trainer = make_trainer(make_config(model={"vlm_config": vlm}, data=files, training=training))
        trainer.fit()
        lines.append(metrics_of(trainer))
    validations = [[line["step"] for line in run if "val_loss" in line] for run in lines]
    assert len(validations[0]) > 2 and not validations[1]
    steps = [[(line["loss"], line["grad_norm"]) for line in run if "loss" in line] for run in lines]
    assert len(steps[0]) == 24 and steps[0] == steps[1]


def test_a_policy_of_width_96_runs_in_4_bits(tmp_path, backbone_of_width_96):
    demos = write_episodes(tmp_path / "demos.parquet", [6, 5])
    checkpoint = train_tiny(tmp_path, backbone_of_width_96, [demos])
    predictor = VLAPredictor.from_checkpoint(checkpoint, "cpu", quantization="int4")
    weights = {name: value.clone() for name, value in predictor.model.named_parameters()}
    predictor.warm_up()
    assert all(torch.equal(value, weights[name]) for name, value in predictor.model.named_parameters())
