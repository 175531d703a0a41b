"""The Meta-World environment: seeds, actions, pictures."""

import gc

import numpy as np
import pytest

from envs import make_env
from envs.metaworld_tasks import PARAPHRASES, TASKS
from tests.helpers import needs

pytestmark = needs("metaworld")


def make(task="window-open-v3", **options):
    return make_env("metaworld", task, **{"image_size": 48, **options})


@pytest.fixture(scope="module")
def window():
    env = make(max_episode_steps=12)
    yield env
    env.close()


def run(env, seed, actions):
    """Every observation of an episode."""
    observations = [env.reset(seed=seed)[0]]
    return observations + [env.step(action)[0] for action in actions]


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])


def test_meets_the_interface(window):
    observation, info = window.reset(seed=0)
    assert info == {"success": False, "seed": 0}
    assert window.observation_space.contains(observation)
    assert observation["image_1"].shape == (48, 48, 3) and observation["image_1"].dtype == np.uint8
    assert observation["state"].shape == (window.state_dim,) and observation["state"].dtype == np.float32
    assert window.action_space.shape == (window.per_action_dim,)
    assert (window.task, window.instruction) == ("window-open-v3", "slide the window open")
    assert window.control_hz == 80
    assert set(window.settings()) >= {"camera", "second_camera", "image_size", "hide_goal", "control_hz"}


def test_every_task_has_paraphrases_that_mean_no_other(window):
    assert window.instructions == ("slide the window open", "open the window", "push the window open by its handle")
    assert PARAPHRASES.keys() == TASKS.keys() and all(len(others) == 2 for others in PARAPHRASES.values())
    said = [task.instruction for task in TASKS.values()] + [text for others in PARAPHRASES.values() for text in others]
    assert len(set(said)) == 150


def test_images_on_request_are_those_of_the_step(window):
    actions = np.random.default_rng(0).uniform(-1, 1, (4, 4)).astype(np.float32)
    eager = run(window, 3, actions)
    observation, _ = window.reset(seed=3, options={"images_on_request": True})
    for step, wanted in enumerate(eager):
        assert observation.keys() == {"state"}
        if step in (0, 3, 4):  # those between are never rendered
            assert_same({**window.images(), **observation}, wanted)
        if step < len(actions):
            observation = window.step(actions[step])[0]
    assert "image_1" in window.reset(seed=3)[0], "of that episode alone"
    with pytest.raises(ValueError, match=r"unknown reset options \['image'\]; images_on_request is the only one"):
        window.reset(seed=3, options={"image": True})


def test_every_task_has_a_simulation_and_an_expert():
    from envs.mujoco_rendering import import_mujoco

    import_mujoco()
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    from metaworld.policies import ENV_POLICY_MAP

    assert set(TASKS) == set(ALL_V3_ENVIRONMENTS) == set(ENV_POLICY_MAP)


# door-lock computes its target from the scene before the reset, push has a random goal
@pytest.mark.parametrize("task", ["window-open-v3", "door-lock-v3", "push-v3"])
def test_reset_is_a_function_of_the_seed(task):
    env = make(task)
    first, _ = env.reset(seed=7)
    target = env._sim._target_pos.copy()
    other, _ = env.reset(seed=8)
    assert (first["image_1"] != other["image_1"]).any()
    for _ in range(20):
        env.step(env.expert_action())
    again, _ = env.reset(seed=7)
    fresh_env = make(task)
    fresh, _ = fresh_env.reset(seed=7)
    for observation, sim in ((again, env._sim), (fresh, fresh_env._sim)):
        assert_same(first, observation)
        np.testing.assert_array_equal(sim._target_pos, target)


def test_unseeded_resets_differ_and_can_be_repeated(window):
    _, first = window.reset()
    _, second = window.reset()
    assert first["seed"] != second["seed"]


def test_state_does_not_tell_where_the_object_is(window):
    first, _ = window.reset(seed=0)
    second, _ = window.reset(seed=1)
    np.testing.assert_array_equal(first["state"], second["state"])
    assert (first["image_1"] != second["image_1"]).any()


def test_actions_are_clipped(window):
    directions = np.array([[1, -1, 1, -1], [-1, 1, 1, 1]], dtype=np.float32)
    for once, far in zip(run(window, 3, directions), run(window, 3, 7 * directions), strict=True):
        assert_same(once, far)


def test_holding_still(window):
    window.reset(seed=3)
    np.testing.assert_array_equal(window.hold_action(None), np.zeros(4))
    for _ in range(10):
        action = np.array([0.5, 0.5, -0.5, 1.0], np.float32)
        window.step(action)
    for _ in range(40):  # it swings out
        window.step(window.hold_action(action))
    before = window.step(window.hold_action(action))[0]["state"]
    after = [window.step(window.hold_action(action))[0]["state"] for _ in range(10)][-1]
    assert np.abs(after[:3] - before[:3]).max() < 1e-3
    assert window.hold_action(action)[3] == 1.0


def test_expert_is_clipped_and_succeeds():
    env = make("button-press-topdown-v3")
    env.reset(seed=0)
    actions, success, steps = [], False, 0
    while not success:
        actions.append(env.expert_action())
        _, _, terminated, truncated, info = env.step(actions[-1])
        success, steps = info["success"], steps + 1
        assert isinstance(success, bool) and terminated == success and not truncated
    assert 30 <= steps <= 120
    stacked = np.stack(actions)
    assert stacked.dtype == np.float32
    assert np.abs(stacked).max() == 1.0  # the raw policy asks for more


def test_success_can_be_left_to_the_caller():
    env = make("reach-v3", terminate_on_success=False)
    env.reset(seed=0)
    infos = []
    for _ in range(60):
        _, _, terminated, _, info = env.step(env.expert_action())
        assert not terminated
        infos.append(info["success"])
    assert infos[-1]


def test_truncates(window):
    window.reset(seed=0)
    ends = [window.step(np.zeros(4))[3] for _ in range(12)]
    assert ends == [False] * 11 + [True]


def cyan_pixels(image):
    """Mean row and column of the left finger's pad, the only cyan thing."""
    red, green, blue = np.moveaxis(image.astype(int), -1, 0)
    rows, columns = np.nonzero((green > 120) & (blue > 120) & (red < 80))
    assert len(rows) >= 3
    return rows.mean(), columns.mean()


@pytest.mark.parametrize("camera", ["corner", "corner2", "corner3", "corner4"])
def test_up_is_up_and_right_is_right(camera):
    env = make("reach-v3", camera=camera, image_size=128)
    observation, _ = env.reset(seed=0)
    start_row, start_column = cyan_pixels(observation["image_1"])
    for _ in range(12):
        observation, *_ = env.step(np.array([0, 0, 1, -1]))
    row, _ = cyan_pixels(observation["image_1"])
    assert row < start_row - 3  # row 0 is at the top

    env.reset(seed=0)
    for _ in range(12):
        observation, *_ = env.step(np.array([1, 0, 0, -1]))
    _, column = cyan_pixels(observation["image_1"])
    view = -env._sim.data.camera(camera).xmat.reshape(3, 3)[:, 2]
    right = np.cross(view, [0, 0, 1])
    assert abs(column - start_column) > 3
    assert np.sign(column - start_column) == np.sign(right[0])


def test_a_renderer_is_not_disturbed_by_another():
    first, second = make("window-open-v3"), make("button-press-topdown-v3")
    seen_first = first.reset(seed=0)[0]["image_1"]
    seen_second = second.reset(seed=0)[0]["image_1"]
    np.testing.assert_array_equal(first.render(), seen_first)
    np.testing.assert_array_equal(second.render(), seen_second)
    first.close()
    np.testing.assert_array_equal(second.render(), seen_second)
    np.testing.assert_array_equal(first.render(), seen_first)  # a closed one starts again
    second.render()
    del first
    gc.collect()
    np.testing.assert_array_equal(second.render(), seen_second)
    second.close()


def test_pictures_match_those_of_mujoco_renderer():
    env = make("window-open-v3", image_size=96)
    ours = env.reset(seed=0)[0]["image_1"].astype(int)
    env.close()
    import mujoco

    from envs.metaworld_env import _make_simulation

    sim = _make_simulation("window-open-v3")  # with all faces of the meshes
    sim.data.qpos[:], sim.data.qvel[:] = env._sim.data.qpos, env._sim.data.qvel
    sim.model.body_pos[:] = env._sim.model.body_pos
    sim.model.site_pos[:] = env._sim.model.site_pos
    mujoco.mj_forward(sim.model, sim.data)
    sim.model.vis.quality.offsamples = 0
    with mujoco.Renderer(sim.model, 96, 96) as renderer:
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        renderer.update_scene(sim.data, "corner4")
        theirs = renderer.render()[::-1, ::-1].astype(int)
    difference = np.abs(ours - theirs)
    assert difference.mean() < 1.0  # of 255
    assert (difference.max(axis=-1) > 16).mean() < 0.02  # edges of the robot


def test_second_camera():
    env = make("window-open-v3", second_camera="gripperPOV")
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert (observation["image_2"] != observation["image_1"]).any()


def test_any_number_of_cameras_under_any_names():
    env = make("window-open-v3", cameras="corner4,wrist=gripperPOV,corner")
    observation, _ = env.reset(seed=0)
    assert list(observation) == ["corner4", "wrist", "corner", "state"] and env.observation_space.contains(observation)
    assert len({observation[name].tobytes() for name in ("corner4", "wrist", "corner")}) == 3
    assert env.settings()["cameras"] == "corner4=corner4,wrist=gripperPOV,corner=corner"
    two = make("window-open-v3", second_camera="gripperPOV").reset(seed=0)[0]
    assert (two["image_1"] == observation["corner4"]).all() and (two["image_2"] == observation["wrist"]).all()
    for options, message in (
        ({"cameras": "front"}, "metaworld has no camera 'front'"),
        ({"cameras": "corner", "camera": "corner2"}, "cameras and camera or second_camera both name cameras"),
        ({"cameras": "corner,corner"}, "each name once"),
        ({"cameras": "a="}, "wanted <camera> or <name>=<camera>"),
    ):
        with pytest.raises(ValueError, match=message):
            make("window-open-v3", **options)


def test_hidden_goal():
    shown, hidden = (make("push-v3", hide_goal=hide).reset(seed=0)[0]["image_1"].astype(int) for hide in (False, True))

    def green(image):
        return ((image[..., 1] > 150) & (image[..., 0] < 100) & (image[..., 2] < 100)).sum()

    assert green(shown) > 0
    assert green(hidden) == 0


def test_two_tasks_can_start_from_the_same_picture():
    opened = make("faucet-open-v3", hide_goal=True)
    closed = make("faucet-close-v3", hide_goal=True, layout_of="faucet-open-v3")
    assert opened.instruction != closed.instruction
    start, info = opened.reset(seed=4)
    actions = []
    while not info["success"]:
        actions.append(opened.expert_action())
        *_, info = opened.step(actions[-1])

    assert_same(start, closed.reset(seed=4)[0])
    assert not any(closed.step(action)[4]["success"] for action in actions)  # opening is not closing


def test_errors_name_what_was_wanted(window):
    with pytest.raises(ValueError, match="no camera 'corner9'; did you mean 'corner'?"):
        make(camera="corner9")
    for options, message in (
        ({"max_episode_steps": 501}, "max_episode_steps is 501, must be a whole number from 1 to 500"),
        ({"max_episode_steps": 50.5}, "max_episode_steps is 50.5, must be a whole number"),
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": "abc"}, "image_size is 'abc', must be a whole number of at least 1"),
        ({"hide_goal": "maybe"}, "hide_goal is 'maybe'; give true or false"),
        ({"camera": 3}, "metaworld has no camera 3; valid names: behindGripper"),
        ({"layout_of": 3}, "unknown metaworld task 3; valid names"),
        ({"cameras": {}}, "cameras is {}; wanted <camera> or <name>=<camera>"),
        ({"cameras": {"state": "corner"}}, "cameras: 'state=corner': no camera may be called 'state'"),
        ({"task": "reach-v3"}, "MetaWorldEnv has no option 'task'"),
        ({"self": 1}, "MetaWorldEnv has no option 'self'"),
    ):
        with pytest.raises(ValueError, match=message):
            make_env("metaworld", "window-open-v3", **options)
    with pytest.raises(ValueError, match="layout_of='push-v3' has another scene"):
        make(layout_of="push-v3")
    with pytest.raises(RuntimeError, match="call reset"):
        make().step(np.zeros(4))
    window.reset(seed=0)
    with pytest.raises(ValueError, match=r"window-open-v3: action has shape \(7,\), must be \(4,\)"):
        window.step(np.zeros(7))
    with pytest.raises(ValueError, match="not finite"):
        window.step(np.array([0, np.nan, 0, 0]))
