"""Real simulators in several processes: every episode is that of a serial run, to the bit."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

from envs import make_env
from inference.closed_loop.parallel import run_episodes
from inference.closed_loop.policies import ExpertPolicy
from inference.closed_loop.simulator import Job
from tests.helpers import needs


def episodes_of(make, jobs, num_envs):
    """What an expert, which reads the whole simulation, saw and did in every episode."""
    found = {}
    jobs = [dataclasses.replace(job, keep_steps=True) for job in jobs]
    policies = {job.task: ExpertPolicy() for job in jobs}
    run_episodes(jobs, make, policies, lambda e: found.update({(e.job.task, e.job.seed): e.result}), num_envs=num_envs)
    return found


def check(make, jobs):
    serial, parallel = episodes_of(make, jobs, 1), episodes_of(make, jobs, 2)
    assert serial.keys() == parallel.keys() == {(job.task, job.seed) for job in jobs}
    for key, result in serial.items():
        assert (parallel[key].success, parallel[key].steps) == (result.success, result.steps), key
        for name, values in result.recording.items():  # pictures, states and actions of every step
            np.testing.assert_array_equal(parallel[key].recording[name], values, err_msg=f"{key} {name}")
    assert len({result.recording["action"].tobytes() for result in serial.values()}) == len(jobs)


class TestAloha:
    pytestmark = needs("gymnasium", "gym_aloha")

    def test_processes_change_no_episode(self):
        make = functools.partial(make_env, "aloha", image_size=32)
        jobs = [Job("transfer_cube", seed) for seed in range(3)]
        check(make, [*jobs, Job("insertion", 0)])


@pytest.mark.slow
class TestLibero:
    pytestmark = needs("libero", "robosuite")

    def test_processes_change_no_episode(self):
        """A process meets scenes in another order, and the gripper's command must not outlive an episode."""
        make = functools.partial(make_env, "libero", image_size=32, layout="wide", max_episode_steps=120)
        check(make, [Job("libero_goal.put_the_bowl_on_the_plate", seed) for seed in range(4)])
