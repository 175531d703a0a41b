"""Looking at a recording before it is converted: what it holds, and some of its frames as they would be converted."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw

from data.convert.columns import Columns
from data.convert.conversion import parse_episodes
from data.convert.convert import Source
from data.convert.episode_writer import ImageEncoding
from data.convert.readers import FORMATS
from data.convert.readers.base import Key, Reader
from data.decoding import decode_frame
from data.schema import INTERVENTION, SUCCESS
from utils.misc import writing
from utils.text import printable

STRIP_EPISODES = 4  # as many as are drawn where none are named
STRIP_HEIGHT = 160  # pixels of a frame in the strip
HELD_FRAMES = 64  # of one camera while the middle is not known yet
_STATE = re.compile(r"state|qpos|proprio|eef|ee_|joint|gripper|position", re.IGNORECASE)
_ACTION = re.compile(r"(^|[/.#_])actions?($|[/.\[_#])", re.IGNORECASE)
_SUCCESS = re.compile(r"(^|[/._])(is_)?success$", re.IGNORECASE)
_INTERVENTION = re.compile(r"(^|[/._])(is_)?interventions?$", re.IGNORECASE)
_IN_JSON = re.compile(r"instruction|^lang", re.IGNORECASE)
_PROMPT = re.compile(r"instruction|language|task|prompt", re.IGNORECASE)


def describe(reader: Reader) -> str:
    """What a recording holds, as text: episodes, keys, attributes, and a mapping to edit.

    Raises:
        DataError: nothing of that format is there.
    """
    suggested = reader.suggested()
    episodes = reader.episodes()
    first = episodes[0]
    keys, attributes = reader.keys(first), reader.attributes(first)
    lines = [f"{reader.path}: {type(reader).DESCRIPTION}, {len(episodes)} episodes; the first is {first.name}"]
    width = max(map(len, keys), default=0)
    lines += ["", "keys (of one step):", *(f"  {name:<{width}}  {key}" for name, key in keys.items())]
    if attributes:
        lines += ["", "attributes (@name in `prompt`):"]
        lines += [f"  {printable(name, 60)} = {printable(value, 100)}" for name, value in attributes.items()]
    guess = reader.recommended() or _guess(keys, attributes, reader)
    entries = {"format": _format_name(reader), **suggested, **guess}
    lines += ["", "# a mapping to edit (map.yaml), guessed from the names:", yaml.safe_dump(entries, sort_keys=False)]
    return "\n".join(lines).rstrip()


def film_strip(source: Source, path: Path, *, episodes: Sequence[str] | None = None) -> None:
    """Draw first, middle and last frame of some episodes, a row each and all cameras side by side.

    Args:
        source: of `open_source`.
        path: the PNG that is written.
        episodes: numbers and ranges; None: the first ones.

    Raises:
        DataError: a fault in the recording or the mapping.
        WriteError: the picture can't be written.
    """
    numbers = parse_episodes(episodes, source.episodes, str(source.reader.path))
    columns = Columns(source.reader, source.mapping, ImageEncoding("png"))
    rows = []
    for index in numbers if episodes is not None else numbers[:STRIP_EPISODES]:
        columns.check(source.episodes[index])
        for camera, frames in _three_frames(columns, source, index).items():
            text = f"episode {index}, {camera}: first, middle, last"
            rows.append(_row([decode_frame(frame, 0, 0) for frame in frames], text))
    width = max((row.width for row in rows), default=1)
    strip = Image.new("RGB", (width, sum(row.height for row in rows) or 1), "white")
    top = 0
    for row in rows:
        strip.paste(row, (0, top))
        top += row.height
    with writing(path, "choose another --strip"):
        strip.save(path, "PNG")


def _three_frames(columns: Columns, source: Source, index: int) -> dict[str, list[bytes]]:
    """Of each camera the first, the middle and the last frame; never more than HELD_FRAMES of them in memory."""
    held: dict[str, list[bytes]] = {}
    last: dict[str, bytes] = {}
    count, stride = 0, 1
    for steps in columns.steps(source.episodes[index]):
        for i in range(len(steps.prompts)):
            if (count + i) % stride == 0:
                for camera, frames in steps.images.items():
                    held.setdefault(camera, []).append(frames[i])
                if len(held[next(iter(held))]) > HELD_FRAMES:
                    held = {camera: frames[::2] for camera, frames in held.items()}
                    stride *= 2
        count += len(steps.prompts)
        last = {camera: frames[-1] for camera, frames in steps.images.items()}
    middle = count // 2 // stride
    return {camera: [frames[0], frames[middle], last[camera]] for camera, frames in held.items()}


def _row(frames: Sequence[np.ndarray], text: str) -> Image.Image:
    pictures = [Image.fromarray(np.ascontiguousarray(frame)) for frame in frames]
    pictures = [p.resize((max(1, round(p.width * STRIP_HEIGHT / p.height)), STRIP_HEIGHT)) for p in pictures]
    row = Image.new("RGB", (sum(p.width + 4 for p in pictures), STRIP_HEIGHT + 18), "white")
    ImageDraw.Draw(row).text((2, 2), text, fill="black")
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 16))
        left += picture.width + 4
    return row


def _format_name(reader: Reader) -> str:
    return next(name for name, (_, kind) in FORMATS.items() if kind == type(reader).__name__)


def _guess(keys: dict[str, Key], attributes: dict[str, Any], reader: Reader) -> dict[str, Any]:
    """Entries that the names suggest; what nothing suggests says so in words, and the conversion refuses it."""
    unknown = "?"
    if any(name.startswith("obs/") for name in keys):  # robomimic: what comes after the action is no observation of it
        keys = {name: key for name, key in keys.items() if not name.startswith("next_obs/")}
    cameras = [name for name, key in keys.items() if _is_camera(key)]
    numbers = [
        name for name, key in keys.items() if len(key.shape) == 1 and key.kind[:3] in ("flo", "int", "uin", "num")
    ]
    numbers = [name for name in numbers if name not in cameras]
    actions = [name for name in numbers if _ACTION.search(name)]
    states = [name for name in numbers if _STATE.search(name) and name not in actions]
    texts = [name for name, key in keys.items() if key.kind == "text" and _PROMPT.search(name)]
    texts.sort(key=lambda name: not re.search(r"instruction|^task$", name))
    texts += [f"@{name}" for name in _text_attributes(attributes)]
    flip = {"flip": "auto"} if "macros_image_convention" in attributes else {}
    guess: dict[str, Any] = {
        f"image_{i}": {"from": name, **flip} if flip else name for i, name in enumerate(cameras, start=1)
    }
    guess = guess or {"image_1": unknown}
    guess |= {
        "state": states or unknown,
        "action": actions[:1] or unknown,
        "prompt": texts[0] if texts else {"text": unknown},
    }
    ends = [name for name in keys if re.search(r"is_terminal|(^|[/.])dones?$|terminations", name)]
    guess |= {"terminal": ends[0] if ends else "never"}
    outcomes = [name for name in [*keys, *(f"@{name}" for name in attributes)] if _SUCCESS.search(name.lstrip("@"))]
    corrected = [name for name in keys if _INTERVENTION.search(name)]
    guess |= {SUCCESS: outcomes[0]} if outcomes else {}
    guess |= {INTERVENTION: corrected[0]} if corrected else {}
    return guess if reader.fps() else {**guess, "fps": unknown}


def _text_attributes(attributes: dict[str, Any]) -> list[str]:
    """Attributes that look like instructions, and keys in the JSON of one: `problem_info:language_instruction`."""
    found = []
    for name, value in attributes.items():
        try:
            content = json.loads(value) if isinstance(value, str | bytes) else None
        except ValueError:
            content = None
        if isinstance(content, dict):
            found += [f"{name}:{key}" for key, text in content.items() if _IN_JSON.search(key) and text]
        elif _PROMPT.search(name):
            found.append(name)
    return found


def _is_camera(key: Key) -> bool:
    pixels = len(key.shape) == 3 and (key.shape[2] == 3 or key.shape[0] == 3) and key.kind[:3] in ("uin", "flo")
    return key.kind in ("jpeg", "png", "image") or pixels
