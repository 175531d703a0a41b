"""pi0's original schedule, decay and loss, as settings."""

from __future__ import annotations

import math

import pytest
import torch

from training.optimizer import parameter_groups
from training.schedule import learning_rate
from utils.batch import steps_with_loss
from utils.config_utils import ConfigError, LRSchedulerConfig, OptimizerConfig, config_from_dict

PRESET = LRSchedulerConfig(type="lerobot_cosine", warmup_steps=1000, T_max=30000, eta_min=2.5e-6)


def rate(step: int, total: int = 40000) -> float:
    return learning_rate(step, 2.5e-5, PRESET, total, 100.0)


def test_lerobots_cosine() -> None:
    assert rate(0) == pytest.approx(2.5e-5 / 1001)
    assert rate(500) == pytest.approx(2.5e-5 * ((1 / 1001 - 1) * 0.5 + 1))
    at_1000 = 0.9 * 0.5 * (1 + math.cos(math.pi / 30)) + 0.1  # the cosine counts from step 0
    assert rate(1000) == pytest.approx(2.5e-5 * at_1000) and rate(1000) < 2.5e-5
    assert rate(30000) == rate(39999) == pytest.approx(2.5e-6)
    assert rate(99, 3000) == pytest.approx(2.5e-5 * ((1 / 101 - 1) * 0.01 + 1)), "a shorter run shortens both"
    assert rate(2999, 3000) == pytest.approx(2.5e-6, rel=1e-3)
    with pytest.raises(ConfigError, match="lerobot_cosine, whose T_max must be given"):
        LRSchedulerConfig(type="lerobot_cosine")


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)

    def parameter_kinds(self) -> dict[str, str]:
        return dict.fromkeys(("linear.weight", "linear.bias"), "head")


def test_everything_decays_where_that_is_asked_for() -> None:
    groups = parameter_groups(Model(), OptimizerConfig(decay_all=True))
    assert len(groups) == 1 and len(groups[0]["params"]) == 2 and groups[0]["weight_decay"] == 0.01
    assert len(parameter_groups(Model(), OptimizerConfig())) == 2


def test_which_steps_have_a_loss() -> None:
    is_pad = torch.tensor([[False, True], [True, True]])
    for head, wanted in (
        ({}, [[True, True], [False, False]]),
        ({"type": "diffusion"}, [[True, True], [False, False]]),
        ({"type": "regression"}, [[True, False], [False, False]]),
        ({"loss_over_padding": False}, [[True, False], [False, False]]),
        ({"type": "regression", "loss_over_padding": True}, [[True, True], [False, False]]),
    ):
        config = config_from_dict({"model": {"action_head_config": head}})
        assert steps_with_loss({"action_is_pad": is_pad}, config).tolist() == wanted, head
