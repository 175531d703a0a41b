"""Offline metrics: hand-computed values, and properties that hold whatever the numbers."""

import json

import numpy as np
import pytest

from inference.metrics import (
    METRICS,
    MetricAccumulator,
    MetricSettings,
    mean_action_prediction,
    repeat_last_action_prediction,
    wilson_interval,
)

SETTINGS = MetricSettings(num_action_bins=4, bin_range=(-1.0, 1.0), accuracy_threshold=0.1)


def accumulate(predicted, true, is_pad, scale=10.0, index=None, names=("demos",), exists=None):
    """Metrics of one batch whose physical units are `scale` times the normalized ones.

    `predicted` is (N, T, A), or (K, N, T, A) with several draws.
    """
    accumulator = accumulator_of(predicted, true, is_pad, scale, index, names, exists)
    return accumulator.result()


def accumulator_of(predicted, true, is_pad, scale=10.0, index=None, names=("demos",), exists=None):
    predicted, true, is_pad = np.asarray(predicted, float), np.asarray(true, float), np.asarray(is_pad)
    predicted = predicted if predicted.ndim == 4 else predicted[None]
    accumulator = MetricAccumulator(names, *true.shape[1:], SETTINGS)
    index = np.zeros(len(true), int) if index is None else np.asarray(index)
    accumulator.update(predicted * scale, true * scale, is_pad, predicted, true, index, exists)
    return accumulator


def test_hand_computed():
    # bins of width 0.5 over [-1, 1]: [-1, -.5) [-.5, 0) [0, .5) [.5, 1]
    true = [[[-0.9, 0.1], [0.4, 0.9]]]
    predicted = [[[-0.4, 0.15], [0.4, 2.0]]]
    result = accumulate(predicted, true, [[False, False]])
    overall = result["overall"]
    assert overall["mae_normalized"] == pytest.approx((0.5 + 0.05 + 0 + 1.1) / 4)
    assert overall["mse_normalized"] == pytest.approx((0.25 + 0.0025 + 0 + 1.21) / 4)
    assert overall["mae"] == pytest.approx(10 * overall["mae_normalized"])
    assert overall["mse"] == pytest.approx(100 * overall["mse_normalized"])
    assert overall["binned_accuracy"] == 3 / 4  # 2.0 is clipped into the last bin, where 0.9 is
    assert overall["binned_accuracy_within_1"] == 1
    assert overall["threshold_accuracy"] == 2 / 4
    assert result["per_step"]["mae_normalized"] == pytest.approx([0.275, 0.55])
    assert result["per_dimension"]["mae_normalized"] == pytest.approx([0.25, 0.575])
    assert (result["samples"], result["valid_steps"]) == (1, 2)


def test_each_dimension_has_its_own_bins():
    accumulator = MetricAccumulator(["demos"], 1, 2, MetricSettings(4, np.array([[-1.0, -8.0], [1.0, 8.0]])))
    true, predicted = np.array([[[0.1, 1.0]], [[0.1, 5.0]]]), np.array([[[[0.4, 3.0]], [[0.6, 3.0]]]])
    accumulator.update(predicted, true, np.zeros((2, 1), bool), predicted, true, np.zeros(2, int))
    assert accumulator.result()["per_dimension"]["binned_accuracy"] == [0.5, 0.5]


def test_steps_and_endpoints_by_hand():
    true = [[[0.0], [0.1], [0.2], [0.3]], [[0.5], [0.5], [0.0], [0.0]]]
    predicted = [[[0.1], [0.1], [0.4], [0.0]], [[0.1], [0.7], [9.0], [9.0]]]
    is_pad = [[False] * 4, [False, False, True, True]]
    result = accumulate(predicted, true, is_pad)
    overall = result["overall"]
    assert overall["first_step_error_normalized"] == pytest.approx((0.1 + 0.4) / 2)
    assert overall["endpoint_error_normalized"] == pytest.approx((0.3 + 0.2) / 2)  # of the last valid steps
    chunks = (0.01 + 0 + 0.04 + 0.09) / 4, (0.16 + 0.04) / 2
    assert overall["trajectory_mse_normalized"] == pytest.approx(sum(chunks) / 2)  # the short chunk counts in full
    assert result["per_step"]["trajectory_mse_normalized"] == [
        None,
        pytest.approx(chunks[1]),
        None,
        pytest.approx(chunks[0]),
    ]
    # second differences 0.4 - 0.2 + 0.1 and 0.0 - 0.8 + 0.1; the second chunk has only two steps
    assert overall["smoothness_normalized"] == pytest.approx((0.3 + 0.7) / 2)
    assert result["per_step"]["smoothness_normalized"] == [None, None, pytest.approx(0.3), pytest.approx(0.7)]
    assert overall["smoothness_true_normalized"] == pytest.approx(0.0)
    assert overall["spread"] is None and overall["best_of_k_mse"] is None  # one draw has neither
    for name in ("first_step_error", "endpoint_error", "smoothness"):
        assert overall[name] == pytest.approx(10 * overall[f"{name}_normalized"])
    assert overall["trajectory_mse"] == pytest.approx(100 * overall["trajectory_mse_normalized"])


def test_draws_by_hand():
    true = [[[0.0, 0.0], [0.2, 0.0]]]
    draws = [[[[0.3, 0.0], [0.2, 0.0]]], [[[0.1, 0.0], [0.4, 0.0]]], [[[0.2, 0.0], [-9.0, 0.0]]]]
    result = accumulate(draws, true, [[False, False]])
    overall = result["overall"]
    assert overall["mse_normalized"] == pytest.approx(0.09 / 4)  # of the first draw
    # the second draw is nearest as a whole chunk, although the first one hits the second step
    assert overall["best_of_k_mse_normalized"] == pytest.approx((0.01 + 0.04) / 4)
    assert overall["best_of_k_mse"] == pytest.approx(100 * overall["best_of_k_mse_normalized"])
    assert result["per_step"]["spread_normalized"][0] == pytest.approx(0.1 / 2)  # of 0.3, 0.1, 0.2; and of zeros
    assert result["per_dimension"]["spread"][1] == 0.0

    padded = accumulate(draws, true, [[False, True]])["overall"]
    assert padded["best_of_k_mse_normalized"] == pytest.approx(0.01 / 2)  # -9 is past the end and disqualifies none
    assert padded["spread_normalized"] == pytest.approx(0.1 / 2)


def test_missing_dimensions_are_left_out():
    true, predicted = [[[0.1, 0.0], [0.2, 0.0]]], [[[0.2, 7.0], [0.4, np.nan]]]
    result = accumulate(predicted, true, [[False, False]], exists=[[True, False]])
    assert result["overall"]["mae_normalized"] == pytest.approx(0.15)
    assert result["per_dimension"]["endpoint_error_normalized"] == [pytest.approx(0.2), None]
    assert result["overall"]["trajectory_mse_normalized"] == pytest.approx((0.01 + 0.04) / 2)


def test_sums_of_ranks_equal_the_whole():
    rng = np.random.default_rng(3)
    predicted, true = rng.uniform(-1, 1, (3, 9, 4, 2)), rng.uniform(-1, 1, (9, 4, 2))
    is_pad, index = np.arange(4) >= rng.integers(1, 5, (9, 1)), rng.integers(0, 2, 9)
    whole = accumulate(predicted, true, is_pad, index=index, names=("a", "b"))
    ranks = [
        accumulator_of(predicted[:, rows], true[rows], is_pad[rows], index=index[rows], names=("a", "b"))
        for rows in (slice(0, 2), slice(2, 9), slice(9, 9))
    ]
    vectors = []
    for rank in ranks:
        rank.reduce(lambda values: (vectors.append(values), values)[1])
    for rank in ranks:
        rank.reduce(lambda values: np.sum(vectors, axis=0))
        reduced = rank.result()
        assert (reduced["samples"], reduced["valid_steps"]) == (whole["samples"], whole["valid_steps"])
        for part in ("overall", "per_step", "per_dimension"):
            for name in METRICS:
                assert reduced[part][name] == pytest.approx(whole[part][name]), (part, name)
        assert reduced["per_dataset"]["b"]["overall"] == pytest.approx(whole["per_dataset"]["b"]["overall"])


def test_padding_is_left_out():
    true = [[[0.0], [0.2], [0.0]]]
    predicted = [[[0.3], [0.2], [50.0]]]
    result = accumulate(predicted, true, [[False, False, True]])
    assert result["overall"]["mae_normalized"] == pytest.approx(0.15)
    assert result["per_step"]["mae_normalized"] == [pytest.approx(0.3), 0.0, None]
    assert result["valid_steps"] == 2


@pytest.mark.parametrize("garbage", [7.0, np.nan, np.inf])
def test_padded_values_change_nothing(garbage):
    rng = np.random.default_rng(0)
    predicted, true = rng.uniform(-1, 1, (2, 16, 5, 3))
    is_pad = np.arange(5) >= rng.integers(1, 6, (16, 1))
    index = rng.integers(0, 2, 16)
    before = accumulate(predicted, true, is_pad, index=index, names=("a", "b"))
    predicted[is_pad], true[is_pad] = garbage, -garbage
    assert accumulate(predicted, true, is_pad, index=index, names=("a", "b")) == before
    assert "NaN" not in json.dumps(before)


def test_perfect_prediction():
    true = np.random.default_rng(1).uniform(-1, 1, (8, 4, 3))
    result = accumulate([true, true], true, np.zeros((8, 4), bool))
    smoothness = {name for name in METRICS if "smoothness" in name}
    for name in smoothness:
        assert result["overall"][name] == result["overall"][name.replace("_true", "")] > 0
    for name in set(METRICS) - smoothness:
        wanted = 1.0 if "accuracy" in name else 0.0
        assert result["overall"][name] == wanted
        assert set(result["per_step"][name]) - {None} == {wanted}
        assert result["per_dimension"][name] == [wanted] * 3


def test_per_dataset_and_batch_split():
    rng = np.random.default_rng(2)
    predicted, true = rng.uniform(-1, 1, (2, 10, 4, 2))
    is_pad = np.arange(4) >= rng.integers(1, 5, (10, 1))
    index = np.array([0] * 3 + [1] * 7)
    whole = accumulate(predicted, true, is_pad, index=index, names=("a", "b"))
    alone = accumulate(predicted[3:], true[3:], is_pad[3:])
    del alone["per_dataset"]
    assert whole["per_dataset"]["b"] == alone
    parts = MetricAccumulator(("a", "b"), 4, 2, SETTINGS)
    for rows in (slice(0, 5), slice(5, 5), slice(5, 10)):
        here = predicted[None, rows]
        parts.update(here * 10, true[rows] * 10, is_pad[rows], here, true[rows], index[rows])
    assert parts.result()["overall"] == pytest.approx(whole["overall"])


def test_bad_batches():
    accumulator = MetricAccumulator(("a",), 2, 1, SETTINGS)
    drawn, ok, pad, index = np.zeros((1, 1, 2, 1)), np.zeros((1, 2, 1)), np.zeros((1, 2), bool), np.zeros(1, int)
    with pytest.raises(ValueError, match=r"true_NTA has shape \(1, 3, 1\).*wanted \(1, 2, 1\)"):
        accumulator.update(drawn, np.zeros((1, 3, 1)), pad, drawn, ok, index)
    with pytest.raises(ValueError, match="predicted_KNTA: sample 0 of the batch, step 1, dimension 0 is nan"):
        accumulator.update(np.array([[[[0.0], [np.nan]]]]), ok, pad, drawn, ok, index)
    with pytest.raises(ValueError, match="dataset_index holds 1; there are 1 names"):
        accumulator.update(drawn, ok, pad, drawn, ok, index + 1)
    assert accumulator.result()["samples"] == 0


def test_trivial_predictors():
    mean = np.array([[1.0, 2.0], [1.0, 2.0]])
    assert mean_action_prediction(mean, 3).tolist() == [[[1, 2]] * 3] * 2
    repeated = repeat_last_action_prediction([None, np.array([5.0, 6.0])], mean, 3)
    assert repeated.tolist() == [[[1, 2]] * 3, [[5, 6]] * 3]


def test_wilson_interval():
    assert wilson_interval(18, 20) == pytest.approx((0.6990, 0.9721), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_interval(20, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)
    with pytest.raises(ValueError, match="3 successes of 2 episodes"):
        wilson_interval(3, 2)
    with pytest.raises(ValueError, match="0 successes of 0 episodes"):
        wilson_interval(0, 0)
