"""A simulator process: runs the episodes that it is given, and asks the process that started it for every plan.

Started by `inference.closed_loop.parallel` as `python -m inference.closed_loop.simulator FD`, FD being its end of a
socket pair.
Messages are those of `inference.serving.wire`:

    to it      once {"env": where `make_env` is found, "settings", "max_seq_len"}; then jobs, one at a time; None to end
    from it    "env" when it made an environment, "plan" when it wants a plan, "finished", "error"

It imports neither torch nor the program that started it, because both take seconds to import, in every process.
"""

from __future__ import annotations

import functools
import importlib
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from inference.alarm import Alarm, Calibration
from inference.closed_loop.episode import Episode, EpisodeResult, Plan, PlanRequest
from inference.closed_loop.execution import ExecutionSettings
from inference.closed_loop.policies import control_from, local_planner
from inference.closed_loop.video import VIDEO_FPS, write_video
from inference.serving.wire import pack, unpack

MakeEnv = Callable[[str], gymnasium.Env]


@dataclass(frozen=True)
class Job:
    """One episode to be run.

    Attributes:
        task: what `make_env` takes.
        seed: of the initial state and of the noise.
        prompt: instead of the environment's instruction.
        video: file that the episode is filmed into; None: it is not.
        label: who acts, for the video.
        keep_steps: whether the result's `recording` is wanted.
        alarm: the values of a `Calibration`; None: there is no alarm.
    """

    task: str
    seed: int
    prompt: str | None = None
    video: str | None = None
    label: str = "policy"
    keep_steps: bool = False
    alarm: dict[str, Any] | None = None


def run_job(
    env: gymnasium.Env,
    job: Job,
    settings: ExecutionSettings,
    max_seq_len: int,
    plan: Callable[[PlanRequest], Plan],
) -> EpisodeResult:
    """One episode, filmed and recorded where the job says so; actions and frames are not kept."""
    alarm = None if job.alarm is None else Alarm(Calibration(**job.alarm))
    kept = {"record": bool(job.video), "label": job.label, "keep_steps": job.keep_steps, "alarm": alarm}
    episode = Episode(env, settings, job.seed, prompt=job.prompt, max_seq_len=max_seq_len, **kept)
    episode.run(plan)
    if job.video:
        write_video(Path(job.video), episode.result.frames, min(env.unwrapped.control_hz, VIDEO_FPS))
    episode.result.frames, episode.result.actions = [], []
    return episode.result


def reference_to(make_env: MakeEnv) -> dict[str, Any]:
    """Plain values from which another process finds a function of a module, or a partial of one."""
    partial = make_env if isinstance(make_env, functools.partial) else functools.partial(make_env)
    place = {"module": partial.func.__module__, "name": partial.func.__qualname__}
    return {**place, "args": list(partial.args), "options": partial.keywords}


def _remote_planner(connection: Connection, seed: int) -> Callable[[PlanRequest], Plan]:
    number = 0

    def plan(request: PlanRequest) -> Plan:
        nonlocal number
        prefix = request.prefix
        if prefix is not None:
            tensors = {"action": prefix.action_BTA.numpy(), "weight": prefix.weight_BT.numpy()}
            prefix = {**tensors, "max_guidance_weight": prefix.max_guidance_weight, "clean": prefix.clean}
        message = {"kind": "plan", "seed": seed, "number": number, "history": list(request.history)}
        connection.send_bytes(pack({**message, "prompt": request.prompt, "prefix": prefix}))
        number += 1
        answer = unpack(connection.recv_bytes())
        return Plan(np.array(answer["actions"]), answer["uncertainty"])

    return plan


def simulate(connection: Connection) -> None:
    """Run jobs until None comes instead of one."""
    start = unpack(connection.recv_bytes())
    place = start["env"]
    function = getattr(importlib.import_module(place["module"]), place["name"])
    make_env = functools.partial(function, *place["args"], **place["options"])
    env, task = None, None
    while (message := unpack(connection.recv_bytes())) is not None:
        job = Job(**message["job"])
        try:
            if job.task != task:
                if env is not None:
                    env.close()  # one live renderer per process
                env, task = make_env(job.task), job.task
                widths = {name: getattr(env.unwrapped, name) for name in ("state_dim", "per_action_dim")}
                connection.send_bytes(pack({"kind": "env", **widths}))
            if message["control"] is None:
                settings, max_seq_len = ExecutionSettings(**start["settings"]), start["max_seq_len"]
                plan = _remote_planner(connection, job.seed)
            else:
                control = control_from(message["control"])
                settings, max_seq_len = control.execution, control.max_seq_len
                plan = local_planner(control, env, job.seed)
            result = run_job(env, job, settings, max_seq_len, plan)
        except (ValueError, ModuleNotFoundError, RuntimeError) as error:
            connection.send_bytes(pack({"kind": "error", "text": str(error)}))
            return
        facts = {"instruction": env.unwrapped.instruction, "env_settings": env.unwrapped.settings()}
        connection.send_bytes(pack({"kind": "finished", "result": asdict(result), **facts}))
    if env is not None:
        env.close()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it ends it
    try:
        simulate(Connection(int(sys.argv[1])))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        sys.exit(1)  # whoever started it is gone
