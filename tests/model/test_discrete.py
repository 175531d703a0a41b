"""The discrete head: its bins and its ways to decode."""

from __future__ import annotations

import math
import re

import pytest
import torch

from model.action_head import build_action_head
from model.normalizer import ActionRange
from tests.model import heads
from tests.model.heads import SMALL, SPEC, STATE, make_context, no_pad, sample, seeded
from utils.config_utils import ActionHeadConfig, ConfigError


def make_head(**options):
    return heads.make_head("discrete", **options)


def with_logits(head, logits_K: list[float]):
    """The same head, made to give these logits everywhere."""
    torch.nn.init.zeros_(head.mlp[-1].weight)
    head.mlp[-1].bias.data = torch.tensor(logits_K).repeat(head.horizon * head.per_action_dim)
    return head


def test_bins_over_the_range():
    head = make_head(num_action_bins=4)
    values = torch.tensor([-9.0, -1.0, -0.6, -0.5, 0.0, 0.49, 0.5, 1.0, 9.0])
    bins = head.bins(values[:, None].expand(-1, 2))[:, 0]
    assert bins.tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 3]
    ranges = torch.tensor([[-1.0, 0.0], [1.0, 8.0]])  # each dimension has its own
    config = ActionHeadConfig(**(SMALL | {"num_action_bins": 4}), type="discrete")
    head = build_action_head(config, SPEC, STATE, ActionRange(ranges, 10 * ranges))
    assert head.bins(torch.tensor([[[0.6, 0.6], [-0.6, 7.9]]])).tolist() == [[[3, 0], [0, 3]]]
    assert "bin_range_2A" in head.state_dict(), "what a bin means travels with the weights"


@pytest.mark.parametrize("bins", [2, 7, 256])
def test_decoding_errs_by_half_a_bin_at_most(bins):
    head = make_head(num_action_bins=bins)
    action = torch.rand(50, 4, 2, generator=seeded(0)) * 2 - 1
    error = (head._values(head.bins(action)) - action).abs().max()
    assert error <= 1 / bins + 1e-6 and torch.equal(head.bins(head._values(head.bins(action))), head.bins(action))


def test_loss_is_the_cross_entropy_of_the_true_bin():
    logits = [0.0, 1.0, 2.0, -1.0]
    head, action = with_logits(make_head(num_action_bins=4), logits), torch.full((3, 4, 2), 0.3)
    loss = head.loss(make_context(), action, no_pad(3))
    expected = math.log(sum(math.exp(x) for x in logits)) - logits[2]
    torch.testing.assert_close(loss, torch.full((3, 4), expected))


def test_three_ways_to_decode():
    probability = torch.tensor([0.5, 0.1, 0.0, 0.4])
    centers = torch.tensor([-0.75, -0.25, 0.25, 0.75])
    logits = probability.clamp(min=1e-30).log().tolist()
    decode = lambda how: with_logits(make_head(num_action_bins=4, decoding=how), logits)  # noqa: E731
    context = make_context(batch=500)
    assert (sample(decode("argmax"), context) == -0.75).all()
    mean = (probability * centers).sum()
    torch.testing.assert_close(sample(decode("expectation"), context), mean.expand(500, 4, 2), atol=1e-6, rtol=0)
    drawn = sample(decode("sample"), context).flatten()
    share = torch.stack([(drawn == center).float().mean() for center in centers])
    torch.testing.assert_close(share, probability, atol=0.03, rtol=0)
    assert share[2] == 0, "a bin of no probability is never drawn"


def test_mlp_widths():
    head = make_head(mlp_hidden_dims=(20, 10), num_action_bins=4)
    assert [layer.out_features for layer in head.mlp if isinstance(layer, torch.nn.Linear)] == [20, 10, 4 * 2 * 4]
    assert sample(make_head(mlp_hidden_dims=()), make_context()).shape == (3, 4, 2)


@pytest.mark.parametrize("options", [{"num_action_bins": 1}, {"mlp_hidden_dims": (64, 0)}])
def test_mistakes_are_named(options):
    with pytest.raises(ConfigError, match=re.escape("give at least 2 bins and positive widths")):
        ActionHeadConfig(**options)
