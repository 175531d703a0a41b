"""ALOHA: the scenes, actions and success of gym-aloha, experts, cameras."""

from __future__ import annotations

import numpy as np
import pytest

from envs import make_env
from envs.aloha_tasks import TASKS
from tests.helpers import needs

pytestmark = needs("gymnasium", "gym_aloha")


def make(task="transfer_cube", **options):
    return make_env("aloha", task, **{"image_size": 32, **options})


def expert_run(env, seed, steps=300):
    """The first step of success, and all rewards."""
    env.reset(seed=seed, options={"images_on_request": True})
    rewards, first = [], None
    for step in range(1, steps + 1):
        _, reward, terminated, truncated, info = env.step(env.expert_action())
        rewards.append(reward)
        first = first or (step if info["success"] else None)
        if terminated or truncated:
            break
    return first, rewards


def test_meets_the_interface():
    env = make(cameras="image_1=top,image_2=angle,wrist=left_wrist,right_wrist")
    observation, info = env.reset(seed=0)
    assert info == {"success": False, "seed": 0} and env.observation_space.contains(observation)
    assert set(observation) == {"image_1", "image_2", "wrist", "right_wrist", "state"}
    assert len({image.tobytes() for key, image in observation.items() if key != "state"}) == 4
    assert (env.state_dim, env.per_action_dim, env.control_hz, env.max_episode_steps) == (14, 14, 50, 300)
    assert env.instructions == TASKS["transfer_cube"] and len(set(env.instructions)) >= 3
    assert env.settings() | {"image_1": "top", "hold_steps": 1, "image_size": 32} == env.settings()


@pytest.mark.parametrize("task", TASKS)
def test_scenes_are_those_of_gym_aloha(task):
    """The same seed puts the objects where the package's own sampler puts them."""
    from gym_aloha import utils

    wanted = {"transfer_cube": utils.sample_box_pose, "insertion": utils.sample_insertion_pose}[task]
    env = make(task)
    for seed in (0, 7):
        first, _ = env.reset(seed=seed)
        placed = env._data.qpos[16:].copy()
        np.testing.assert_allclose(placed, np.concatenate(np.atleast_2d(wanted(seed))).ravel())
        env.step(env.expert_action())
        again, _ = env.reset(seed=seed)
        for key in first:
            np.testing.assert_array_equal(first[key], again[key])


@pytest.mark.parametrize("task", TASKS)
def test_the_expert_succeeds(task):
    env = make(task)
    for seed in (0, 1):
        first, rewards = expert_run(env, seed)
        assert first is not None and first < 200 and max(rewards) == 4


def test_success_may_have_to_be_held():
    env = make(hold_steps=40)
    first, rewards = expert_run(env, 0)
    published, _ = expert_run(make(), 0)
    assert first >= published + 39 and all(reward == 4 for reward in rewards[-40:])


@pytest.mark.parametrize(("task", "holding"), [("transfer_cube", [13]), ("insertion", [6, 13])])
def test_an_expert_that_takes_over_goes_on_with_what_is_held(task, holding):
    env = make(task)
    env.reset(seed=0, options={"images_on_request": True})
    reward, ended = 0, False
    while reward != 2 and not ended:  # lifted
        _, reward, _, ended, _ = env.step(env.expert_action())
    env.restart_expert()
    openings = []
    while reward < 4 and len(openings) < 60:
        action = env.expert_action()
        reward = env.step(action)[1]
        openings.append(action[holding])
    assert reward == 4 and len(openings) >= 25 and np.max(openings) == 0.0, "no gripper opens on the way"


def test_asking_the_expert_changes_nothing():
    runs = []
    for asked in (1, 3):
        env = make()
        env.reset(seed=2, options={"images_on_request": True})
        for _ in range(60):
            for _ in range(asked):
                action = env.expert_action()
            env.step(action)
        runs.append(env._data.qpos.copy())
    np.testing.assert_array_equal(*runs)


def test_actions_are_absolute_and_clipped_to_the_actuators():
    env = make()
    env.reset(seed=0)
    assert env.action_space.high[3] > 3 and env.action_space.low[6] == 0 and env.action_space.high[6] == 1
    start = env.hold_action(None)
    assert start[2] == pytest.approx(1.16, abs=1e-3)  # outside the [-1, 1] that the package declares
    for _ in range(25):
        observation, *_ = env.step(start)
    assert np.abs(observation["state"] - start).max() < 0.12  # the wrist gives way a little under its weight
    once, far = (env.action_space.high, env.action_space.high * 10)
    ends = []
    for action in (once, far):
        env.reset(seed=0)
        for _ in range(5):
            env.step(action)
        ends.append(env._data.qpos.copy())
    np.testing.assert_array_equal(*ends)


def test_errors_name_what_was_wanted():
    for options, message in (
        ({"cameras": "topp"}, "aloha has no camera 'topp'; did you mean 'top'?"),
        ({"cameras": "a=b=c,a"}, "cameras: 'a'; wanted <camera> or <name>=<camera>, each name once"),
        ({"image_1": 3}, "camera image_1=3; give an image's name and a camera's"),
        ({"camera": "top"}, "aloha has no option 'camera'; did you mean 'cameras'?"),
        ({"hold_steps": 0}, "hold_steps is 0, must be a whole number of at least 1"),
        ({"hold_steps": 301}, "hold_steps is 301, but an episode ends after max_episode_steps 300"),
        ({"terminate_on_success": "maybe"}, "terminate_on_success is 'maybe'; give true or false"),
        ({"cameras": "action=top"}, "no camera may be called 'action'"),
        ({"cameras": "../x=top"}, "no camera may be called '../x'"),
        ({"cameras": 3}, "cameras is 3; wanted <camera> or <name>=<camera>"),
    ):
        with pytest.raises(ValueError, match=message.replace("?", r"\?")):
            make(**options)
    with pytest.raises(ValueError, match="AlohaEnv has no option 'task'"):
        make_env("aloha", "transfer_cube", **{"task": "insertion"})
    with pytest.raises(ValueError, match="unknown aloha task 'transfer'; did you mean 'transfer_cube'"):
        make("transfer")
    env = make()
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(np.zeros(14))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"action has shape \(7,\), must be \(14,\)"):
        env.step(np.zeros(7))
    with pytest.raises(ValueError, match="not finite"):
        env.step(np.full(14, np.nan))
