"""The average of the weights: its arithmetic, and who uses it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from inference.predictor import VLAPredictor
from model.vla_model import VLAModel
from tests.trainers import make_trainer, resumed_trainer
from training.ema import WeightAverage
from utils.checkpoint import load_checkpoint
from utils.config_utils import ConfigError


def test_decay_warms_up():
    """Against the definition, update by update; the decay reaches its limit and stays there."""
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    ema, expected = WeightAverage(model, 0.7), model.weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    for n in range(40):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 3, generator=generator))
        ema.update()
        decay = min(0.7, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.weight.detach()
        torch.testing.assert_close(ema.average["weight"], expected)
    assert ema.updates == 40 and ema.average.keys() == {"weight"}, "what is frozen has no average"


def test_weights_come_back_to_the_bit():
    model = nn.Linear(3, 2)
    ema = WeightAverage(model, 0.9)
    with torch.no_grad():
        model.weight.add_(0.1)
    own, average = model.weight.detach().clone(), ema.average["weight"].clone()
    with pytest.raises(KeyError), ema.applied():
        assert torch.equal(model.weight, average) and not torch.equal(own, average)
        raise KeyError
    assert torch.equal(model.weight, own) and torch.equal(ema.average["weight"], average)


def test_validation_and_inference_use_the_average_and_training_its_own(make_config, caplog):
    trainer = make_trainer(make_config(training={"max_steps": 6, "ema_decay": 0.95}))
    trainer.fit()
    path = trainer.checkpoints / "checkpoint_epoch_1.pth.tar"
    checkpoint = load_checkpoint(path)
    assert checkpoint["ema"]["updates"] == 6
    validated = trainer.evaluate()["val_loss"]
    with caplog.at_level("INFO"):
        judged = VLAPredictor.from_checkpoint(path).model
    assert "the weights are their average over 6 updates (EMA)" in caplog.text
    own = VLAModel.from_checkpoint(checkpoint, use_ema=False)
    name = "action_head.position"
    assert torch.equal(judged.state_dict()[name], checkpoint["ema"]["weights"][name])
    assert torch.equal(own.state_dict()[name], trainer.policy.state_dict()[name])
    assert not torch.equal(own.state_dict()[name], judged.state_dict()[name])

    trainer.state.ema, trainer.policy = None, judged
    assert trainer.evaluate()["val_loss"] == pytest.approx(validated, rel=1e-6)
    trainer.policy = own
    assert trainer.evaluate()["val_loss"] != pytest.approx(validated, rel=1e-4)


def test_an_average_can_start_later(make_config, caplog):
    trainer = make_trainer(make_config(training={"max_steps": 2}))
    trainer.fit()
    with caplog.at_level("INFO"):
        config = make_config(training={"max_steps": 4, "ema_decay": 0.5})
        later = resumed_trainer(config, trainer.checkpoints / "checkpoint_epoch_1.pth.tar")
    assert "the checkpoint has no average of the weights: training.ema_decay starts one here" in caplog.text
    later.fit()
    assert later.step == 4 and later.state.ema.updates == 2


def test_decay_must_be_a_share(make_config):
    with pytest.raises(ConfigError, match=r"training.ema_decay is 1.0; give a number in \(0, 1\)"):
        make_config(training={"ema_decay": 1.0})
