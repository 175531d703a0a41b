"""LIBERO: seeds to the bit, one picture for several tasks, layouts, official states, cameras, the expert.

The tables need no simulator; the simulator's tests are slow, since it takes 1.7 GB of packages and seconds to load.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from envs import expand_tasks, make_env
from envs.libero_env import _make_control, _official_states, rotation_vector
from envs.libero_expert import PickAndPlace
from envs.libero_tasks import PARAPHRASES, STEP_LIMITS, SUITES, TASKS, instructions_of, suite_of
from tests.helpers import needs

INSTALLED = needs("gymnasium")[1]
PLATE, STOVE = (f"libero_goal.put_the_bowl_on_the_{place}" for place in ("plate", "stove"))
DRAWER = "libero_spatial.pick_up_the_black_bowl_in_the_top_drawer_of_the_wooden_cabinet_and_place_it_on_the_plate"


def test_the_table_of_tasks():
    assert {suite: len(names) for suite, names in SUITES.items()} == {
        "libero_spatial": 10,
        "libero_object": 10,
        "libero_goal": 10,
        "libero_10": 10,
        "libero_90": 90,
    }
    assert len(TASKS) == 130 + 40 and SUITES.keys() == STEP_LIMITS.keys()
    assert expand_tasks("libero", ["libero_goal"]) == [f"libero_goal.{name}" for name in SUITES["libero_goal"]]
    assert all(len(words) == len(SUITES[suite]) for suite, words in PARAPHRASES.items())


def test_instructions_and_their_paraphrases():
    told, other, reworded = instructions_of(PLATE)
    assert (told, other) == ("put the bowl on the plate", "place the bowl on top of the plate")
    assert reworded == "set the bowl on the plate"
    paraphrased = PLATE.replace("libero_goal", "libero_goal_lan")
    assert instructions_of(paraphrased) == (other, told, reworded) and suite_of(paraphrased) == suite_of(PLATE)
    scene = next(task for task in TASKS if ".KITCHEN_SCENE10_" in task)
    assert all(words == words.lower() and "scene" not in words for words in instructions_of(scene))
    assert all(len(set(instructions_of(task))) == len(instructions_of(task)) >= 2 for task in TASKS)
    opened = "open_the_top_drawer_of_the_cabinet_and_put_the_bowl_in_it"
    told = "pull open the top drawer of the cabinet and set the bowl in it"
    assert instructions_of(f"libero_90.KITCHEN_SCENE1_{opened}")[-1] == told
    goal = [instructions_of(f"libero_goal.{name}")[0] for name in SUITES["libero_goal"]]
    assert len(set(goal)) == 10
    assert Counter(TASKS.values())["libero_goal_lan"] == 10


@pytest.mark.parametrize("degrees", [0, 1, 90, 179, 180, 181, 270])
def test_rotation_vectors_go_on_past_half_a_turn(degrees):
    """robosuite's `quat2axisangle`: 2 arccos(w) times the axis, for any sign of w."""
    angle = np.radians(degrees)
    axis = np.array([0.6, -0.8, 0.0])
    quaternion = [*(axis * np.sin(angle / 2)), np.cos(angle / 2)]
    np.testing.assert_allclose(rotation_vector(quaternion), axis * angle, atol=1e-9)
    np.testing.assert_allclose(rotation_vector([0.0, 0.0, 0.0, -1.0]), 0.0)


def test_an_upstream_libero_that_asks_or_keeps_pickles_is_told_in_one_line(monkeypatch, tmp_path):
    """Upstream's package asks for its folders at its first import, and loads states with torch's pickles."""

    class Asks:
        def find_spec(self, name, *_):
            if name == "libero":
                raise EOFError("EOF when reading a line")

    for name in [name for name in sys.modules if name.partition(".")[0] == "libero"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Asks(), *sys.meta_path])
    with pytest.raises(RuntimeError, match=r"asks .* run once at a terminal: python -c 'import libero.libero'"):
        _make_control("libero_goal", "put_the_bowl_on_the_plate")

    class Suite:
        tasks = (SimpleNamespace(name="a"),)

        def get_task_init_states(self, index):
            torch.save(np.zeros((50, 3)), tmp_path / "states")
            return torch.load(tmp_path / "states")

    with pytest.raises(RuntimeError, match="keeps its official states as pickles.*requirements-libero.txt"):
        _official_states(Suite(), "a")


@INSTALLED
def test_options_that_cannot_be():
    for options, message in (
        ({"layout": "wild"}, "layout is 'wild'; give one of standard, wide"),
        ({"look": "slow"}, "look is 'slow'; give one of fast, shipped"),
        ({"layout": "wide", "initial_states": "official"}, "exclude each other: official states are standard"),
        ({"camera": "agentview"}, "libero has no option 'camera'; did you mean 'cameras'"),
        ({"image_size": 0}, "image_size is 0, must be a whole number of at least 1"),
        ({"settle_steps": -1}, "settle_steps is -1, must be a whole number of at least 0"),
        ({"settle_steps": 2.5}, "settle_steps is 2.5, must be a whole number"),
        ({"mirror": "left"}, "mirror is 'left'; give true or false"),
    ):
        with pytest.raises(ValueError, match=message):
            make_env("libero", PLATE, **options)
    with pytest.raises(ValueError, match="unknown libero task 'libero_goal.put_the_bowl_on_the_plat'; did you mean"):
        make_env("libero", "libero_goal.put_the_bowl_on_the_plat")


def run(env, steps):
    for _ in range(steps):
        *_, info = env.step(env.expert_action())
    return info


def digest(env, observation):
    state = env._env.sim.get_state().flatten()
    return [hashlib.sha256(np.ascontiguousarray(part)).hexdigest() for part in (state, *observation.values())]


@pytest.fixture(scope="module")
def plate():
    env = make_env("libero", PLATE, image_size=64)
    yield env
    env.close()


@pytest.mark.slow
class TestTheSimulator:
    pytestmark = needs("libero", "robosuite")

    def test_meets_the_interface(self, plate):
        observation, info = plate.reset(seed=0)
        assert info == {"success": False, "seed": 0} and plate.observation_space.contains(observation)
        assert set(observation) == {"image_1", "image_2", "state"}
        assert (plate.state_dim, plate.per_action_dim, plate.control_hz, plate.max_episode_steps) == (8, 7, 20, 300)
        x, y, z = observation["state"][:3]
        assert abs(x) < 0.5 and abs(y) < 0.3 and 0.9 < z < 1.5  # metres, above the table
        assert 3.0 < np.linalg.norm(observation["state"][3:6]) < 3.3  # it looks down: half a turn about x
        assert plate.settings()["mujoco"] and plate.settings()["settle_steps"] == 10
        np.testing.assert_array_equal(plate.hold_action(None), [0, 0, 0, 0, 0, 0, -1])

    def test_equal_seeds_are_equal_to_the_bit_whatever_was_before(self, plate):
        before = np.random.get_state()[1].copy()
        first = digest(plate, plate.reset(seed=5)[0])
        run(plate, 40)  # ends with a shut gripper
        assert digest(plate, plate.reset(seed=6)[0]) != first
        run(plate, 3)
        assert digest(plate, plate.reset(seed=5)[0]) == first
        np.testing.assert_array_equal(np.random.get_state()[1], before)  # the global generator is left alone

    def test_things_on_shelves_and_in_drawers_lie_there_whatever_was_before(self):
        """LIBERO's soft reset would add a cabinet's place to its last one, and drop the bowl from a metre above."""
        drawer = make_env("libero", DRAWER, image_size=64)
        first = digest(drawer, drawer.reset(seed=5)[0])
        drawer.reset(seed=6)
        assert digest(drawer, drawer.reset(seed=5)[0]) == first
        places = [drawer._env.sim.data.body_xpos[drawer._env.obj_body_id["akita_black_bowl_1"]].copy()]
        drawer.step(drawer.hold_action(None))
        places.append(drawer._env.sim.data.body_xpos[drawer._env.obj_body_id["akita_black_bowl_1"]].copy())
        assert 1.0 < places[0][2] < 1.1  # in the upper drawer, where the published states have it too
        np.testing.assert_allclose(places[1], places[0], atol=1e-4)  # and at rest
        run(drawer, 10)
        while not (last := drawer.step(drawer.expert_action()))[-1]["success"]:
            assert not last[3], "the expert takes it out between the drawer's walls"
        drawer.close()

    def test_another_task_starts_from_the_same_picture(self, plate):
        first = digest(plate, plate.reset(seed=5)[0])
        stove = make_env("libero", STOVE, image_size=64)
        assert digest(stove, stove.reset(seed=5)[0]) == first and stove.instruction != plate.instruction
        stove.close()

    def test_the_expert_succeeds_and_asking_it_changes_nothing(self, plate):
        observation, _ = plate.reset(seed=1, options={"images_on_request": True})
        success, states = False, [observation["state"]]
        while not success:
            for _ in range(2):
                action = plate.expert_action()
            observation, *_, truncated, info = plate.step(action)
            states.append(observation["state"])
            success = info["success"]
            assert not truncated
        assert np.abs(action).max() <= 1.0
        assert np.abs(np.diff(states, axis=0)).max() < 0.5, "no rotation vector jumps to its negative"

    @pytest.mark.parametrize("stage", [3, 4, 5])
    def test_an_expert_that_takes_over_goes_on_with_what_is_held(self, plate, stage):
        plate.reset(seed=1, options={"images_on_request": True})
        action = plate.expert_action()
        while plate._expert._stage < stage or plate._expert._since < 6:
            plate.step(action)
            action = plate.expert_action()
        plate.restart_expert()
        commands, info = [], {"success": False}
        while not info["success"]:
            action = plate.expert_action()
            *_, truncated, info = plate.step(action)
            commands.append(action[6])
            assert not truncated
        assert len(commands) < 60 and (np.diff(commands) < 0).sum() <= 1, "it opens once, over the plate"
        assert commands[0] == 1.0

    def test_an_expert_that_watches_sees_who_holds_the_thing(self, plate):
        """Somebody else takes the bowl at another side of its rim."""
        plate.reset(seed=1, options={"images_on_request": True})
        watched, other = plate.expert_action(), PickAndPlace(plate._env, PLATE)
        rooms = [grip for room, grip in other._grips_of_a_rim() if room > 0.012]
        other._grip = max(rooms, key=lambda grip: np.linalg.norm(grip.position - other._grip.position))
        assert np.linalg.norm(other._grip.position - plate._expert._grip.position) > 0.05
        info = {"success": False}
        while not info["success"]:
            if other._stage == 4:
                assert watched[6] == 1.0 and np.abs(watched - other.action()).mean() < 0.3
            *_, truncated, info = plate.step(other.action())
            other.advance()
            watched = plate.expert_action()
            assert not truncated
        assert other._stage == plate._expert._stage == 6

    def test_an_expert_that_watches_sees_a_gripper_come_in_from_the_side(self, plate):
        plate.reset(seed=1, options={"images_on_request": True})
        plate.expert_action()
        other = PickAndPlace(plate._env, PLATE)
        above, _ = other._target()
        for aside in ([-0.05, 0.0, -0.035], [0.0, 0.0, -0.035]):  # lower than where the approach ends
            other._target = lambda point=above + aside: (point, -1.0)
            for _ in range(25):
                assert plate._expert._stage == 0 and plate.expert_action()[6] == -1.0
                plate.step(other.action())
                if plate._expert._stage:
                    break
        assert plate._expert._stage == 1 and plate.expert_action()[2] < 0, "it goes down, not up first"

    def test_goals_of_other_tasks_of_the_scene(self, plate):
        plate.reset(seed=0, options={"images_on_request": True})
        assert not plate.holds(PLATE) and not plate.holds(STOVE)
        while not plate.step(plate.expert_action())[-1]["success"]:
            pass
        assert plate.holds(PLATE) and not plate.holds(STOVE)
        with pytest.raises(ValueError, match="is about .*basket.*, which the scene of libero_goal.put_the_bowl_on_the"):
            plate.holds("libero_object.pick_up_the_milk_and_place_it_in_the_basket")
        with pytest.raises(ValueError, match="unknown libero task 'libero_goal.put_the_bowl'; did you mean"):
            plate.holds("libero_goal.put_the_bowl")

    def test_the_hand_s_camera_is_not_turned_mid_episode(self, plate):
        """Its own axis hovers about the horizontal; a turned picture would jump by far more than the scene moves."""
        plate.reset(seed=0, options={"images_on_request": True})
        pictures = []
        for _ in range(30):
            plate.step(plate.expert_action())
            pictures.append(plate.images()["image_2"].astype(int))
        jumps = [np.abs(a - b).mean() for a, b in zip(pictures, pictures[1:], strict=False)]
        turned = [np.abs(a - b[::-1, ::-1]).mean() for a, b in zip(pictures, pictures[1:], strict=False)]
        assert max(jumps) < min(turned)

    def test_wide_official_mirrored_and_shipped(self, plate):
        straight = plate.reset(seed=3)[0]["image_1"]
        wide = make_env("libero", PLATE, image_size=64, layout="wide", image_2=None)
        places = []
        for seed in range(6):
            wide.reset(seed=seed)
            places.append(wide._env.sim.data.body_xpos[wide._env.obj_body_id["akita_black_bowl_1"]][:2].copy())
        assert np.std(places, axis=0).max() > 0.025
        wide.close()
        mirrored = make_env("libero", PLATE, image_size=64, mirror=True)
        np.testing.assert_array_equal(mirrored.reset(seed=3)[0]["image_1"], straight[:, ::-1])
        mirrored.close()
        official = make_env("libero", PLATE, image_size=64, initial_states="official", settle_steps=0)
        first, other = (official.reset(seed=seed)[0] for seed in (0, 50))
        np.testing.assert_array_equal(first["state"], other["state"])  # there are 50
        np.testing.assert_allclose(official._env.sim.get_state().flatten()[1:], official._states[0][1:], atol=1e-12)
        official.close()
        shipped = make_env("libero", PLATE, image_size=64, look="shipped").reset(seed=3)[0]["image_1"]
        difference = np.abs(shipped.astype(int) - straight).mean()
        assert 0.5 < difference < 40  # shadows and edges, of the same scene

    def test_tasks_without_an_expert_say_so(self):
        env = make_env("libero", "libero_goal.turn_on_the_stove", image_size=64)
        env.reset(seed=0, options={"images_on_request": True})
        with pytest.raises(NotImplementedError, match="libero_goal.turn_on_the_stove has no scripted expert"):
            env.expert_action()
        env.close()
