"""From blocks of a reader to columns of docs/data_format.md, as a mapping says: the same for every format."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data.convert.conversion import check_names
from data.convert.episode_writer import ImageEncoding, Steps
from data.convert.foreign_sources import reading
from data.convert.mapping import TERMINAL, Camera, Mapping, Term
from data.convert.readers.base import Block, Episode, Key, Reader
from data.decoding import decode_frame
from data.schema import TIMESTAMP
from utils.encoded_images import JPEG_START, PNG_START, is_image
from utils.parquet_utils import DataError
from utils.text import printable

logger = logging.getLogger(__name__)

STATE, ACTION, PROMPT, TERMINATED, KEPT, TIME = "state", "action", "prompt", "terminated", "kept", "time"
JPEG_END, PNG_END = b"\xff\xd9", b"IEND\xaeB`\x82"
TAIL = 4096  # bytes behind a JPEG's end that some cameras write
_told: set[str] = set()  # what this process has warned of


class Columns:
    """The columns of a source's episodes."""

    def __init__(self, reader: Reader, mapping: Mapping, encoding: ImageEncoding) -> None:
        """
        Args:
            reader: of the source.
            mapping: what becomes what; `fps` is set.
            encoding: of frames that are encoded.
        """
        self._reader, self._mapping, self._encoding = reader, mapping, encoding
        self._time_key = reader.time_key()

    def check(self, episode: Episode) -> None:
        """Compare the mapping with what an episode holds.

        Raises:
            DataError: a key that is not there, that can't be read, or of another kind than its column needs.
        """
        found = self._reader.keys(episode)
        plain = {name: self._reader.plain_key(name) for name in self._mapping.keys}
        check_names(plain.values(), list(found), "key", episode.name)
        available = {name: found[key] for name, key in plain.items()}
        for name in self._mapping.keys:
            if available[name].kind.startswith("not read: "):
                raise DataError(f"{episode.name}: {name!r} is {available[name].kind}")
        for column, camera in self._mapping.cameras.items():
            _check_camera(column, camera, available[camera.key], episode.name)

    def widths(self, episode: Episode) -> tuple[int, int]:
        """Values of `state` and of `action`, from the first steps of an episode.

        Raises:
            DataError: the mapping does not fit what is there.
        """
        with reading(episode.files[0]):
            block = next(self._raw(episode))
        return block[STATE].shape[1], block[ACTION].shape[1]

    def steps(self, episode: Episode) -> Iterator[Steps]:
        """The steps of an episode; none where the mapping keeps none of them.

        Raises:
            DataError: a value that does not fit its column, naming episode, step and key.
        """
        mapping, finish = self._mapping, self._finisher(episode)
        rows = _without_last(self._raw(episode), mapping.drop_last)
        rows = _shifted(rows, mapping.action_shift)
        rows = _without_first(rows, mapping.drop_first)
        begin, waiting = 0, None
        terminated, first_time = False, None
        for block in rows:
            terminated = bool(block[TERMINATED][-1])
            if mapping.keep:
                block = _rows(block, np.flatnonzero(block[KEPT]))
            if not len(block[PROMPT]):
                continue
            if TIME in block and first_time is None:
                first_time = block[TIME][0]
            if waiting is not None:
                yield waiting
            waiting = finish(block, begin, first_time)
            begin += len(waiting.prompts)
        if waiting is not None:
            yield dataclasses.replace(waiting, terminal=terminated)

    def _raw(self, episode: Episode) -> Iterator[Block]:
        """The columns of whole blocks; images as they are stored, since not all of them are needed."""
        mapping, reader = self._mapping, self._reader
        keys = [*mapping.keys, *([self._time_key] if self._time_key else [])]
        fixed_prompt = self._fixed_prompt(episode)
        begin, last_action = 0, None
        for block in reader.blocks(episode, list(dict.fromkeys(keys))):
            length = len(next(iter(block.values())))
            where = Place(episode.name, begin)
            columns: Block = {STATE: _vector(mapping.state, block, length, STATE, where)}
            columns[ACTION] = last_action = _vector(mapping.action, block, length, ACTION, where)
            if fixed_prompt is None:
                columns[PROMPT] = self._texts(block[mapping.prompt.value], where)
            else:
                columns[PROMPT] = [fixed_prompt] * length
            if mapping.terminal in TERMINAL:
                columns[TERMINATED] = np.full(length, mapping.terminal == "always")
            else:
                columns[TERMINATED] = _truths(block[mapping.terminal], mapping.terminal, where)
            if mapping.keep:
                columns[KEPT] = self._kept(block[mapping.keep.key], where)
            if self._time_key:
                columns[TIME] = block[self._time_key]
            columns |= {column: block[camera.key] for column, camera in mapping.cameras.items()}
            yield columns
            begin += length
        if begin == 0:
            raise DataError(f"{episode.name}: holds no steps; remove it or record it again")
        if reader.WARN_OF_ZERO_ACTION and not (mapping.drop_last or mapping.action_shift):
            _warn_of_zero_action(last_action, episode)

    def _finisher(self, episode: Episode) -> Any:
        """What makes `Steps` of the rows that stay."""
        mapping = self._mapping
        attributes = self._reader.attributes(episode) if any(c.flip == "auto" for c in mapping.cameras.values()) else {}
        cameras = {column: _resolved(camera, attributes, episode) for column, camera in mapping.cameras.items()}

        def finish(block: Block, begin: int, first_time: float | None) -> Steps:
            length = len(block[PROMPT])
            where = Place(episode.name, begin)
            if TIME in block:
                time = block[TIME].astype(np.float32)
                dropped = mapping.drop_first or mapping.keep
                time = (block[TIME] - first_time).astype(np.float32) if dropped else time
            else:
                time = (np.arange(begin, begin + length) / mapping.fps).astype(np.float32)
            return Steps(
                images={
                    column: encoded_images(block[column], camera, self._encoding, column, where)
                    for column, camera in cameras.items()
                },
                state=block[STATE],
                action=block[ACTION],
                prompts=block[PROMPT],
                extra={TIMESTAMP: time},
            )

        return finish

    def _fixed_prompt(self, episode: Episode) -> str | None:
        """The instruction of every step of an episode; None where each step has its own."""
        prompt = self._mapping.prompt
        if prompt.kind == "key":
            return None
        if prompt.kind == "text":
            return prompt.value
        if prompt.kind == "file":
            name = episode.files[0].relative_to(self._reader.root).as_posix()
            match = re.search(prompt.value, name)
            if not match or match[1] is None:
                raise DataError(f"{episode.name}: prompt {prompt.value!r} does not fit the name {name!r}; correct it")
            text = match[1] if " " in match[1] else match[1].replace("_", " ")
        else:
            text = _attribute(self._reader.attributes(episode), prompt.value, prompt.json_key, episode)
        return text if text.strip() or prompt.empty is None else prompt.empty

    def _texts(self, values: np.ndarray | list[Any], where: Place) -> list[str]:
        known: dict[bytes, str] = {}
        texts = []
        for i, value in enumerate(values):
            if isinstance(value, str):
                text = value
            else:
                raw = value if isinstance(value, bytes) else np.ascontiguousarray(value).tobytes()
                text = known.get(raw)
                if text is None:
                    text = known[raw] = _text(value, self._mapping.prompt.value, where.step(i))
            texts.append(text if text.strip() or self._mapping.prompt.empty is None else self._mapping.prompt.empty)
        return texts

    def _kept(self, values: np.ndarray | list[Any], where: Place) -> np.ndarray:
        keep = self._mapping.keep
        if keep.equals is None:
            result = _truths(values, keep.key, where)
        elif isinstance(keep.equals, str):
            texts = [v if isinstance(v, str) else _text(v, keep.key, where.step(i)) for i, v in enumerate(values)]
            result = np.array([text == keep.equals for text in texts], dtype=bool)
        else:
            result = np.asarray(values).reshape(len(values), -1)[:, 0] == keep.equals
        return ~result if keep.invert else result


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a block lies, for messages."""

    episode: str
    begin: int

    def step(self, i: int) -> str:
        return f"{self.episode} step {self.begin + i}"


def encoded_images(
    values: np.ndarray | list[Any], camera: Camera, encoding: ImageEncoding, column: str, where: Place
) -> list[bytes]:
    """The frames of a camera as JPEG or PNG: those that are encoded already untouched, unless pixels change.

    Args:
        values: pixels (N, H, W, 3), or (N, 3, H, W) with `layout: chw`; or N encoded frames, padded with zeros or not.
        camera: what is done to the pixels.
        encoding: of pixels.
        column, where: for messages.

    Raises:
        DataError: something else than colour images of 8 bits, or a frame that is cut short.
    """
    if isinstance(values, np.ndarray) and values.ndim >= 3:
        return [encoding(image) for image in _pixels(values, camera, column, where)]
    frames = []
    for i, value in enumerate(values):
        frame = value if isinstance(value, bytes) else np.asarray(value, dtype=np.uint8).tobytes().rstrip(b"\0")
        _check_frame(frame, column, where, i)
        if camera.changes_pixels or not encoding.fits(frame):
            frame = encoding(_changed(frame, camera, column, where, i))
        frames.append(frame)
    return frames


def _check_frame(frame: bytes, column: str, where: Place, i: int) -> None:
    if not is_image(frame):
        raise DataError(
            f"{where.step(i)}: {column} begins with {frame[:8]!r}; wanted the bytes of a JPEG or PNG image: correct "
            "the mapping, or record that episode again"
        )
    end = PNG_END if frame.startswith(PNG_START) else JPEG_END
    if not frame.endswith(end) and end not in frame[-TAIL:]:
        raise DataError(f"{where.step(i)}: {column} is not a whole image; record that episode again")
    if frame.startswith(PNG_START) and frame[24:25] == b"\x10":
        raise DataError(f"{where.step(i)}: {column} is a PNG of 16 bits a value, depth and not colour; choose another")


def _changed(frame: bytes, camera: Camera, column: str, where: Place, i: int) -> np.ndarray:
    try:
        pixels = decode_frame(frame, 0, 0)
    except (OSError, SyntaxError, ValueError) as error:
        kind = "JPEG" if frame.startswith(JPEG_START) else "PNG"
        raise DataError(
            f"{where.step(i)}: {column}, a {kind}, can't be decoded ({printable(error)}); record it again"
        ) from None
    return _turned(pixels[..., ::-1] if camera.channels.startswith("bgr") else pixels, camera.flip)


def _turned(pixels: np.ndarray, flip: str) -> np.ndarray:
    """(..., H, W, 3) mirrored as `flip` says."""
    rows = slice(None, None, -1 if flip in ("vertical", "both") else 1)
    columns = slice(None, None, -1 if flip in ("horizontal", "both") else 1)
    return np.ascontiguousarray(pixels[..., rows, columns, :])


def _pixels(values: np.ndarray, camera: Camera, column: str, where: Place) -> np.ndarray:
    if camera.layout == "chw":
        values = np.moveaxis(values, 1, -1) if values.ndim == 4 else values
    channels = len(camera.channels)
    if values.ndim != 4 or values.shape[3] != channels:
        hint = "; is it `layout: chw`?" if values.ndim == 4 and values.shape[1] == channels else ""
        raise DataError(
            f"{where.step(0)}: {column} is {values.dtype} {values.shape[1:]}; wanted (height, width, {channels}){hint}"
        )
    if values.dtype != np.uint8:
        values = _eight_bits(values, camera, column, where)
    elif camera.scale is not None:
        raise DataError(f"mapping: scale of {column}: its pixels are uint8 already; leave it out")
    values = values[..., :3]
    return _turned(values[..., ::-1] if camera.channels.startswith("bgr") else values, camera.flip)


def _eight_bits(values: np.ndarray, camera: Camera, column: str, where: Place) -> np.ndarray:
    if values.dtype.kind not in "fiu" or (values.dtype.kind != "f" and camera.scale is None and values.max() > 255):
        raise DataError(f"{where.step(0)}: {column} is {values.dtype} up to {values.max()}; wanted colours of 8 bits")
    if camera.scale is None and values.dtype.kind == "f" and 0 < values.max() <= 1:
        raise DataError(
            f"{where.step(0)}: {column} is {values.dtype} from {values.min():g} to {values.max():g}, where 0 to 255 "
            "was expected; say `scale: 255` if 1 is white, `scale: 1` if these frames are black"
        )
    values = values * (1.0 if camera.scale is None else camera.scale)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 255):
        raise DataError(
            f"{where.step(0)}: {column} has pixels from {low:g} to {high:g}; wanted 0 to 255: correct scale"
        )
    return np.rint(values).astype(np.uint8)


def _check_camera(column: str, camera: Camera, key: Key, where: str) -> None:
    encoded = key.kind in ("jpeg", "png", "image")
    if not encoded and len(key.shape) != 3 and not (len(key.shape) == 1 and key.kind == "uint8"):
        raise DataError(f"{where}: {column} is made from {camera.key!r}, which is {key}; wanted images")
    if encoded and (camera.layout != "hwc" or camera.scale is not None or len(camera.channels) == 4):
        raise DataError(f"mapping: {column} comes from encoded images; layout, scale and rgba have no meaning there")


def _resolved(camera: Camera, attributes: dict[str, Any], episode: Episode) -> Camera:
    """`flip: auto` as the source says: robosuite's macros_image_convention, opengl being upside down."""
    if camera.flip != "auto":
        return camera
    convention = attributes.get("macros_image_convention")
    if convention not in ("opengl", "opencv"):
        raise DataError(
            f"{episode.name}: flip is auto, but no attribute macros_image_convention says whether frames are upside "
            "down; look at them (--strip out.png), and say flip: vertical or none"
        )
    return dataclasses.replace(camera, flip="vertical" if convention == "opengl" else "none")


def _vector(terms: Sequence[Term], block: Block, length: int, column: str, where: Place) -> np.ndarray:
    parts = [_values(term, block, length, column, where) for term in terms]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _values(term: Term, block: Block, length: int, column: str, where: Place) -> np.ndarray:
    """(N, values) of one term."""
    if term.key is None:
        return np.tile(np.asarray(term.constant, dtype=np.float32), (length, 1))
    try:
        values = np.asarray(block[term.key]).reshape(length, -1)
    except ValueError:  # rows of different lengths
        values = np.zeros((length, 0), dtype=object)
    if values.dtype.kind == "b":
        values = values.astype(np.float32)
    if values.dtype.kind not in "fiu" or values.shape[1] == 0:
        raise DataError(f"{where.step(0)}: {column} is made from {term.key!r}, which is no array of numbers; {_CHOOSE}")
    if term.dims is not None:
        if max(term.dims) >= values.shape[1]:
            raise DataError(
                f"{where.step(0)}: {column} takes value {max(term.dims)} of {term.key!r}, which has {values.shape[1]}; "
                "correct the mapping"
            )
        first, count = term.dims[0], len(term.dims)
        in_a_row = term.dims == tuple(range(first, first + count))
        values = values[:, first : first + count] if in_a_row else values[:, list(term.dims)]
    if term.scale != 1 or term.offset != 0 or term.invert or term.clip:
        values = values * np.float64(term.scale) + term.offset
        values = 1 - values if term.invert else values
        values = np.clip(values, *term.clip) if term.clip else values
    return values


def _truths(values: np.ndarray | list[Any], key: str, where: Place) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind not in "biuf" or array.size != len(array):
        raise DataError(f"{where.step(0)}: {key!r} is {array.dtype} {array.shape}; wanted true or false a step")
    return array.reshape(-1).astype(bool)


def _text(value: Any, key: str, where: str) -> str:
    """Bytes in UTF-8, or code points padded with zeros, as text."""
    try:
        if isinstance(value, bytes):
            return value.rstrip(b"\0").decode()
        array = np.asarray(value)
        if array.dtype.kind == "S" and array.size == 1:
            return bytes(array.item()).decode()
        if array.dtype == np.uint8:
            return array.tobytes().rstrip(b"\0").decode()
        if array.dtype.kind in "iu":
            return "".join(map(chr, array[array != 0].tolist()))
    except (UnicodeDecodeError, ValueError, OverflowError) as error:
        raise DataError(f"{where}: {key!r} is no text in UTF-8 ({printable(error)}); {_CHOOSE}") from None
    raise DataError(f"{where}: {key!r} is {printable(repr(value), 60)}; wanted a text; {_CHOOSE}")


_CHOOSE = "choose another key (--inspect lists them)"


def _attribute(attributes: dict[str, Any], name: str, json_key: str | None, episode: Episode) -> str:
    """The text of an attribute, or what its JSON has under a key; a list of letters is joined, quotes are taken off."""
    check_names([name], list(attributes), "attribute", episode.name)
    value = attributes[name]
    if isinstance(value, np.ndarray):
        value = value.item() if value.size == 1 else value.tolist()
    if isinstance(value, bytes):
        value = _text(value, f"@{name}", episode.name)
    if json_key is not None:
        try:
            value = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            raise DataError(f"{episode.name}: attribute {name!r} is no JSON; leave out :{json_key}") from None
        if not isinstance(value, dict) or json_key not in value:
            found = ", ".join(map(str, value)) if isinstance(value, dict) else "no object"
            raise DataError(f"{episode.name}: attribute {name!r} has no {json_key!r} (found: {printable(found)})")
        value = value[json_key]
    if isinstance(value, list) and value and all(isinstance(letter, str) for letter in value):
        value = "".join(value)
    if not isinstance(value, str):
        raise DataError(f"{episode.name}: attribute {name!r} is {printable(repr(value), 60)}; wanted a text")
    return value.strip().strip('"')


def _rows(block: Block, rows: np.ndarray | slice) -> Block:
    """Some rows of a block."""
    chosen = range(len(block[PROMPT]))[rows] if isinstance(rows, slice) else rows.tolist()
    return {
        name: values[rows] if isinstance(values, np.ndarray) else [values[i] for i in chosen]
        for name, values in block.items()
    }


def _joined(first: Block | None, second: Block) -> Block:
    if first is None or not len(first[PROMPT]):
        return second
    return {
        name: np.concatenate([first[name], values]) if isinstance(values, np.ndarray) else first[name] + values
        for name, values in second.items()
    }


def _without_last(blocks: Iterator[Block], count: int) -> Iterator[Block]:
    """The last rows left out; the flag of the very last row goes to the last that stays."""
    if not count:
        yield from blocks
        return
    held: Block | None = None
    for block in blocks:
        block = _joined(held, block)
        split = max(len(block[PROMPT]) - count, 0)
        block[TERMINATED] = np.full(len(block[TERMINATED]), block[TERMINATED][-1])
        if split > 1:  # one row stays behind, to carry the flag
            yield _rows(block, slice(0, split - 1))
        held = _rows(block, slice(max(split - 1, 0), None))
    if held is not None and len(held[PROMPT]) > count:
        yield _rows(held, slice(0, len(held[PROMPT]) - count))


def _shifted(blocks: Iterator[Block], count: int) -> Iterator[Block]:
    """Row t with the action of row t + count; the last rows have none and are left out."""
    if not count:
        yield from blocks
        return
    held: Block | None = None
    for block in blocks:
        held = _joined(held, block)
        split = len(held[PROMPT]) - count
        if split > 1:  # one row stays behind, for the last row's flag
            yield {**_rows(held, slice(0, split - 1)), ACTION: held[ACTION][count : count + split - 1]}
            held = _rows(held, slice(split - 1, None))
    if held is not None and (split := len(held[PROMPT]) - count) > 0:
        flags = np.full(split, held[TERMINATED][-1])
        yield {**_rows(held, slice(0, split)), ACTION: held[ACTION][count:], TERMINATED: flags}


def _without_first(blocks: Iterator[Block], count: int) -> Iterator[Block]:
    for block in blocks:
        if count:
            length = len(block[PROMPT])
            block = _rows(block, slice(min(count, length), None))
            count -= min(count, length)
        if len(block[PROMPT]):
            yield block


def _warn_of_zero_action(action: np.ndarray, episode: Episode) -> None:
    if action is not None and not np.any(action[-1]) and "zero action" not in _told:
        _told.add("zero action")
        logger.warning(
            "%s: the last step's action is all zero; if episodes end with an observation alone, give drop_last: 1",
            episode.name,
        )
