"""Which camera of a simulator becomes which image of an observation, from the options `cameras` and `image_1`, ..."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from envs.simulator import named_cameras, suggest


def chosen_cameras(cameras: Any, images: Mapping[str, Any], default: Mapping[str, str]) -> dict[str, str]:
    """Images of the observation -> cameras of the simulator, from the options that a user gave.

    Args:
        cameras: see `envs.simulator.named_cameras`; None: `default`.
        images: further pairs, as keyword arguments give them: image_1="top". None as a camera leaves the image out.
        default: what is seen where nobody chooses.

    Raises:
        ValueError: another kind of value.
    """
    chosen = {**(default if cameras is None else named_cameras(cameras)), **images}
    for key, name in chosen.items():
        if not (name is None or isinstance(name, str)):
            raise ValueError(f"camera {key}={name!r}; give an image's name and a camera's, as in image_1=top")
    return {key: name for key, name in chosen.items() if name is not None}


def image_options(simulator: str, options: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Options that begin with "image_", which name images; any other is misspelt.

    Raises:
        ValueError: another option; names the nearest that the simulator takes.
    """
    for name in options:
        if not name.startswith("image_"):
            raise ValueError(f"{simulator} has no option {name!r}; {suggest(name, [*known, 'image_1', 'image_2'])}")
    return dict(options)
