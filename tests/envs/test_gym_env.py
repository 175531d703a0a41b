"""Any gymnasium environment behind the interface, on gym-pusht and on a small one made here."""

from __future__ import annotations

import json

import gymnasium
import numpy as np
import pytest

import main_eval
from envs import expand_tasks, make_env
from tests.helpers import PROMPTS, needs, write_episodes

PUSHT = "gym_pusht:gym_pusht/PushT-v0"
SEEN = {"obs_type": "pixels_agent_pos", "image_1": "pixels", "state": "agent_pos", "prompt": "push the T onto its mark"}
pytestmark = needs("gymnasium", "gym_pusht")


class Arm(gymnasium.Env):
    """Nested observations, actions far outside the declared space, success by reward alone."""

    metadata = {"render_modes": ["rgb_array"]}
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode, self.actions = render_mode, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.actions = []
        return self._observation(), {}

    def step(self, action):
        self.actions.append(action)
        return self._observation(), float(len(self.actions)), len(self.actions) == 3, False, self._info()

    def _info(self):
        return {"solved": True} | ({"at_the_end": True} if len(self.actions) == 3 else {})

    def render(self):
        return np.full((8, 8, 3), 7, np.uint8)

    def _observation(self):
        pictures = {"top": np.zeros((4, 6, 3), np.uint8), "depth": np.zeros((4, 6, 1), np.float32)}
        return {"pixels": pictures, "robot": {"joints": np.array([0.5, -2.0]), "grip": 0.25}, "all": np.arange(5.0)}


gymnasium.register("tests/Arm-v0", entry_point=Arm)


def arm(**options):
    given = {"image_1": "pixels.top", "state": "robot.joints", "prompt": "reach", "control_hz": 50}
    return make_env("gym", "tests/Arm-v0", **{**given, "max_episode_steps": 9, **options})


def test_push_t_meets_the_interface():
    env = make_env("gym", PUSHT, **SEEN)
    first, info = env.reset(seed=3)
    assert info["success"] is False and env.observation_space.contains(first)
    assert first["image_1"].shape == (96, 96, 3) and first["state"].shape == (2,)
    assert (env.control_hz, env.max_episode_steps, env.state_dim, env.per_action_dim) == (10.0, 300, 2, 2)
    lazy, _ = env.reset(seed=3, options={"images_on_request": True})
    assert lazy.keys() == {"state"}
    np.testing.assert_array_equal(env.images()["image_1"], first["image_1"])
    np.testing.assert_array_equal(lazy["state"], first["state"])
    for _ in range(20):  # towards a corner, in the environment's own pixels
        observation, _, _, _, info = env.step(np.array([500.0, 20.0]))
    assert np.abs(observation["state"] - [500, 20]).max() < 60 and info["success"] is False
    assert env.settings()["image_1"] == "pixels"
    with pytest.raises(NotImplementedError, match="has no scripted expert; record demonstrations elsewhere"):
        env.expert_action()


def test_places_of_a_nested_observation():
    env = arm(image_2="render", state="robot.joints+robot.grip+all[1:3]")
    observation, _ = env.reset(seed=0)
    np.testing.assert_array_equal(observation["state"], np.array([0.5, -2.0, 0.25, 1.0, 2.0], np.float32))
    assert observation["image_1"].shape == (4, 6, 3) and (observation["image_2"] == 7).all()
    named = arm(image_1=None, cameras={"front": "pixels.top"})
    assert set(named.reset(seed=0)[0]) == {"front", "state"}


def test_actions_are_clipped_only_where_asked():
    for options, wanted in (({}, [5.0, -5.0]), ({"clip": True}, [1.0, -1.0])):
        env = arm(success="solved", **options)
        assert env.clips_actions == bool(options)
        env.reset(seed=0)
        env.step(np.array([5.0, -5.0]))
        np.testing.assert_array_equal(env._env.unwrapped.actions[0], wanted)


@pytest.mark.parametrize(
    ("success", "steps"), [("solved", 1), ("at_the_end", 3), ("terminated", 3), ("reward>=2", 2), ("reward>=1e3", None)]
)
def test_what_success_is(success, steps):
    env = arm(success=success)
    env.reset(seed=0)
    succeeded = [env.step(np.zeros(2))[4]["success"] for _ in range(3)]
    assert (succeeded.index(True) + 1 if any(succeeded) else None) == steps


def test_one_paraphrase_is_a_text():
    assert arm(paraphrases="touch it").instructions == ("reach", "touch it")
    assert arm(paraphrases=["touch it", "go there"]).instructions == ("reach", "touch it", "go there")


def test_holding_still_must_be_said():
    with pytest.raises(ValueError, match="Give --env_options hold=zero where actions are displacements, hold=state"):
        arm().hold_action(None)
    for hold, wanted in (("zero", [0, 0]), ("state", [0.5, -2.0])):
        env = arm(hold=hold)
        env.reset(seed=0)
        np.testing.assert_array_equal(env.hold_action(None), np.array(wanted, np.float32))


def test_what_it_carries_is_held_too():
    env = arm(hold="zero", gripper=1)
    env.reset(seed=0)
    np.testing.assert_array_equal(env.hold_action(np.array([0.3, -1.0])), np.array([0, -1], np.float32))
    np.testing.assert_array_equal(env.hold_action(None), np.zeros(2, np.float32))


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (PUSHT, {"prompt": None}, "what is the robot told\\? Give --env_options prompt="),
        (PUSHT, {"image_1": "pixel"}, "image_1=pixel: no picture is there; there is pixels, render"),
        (PUSHT, {"state": None}, "where is the state\\? Give --env_options state=...; there is agent_pos"),
        (PUSHT, {"state": "agent_po"}, "state=agent_po: no vector is there; there is agent_pos"),
        (PUSHT, {"state": "agent_pos[1:5]"}, r"state=agent_pos\[1:5\]: agent_pos has 2 values"),
        (PUSHT, {"sucess": "x"}, "takes no option 'sucess'; did you mean 'success'"),
        (PUSHT, {"hold": "still"}, "hold='still'; give one of state, zero"),
        (PUSHT, {"gripper": 1}, "gripper=1 is kept while the robot is held still; give hold=zero or hold=state"),
        (PUSHT, {"hold": "zero", "gripper": [0, 2]}, r"gripper=\[0, 2\]; give numbers from 0 to 1"),
        (PUSHT, {"hold": "zero", "gripper": True}, "gripper=.*True.*; give numbers from 0 to 1"),
        (PUSHT, {"control_hz": 0}, "control_hz is 0; give the steps a second"),
        (PUSHT, {"control_hz": float("nan")}, "control_hz is nan; give the steps a second"),
        (PUSHT, {"max_episode_steps": -1}, "max_episode_steps is -1, must be a whole number of at least 1"),
        (PUSHT, {"max_episode_steps": "abc"}, "max_episode_steps is 'abc', must be a whole number"),
        (PUSHT, {"clip": "maybe"}, "clip is 'maybe'; give true or false"),
        (PUSHT, {"prompt": {"task": "push"}}, "prompt is {'task': 'push'}, which YAML does not read as text"),
        (PUSHT, {"state": 5}, "state is 5, which YAML does not read as text"),
        (PUSHT, {"success": True}, "success is True, which YAML does not read as text"),
        (PUSHT, {"paraphrases": 3}, "paraphrases is 3; give one text, or several"),
        (PUSHT, {"paraphrases": ["push", 3]}, "paraphrases is 3, which YAML does not read as text"),
        (PUSHT, {"image_size": 64}, "takes no option 'image_size'"),
        (PUSHT, {"id": "x"}, "takes no option 'id'"),
        (PUSHT, {"task": "x"}, "GymEnv has no option 'task'"),
        ("gym_pusht:gym_pusht/PushX-v0", {}, "gymnasium makes no 'gym_pusht:gym_pusht/PushX-v0'"),
        ("no_such_module:A-v0", {}, "no module 'no_such_module'; install the package that registers"),
        ("CartPole-v1", {}, "only vectors of real numbers are supported"),
        ("all", {}, "gym has no list of tasks that 'all' could stand for"),
    ],
)
def test_errors_name_what_was_wanted(task, options, message):
    seen = SEEN if task == PUSHT else {"prompt": "x"}
    with pytest.raises(ValueError, match=message):
        make_env("gym", task, **{**seen, **options})


def test_success_that_info_does_not_hold_is_named():
    env = arm()
    env.reset(seed=0)
    assert [env.step(np.zeros(2))[4]["success"] for _ in range(2)] == [False, False]
    with pytest.raises(ValueError, match="success=is_success: the environment's info has no such key; it has solved"):
        env.step(np.zeros(2))  # the episode's last: some environments fill it in only there
    with pytest.raises(ValueError, match="tests/Arm-v0: control_hz is None"):
        arm(control_hz=None)
    with pytest.raises(ValueError, match="tests/Arm-v0 never ends an episode; give --env_options max_episode_steps"):
        arm(max_episode_steps=None)


def test_closed_loop_without_tiers(tmp_path):
    """main_eval.py with a control and a task whose name no file could have."""
    demos = write_episodes(tmp_path / "demos.parquet", [5], state_dim=2, action_dim=2)
    seen = {**SEEN, "prompt": PROMPTS[0], "max_episode_steps": 6}
    options = [f"{key}={value}" for key, value in seen.items()]
    command = ["--env", "gym", "--tasks", PUSHT, "--control", "replay", "--demos_path", str(demos), "--episodes", "2"]
    command += ["--num_videos", "1", "--output_dir", str(tmp_path / "out"), "--env_options", *options]
    main_eval.main(command)
    found = json.loads((tmp_path / "out/rollouts.json").read_text())
    assert found["tasks"][PUSHT]["steps"] == [6, 6] and "tiers" not in found["summary"]
    assert (tmp_path / "out/videos/gym_pusht_gym_pusht_PushT-v0_seed10000.mp4").is_file()
    assert expand_tasks("gym", [PUSHT, PUSHT]) == [PUSHT]
