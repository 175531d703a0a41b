"""What is known of a simulator before any of its packages is imported."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from utils.config_data import is_camera_name

if TYPE_CHECKING:
    from envs.base import RobotEnv


@dataclass(frozen=True)
class Simulator:
    """One simulator.

    Attributes:
        environment: module and class of its RobotEnv, "envs.metaworld_env.MetaWorldEnv"; imported when the first one
            is made, since a program that only trains does not have the simulator's packages.
        tasks: their names, which are fit to be names of files. As a mapping each belongs to a group (a tier of
            difficulty, a suite), and results are summed up by group. None: the simulator itself knows its tasks.
        packages: top-level packages that its module imports, so that one that is missing can be told from a fault.
        requirements: file that installs them.
    """

    environment: str
    tasks: Mapping[str, str] | Sequence[str] | None
    packages: tuple[str, ...]
    requirements: str = "requirements-sim.txt"

    def group_of(self, task: str) -> str | None:
        """The group of a task; None where the simulator has none."""
        return self.tasks[task] if isinstance(self.tasks, Mapping) else None

    def options(self) -> dict[str, Any]:
        """What can be chosen beside the task, and what each is where nobody chooses: its class's keyword arguments.

        Raises:
            ModuleNotFoundError: one of its packages is not installed; names the command that installs them.
        """
        parameters = inspect.signature(self._class()).parameters.values()
        named = [parameter for parameter in parameters if parameter.kind != parameter.VAR_KEYWORD]
        return {parameter.name: parameter.default for parameter in named if parameter.name != "task"}

    def make(self, task: str, /, **options: Any) -> RobotEnv:
        """An environment of this simulator; arguments and errors as its class has them.

        Raises:
            ValueError: an option that the class does not take; names the nearest that it takes.
            ModuleNotFoundError: one of its packages is not installed; names the command that installs them.
        """
        environment, known = self._class(), self.options()
        parameters = inspect.signature(environment).parameters.values()
        takes_others = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)
        for option in options:
            if option in ("self", "task") or not (takes_others or option in known):
                raise ValueError(f"{environment.__name__} has no option {option!r}; {suggest(option, known)}")
        with self._installed():
            return environment(task, **options)

    def _class(self) -> type:
        module, _, name = self.environment.rpartition(".")
        with self._installed():
            return getattr(importlib.import_module(module), name)

    @contextlib.contextmanager
    def _installed(self) -> Iterator[None]:
        try:
            yield
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in self.packages:
                raise
            raise ModuleNotFoundError(
                f"{self.environment.rpartition('.')[2]} needs the package {package!r}: pip install -r "
                f"{self.requirements}",
                name=error.name,
            ) from error


def named_cameras(spec: str | Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Which camera of a simulator is seen under which name: "wrist=gripperPOV,corner" sees gripperPOV as `wrist` and
    corner as `corner`.

    Args:
        spec: such a text, its parts, or the mapping itself.

    Raises:
        ValueError: another form, no camera at all, a name twice, or one that a recording has for something else.
    """
    if isinstance(spec, str):
        parts = [part.strip() for part in spec.split(",")]
    elif isinstance(spec, Mapping):
        parts = [f"{name}={camera}" for name, camera in spec.items()]
    else:
        parts = list(spec) if isinstance(spec, Sequence) else []
    if not parts:
        raise ValueError(f"cameras is {spec!r}; wanted <camera> or <name>=<camera>, several with commas between them")
    named: dict[str, str] = {}
    for part in parts:
        name, equals, camera = str(part).partition("=")
        if not name or bool(equals) != bool(camera) or name in named:
            raise ValueError(f"cameras: {part!r}; wanted <camera> or <name>=<camera>, each name once")
        if not is_camera_name(name):
            raise ValueError(
                f"cameras: {part!r}: no camera may be called {name!r}, which names something else in a recording or is "
                "no column's name; write <name>=<camera>"
            )
        named[name] = camera or name
    return named


def suggest(name: Any, valid: Iterable[str]) -> str:
    """The end of an error message about an unknown name: "did you mean 'x'?", else all valid names."""
    names = sorted(valid)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid names: {', '.join(names)}"
