"""Simulators behind one small interface: ``make_env("metaworld", "window-open-v3")``.

Importing this package imports no simulator.

Seeds. ``reset(seed=s)`` decides where the objects are. Recordings take the seeds from ``--seed`` (0) upwards,
evaluations those from ``FIRST_EVALUATION_SEED`` upwards, so that a policy is tested on scenes that it has
not been trained on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from envs import metaworld_tasks
from envs.simulator import Simulator, suggest

if TYPE_CHECKING:
    from envs.base import RobotEnv

FIRST_EVALUATION_SEED = 10_000

# One line a simulator (docs/adding_a_simulator.md).
SIMULATORS: dict[str, Simulator] = {
    "metaworld": Simulator(
        "envs.metaworld_env.MetaWorldEnv", metaworld_tasks.TIERS, ("gymnasium", "metaworld", "mujoco", "OpenGL")
    ),
}


def make_env(name: str, task: str, **options: Any) -> RobotEnv:
    """Makes an environment.

    Args:
        name: a key of ``SIMULATORS``.
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
    simulator = SIMULATORS[name]
    try:
        return simulator.make(task, **options)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in simulator.packages:
            raise
        raise ModuleNotFoundError(
            f"environment {name!r} needs the package {package!r}: pip install -r {simulator.requirements}",
            name=error.name,
        ) from error


def check_task(name: str, task: str) -> None:
    """Raises ValueError, naming the nearest valid name, unless ``make_env`` knows the simulator and its task."""
    if name not in SIMULATORS:
        raise ValueError(f"unknown environment {name!r}; {suggest(name, SIMULATORS)}")
    if task not in SIMULATORS[name].tiers:
        raise ValueError(f"unknown {name} task {task!r}; {suggest(task, SIMULATORS[name].tiers)}")


def expand_tasks(name: str, tasks: Iterable[str]) -> list[str]:
    """Task names, where `all` and the names of tiers (`very_hard` for "very hard") stand for their tasks.

    Raises:
        ValueError: unknown simulator or task; names the nearest valid one.
    """
    tiers = SIMULATORS[name].tiers if name in SIMULATORS else {}
    expanded: list[str] = []
    for task in tasks:
        members = [member for member, tier in tiers.items() if task in ("all", tier, tier.replace(" ", "_"))]
        expanded += members or [task]
    for task in expanded:
        check_task(name, task)
    return list(dict.fromkeys(expanded))
