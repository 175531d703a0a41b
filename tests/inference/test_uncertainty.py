"""The uncertainty of predictions, and the best of several draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from inference.closed_loop.execution import EXECUTION_STRATEGIES
from inference.closed_loop.rollout import ModelPolicy, execution_settings, run_episode
from inference.predictor import VLAPredictor
from inference.uncertainty import best_of_draws, draw_seeds
from model.context import ActionPrefix
from tests.helpers import write_episodes
from tests.inference.checkpoints import train_tiny
from tests.inference.closed_loop.test_execution import HoldingEnv

STATE = [0.1, -0.2, 0.3, 0.4]


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    return write_episodes(tmp_path_factory.mktemp("demos") / "two.parquet", [6, 5])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_paligemma_dir, demos):
    return train_tiny(tmp_path_factory.mktemp("run"), tiny_paligemma_dir, [demos], steps=20)


@pytest.fixture(scope="module")
def several(checkpoint):
    return VLAPredictor.from_checkpoint(checkpoint, "cpu", best_of=5)


def frame(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)


def test_the_medoid_is_the_draw_nearest_to_the_others():
    rng = np.random.default_rng(0)
    normalized = rng.normal(size=(10, 3, 4, 2)).astype(np.float32)  # two predictions of five draws
    physical = normalized * 7
    found = best_of_draws(physical, normalized, 5)
    for k in range(2):
        for b in range(3):
            draws = normalized[5 * k : 5 * k + 5, b].reshape(5, -1)
            means = [np.mean([np.sqrt(np.mean((one - other) ** 2)) for other in draws]) for one in draws]
            np.testing.assert_array_equal(found.action_KBTA[k, b], physical[5 * k + int(np.argmin(means)), b])
            spread = np.sqrt(np.mean(draws.var(axis=0, ddof=1)))
            assert found.uncertainty_KB[k, b] == pytest.approx(spread, rel=1e-5)


def test_the_draws_of_a_prediction_are_its_own():
    assert draw_seeds([[3, 4]], 1) == [[3, 4]]
    seeds = draw_seeds([[3, 4], [5, 6]], 3)
    assert seeds[0] == [3, 4] and seeds[3] == [5, 6] and len({seed for row in seeds for seed in row}) == 12


def test_best_of_takes_one_of_its_draws(checkpoint, several):
    one = VLAPredictor.from_checkpoint(checkpoint, "cpu")
    batch = one.observe(frame(), prompt="open", state=STATE)
    draws = one.predict_draws(batch, draw_seeds([[7]], 5))[:, 0]
    chosen, spread = several.predict_measured(batch, [[7]])
    near = np.abs(draws - chosen[0, 0]).max(axis=(1, 2))
    assert near.min() < 1e-5 and np.sum(near < 1e-5) == 1
    wanted = best_of_draws(
        draws[:, None], np.stack([one.action_units.normalize(d[None], np.array([STATE])) for d in draws]), 5
    )
    np.testing.assert_allclose(chosen, wanted.action_KBTA, atol=1e-5)
    np.testing.assert_allclose(spread, wanted.uncertainty_KB, rtol=1e-4)
    action = several.predict(frame(), prompt="open", state=STATE, seed=7)
    np.testing.assert_array_equal(action, chosen[0, 0])
    assert several.uncertainty == pytest.approx(float(spread[0, 0]))


def test_a_batch_is_as_unsure_as_its_samples(several):
    batch = several.observe(frame(), prompt="open", state=STATE)
    pair = {key: torch.cat([v, v]) if torch.is_tensor(v) else 2 * v for key, v in batch.items()}
    together = several.predict_measured(pair, [[1, 2]])
    for i, seed in enumerate((1, 2)):
        alone = several.predict_measured(batch, [[seed]])
        np.testing.assert_allclose(together.action_KBTA[:, i], alone.action_KBTA[:, 0], atol=1e-5)
        np.testing.assert_allclose(together.uncertainty_KB[:, i], alone.uncertainty_KB[:, 0], rtol=1e-4)


def test_what_has_no_uncertainty_says_so(tmp_path, tiny_paligemma_dir, demos, checkpoint):
    path = train_tiny(tmp_path, tiny_paligemma_dir, [demos], head={"type": "regression"})
    predictor = VLAPredictor.from_checkpoint(path, "cpu")
    predictor.predict(frame(), prompt="open", state=STATE)
    assert math.isnan(predictor.uncertainty) and "have no uncertainty" in predictor.no_alarm
    with pytest.raises(ValueError, match=r"best_of is 4, but RegressionActionHead samples nothing.*give 1"):
        VLAPredictor.from_checkpoint(path, "cpu", best_of=4)
    with pytest.raises(ValueError, match="inference.best_of is 0"):
        VLAPredictor.from_checkpoint(checkpoint, "cpu", best_of=0)
    one_step = VLAPredictor.from_checkpoint(checkpoint, "cpu", num_inference_steps=1)
    one_step.predict(frame(), prompt="open", state=STATE)
    assert math.isnan(one_step.uncertainty)


def test_noise_is_that_of_one_draw(several):
    with pytest.raises(ValueError, match="noise is that of one draw, and best_of takes several"):
        several.predict(frame(), prompt="open", state=STATE, noise=np.zeros((4, 4), np.float32))


def test_best_of_with_every_execution(checkpoint):
    """Real-time chunking too: every draw continues the old chunk, and the number is their spread."""
    for strategy in EXECUTION_STRATEGIES.keys() - {"clean_prefix"}:
        settings = {"execution": strategy, "latency_steps": 0 if strategy == "synchronous" else 1, "n_action_steps": 2}
        predictor = VLAPredictor.from_checkpoint(checkpoint, "cpu", best_of=3, **settings)
        policy = ModelPolicy(predictor, execution_settings(predictor))
        result = run_episode(HoldingEnv(limit=8), policy, seed=0)
        assert len(result.uncertainty) == result.plans > 2 and np.isfinite(result.uncertainty).all()
    plain = VLAPredictor.from_checkpoint(checkpoint, "cpu", execution="rtc", latency_steps=1, n_action_steps=2)
    found = run_episode(HoldingEnv(limit=8), ModelPolicy(plain), seed=0).uncertainty
    assert np.isfinite(found[0]) and np.isnan(found[1:]).all()  # what continues a chunk is held by it


def test_draws_of_a_prefix_hold_to_it(several):
    batch = several.observe(frame(), prompt="open", state=STATE)
    target = several.predict_draws(batch, [[1]])[0]
    free = several.predict_draws(batch, [[2]])[0]
    prefix = ActionPrefix(torch.from_numpy(target), torch.tensor([[1.0, 1.0, 0.5, 0.0]]))
    held = several.predict_draws(batch, [[2]], prefix=prefix)[0]
    assert np.abs(held - target)[:, :2].mean() < np.abs(free - target)[:, :2].mean()
