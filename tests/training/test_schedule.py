"""Learning rates against torch's own schedulers."""

from __future__ import annotations

import pytest
import torch

from training.schedule import RunLength, learning_rate, unfinished_warmup
from utils.config_utils import LRSchedulerConfig


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
    got = rates(30, type="CosineAnnealingLR", T_max=20, eta_min=0.01)
    assert got[:21] == pytest.approx(expected) and got[21:] == pytest.approx([0.01] * 9)


def test_cosine_ends_with_the_run_by_default():
    got = rates(41, type="warmup_cosine", warmup_steps=8, eta_min=0.02)
    assert got[:8] == pytest.approx([0.1 * (i + 1) / 8 for i in range(8)])
    assert got[8] == pytest.approx(0.1) and got[24] == pytest.approx(0.06) and got[40] == pytest.approx(0.02)


def test_step_lr_equals_torchs():
    expected = torch_rates(lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=7, gamma=0.5), 30)
    assert rates(30, type="StepLR", step_size=7, gamma=0.5) == pytest.approx(expected)


def test_epochs_as_the_unit():
    assert rates(40, type="StepLR", step_size=1, gamma=0.5, interval="epoch") == pytest.approx(
        rates(40, type="StepLR", step_size=10, gamma=0.5)
    )


def test_constant():
    assert set(rates(10, type="constant")) == {0.1}


def test_a_warmup_that_does_not_end_is_told():
    assert unfinished_warmup(LRSchedulerConfig(warmup_steps=11), 12, 5.0) is None
    told = unfinished_warmup(LRSchedulerConfig(warmup_steps=1000), 12, 5.5)
    assert "lr_scheduler.warmup_steps 1000 take 1000 of the run's 12 steps" in told and "lower them" in told
    assert "3 take 15 of the run's 12 steps" in unfinished_warmup(
        LRSchedulerConfig(warmup_steps=3, interval="epoch"), 12, 5.0
    )


def test_epochs_that_end_in_mid_step():
    """22 samples in batches of 4: epochs end after 5.5, 11, 16.5 steps; validation is skipped where the end is near."""
    length = RunLength(num_samples=22, batch_size=4, total_steps=12)
    assert length.epoch_steps == 5.5
    assert [step for step in range(1, 13) if length.epoch_ends(step, 1)] == [6, 11, 12]
    assert [step for step in range(1, 13) if length.epoch_ends(step, 2)] == [11, 12]
    assert [length.epoch_number(step) for step in (1, 5, 6, 7, 11, 12)] == [1, 1, 1, 2, 2, 3]
    assert [step for step in range(1, 13) if length.validation_due(step, 1)] == [6, 11, 12]
    assert [step for step in range(1, 13) if length.validation_due(step, 2)] == [12], "1 step before the end, of 11"
