"""Simulators behind one small interface: ``make_env("metaworld", "window-open-v3")``.

Importing this package imports no simulator.

Seeds. ``reset(seed=s)`` decides where the objects are. Recordings take the seeds from ``--seed`` (0) upwards,
evaluations those from ``FIRST_EVALUATION_SEED`` upwards, so that a policy is tested on scenes that it has
not been trained on.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any

from envs import metaworld_tasks

if TYPE_CHECKING:
    from envs.base import RobotEnv

FIRST_EVALUATION_SEED = 10_000
_SIMULATOR_PACKAGES = ("gymnasium", "metaworld", "mujoco", "OpenGL")


def make_env(name: str, task: str, **options: Any) -> RobotEnv:
    """Makes an environment.

    Args:
        name: a key of ``ENVS``.
        task: a task of that simulator, e.g. "window-open-v3".
        options: see the environment's class, e.g. :class:`envs.metaworld_env.MetaWorldEnv`.

    Returns:
        The environment; ``reset`` it before the first step.

    Raises:
        ValueError: unknown simulator, task or option value; names the nearest valid one.
        ModuleNotFoundError: the simulator's packages are not installed; names the command that installs them.
        RuntimeError: off-screen rendering is impossible; names the package and variable that mend it.
    """
    check_task(name, task)
    try:
        return ENVS[name](task, **options)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _SIMULATOR_PACKAGES:
            raise
        raise ModuleNotFoundError(
            f"environment {name!r} needs the package {package!r}: pip install -r requirements-sim.txt",
            name=error.name,
        ) from error


def check_task(name: str, task: str) -> None:
    """Raises ValueError, naming the nearest valid name, unless ``make_env`` knows the simulator and its task."""
    if name not in ENVS:
        raise ValueError(f"unknown environment {name!r}; {suggest(name, ENVS)}")
    if task not in TASKS[name]:
        raise ValueError(f"unknown {name} task {task!r}; {suggest(task, TASKS[name])}")


def suggest(name: str, valid: Iterable[str]) -> str:
    """The end of an error message about an unknown name: "did you mean 'x'?", else all valid names."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid names: {', '.join(names)}"


def _make_metaworld(task: str, **options: Any) -> RobotEnv:
    from envs.metaworld_env import MetaWorldEnv

    return MetaWorldEnv(task, **options)


ENVS: dict[str, Callable[..., RobotEnv]] = {"metaworld": _make_metaworld}
TASKS: dict[str, Collection[str]] = {"metaworld": metaworld_tasks.TASKS.keys()}
TIERS: dict[str, dict[str, str]] = {
    "metaworld": {name: task.tier for name, task in metaworld_tasks.TASKS.items()},
}


def expand_tasks(name: str, tasks: Iterable[str]) -> list[str]:
    """Task names, where `all` and the names of tiers (`very_hard` for "very hard") stand for their tasks.

    Raises:
        ValueError: unknown simulator or task; names the nearest valid one.
    """
    expanded: list[str] = []
    for task in tasks:
        members = [one for one, tier in TIERS.get(name, {}).items() if task in ("all", tier, tier.replace(" ", "_"))]
        expanded += members or [task]
    for task in expanded:
        check_task(name, task)
    return list(dict.fromkeys(expanded))
