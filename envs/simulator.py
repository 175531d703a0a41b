"""What is known of a simulator before any of its packages is imported."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from envs.base import RobotEnv


@dataclass(frozen=True)
class Simulator:
    """One simulator.

    Attributes:
        environment: module and class of its RobotEnv, "envs.metaworld_env.MetaWorldEnv"; imported when the first one
            is made, since a program that only trains does not have the simulator's packages.
        tiers: how hard each of its tasks is; results are summed up by tier.
        packages: top-level packages that its module imports, so that one that is missing can be told from a fault.
        requirements: file that installs them.
    """

    environment: str
    tiers: Mapping[str, str]
    packages: tuple[str, ...]
    requirements: str = "requirements-sim.txt"

    def make(self, task: str, **options: Any) -> RobotEnv:
        """An environment of this simulator; arguments and errors as its class has them.

        Raises:
            ValueError: an option that the class does not take; names the nearest that it takes.
        """
        module, _, name = self.environment.rpartition(".")
        environment = getattr(importlib.import_module(module), name)
        known = [parameter for parameter in inspect.signature(environment).parameters if parameter != "task"]
        for option in options:
            if option not in known:
                raise ValueError(f"{name} has no option {option!r}; {suggest(option, known)}")
        return environment(task, **options)


def named_cameras(spec: str | Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Which camera of a simulator is seen under which name: "wrist=gripperPOV,corner" sees gripperPOV as `wrist` and
    corner as `corner`.

    Args:
        spec: such a text, its parts, or the mapping itself.

    Raises:
        ValueError: another form, or a name twice.
    """
    if isinstance(spec, Mapping):
        return dict(spec)
    parts = [part.strip() for part in spec.split(",")] if isinstance(spec, str) else list(spec)
    named: dict[str, str] = {}
    for part in parts:
        name, equals, camera = str(part).partition("=")
        if not name or bool(equals) != bool(camera) or name in named or name == "state":
            raise ValueError(f"cameras: {part!r}; wanted <camera> or <name>=<camera>, each name once, none 'state'")
        named[name] = camera or name
    return named


def suggest(name: str, valid: Iterable[str]) -> str:
    """The end of an error message about an unknown name: "did you mean 'x'?", else all valid names."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid names: {', '.join(names)}"
