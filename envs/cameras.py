"""Which camera of a simulator becomes which image of an observation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from envs.simulator import suggest


def chosen_cameras(cameras: Any, images: Mapping[str, Any]) -> dict[str, str]:
    """Images of the observation -> cameras of the simulator, from the options that a user gave.

    Args:
        cameras: a list of cameras (they become image_1, image_2, ...), their names in one text ("top,left_wrist"), or a
            mapping from names of images to cameras ({front: top}); None: none.
        images: further pairs, as keyword arguments give them: image_1="top". None as a camera leaves the image out.

    Raises:
        ValueError: another kind of value.
    """
    if isinstance(cameras, str):
        cameras = [name.strip() for name in cameras.split(",") if name.strip()]
    if isinstance(cameras, (list, tuple)):
        cameras = {f"image_{number}": name for number, name in enumerate(cameras, start=1)}
    if cameras is not None and not isinstance(cameras, Mapping):
        raise ValueError(
            f"cameras is {cameras!r}; give names, as in cameras=[top,left_wrist] or cameras='{{front: top}}'"
        )
    chosen = {**(cameras or {}), **images}
    for key, name in chosen.items():
        if not (name is None or isinstance(name, str)) or key == "state":
            raise ValueError(
                f"camera {key}={name!r}; give the name of an image and that of a camera, as in image_1=top"
            )
    return {str(key): name for key, name in chosen.items() if name is not None}


def image_options(simulator: str, options: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Options that begin with "image_", which name images; any other is misspelt.

    Raises:
        ValueError: another option; names the nearest that the simulator takes.
    """
    for name in options:
        if not name.startswith("image_"):
            raise ValueError(f"{simulator} has no option {name!r}; {suggest(name, [*known, 'image_1', 'image_2'])}")
    return dict(options)
