"""Corrections: where the expert takes over from a policy, what is recorded, and flags that don't go together."""

from __future__ import annotations

import gymnasium
import numpy as np
import pyarrow.parquet as pq
import pytest

from envs import make_env
from scripts._recording import record
from scripts._takeover import Corridor, WatchedEnv
from tests.helpers import needs, write_episodes
from tests.inference.checkpoints import train_tiny
from tests.scripts.test_record_demos import arguments, needs_simulator


class Line(gymnasium.Env):
    """A point on a line that has to reach 1; the expert goes there by 0.1 a step."""

    instruction, state_dim, per_action_dim, max_episode_steps = "go", 1, 2, 40
    action_space = gymnasium.spaces.Box(-2.0, 2.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        self.x, self.t = 0.0, 0
        return self._observe(), {"success": False, "seed": seed}

    def step(self, action):
        self.x, self.t = self.x + 0.1 * float(action[0]), self.t + 1
        return self._observe(), 0.0, False, self.t >= self.max_episode_steps, {"success": self.x >= 0.999}

    def expert_action(self):
        return np.array([1.0, 0.0], np.float32)

    def restart_expert(self):
        """It looks at the present state alone."""

    def settings(self):
        return {"control_hz": 10.0}

    def _observe(self):
        return {"image_1": np.zeros((8, 8, 3), np.uint8), "state": np.array([self.x], np.float32)}


def watched(actions, corridor, **options):
    """The attempt of somebody who takes these actions as long as the expert lets them."""
    env = WatchedEnv(Line(), corridor, lambda image: b"image", options.get("steps_after_success", 0))
    env.reset(seed=7)
    for action in actions:
        _, _, terminated, truncated, info = env.step(np.array(action, np.float32))
        if terminated or truncated or info["success"]:
            break
    return env.seen


def test_the_expert_takes_over_where_the_mean_distance_exceeds_the_corridor():
    good, bad = [1.0, 0.0], [-1.0, 0.0]  # bad: 2 of the range's half, 2, in one of two dimensions: a distance of 0.5
    seen = watched([good] * 4 + [bad] * 30, Corridor(0.3, 4, None))
    assert seen.intervention.index(True) == 6, "0.25 after two bad steps of four, 0.375 after three: not executed"
    assert [action[0] for action in seen.actions[:7]] == [1, 1, 1, 1, -1, -1, 1]
    assert seen.success and seen.is_wanted and seen.seed == 7
    assert len(seen.actions) == 4 + 2 + 8 and len(seen.states) == len(seen.images["image_1"]) == 14
    steps = seen.steps()
    assert steps.extra["intervention"].tolist() == [False] * 6 + [True] * 8 and steps.extra["success"].all()


def test_a_policy_that_needs_no_help_is_not_kept():
    seen = watched([[1.0, 0.0]] * 30, Corridor(0.3, 4, None))
    assert seen.success and not any(seen.intervention) and not seen.is_wanted


def test_patience_ends_what_the_corridor_lets_pass():
    seen = watched([[0.0, 0.0]] * 40, Corridor(2.0, 4, None))
    assert seen.intervention.index(True) == 20, "half of the episode's steps"
    assert watched([[0.0, 0.0]] * 40, Corridor(2.0, 4, 5)).intervention.index(True) == 5


def test_actions_are_recorded_as_executed():
    seen = watched([[9.0, 0.0]] * 3, Corridor(2.0, 4, None), steps_after_success=2)
    assert max(abs(action).max() for action in seen.actions) == 2.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--policy", "c"], "--policy and --takeover go together"),
        (["--takeover"], "--policy and --takeover go together"),
        (
            ["--corridor", "0.3"],
            "--corridor says when the expert takes over from a policy: give --policy",
        ),
        (["--policy", "c", "--takeover", "--corridor", "3"], "--corridor is 3.0, must be more than 0 and at most 2"),
        (["--policy", "c", "--takeover", "--patience", "0"], "--patience is 0, must be at least 1"),
        (["--policy", "c", "--takeover", "--noise_scale", "0.1"], "--noise_scale is 0.1, but with --takeover"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        record(arguments(tmp_path, *flags))


class TestInTheSimulator:
    pytestmark = needs_simulator

    def test_corrections_of_an_untrained_policy(self, tmp_path, tiny_paligemma_dir):
        demos = write_episodes(tmp_path / "demos.parquet", [6, 5])
        checkpoint = str(train_tiny(tmp_path / "run", tiny_paligemma_dir, [demos]))
        flags = ["--num_workers", "1", "--policy", checkpoint, "--takeover", "--corridor_steps", "5"]
        (summary,) = record(arguments(tmp_path / "out", *flags, tasks=["reach-v3"], episodes=2))
        table = pq.read_table(summary.path)
        assert table.column_names[-3:] == ["seed", "intervention", "success"]
        rows = table.to_pylist()
        firsts = [i for i, row in enumerate(rows) if row["is_first"]]
        assert len(firsts) == 2 and all(row["success"] for row in rows)
        for begin, end in zip(firsts, [*firsts[1:], len(rows)], strict=True):
            flags = [row["intervention"] for row in rows[begin:end]]
            assert flags == sorted(flags) and not flags[0] and flags[-1], "the policy first, then the expert"
        metadata = table.schema.metadata
        assert metadata[b"policy"].decode() == checkpoint and b'"width": 0.5' in metadata[b"corridor"]
        with pytest.raises(RuntimeError, match=r"reach-v3: 0 of 3 attempts .* became corrections, 1 are wanted"):
            hopeless = ["--max_episode_steps", "8", "--patience", "7"]
            record(arguments(tmp_path / "none", *flags_of(checkpoint), *hopeless, tasks=["reach-v3"], episodes=1))


def flags_of(checkpoint):
    return ["--num_workers", "1", "--policy", checkpoint, "--takeover"]


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(0, marks=needs("mujoco", "gym_aloha")),
        pytest.param(1, marks=[*needs("mujoco", "gym_aloha"), pytest.mark.slow]),
    ],
)
def test_an_expert_with_stages_begins_where_it_takes_over(seed):
    """ALOHA's: 60 steps pass in which nothing moves, and all of its first stages would have timed out."""
    env = WatchedEnv(make_env("aloha", "transfer_cube", image_size=16), Corridor(2.0, 4, 60), lambda image: b"image", 0)
    observation, _ = env.reset(seed=seed)
    over = False
    while not over:
        *_, over, truncated, _ = env.step(env.unwrapped.hold_action(observation["state"]))
        over |= truncated
    env.close()
    assert env.seen.success and env.seen.is_wanted and env.seen.intervention.index(True) == 60
