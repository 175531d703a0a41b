"""Strategies of execution: which action each control step gets, when plans are wanted, what they must continue."""

from __future__ import annotations

import numpy as np
import pytest

from inference.closed_loop.episode import Episode
from inference.closed_loop.execution import EXECUTION_STRATEGIES
from inference.closed_loop.rollout import ModelPolicy, execution_settings, run_episode
from inference.predictor import VLAPredictor
from model.action_head.guidance import soft_mask
from tests.helpers import write_episodes
from tests.inference.checkpoints import train_tiny
from tests.inference.closed_loop.settings import executing
from tests.inference.closed_loop.test_rollout import CountingEnv

HORIZON = 8


class HoldingEnv(CountingEnv):
    """Holds still with -1 in its first value, the rest as before."""

    def __init__(self, limit=24, **options):
        super().__init__(goal=99, limit=limit, **options)

    def hold_action(self, previous):
        return np.array([-1, 0, 0, 0 if previous is None else previous[3]], np.float32)


class Timetable:
    """Plan number p holds (step it is for, p, 0, 7) in every row, so that an action tells where it came from."""

    max_seq_len = 1

    def __init__(self, execution):
        self.execution, self.prefixes, self.asked_at = execution, [], []

    def reset(self, env, seed):
        self.prefixes.clear()
        self.asked_at.clear()

    def plan(self, history, prompt, prefix=None):
        start = int(history[-1]["image_1"][0, 0, 0])
        self.prefixes.append(prefix)
        self.asked_at.append(start)
        rows = [(start + i, len(self.asked_at) - 1, 0, 7) for i in range(self.execution.horizon)]
        return np.array(rows, np.float32)


def drive(strategy, n_action_steps, latency_steps, limit=24, **options):
    """(actions (steps, 4), the policy, the result) of one episode."""
    policy = Timetable(executing(HORIZON, n_action_steps, strategy, latency_steps=latency_steps, **options))
    env = HoldingEnv(limit=limit)
    result = run_episode(env, policy, seed=0)
    return np.stack(env.actions), policy, result


@pytest.mark.parametrize("strategy", [name for name in EXECUTION_STRATEGIES if name != "ensemble"])
def test_without_latency_every_strategy_executes_n_steps_of_each_plan(strategy):
    actions, policy, result = drive(strategy, n_action_steps=3, latency_steps=0)
    assert actions[:, 0].tolist() == list(range(24))
    assert actions[:, 1].tolist() == [step // 3 for step in range(24)]
    assert policy.asked_at == list(range(0, 24, 3)) and result.plans == 8 and result.held_steps == 0


def test_synchronous_holds_still_while_it_plans():
    actions, policy, result = drive("synchronous", n_action_steps=3, latency_steps=2, limit=10)
    assert actions[:, 0].tolist() == [-1, -1, 0, 1, 2, -1, -1, 5, 6, 7]  # plans start where they were asked for
    assert actions[:, 3].tolist() == [0, 0, 7, 7, 7, 7, 7, 7, 7, 7]  # the gripper is kept
    assert policy.asked_at == [0, 5] and result.held_steps == 4
    assert policy.prefixes == [None, None]


@pytest.mark.parametrize("strategy", ["naive_async", "rtc", "clean_prefix"])
def test_asynchronous_strategies_switch_to_the_step_that_is_now(strategy):
    actions, policy, result = drive(strategy, n_action_steps=3, latency_steps=2, limit=12)
    assert policy.asked_at == [0, 3, 6, 9]
    assert actions[:, 0].tolist() == [-1, -1, *range(2, 12)]
    assert actions[2:, 1].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]  # a plan arrives two steps after it was asked for
    assert result.held_steps == 2  # before the first plan alone


def test_a_latency_beyond_n_action_steps_sets_the_pace():
    actions, policy, _ = drive("naive_async", n_action_steps=1, latency_steps=4, limit=16)
    assert policy.asked_at == [0, 4, 8, 12] and actions[4:, 0].tolist() == list(range(4, 16))


def test_rtc_passes_on_the_rest_of_the_chunk_that_runs():
    _, policy, _ = drive("rtc", n_action_steps=3, latency_steps=2, limit=12, max_guidance_weight=4.0)
    assert policy.prefixes[0] is None
    for start, number, prefix in zip(policy.asked_at[1:], range(3), policy.prefixes[1:], strict=True):
        assert prefix.action_BTA.shape == (1, HORIZON, 4) and not prefix.clean and prefix.max_guidance_weight == 4.0
        assert prefix.weight_BT[0].tolist() == soft_mask(HORIZON, delay=2, overlap=5).tolist()
        rest = prefix.action_BTA[0, :5].numpy()
        assert rest[:, 0].tolist() == list(range(start, start + 5)) and (rest[:, 1] == number).all()
        assert (prefix.action_BTA[0, 5:] == 0).all()


@pytest.mark.parametrize(("guidance_steps", "overlap"), [(1, 2), (3, 3), (7, 5)])
def test_rtc_may_follow_the_old_chunk_for_fewer_steps(guidance_steps, overlap):
    _, policy, _ = drive("rtc", n_action_steps=3, latency_steps=2, limit=12, guidance_steps=guidance_steps)
    for prefix in policy.prefixes[1:]:  # never fewer than the committed ones, nor more than there are
        assert prefix.weight_BT[0].tolist() == soft_mask(HORIZON, delay=2, overlap=overlap).tolist()


def test_clean_prefix_commits_what_will_be_executed_and_no_more():
    actions, policy, _ = drive("clean_prefix", n_action_steps=3, latency_steps=2, limit=12)
    for start, prefix in zip(policy.asked_at[1:], policy.prefixes[1:], strict=True):
        assert prefix.clean and prefix.weight_BT[0].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
        np.testing.assert_array_equal(prefix.action_BTA[0, :2], actions[start : start + 2])
    assert drive("clean_prefix", 3, 0)[1].prefixes == [None] * 8  # without latency nothing is committed


def test_ensemble_weighs_older_predictions_more():
    actions, policy, result = drive("ensemble", n_action_steps=3, latency_steps=0, limit=12, ensemble_decay=0.5)
    assert policy.asked_at == list(range(12)) and result.plans == 12  # every step, whatever n_action_steps
    for step, action in enumerate(actions):
        plans = np.arange(max(0, step - HORIZON + 1), step + 1)  # those that reach this step, oldest first
        weight = np.exp(-0.5 * np.arange(len(plans)))
        assert action[0] == pytest.approx(step) and action[1] == pytest.approx((weight * plans).sum() / weight.sum())


def test_ensemble_plans_as_often_as_the_latency_allows():
    actions, policy, result = drive("ensemble", n_action_steps=1, latency_steps=3, limit=12, ensemble_decay=0.0)
    assert policy.asked_at == [0, 3, 6, 9] and result.held_steps == 3
    assert actions[3:, 0].tolist() == list(range(3, 12))
    assert actions[3:, 1].tolist() == pytest.approx([0, 0, 0, 0.5, 0.5, 1.0, 1.5, 1.5, 2.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "hasty"}, "execution is 'hasty'; give one of synchronous, naive_async, ensemble, rtc"),
        ({"n_action_steps": 9}, "n_action_steps is 9, but the policy predicts a horizon of 8 actions; give 1 to 8"),
        ({"latency_steps": -1}, "latency_steps is -1; give 0 or more"),
        (
            {"strategy": "rtc", "latency_steps": 6},
            "rtc execution: a plan is made every 6 control steps and arrives 6 later, so it must cover 12, but the "
            "policy predicts a horizon of 8; lower n_action_steps or the latency, or train with a longer horizon",
        ),
        ({"strategy": "ensemble", "latency_steps": 5}, "ensemble execution: a plan is made every 5 .* cover 10"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        executing(**({"horizon": 8, "n_action_steps": 4} | options))


def test_an_episode_is_stepped_apart_from_its_policy():
    """Two episodes in turns, one planner for both: what evaluation in parallel needs."""
    settings = executing(HORIZON, 3, "rtc", latency_steps=2)
    policies = [Timetable(settings), Timetable(settings)]
    episodes = [Episode(HoldingEnv(limit=limit), settings, seed=0) for limit in (12, 7)]
    waiting = dict(enumerate(episodes))
    while waiting:
        requests = {i: episode.advance() for i, episode in waiting.items()}
        waiting = {i: episodes[i] for i, request in requests.items() if request is not None}
        for i in waiting:
            request = requests[i]
            assert request.prompt == "press the button" and len(request.history) == 1
            episodes[i].give(policies[i].plan(request.history, request.prompt, request.prefix))
    for episode, limit in zip(episodes, (12, 7), strict=True):
        alone = run_episode(HoldingEnv(limit=limit), Timetable(settings), seed=0)
        np.testing.assert_array_equal(episode.result.actions, alone.actions)
        assert episode.result.steps == limit


@pytest.fixture(scope="module")
def predictor(tmp_path_factory, tiny_paligemma_dir):
    folder = tmp_path_factory.mktemp("execution")
    files = [write_episodes(folder / "a.parquet", [12, 11])]
    head = {"horizon": HORIZON, "max_clean_prefix": 2}
    return VLAPredictor.from_checkpoint(train_tiny(folder, tiny_paligemma_dir, files, head=head), "cpu")


@pytest.mark.parametrize("strategy", EXECUTION_STRATEGIES)
def test_a_policy_under_latency_repeats_and_counts(predictor, strategy):
    settings = execution_settings(predictor, execution=strategy, latency_steps=2, n_action_steps=3)
    results = [run_episode(HoldingEnv(limit=12), ModelPolicy(predictor, settings), seed) for seed in (1, 2, 1)]
    np.testing.assert_array_equal(results[0].actions, results[2].actions)
    assert [result.held_steps for result in results] == [6 if strategy == "synchronous" else 2] * 3
    assert [result.steps for result in results] == [12] * 3


def test_committed_steps_agree_between_chunks(predictor):
    """What distinguishes rtc: the new chunk repeats the steps that were executed while it was made."""

    class Watched(ModelPolicy):
        def reset(self, env, seed):
            super().reset(env, seed)
            self.gaps = []

        def plan(self, history, prompt, prefix=None):
            action_TA = super().plan(history, prompt, prefix)
            free_TA = self.predictor.predict(
                history[-1]["image_1"], prompt=prompt, state=history[-1]["state"], seed=self._plans
            )
            if prefix is not None:
                committed = prefix.action_BTA[0, :2].numpy()
                self.gaps.append([np.abs(plan[:2] - committed).mean() for plan in (action_TA, free_TA)])
            return action_TA

    for strategy, most in (("rtc", 0.35), ("clean_prefix", 1e-4)):
        settings = execution_settings(predictor, execution=strategy, latency_steps=2, n_action_steps=3)
        policy = Watched(predictor, settings)
        run_episode(HoldingEnv(limit=18), policy, seed=0)
        with_prefix, without = np.mean(policy.gaps, axis=0)
        assert with_prefix < most * without


def test_strategies_that_the_policy_was_not_made_for(predictor):
    with pytest.raises(
        ValueError, match="clean_prefix execution commits latency_steps 3 actions, but the policy was t"
    ):
        execution_settings(predictor, execution="clean_prefix", latency_steps=3, n_action_steps=3)
    assert execution_settings(predictor) == executing(HORIZON, 2)
