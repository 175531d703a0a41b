"""Episodes in several simulator processes, with one policy that plans for all of them.

    process 1: Episode ─► request ─┐           ┌─► plan
    process 2: Episode ─► request ─┼─► planner ┼─► plan
    process n: Episode ─► request ─┘           └─► plan

A plan's noise depends on its episode's seed and its number in the episode alone, so that the number of processes
changes no episode: on a processor to the bit, on a GPU, which plans for several at once, up to rounding. The processes
run `inference.closed_loop.simulator`; nothing is pickled on the way.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import numpy as np
import torch

from inference.closed_loop.episode import EpisodeRequest, EpisodeResult, Plan, PlanRequest
from inference.closed_loop.policies import Control, Policy, local_planner
from inference.closed_loop.simulator import Job, MakeEnv, reference_to, run_job
from inference.serving.wire import pack, unpack
from model.context import ActionPrefix

logger = logging.getLogger(__name__)


class Planner(Policy, Protocol):
    """A policy that also plans for several episodes at once."""

    def check_widths(self, state_dim: int, per_action_dim: int) -> None:
        """Raise a ValueError where an environment does not fit the policy."""

    def plan_many(self, requests: Sequence[EpisodeRequest]) -> list[Plan]:
        """A plan for each."""


@dataclass(frozen=True)
class Finished:
    """An episode that was run.

    Attributes:
        job, result: the job, and its result; without frames and actions.
        instruction: the environment's own.
        env_settings: see `RobotEnv.settings`.
    """

    job: Job
    result: EpisodeResult
    instruction: str
    env_settings: dict[str, Any]


def run_episodes(
    jobs: Sequence[Job],
    make_env: MakeEnv,
    policy: Planner | dict[str, Control],
    on_finished: Callable[[Finished], None],
    *,
    num_envs: int,
) -> None:
    """Run every job, several at a time.

    Args:
        jobs: in the order in which they are started.
        make_env: task -> environment: a function of a module, or a partial of one with plain values, so that the
            simulator processes find it.
        policy: plans in this process; or, per task, a control that each simulator process runs itself.
        on_finished: called in this process, in the order in which episodes end.
        num_envs: simulator processes; 1 simulates in this process.

    Raises:
        ValueError: what an episode raises: a plan that is not finite, an environment that does not fit the policy.
        RuntimeError: a simulator process died.
    """
    if num_envs == 1:
        _run_here(jobs, make_env, policy, on_finished)
        return
    central = None if isinstance(policy, dict) else policy
    start: dict[str, Any] = {"env": reference_to(make_env)}
    if central is not None:
        start |= {"settings": asdict(central.execution), "max_seq_len": central.max_seq_len}
    waiting = [
        (job, {"job": asdict(job), "control": None if central else policy[job.task].described(job.seed)})
        for job in reversed(jobs)
    ]
    running: dict[Connection, Job] = {}
    processes = []
    try:
        for _ in range(min(num_envs, len(jobs))):
            process, connection = start_simulator()
            processes.append(process)
            connection.send_bytes(pack(start))
            _start_next(connection, waiting, running)
        requests: dict[Connection, EpisodeRequest] = {}
        deadline = patience = 0.0
        while running:
            others = list(running.keys() - requests.keys())
            ready = wait(others, max(0.0, deadline - time.monotonic()) if requests else None) if others else []
            for connection in ready:
                message = _receive(connection, running[connection])
                if message["kind"] == "plan":
                    # Wait for the other processes' requests as long as a plan takes: a larger batch costs hardly more.
                    deadline = deadline if requests else time.monotonic() + patience
                    requests[connection] = _request(message)
                elif message["kind"] == "env" and central is not None:
                    central.check_widths(message["state_dim"], message["per_action_dim"])
                elif message["kind"] == "finished":
                    on_finished(_finished(running[connection], message))
                    _start_next(connection, waiting, running)
            if requests and not ready:
                started = time.monotonic()
                for connection, plan in zip(requests, central.plan_many(list(requests.values())), strict=True):
                    actions = np.ascontiguousarray(plan.actions)
                    connection.send_bytes(pack({"actions": actions, "uncertainty": float(plan.uncertainty)}))
                requests, patience = {}, time.monotonic() - started
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def start_simulator() -> tuple[subprocess.Popen[bytes], Connection]:
    """Start a simulator process; returns it and the connection to it."""
    here, there = socket.socketpair()
    with there:
        command = [sys.executable, "-P", "-m", "inference.closed_loop.simulator", str(there.fileno())]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        # A group of its own: Ctrl-C in the terminal is for the process that started it, which then ends it.
        process = subprocess.Popen(command, env=environment, pass_fds=[there.fileno()], process_group=0)
    return process, Connection(here.detach())


def _run_here(
    jobs: Sequence[Job],
    make_env: MakeEnv,
    policy: Planner | dict[str, Control],
    on_finished: Callable[[Finished], None],
) -> None:
    """Run every job in this process, one after the other."""
    env, task = None, None
    for job in jobs:
        if job.task != task:
            if env is not None:
                env.close()
            env, task = make_env(job.task), job.task
        driver = policy[job.task] if isinstance(policy, dict) else policy
        result = run_job(env, job, driver.execution, driver.max_seq_len, local_planner(driver, env, job.seed))
        on_finished(Finished(job, result, env.unwrapped.instruction, env.unwrapped.settings()))
    if env is not None:
        env.close()


def _start_next(
    connection: Connection, waiting: list[tuple[Job, dict[str, Any]]], running: dict[Connection, Job]
) -> None:
    """Give a simulator process its next job; where there is none, tell it to end."""
    if waiting:
        running[connection], message = waiting.pop()
        connection.send_bytes(pack(message))
    else:
        running.pop(connection, None)
        connection.send_bytes(pack(None))


def _receive(connection: Connection, job: Job) -> dict[str, Any]:
    try:
        message = unpack(connection.recv_bytes())
    except (EOFError, ConnectionResetError):
        raise RuntimeError(
            f"the simulator process of {job.task} seed {job.seed} died (killed for want of memory, or a crash of the "
            "renderer); run the evaluation again to go on, perhaps with fewer --num_envs"
        ) from None
    if message["kind"] == "error":
        raise ValueError(f"{job.task}: {message['text']}")
    return message


def _request(message: dict[str, Any]) -> EpisodeRequest:
    prefix = message["prefix"]
    if prefix is not None:
        tensors = (torch.from_numpy(np.array(prefix[name])) for name in ("action", "weight"))
        prefix = ActionPrefix(*tensors, prefix["max_guidance_weight"], prefix["clean"])
    return EpisodeRequest(
        message["seed"], message["number"], PlanRequest(tuple(message["history"]), message["prompt"], prefix)
    )


def _finished(job: Job, message: dict[str, Any]) -> Finished:
    return Finished(job, EpisodeResult(**message["result"]), message["instruction"], message["env_settings"])
