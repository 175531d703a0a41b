"""Closed-loop episodes in several simulator processes, with one policy that plans for all of them in batches.

    process 1: Episode ─► request ─┐                    ┌─► plan
    process 2: Episode ─► request ─┼─► planner, batched ┼─► plan
    process n: Episode ─► request ─┘                    └─► plan

A plan's noise depends on its episode's seed and its number in the episode alone, so that neither the number of
processes nor what else is in a batch changes an episode, up to rounding. Messages between the processes are those
of `inference.wire`.
"""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch

from inference.episode import Asked, Episode, EpisodeResult, PlanRequest
from inference.execution import ExecutionSettings
from inference.rollout import VIDEO_FPS, Policy
from inference.video import write_video
from inference.wire import pack, unpack
from model.action_head.guidance import ActionPrefix

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One episode to be run.

    Attributes:
        task: what `make_env` takes.
        seed: of the initial state and of the noise.
        prompt: instead of the environment's instruction.
        video: file that the episode is filmed into; None: it is not.
    """

    task: str
    seed: int
    prompt: str | None = None
    video: str | None = None


class Planner(Policy, Protocol):
    """A policy that also plans for several episodes at once."""

    def check_widths(self, state_dim: int, per_action_dim: int) -> None:
        """Raise a ValueError where an environment does not fit the policy."""

    def plan_many(self, asked: Sequence[Asked]) -> list[np.ndarray]:
        """A plan (T, A) for each."""


@dataclass(frozen=True)
class Finished:
    """An episode that was run.

    Attributes:
        job, result: what was asked for, and what came of it; without frames and actions.
        instruction: the environment's own.
        env_settings: see `RobotEnv.settings`.
    """

    job: Job
    result: EpisodeResult
    instruction: str
    env_settings: dict[str, Any]


MakeEnv = Callable[[str], gymnasium.Env]


def run_jobs(
    jobs: Sequence[Job],
    make_env: MakeEnv,
    policy: Planner | dict[str, Policy],
    on_finished: Callable[[Finished], None],
    *,
    num_envs: int,
) -> None:
    """Run every job, several at a time.

    Args:
        jobs: in the order in which they are started.
        make_env: task -> environment; called in the simulator processes, so it must be importable there.
        policy: plans in this process, in batches; or, per task, a policy that each simulator process runs itself.
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
    context = multiprocessing.get_context("spawn")  # neither threads nor a renderer may be inherited
    waiting, running = list(reversed(jobs)), {}
    processes = []
    try:
        for _ in range(min(num_envs, len(jobs))):
            here, there = context.Pipe()
            settings = None if central is None else (central.execution, central.max_seq_len)
            process = context.Process(target=_simulate, args=(there, make_env, settings, policy if not central else {}))
            process.start()
            there.close()
            processes.append(process)
            _start_next(here, waiting, running)
        asked: dict[Connection, Asked] = {}
        while running:
            for connection in wait(list(running.keys() - asked.keys()), timeout=0 if asked else None):
                message = _receive(connection, running[connection])
                if message["kind"] == "plan":
                    asked[connection] = _asked(message)
                elif message["kind"] == "env" and central is not None:
                    central.check_widths(message["state_dim"], message["per_action_dim"])
                elif message["kind"] == "finished":
                    on_finished(_finished(running[connection], message))
                    _start_next(connection, waiting, running)
            # Whoever is ready is planned for; those still simulating join the next batch.
            ready = wait(list(running.keys() - asked.keys()), timeout=0) if asked else []
            if asked and not ready:
                for connection, action_TA in zip(asked, central.plan_many(list(asked.values())), strict=True):
                    connection.send_bytes(pack(np.ascontiguousarray(action_TA)))
                asked = {}
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _run_here(
    jobs: Sequence[Job],
    make_env: MakeEnv,
    policy: Planner | dict[str, Policy],
    on_finished: Callable[[Finished], None],
) -> None:
    """The same in this process, one episode after the other."""
    env, task = None, None
    for job in jobs:
        if job.task != task:
            if env is not None:
                env.close()
            env, task = make_env(job.task), job.task
        own = policy[job.task] if isinstance(policy, dict) else policy
        result = _run(env, job, own.execution, own.max_seq_len, _own_planner(own, env, job.seed))
        result.frames, result.actions = [], []
        on_finished(Finished(job, result, env.unwrapped.instruction, env.unwrapped.settings()))
    if env is not None:
        env.close()


def _start_next(connection: Connection, waiting: list[Job], running: dict[Connection, Job]) -> None:
    """Give a simulator process its next job, or let it go."""
    if waiting:
        running[connection] = waiting.pop()
        connection.send_bytes(pack(asdict(running[connection])))
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


def _asked(message: dict[str, Any]) -> Asked:
    prefix = message["prefix"]
    if prefix is not None:
        tensors = (torch.from_numpy(np.array(prefix[name])) for name in ("action", "weight"))
        prefix = ActionPrefix(*tensors, prefix["max_guidance_weight"], prefix["clean"])
    return Asked(message["seed"], message["number"], PlanRequest(tuple(message["history"]), message["prompt"], prefix))


def _finished(job: Job, message: dict[str, Any]) -> Finished:
    return Finished(job, EpisodeResult(**message["result"]), message["instruction"], message["env_settings"])


def _simulate(
    connection: Connection,
    make_env: MakeEnv,
    central: tuple[ExecutionSettings, int] | None,
    policies: dict[str, Policy],
) -> None:
    """What a simulator process does: run jobs until there are none."""
    torch.set_num_threads(1)
    env, task = None, None
    while (fields := unpack(connection.recv_bytes())) is not None:
        job = Job(**fields)
        try:
            if job.task != task:
                if env is not None:
                    env.close()  # one live renderer per process
                env, task = make_env(job.task), job.task
                widths = {name: getattr(env.unwrapped, name) for name in ("state_dim", "per_action_dim")}
                connection.send_bytes(pack({"kind": "env", **widths}))
            if central is None:
                plan = _own_planner(policies[job.task], env, job.seed)
                settings, max_seq_len = policies[job.task].execution, policies[job.task].max_seq_len
            else:
                plan, (settings, max_seq_len) = _distant_planner(connection, job.seed), central
            result = _run(env, job, settings, max_seq_len, plan)
        except (ValueError, ModuleNotFoundError, RuntimeError) as error:
            connection.send_bytes(pack({"kind": "error", "text": str(error)}))
            return
        result.frames, result.actions = [], []
        facts = {"instruction": env.unwrapped.instruction, "env_settings": env.unwrapped.settings()}
        connection.send_bytes(pack({"kind": "finished", "result": asdict(result), **facts}))
    if env is not None:
        env.close()


def _run(
    env: gymnasium.Env,
    job: Job,
    settings: ExecutionSettings,
    max_seq_len: int,
    plan: Callable[[PlanRequest], np.ndarray],
) -> EpisodeResult:
    episode = Episode(env, settings, job.seed, prompt=job.prompt, max_seq_len=max_seq_len, record=bool(job.video))
    while (request := episode.advance()) is not None:
        episode.give(plan(request))
    if job.video:
        write_video(Path(job.video), episode.result.frames, min(env.unwrapped.control_hz, VIDEO_FPS))
    return episode.result


def _own_planner(policy: Policy, env: gymnasium.Env, seed: int) -> Callable[[PlanRequest], np.ndarray]:
    policy.reset(env, seed)
    return lambda request: policy.plan(request.history, request.prompt, request.prefix)


def _distant_planner(connection: Connection, seed: int) -> Callable[[PlanRequest], np.ndarray]:
    number = 0

    def plan(request: PlanRequest) -> np.ndarray:
        nonlocal number
        prefix = request.prefix
        if prefix is not None:
            tensors = {"action": prefix.action_BTA.numpy(), "weight": prefix.weight_BT.numpy()}
            prefix = {**tensors, "max_guidance_weight": prefix.max_guidance_weight, "clean": prefix.clean}
        message = {"kind": "plan", "seed": seed, "number": number, "history": list(request.history)}
        connection.send_bytes(pack({**message, "prompt": request.prompt, "prefix": prefix}))
        number += 1
        return np.array(unpack(connection.recv_bytes()))

    return plan
