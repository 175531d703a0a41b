"""Rollouts: history, chunks, seeds, controls and videos, in a small environment whose rules are known."""

from __future__ import annotations

import json

import av
import gymnasium
import numpy as np
import pytest

from inference.closed_loop.episode import EpisodeRequest, PlanRequest
from inference.closed_loop.evaluation import evaluate_tasks
from inference.closed_loop.policies import ExpertPolicy, ReplayPolicy
from inference.closed_loop.rollout import GREY, ModelPolicy, execution_settings, run_episode, summarize_tasks
from inference.closed_loop.video import captioned, tiled
from inference.predictor import VLAPredictor
from tests.helpers import write_episodes
from tests.inference.checkpoints import train_tiny
from tests.inference.closed_loop.settings import executing


class CountingEnv(gymnasium.Env):
    """Succeeds at the `goal`-th step whose first action value is above 0.5; its image shows the step's number."""

    instruction = "press the button"
    state_dim = per_action_dim = 4
    control_hz = 10.0

    def __init__(self, goal=3, limit=12, cameras=("image_1",)):
        self.goal, self.limit, self.cameras = goal, limit, cameras
        self.actions = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = self.hits = 0
        self.actions = []
        self.offset = self.np_random.uniform()
        return self._observe(), {"success": False}

    def step(self, action):
        self.actions.append(np.array(action))
        self.t += 1
        self.hits += action[0] > 0.5
        return self._observe(), 1.0, False, self.t >= self.limit, {"success": self.hits == self.goal}

    def settings(self):
        return {}

    def expert_action(self):
        return np.ones(4, np.float32)

    def _observe(self):
        image = np.full((40, 40, 3), self.t, np.uint8)
        return {camera: image for camera in self.cameras} | {"state": np.full(4, self.offset, np.float32)}


class Scripted:
    """Plans `chunk` again and again, and keeps what it was shown."""

    def __init__(self, chunk, n_action_steps, max_seq_len=1):
        self.chunk, self.max_seq_len = np.asarray(chunk, np.float32), max_seq_len
        self.execution = executing(max(n_action_steps, len(chunk)), n_action_steps)
        self.seen = []

    def reset(self, env, seed):
        self.seen.clear()

    def plan(self, history, prompt, prefix=None):
        self.seen.append(([int(o["image_1"][0, 0, 0]) for o in history], prompt))
        return self.chunk


def chunk(*first_values):
    return [[value, 0, 0, 0] for value in first_values]


def test_executes_part_of_each_plan_then_replans():
    env, policy = CountingEnv(goal=99, limit=7), Scripted(chunk(0.1, 0.2, 0.3), n_action_steps=2)
    result = run_episode(env, policy, seed=0)
    assert [round(float(action[0]), 1) for action in env.actions] == [0.1, 0.2, 0.1, 0.2, 0.1, 0.2, 0.1]
    assert (result.steps, result.plans, result.success, result.total_reward) == (7, 4, False, 7.0)


def test_history_holds_the_last_frames_of_every_step():
    env, policy = CountingEnv(goal=99, limit=6), Scripted(chunk(0, 0), n_action_steps=2, max_seq_len=3)
    run_episode(env, policy, seed=0)
    assert [frames for frames, _ in policy.seen] == [[0], [0, 1, 2], [2, 3, 4]]


class OnRequestEnv(CountingEnv):
    """Renders when asked; `rendered` are the steps that were."""

    def reset(self, *, seed=None, options=None):
        self.on_request, self.rendered = options["images_on_request"], []
        return super().reset(seed=seed)

    def images(self):
        self.rendered.append(self.t)
        return {"image_1": np.full((40, 40, 3), self.t, np.uint8)}

    def _observe(self):
        return {"state": np.full(4, self.offset, np.float32)} if self.on_request else super()._observe()


def test_frames_that_nobody_looks_at_are_not_rendered():
    env, policy = OnRequestEnv(goal=99, limit=7), Scripted(chunk(0, 0, 0), n_action_steps=3)
    run_episode(env, policy, seed=0)
    assert env.rendered == [0, 3, 6] and [frames for frames, _ in policy.seen] == [[0], [3], [6]]
    run_episode(env, ReplayPolicy([np.zeros((2, 4), np.float32)]), seed=0)
    assert env.on_request and env.rendered == [], "a replay does not look"
    for options in ({"record": True}, {"max_seq_len": 2}):
        policy = Scripted(chunk(0, 0, 0), 3, options.pop("max_seq_len", 1))
        run_episode(env, policy, seed=0, **options)
        assert not env.on_request and policy.seen[1][0][-1] == 3


def test_success_at_any_step_ends_the_episode():
    env, policy = CountingEnv(goal=3), Scripted(chunk(1, 0, 1, 0), n_action_steps=4)
    result = run_episode(env, policy, seed=5)
    assert (result.success, result.steps, result.plans, result.seed) == (True, 5, 2, 5)


def test_actions_are_sent_as_predicted():
    env = CountingEnv(goal=1)
    run_episode(env, Scripted(chunk(19.0), n_action_steps=1), seed=0)
    assert env.actions[0][0] == 19.0


def test_prompt_is_the_environment_s_unless_given():
    policy = Scripted(chunk(1), n_action_steps=1)
    run_episode(CountingEnv(goal=1), policy, seed=0)
    assert policy.seen[0][1] == "press the button"
    run_episode(CountingEnv(goal=1), policy, seed=0, prompt="open the window")
    assert policy.seen[0][1] == "open the window"


@pytest.mark.parametrize(
    ("bad", "found"), [(chunk(1), "1 actions, 0 of them"), (chunk(1, float("nan")), "2 actions, 1 of them")]
)
def test_bad_plans(bad, found):
    with pytest.raises(ValueError, match=f"seed 4 step 0: the policy planned {found} not finite; wanted at least 2"):
        run_episode(CountingEnv(), Scripted(bad, n_action_steps=2), seed=4)


def test_replay_plays_the_seed_s_demonstration_and_holds_its_last_action():
    demos = [np.array(chunk(0.1, 0.2), np.float32), np.array(chunk(0.3), np.float32)]
    env = CountingEnv(goal=99, limit=4)
    run_episode(env, ReplayPolicy(demos), seed=2)
    np.testing.assert_allclose([action[0] for action in env.actions], [0.1, 0.2, 0.2, 0.2])
    run_episode(env, ReplayPolicy(demos), seed=3)
    np.testing.assert_allclose([action[0] for action in env.actions], [0.3] * 4)
    with pytest.raises(ValueError, match="no demonstration to replay"):
        ReplayPolicy([])


def test_task_result_and_videos(tmp_path):
    settings = {"prompts": {}, "num_envs": 1, "num_videos": 2, "restart": False}
    policy, tiers = {"count": ExpertPolicy()}, {"count": "easy"}
    written = evaluate_tasks(tmp_path, tiers, range(7, 11), lambda _: CountingEnv(goal=3), policy, {}, **settings)
    assert json.loads((tmp_path / "rollouts.json").read_text()) == written
    result = written["tasks"]["count"]
    assert (result["successes"], result["episodes"], result["steps"]) == (4, 4, [3] * 4)
    assert result["seeds"] == [7, 8, 9, 10] and result["wilson_95"] == pytest.approx([0.5101, 1.0], abs=1e-4)
    assert [path.rsplit("/", 1)[1] for path in result["videos"]] == [
        "count_seed7.mp4",
        "count_seed8.mp4",
        "count.mp4",
    ]
    with av.open(result["videos"][0]) as one, av.open(result["videos"][2]) as both:
        frames = [frame.to_ndarray(format="rgb24") for frame in one.decode(video=0)]
        assert len(frames) == 4  # the first observation and one per step
        assert both.streams.video[0].width == 2 * one.streams.video[0].width
    assert frames[-1][-30:].mean(axis=(0, 1)).argmax() == 1 and frames[0][-30:].max() > 200  # green strip; white text


def test_summary_over_tasks():
    result = {
        "a": {"successes": 3, "episodes": 4, "success_rate": 0.75},
        "b": {"successes": 1, "episodes": 4, "success_rate": 0.25},
    }
    summary = summarize_tasks(result)
    assert (summary["successes"], summary["episodes"], summary["mean_success_rate"]) == (4, 8, 0.5)
    assert summary["wilson_95"] == pytest.approx([0.2152, 0.7848], abs=1e-4)


def test_nothing_to_film_is_said():
    policy = ReplayPolicy([np.zeros((1, 4), np.float32)])
    with pytest.raises(ValueError, match="shows no picture that could be filmed; .*--num_videos 0"):
        run_episode(CountingEnv(cameras=()), policy, seed=0, record=True)


def test_frames_are_enlarged_by_a_whole_factor_and_even():
    frame = captioned(np.zeros((95, 97, 3), np.uint8), ("a prompt that is far too long for this width" * 3, "step"))
    assert frame.shape == (95 * 3 - 1 + 34, 97 * 3 - 1, 3)
    assert len(tiled([[frame] * 2, [frame] * 5, [frame]])) == 5
    assert tiled([[frame]] * 3)[0].shape == (2 * frame.shape[0], 2 * frame.shape[1], 3)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory, tiny_paligemma_dir):
    folder = tmp_path_factory.mktemp("run")
    demos = write_episodes(folder / "demos.parquet", [6, 5])
    return VLAPredictor.from_checkpoint(train_tiny(folder, tiny_paligemma_dir, [demos]), "cpu")


def test_model_policy_is_a_function_of_the_seed(predictor):
    env, policy = CountingEnv(goal=99, limit=5), ModelPolicy(predictor)

    def actions(seed):
        assert run_episode(env, policy, seed).plans == 3  # 2 of 4 actions executed, 5 steps
        return np.stack(env.actions)

    first = actions(1)
    assert not np.allclose(actions(2), first)
    np.testing.assert_array_equal(actions(1), first)
    assert not np.allclose(first[0], first[2])  # fresh noise at each plan


def test_a_plan_is_the_same_beside_others_to_the_bit(predictor, monkeypatch):
    """On a processor a plan has a batch of its own: in larger ones sums are rounded differently."""
    sizes, real = [], VLAPredictor.predict_measured

    def predict_measured(self, batch, seeds, **more):
        sizes.append(len(batch["state"]))
        return real(self, batch, seeds, **more)

    monkeypatch.setattr(VLAPredictor, "predict_measured", predict_measured)
    policy, shown = ModelPolicy(predictor), CountingEnv(goal=9, limit=5).reset(seed=0)[0]
    asked = [EpisodeRequest(seed, 0, PlanRequest((shown,), "count", None)) for seed in range(3)]
    together = policy.plan_many(asked)
    assert sizes == [1, 1, 1]
    for request, plan in zip(asked, together, strict=True):
        np.testing.assert_array_equal(plan.actions, policy.plan_many([request])[0].actions)


def test_blind_policy_sees_grey_and_everything_else(predictor):
    observations = [
        {"image_1": np.full((40, 40, 3), value, np.uint8), "state": np.ones(4, np.float32)} for value in (0, 255)
    ]
    plans = {}
    for blind in (False, True):
        policy = ModelPolicy(predictor, blind=blind)
        for i, observation in enumerate(observations):
            policy.reset(CountingEnv(), seed=0)
            plans[blind, i] = policy.plan([observation], "press the button")
    np.testing.assert_array_equal(plans[True, 0], plans[True, 1])
    grey = {"image_1": np.full((40, 40, 3), GREY, np.uint8), "state": np.ones(4, np.float32)}
    policy = ModelPolicy(predictor)
    policy.reset(CountingEnv(), seed=0)
    np.testing.assert_array_equal(policy.plan([grey], "press the button"), plans[True, 0])


def test_model_policy_settings(predictor):
    assert ModelPolicy(predictor).execution == executing(horizon=4, n_action_steps=2)  # the checkpoint's
    assert ModelPolicy(predictor, execution_settings(predictor, n_action_steps=3)).execution.n_action_steps == 3
    with pytest.raises(ValueError, match="n_action_steps is 5, but the policy predicts a horizon of 4"):
        execution_settings(predictor, n_action_steps=5)
    with pytest.raises(ValueError, match="unknown key inference.latency; did you mean inference.latency_steps?"):
        execution_settings(predictor, latency=2)
    env = CountingEnv()
    env.state_dim = 7
    with pytest.raises(ValueError, match="the policy has state_dim 4, the environment 7"):
        run_episode(env, ModelPolicy(predictor), seed=0)


def test_an_environment_shows_its_cameras_by_name(tmp_path, tiny_paligemma_dir):
    names = ("front", "wrist", "side")
    demos = write_episodes(tmp_path / "demos.parquet", [6], cameras=names)
    path = train_tiny(tmp_path, tiny_paligemma_dir, [demos], data={"cameras": list(names)})
    predictor = VLAPredictor.from_checkpoint(path, "cpu")
    policy = ModelPolicy(predictor)
    seen = []
    observation = predictor.observation
    predictor.observation = lambda **given: seen.append(given["images"]) or observation(**given)
    result = run_episode(CountingEnv(limit=4, cameras=("side", "front", "top")), policy, seed=3, record=True)
    assert result.steps == 4 and len(result.frames) == 5
    assert [list(images) for images in seen] == [["front", "side"]] * 2  # wrist is absent, nothing reads top
    with pytest.raises(ValueError, match="policy reads the cameras front, wrist, side, the environment has top"):
        run_episode(CountingEnv(limit=4, cameras=("top",)), policy, seed=3)
