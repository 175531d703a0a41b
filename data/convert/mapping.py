"""What of a recording becomes which column: a YAML file, a preset of configs/sources/, or `--map column=source ...`.

    image_1: {from: obs/agentview_rgb, flip: auto}      a camera's column; other names stand below `cameras`
    state: [obs/ee_pos, "obs/gripper_states[0]"]        terms, one after the other
    action: ["actions[0:6]", {from: actions, dims: 6, invert: true}]
    prompt: "@problem_info:language_instruction"        a key, {text: ...}, @attribute[:JSON key], file:<regex>
    terminal: dones                                     a key, always or never
    success: "@success"                                 of the episode: likewise, or an attribute, or file:<regex>
    intervention: {from: action_modes, equals: 1}       steps at which somebody corrected a policy
    fps: 20

docs/convert.md has all of it. `data/convert/columns.py` does what a mapping says.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping as MappingType
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data.convert.conversion import check_names
from data.schema import INTERVENTION, LABELS, MAIN_CAMERA, SUCCESS
from utils.config_data import is_camera_name
from utils.foreign_files import ForeignFileError, read_yaml
from utils.parquet_utils import DataError

PRESETS = Path(__file__).resolve().parents[2] / "configs" / "sources"
FLIPS = ("none", "vertical", "horizontal", "both", "auto")
CHANNELS = ("rgb", "bgr", "rgba", "bgra")
LAYOUTS = ("hwc", "chw")
TERMINAL = ("always", "never")
_OTHER_CAMERAS = "cameras."
_TEXT, _ATTRIBUTE, _PATTERN = "text:", "@", "file:"  # how a prompt begins that is no key
_COUNTS = ("action_shift", "drop_first", "drop_last")
_TERM_OPTIONS = ("from", "dims", "scale", "offset", "invert", "clip", "constant")
_CAMERA_OPTIONS = ("from", "flip", "channels", "layout", "scale")
_WHERE_OPTIONS = ("from", "equals", "invert")
_SUFFIX = re.compile(r"(?P<key>.*?)\[(?P<dims>[\d:,\s]+)\]$")
_SETTING = re.compile(r"(?P<name>[a-z]+)=(?P<value>.*)$")


@dataclass(frozen=True)
class Term:
    """A part of `state` or `action`: values of a key, then scale, offset, invert and clip in this order."""

    key: str | None  # None: `constant`
    dims: tuple[int, ...] | None = None  # which of the values; None: all
    scale: float = 1.0
    offset: float = 0.0
    invert: bool = False  # 1 - x: a gripper whose 0 and 1 are exchanged
    clip: tuple[float, float] | None = None
    constant: tuple[float, ...] = ()


@dataclass(frozen=True)
class Camera:
    """Where a camera's frames come from, and what is done to them."""

    key: str
    flip: str = "none"  # vertical: upside down is mended; auto: as the source's attributes say
    channels: str = "rgb"  # of the pixels as they are stored
    layout: str = "hwc"
    scale: float | None = None  # of the pixels, to 0..255; None: they are 0..255

    @property
    def changes_pixels(self) -> bool:
        """Whether encoded frames have to be decoded."""
        return self.flip not in ("none", "auto") or self.channels != "rgb"


@dataclass(frozen=True)
class Prompt:
    """Where instructions come from."""

    kind: str  # key, text, attribute or file
    value: str
    json_key: str | None = None  # within the attribute's JSON
    empty: str | None = None  # in place of an empty one


@dataclass(frozen=True)
class Where:
    """Rows at which a key is true, or has a value; with `invert` the others."""

    key: str
    equals: Any = None
    invert: bool = False


@dataclass(frozen=True)
class Outcome:
    """Where it stands whether an episode succeeded."""

    kind: str  # always, never, key (at any of its steps), attribute, or file (whose name fits)
    where: Where  # the key, the attribute's name or the pattern, and which value means success
    json_key: str | None = None  # within the attribute's JSON


@dataclass(frozen=True)
class Mapping:
    """A whole mapping; `given` is what it was made from."""

    cameras: dict[str, Camera]  # column -> source
    state: tuple[Term, ...]
    action: tuple[Term, ...]
    prompt: Prompt
    terminal: str = "never"
    keep: Where | None = None
    intervention: Where | None = None
    success: Outcome | None = None
    fps: float | None = None
    action_shift: int = 0
    drop_first: int = 0
    drop_last: int = 0
    given: dict[str, Any] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """Every key that is read, each once."""
        found = [camera.key for camera in self.cameras.values()]
        found += [term.key for term in (*self.state, *self.action) if term.key is not None]
        found += [self.prompt.value] * (self.prompt.kind == "key")
        found += [] if self.terminal in TERMINAL else [self.terminal]
        found += [where.key for where in (self.keep, self.intervention) if where]
        return list(dict.fromkeys(found))

    @property
    def named_keys(self) -> list[str]:
        """`keys`, and the one that says whether an episode succeeded, which is read before."""
        outcome = [self.success.where.key] if self.success and self.success.kind == "key" else []
        return list(dict.fromkeys([*self.keys, *outcome]))


def read_entries(preset: str | None, items: Sequence[str]) -> dict[str, Any]:
    """The entries of a mapping, before they are checked.

    Args:
        preset: name of a file in configs/sources/.
        items: of --map: files, and `column=source` which take the place of entries read before.

    Raises:
        DataError: no such preset or file, or one that is no mapping.
    """
    entries: dict[str, Any] = {}
    if preset is not None:
        check_names([preset], presets(), "preset", "--preset")
        entries |= _read(PRESETS / f"{preset}.yaml")
    for item in items:
        name, equals, value = item.partition("=")
        entries |= {name: _entry(name, value)} if equals else _read(Path(item).expanduser())
    return entries


def presets() -> list[str]:
    """Names of the presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def parse_mapping(entries: MappingType[str, Any], options: Sequence[str]) -> Mapping:
    """Check the entries of a mapping.

    Args:
        entries: of `read_entries`, without `format`.
        options: names that the format's reader takes itself.

    Raises:
        DataError: an unknown name, or a value of another kind.
    """
    cameras = {name: _camera(name, value) for name, value in _camera_entries(entries).items()}
    known = ("cameras", "state", "action", "prompt", "terminal", "keep", *LABELS, "fps", *_COUNTS, *options)
    check_names((name for name in entries if not _names_camera(name)), known, "entry", "mapping")
    for name in ("state", "action", "prompt"):
        if name not in entries:
            hint = ', or give it: --map "prompt=text:lift the cube"' if name == "prompt" else ""
            remedy = f"say what it is made of (--inspect lists what there is){hint}"
            raise DataError(f"mapping: {name!r} is missing; {remedy}")
    if not cameras:
        raise DataError(f"mapping: no camera, and every step needs one; say which is {MAIN_CAMERA}")
    fps = entries.get("fps")
    if fps is not None and not (_is_number(fps) and fps > 0):
        raise DataError(f"mapping: fps is {fps!r}; wanted steps a second, more than 0")
    for name in _COUNTS:
        value = entries.get(name, 0)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise DataError(f"mapping: {name} is {value!r}; wanted a number of steps, 0 or more")
    return Mapping(
        cameras=dict(sorted(cameras.items(), key=lambda item: (item[0] != MAIN_CAMERA, item[0]))),
        state=_terms("state", entries["state"]),
        action=_terms("action", entries["action"]),
        prompt=_prompt(entries["prompt"]),
        terminal=_terminal(entries.get("terminal", "never")),
        keep=_where("keep", entries["keep"]) if "keep" in entries else None,
        intervention=_where(INTERVENTION, entries[INTERVENTION]) if INTERVENTION in entries else None,
        success=_outcome(entries[SUCCESS]) if SUCCESS in entries else None,
        fps=fps,
        given=dict(entries),
        **{name: entries.get(name, 0) for name in _COUNTS},
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        entries = read_yaml(path)
    except ForeignFileError as error:
        raise DataError(f"--map: {error}") from None
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
        raise DataError(f"--map: {path} holds no mapping; wanted entries such as `state: observation/state`")
    return entries


def _entry(name: str, text: str) -> Any:
    """The value of `name=text` on a command line, as YAML would have it."""
    if name == "prompt" or text.startswith(_PATTERN):
        return text
    if not (name in ("state", "action", "keep", *LABELS) or _names_camera(name)):
        return _plain(name, text)
    terms: list[dict[str, Any]] = []
    for part in re.split(r",(?![^\[{(]*[\]})])", text):
        match = _SETTING.match(part)
        if match and terms:
            terms[-1][match["name"]] = _plain(name, match["value"])
        else:
            terms.append({"from": part})
    return terms if name in ("state", "action") else terms[0] if len(terms) == 1 else text


def _plain(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise DataError(f"--map {name}: {text!r} is no value") from None


def _names_camera(name: str) -> bool:
    """Whether an entry is a camera: `image_1`, or any other name as `cameras.wrist`."""
    return name.startswith("image") or name.startswith(_OTHER_CAMERAS)


def _camera_entries(entries: MappingType[str, Any]) -> dict[str, Any]:
    """Column -> source of every camera, those of the section `cameras` among them."""
    section = entries.get("cameras", {})
    if not isinstance(section, dict):
        raise DataError(f"mapping: cameras is {section!r}; wanted names and where their frames come from")
    named = {str(name): value for name, value in section.items()}
    named |= {name.removeprefix(_OTHER_CAMERAS): value for name, value in entries.items() if _names_camera(name)}
    for name in named:
        if not is_camera_name(name):
            raise DataError(f"mapping: a camera can't be called {name!r}; choose another name")
    return named


def _camera(name: str, value: Any) -> Camera:
    options = _options(name, value, _CAMERA_OPTIONS)
    for option, allowed in (("flip", FLIPS), ("channels", CHANNELS), ("layout", LAYOUTS)):
        if options.get(option, allowed[0]) not in allowed:
            raise DataError(f"mapping: {option} of {name} is {options[option]!r}; wanted {', '.join(allowed)}")
    return Camera(key=_key(name, options), **{key: options[key] for key in options if key != "from"})


def _terms(name: str, value: Any) -> tuple[Term, ...]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise DataError(f"mapping: {name} is empty; name what it is made of")
    return tuple(_term(name, item) for item in values)


def _term(name: str, value: Any) -> Term:
    options = _options(name, value, _TERM_OPTIONS)
    if "constant" in options:
        constant = options["constant"] if isinstance(options["constant"], list) else [options["constant"]]
        if len(options) > 1 or not constant or not all(map(_is_number, constant)):
            raise DataError(f"mapping: {name} is {value!r}; wanted `constant: [0.0]`, numbers and nothing beside it")
        return Term(None, constant=tuple(map(float, constant)))
    key = _key(name, options)
    if "dims" in options:
        dims = _dims(name, str(options["dims"]).strip("[]"))
    elif match := _SUFFIX.fullmatch(key):
        key, dims = match["key"], _dims(name, match["dims"])
    else:
        dims = None
    for option in ("scale", "offset"):
        if not _is_number(options.get(option, 0)):
            raise DataError(f"mapping: {option} of {name} is {options[option]!r}; wanted a number")
    clip = options.get("clip")
    if clip is not None and not (isinstance(clip, list) and len(clip) == 2 and all(map(_is_number, clip))):
        raise DataError(f"mapping: clip of {name} is {clip!r}; wanted [least, most]")
    return Term(
        key,
        dims,
        float(options.get("scale", 1)),
        float(options.get("offset", 0)),
        _flag(name, options),
        tuple(map(float, clip)) if clip else None,
    )


def _dims(name: str, text: str) -> tuple[int, ...]:
    """`0:6,7` as (0, 1, 2, 3, 4, 5, 7)."""
    dims: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?::(\d{1,6}))?\s*", part)
        if not match or (match[2] and int(match[2]) <= int(match[1])):
            raise DataError(f"mapping: {name} has [{text}]; wanted numbers and ranges such as [0:6] or [0,1,5]")
        dims += range(int(match[1]), int(match[2])) if match[2] else [int(match[1])]
    return tuple(dims)


def _prompt(value: Any) -> Prompt:
    empty = None
    if isinstance(value, dict):
        check_names(value, ("text", "from", "empty"), "option", "mapping: prompt")
        if "text" in value and len(value) > 1:
            raise DataError("mapping: prompt has a text, which is every step's; leave out from and empty")
        empty = value.get("empty")
        value = f"text:{value['text']}" if "text" in value else value.get("from")
    if not isinstance(value, str) or not value.strip() or (empty is not None and not str(empty).strip()):
        raise DataError(f"mapping: prompt is {value!r}; wanted a key, text:..., @attribute[:JSON key] or file:<regex>")
    if value.startswith(_TEXT):
        text = value.removeprefix(_TEXT).strip()
        if not text:
            raise DataError("mapping: the text of prompt is empty; give an instruction")
        return Prompt("text", text, empty=empty)
    if value.startswith(_ATTRIBUTE):
        attribute, _, key = value[1:].partition(":")
        return Prompt("attribute", attribute, key or None, empty)
    if value.startswith(_PATTERN):
        pattern = value.removeprefix(_PATTERN)
        groups = _expression("prompt", pattern).groups
        if groups != 1:
            raise DataError(f"mapping: prompt {value!r} has {groups} groups; wanted one, around the instruction: (.*)")
        return Prompt("file", pattern, empty=empty)
    return Prompt("key", value, empty=empty)


def _terminal(value: Any) -> str:
    if isinstance(value, bool):
        return TERMINAL[0] if value else TERMINAL[1]
    if not isinstance(value, str) or not value:
        raise DataError(f"mapping: terminal is {value!r}; wanted a key, always or never")
    return value


def _expression(name: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise DataError(f"mapping: {name} 'file:{pattern}' is no regular expression ({error})") from None


def _where(name: str, value: Any) -> Where:
    options = _options(name, value, _WHERE_OPTIONS)
    equals = options.get("equals", "")
    if not (isinstance(equals, str | bool) or _is_number(equals)):
        raise DataError(f"mapping: equals of {name} is {equals!r}; wanted a text in quotes, a number, true or false")
    return Where(_key(name, options), options.get("equals"), _flag(name, options))


def _outcome(value: Any) -> Outcome:
    if isinstance(value, bool):
        return Outcome(TERMINAL[not value], Where(""))
    where = _where(SUCCESS, value)
    if where.key in TERMINAL:
        if where != Where(where.key):
            raise DataError(f"mapping: success is {where.key}, whatever a file holds; leave out equals and invert")
        return Outcome(where.key, Where(""))
    if where.key.startswith(_PATTERN):
        where = dataclasses.replace(where, key=where.key.removeprefix(_PATTERN))
        _expression(SUCCESS, where.key)
        if where.equals is not None:
            raise DataError("mapping: success is a file's name that fits or does not; leave out equals")
        return Outcome("file", where)
    if where.key.startswith(_ATTRIBUTE):
        attribute, _, key = where.key[1:].partition(":")
        return Outcome("attribute", dataclasses.replace(where, key=attribute), key or None)
    return Outcome("key", where)


def _options(name: str, value: Any, allowed: Sequence[str]) -> dict[str, Any]:
    options = value if isinstance(value, dict) else {"from": value}
    check_names(map(str, options), allowed, "option", f"mapping: {name}")
    return options


def _key(name: str, options: dict[str, Any]) -> str:
    key = options.get("from")
    if not isinstance(key, str) or not key:
        raise DataError(f"mapping: {name} is made from {key!r}; wanted the name of a key (--inspect lists them)")
    return key


def _flag(name: str, options: dict[str, Any]) -> bool:
    value = options.get("invert", False)
    if not isinstance(value, bool):
        raise DataError(f"mapping: invert of {name} is {value!r}; wanted true or false")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def with_fps(mapping: Mapping, fps: float | None, where: str) -> Mapping:
    """The mapping with the source's own rate where it names none.

    Raises:
        DataError: neither says it, or they differ by more than a tenth.
    """
    if mapping.fps is None and fps is None:
        raise DataError(f"{where}: the source does not say how many steps a second it has; give fps in the mapping")
    if mapping.fps and fps and abs(mapping.fps / fps - 1) > 0.1:
        raise DataError(f"{where}: the mapping says {mapping.fps:g} steps a second, the source {fps:g}; correct fps")
    return dataclasses.replace(mapping, fps=mapping.fps or fps)
