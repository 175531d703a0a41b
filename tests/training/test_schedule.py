"""Learning rates against torch's own schedulers."""

from __future__ import annotations

import re

import pytest
import torch

from training.schedule import RunLength, learning_rate, schedule_warnings
from utils.config_utils import ConfigError, LRSchedulerConfig


def torch_rates(scheduler, steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule, rates = scheduler(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def rates(steps, **config):
    return [learning_rate(step, 0.1, LRSchedulerConfig(**config), 40, 10.0) for step in range(steps)]


def test_cosine_equals_torchs_until_t_max_and_then_stays():
    expected = torch_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=20, eta_min=0.01), 21)
    got = rates(30, type="CosineAnnealingLR", T_max=20, eta_min=0.01, interval="step")
    assert got[:21] == pytest.approx(expected) and got[21:] == pytest.approx([0.01] * 9)


def test_cosine_ends_with_the_run_by_default():
    got = rates(41, type="warmup_cosine", warmup_steps=8, eta_min=0.02)
    assert got[:8] == pytest.approx([0.1 * (i + 1) / 8 for i in range(8)])
    assert got[8] == pytest.approx(0.1) and got[24] == pytest.approx(0.06) and got[40] == pytest.approx(0.02)


def test_step_lr_equals_torchs():
    expected = torch_rates(lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=7, gamma=0.5), 30)
    assert rates(30, type="StepLR", step_size=7, gamma=0.5, interval="step") == pytest.approx(expected)


def test_epochs_as_the_unit():
    assert rates(40, type="StepLR", step_size=1, gamma=0.5, interval="epoch") == pytest.approx(
        rates(40, type="StepLR", step_size=10, gamma=0.5, interval="step")
    )


def test_t_max_and_step_size_count_epochs_unless_told_otherwise():
    """10 steps an epoch: `{type: CosineAnnealingLR, T_max: 4}` ends with a run of 4 epochs, not at its fourth step."""
    whole = rates(40, type="CosineAnnealingLR", T_max=4)
    assert whole == rates(40, type="warmup_cosine")
    assert whole == rates(40, type="CosineAnnealingLR", T_max=40, interval="step") and whole[39] > 0
    steps = rates(40, type="StepLR", step_size=2, gamma=0.5)
    assert steps == pytest.approx([0.1] * 20 + [0.05] * 20)
    warmup = rates(40, type="CosineAnnealingLR", T_max=3, warmup_steps=10)
    assert warmup[9] == warmup[10] == 0.1, "warmup_steps are steps as ever"
    assert rates(40, type="warmup_cosine", T_max=20) == rates(40, type="warmup_cosine", T_max=20, interval="step")
    with pytest.raises(ConfigError, match=r"StepLR without a step_size; give a number of epochs"):
        LRSchedulerConfig(type="StepLR")


def test_constant():
    assert set(rates(10, type="constant")) == {0.1}


def test_a_warmup_that_does_not_end_is_told():
    assert schedule_warnings(0.1, LRSchedulerConfig(warmup_steps=11), 12, 5.0) == []
    (told,) = schedule_warnings(0.1, LRSchedulerConfig(warmup_steps=1000), 12, 5.5)
    assert "lr_scheduler.warmup_steps 1000 take 1000 of the run's 12 steps" in told and "lower them" in told
    (told,) = schedule_warnings(0.1, LRSchedulerConfig(warmup_steps=3, interval="epoch"), 12, 5.0)
    assert "3 take 15 of the run's 12 steps" in told


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "CosineAnnealingLR", "T_max": 50, "interval": "step"}, r"T_max 50 \(steps\) .* step 4\d of 5000"),
        ({"type": "StepLR", "step_size": 5}, r"step_size 5 \(epochs\) .* of 5000.*interval: step counts steps"),
        ({"type": "CosineAnnealingLR", "T_max": 5000}, r"T_max 5000 \(epochs\) is 500000 steps, longer than the run"),
        ({"type": "StepLR", "step_size": 1000}, r"the learning rate never falls; lr_scheduler.interval: step counts"),
    ],
)
def test_a_schedule_that_ends_early_or_never_is_told(config, message):
    """Of a run of 50 epochs of 100 steps."""
    (told,) = schedule_warnings(0.1, LRSchedulerConfig(**config), 5000, 100.0)
    assert re.search(message, told), told


@pytest.mark.parametrize(
    "config",
    [
        {"type": "CosineAnnealingLR", "T_max": 50},
        {"type": "CosineAnnealingLR", "T_max": 20, "eta_min": 0.01},
        {"type": "StepLR", "step_size": 20},
        {"type": "warmup_cosine", "warmup_steps": 100},
        {"type": "constant"},
    ],
)
def test_an_ordinary_schedule_gives_no_warning(config):
    assert schedule_warnings(0.1, LRSchedulerConfig(**config), 5000, 100.0) == []


def test_epochs_that_end_in_mid_step():
    """22 samples in batches of 4: epochs end after 5.5, 11, 16.5 steps; validation is skipped where the end is near."""
    length = RunLength(num_samples=22, batch_size=4, total_steps=12)
    assert length.epoch_steps == 5.5
    assert [step for step in range(1, 13) if length.epoch_ends(step, 1)] == [6, 11, 12]
    assert [step for step in range(1, 13) if length.epoch_ends(step, 2)] == [11, 12]
    assert [length.epoch_number(step) for step in (1, 5, 6, 7, 11, 12)] == [1, 1, 1, 2, 2, 3]
    assert [step for step in range(1, 13) if length.validation_due(step, 1)] == [6, 11, 12]
    assert [step for step in range(1, 13) if length.validation_due(step, 2)] == [12], "1 step before the end, of 11"
