"""Simulators behind one small interface: ``make_env("metaworld", "window-open-v3")``.

Importing this package imports no simulator.

Seeds. ``reset(seed=s)`` decides where the objects are. Recordings take the seeds from ``--seed`` (0) upwards,
evaluations those from ``FIRST_EVALUATION_SEED`` upwards, so that a policy is tested on scenes that it has
not been trained on.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from envs import aloha_tasks, libero_tasks, metaworld_tasks
from envs.simulator import Simulator, suggest
from utils.text import file_stem

if TYPE_CHECKING:
    from envs.base import RobotEnv

FIRST_EVALUATION_SEED = 10_000

# One line a simulator (docs/adding_a_simulator.md).
SIMULATORS: dict[str, Simulator] = {
    "metaworld": Simulator(
        "envs.metaworld_env.MetaWorldEnv", metaworld_tasks.TIERS, ("gymnasium", "metaworld", "mujoco", "OpenGL")
    ),
    "aloha": Simulator(
        "envs.aloha_env.AlohaEnv",
        tuple(aloha_tasks.TASKS),
        ("gymnasium", "gym_aloha", "mujoco", "OpenGL"),
        "requirements-aloha.txt",
    ),
    "libero": Simulator(
        "envs.libero_env.LiberoEnv",
        libero_tasks.TASKS,
        ("bddl", "gymnasium", "libero", "mujoco", "OpenGL", "robosuite"),
        "requirements-libero.txt",
    ),
    "gym": Simulator("envs.gym_env.GymEnv", None, ("gymnasium",)),
}


def make_env(name: str, task: str, /, **options: Any) -> RobotEnv:
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
    return SIMULATORS[name].make(task, **options)


def env_maker(
    name: str, options: dict[str, Any], image_size: int | None = None, cameras: Sequence[str] = ()
) -> functools.partial[RobotEnv]:
    """``make_env`` for the tasks of one simulator, from what a user chose and what a policy wants.

    Args:
        name: a key of ``SIMULATORS``.
        options: as ``make_env`` takes them.
        image_size: in pixels, where ``options`` do not say and the simulator lets it be chosen; None: its own.
        cameras: that the policy reads. Where they have names of their own and ``options`` choose none, the simulator's
            cameras of these names are seen.

    Raises:
        ModuleNotFoundError: the simulator's packages are not installed; names the command that installs them.
    """
    known = SIMULATORS[name].options()
    if image_size is not None and "image_size" in known:
        options = {"image_size": image_size, **options}
    chosen = any(option.startswith(("camera", "second_camera", "image_")) for option in options.keys() - {"image_size"})
    if "cameras" in known and not chosen and not set(cameras) <= {"image_1", "image_2"}:
        options = {"cameras": ",".join(cameras), **options}
    return functools.partial(make_env, name, **options)


def check_task(name: str, task: str) -> None:
    """Raises ValueError, naming the nearest valid name, unless ``make_env`` knows the simulator and its task.

    Where only the simulator itself knows its tasks, making the environment tells.
    """
    if name not in SIMULATORS:
        raise ValueError(f"unknown environment {name!r}; {suggest(name, SIMULATORS)}")
    tasks = SIMULATORS[name].tasks
    if tasks is None and task == "all":
        raise ValueError(f"{name} has no list of tasks that 'all' could stand for; name them one by one")
    if tasks is not None and task not in tasks:
        raise ValueError(f"unknown {name} task {task!r}; {suggest(task, [*tasks, *groups(name)])}")


def groups(name: str) -> list[str]:
    """The groups (tiers of difficulty, suites) that a simulator's tasks belong to."""
    simulator = SIMULATORS[name]
    found = (simulator.group_of(task) for task in simulator.tasks or ())
    return list(dict.fromkeys(group for group in found if group is not None))


def expand_tasks(name: str, tasks: Iterable[str]) -> list[str]:
    """Task names, where `all` and the names of groups (`very_hard` for "very hard") stand for their tasks.

    Raises:
        ValueError: unknown simulator or task; names the nearest valid one. Also two tasks whose files, of recordings
            and videos, would have the same name.
    """
    known = (SIMULATORS[name].tasks or ()) if name in SIMULATORS else ()
    expanded: list[str] = []
    for task in tasks:
        members = [member for member in known if task in ("all", *_spellings(SIMULATORS[name].group_of(member)))]
        expanded += members or [task]
    for task in expanded:
        check_task(name, task)
    expanded = list(dict.fromkeys(expanded))
    by_file: dict[str, str] = {}
    for task in expanded:
        other = by_file.setdefault(file_stem(task), task)
        if other != task:
            raise ValueError(f"tasks {other} and {task}: their files would have the same name; take one at a time")
    return expanded


def _spellings(group: str | None) -> tuple[str, ...]:
    return () if group is None else (group, group.replace(" ", "_"))
