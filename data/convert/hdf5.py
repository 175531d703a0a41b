"""HDF5 episodes in the ALOHA layout, one file each, into the schema of docs/data_format.md.

The layout is that of tonyzhaozh/aloha (record_episodes.py) and act-plus-plus:

    /action                      (T, per_action_dim) float
    /observations/qpos           (T, state_dim) float
    /observations/images/<cam>   (T, H, W, 3) uint8; or compressed: (T, longest) uint8, JPEG bytes padded with zeros
    /compress_len                (cameras, T), lengths of the compressed frames; optional
    attributes                   sim (bool), compress (bool)

Compressed frames go over untouched, without their padding. The file says nothing about rate, instruction or the
order of colour channels, so these are options.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

from data.convert.conversion import (
    UNITS,
    ConversionSummary,
    check_names,
    convert_files,
    fingerprint,
    parse_cameras,
    parse_episodes,
    parse_state_keys,
    plan_files,
)
from data.convert.episode_writer import EpisodeFileWriter, ImageEncoding, OutputFile, Steps
from data.convert.foreign_sources import check_links, file_in, reading
from data.convert.hdf5_files import (
    ROWS_PER_BLOCK,
    attribute_text,
    get_item,
    open_hdf5,
    read_rows,
    require_written,
)
from data.decoding import upright_rgb
from data.schema import STATE, TIMESTAMP
from utils.parquet_utils import DataError, files_below

IMAGES = "observations/images"
SUFFIXES = (".hdf5", ".h5")


@dataclass(frozen=True)
class Hdf5Options:
    """What is converted, and how.

    Attributes:
        cameras: group member of observations/images -> its column.
        state_columns: columns of the state -> the datasets that make up each, in order.
        action_key: dataset that is `action`.
        encoding: of raw frames, and of compressed ones in `bgr` order.
        fps: control rate, for the time stamps.
        prompt: instruction of every episode that has no `prompt_attribute`.
        prompt_attribute: attribute of the file that holds its instruction.
        channel_order: of raw pixels, and of compressed ones as a standard decoder gives them: `rgb` or `bgr`.
        terminal: whether the episodes ended by themselves, not by a time limit.
    """

    cameras: dict[str, str]
    state_columns: dict[str, tuple[str, ...]]
    action_key: str
    encoding: ImageEncoding
    fps: float
    prompt: str | None
    prompt_attribute: str | None
    channel_order: str
    terminal: bool

    @property
    def state_keys(self) -> tuple[str, ...]:
        """Datasets that make up the state, in order."""
        return tuple(key for keys in self.state_columns.values() for key in keys)

    def __post_init__(self) -> None:
        if self.channel_order not in ("rgb", "bgr"):
            raise DataError(f"--channel_order is {self.channel_order!r}; wanted rgb or bgr")
        if not 0 < self.fps < math.inf:
            raise DataError(f"--fps is {self.fps}; wanted more than 0")
        if not self.prompt and not self.prompt_attribute:
            raise DataError(
                "every step needs an instruction: give --prompt, or --prompt_attribute where files have one"
            )


@dataclass(frozen=True)
class _Header:
    """What a file holds, without reading it."""

    length: int
    state_widths: dict[str, int]
    per_action_dim: int


def convert_hdf5(
    hdf5_dir: Path,
    output_dir: Path,
    cameras: Sequence[str],
    *,
    prompt: str | None = None,
    prompt_attribute: str | None = None,
    state_keys: Sequence[str] = ("observations/qpos",),
    action_key: str = "action",
    episodes: Sequence[str] | None = None,
    encoding: ImageEncoding | None = None,
    fps: float = 50,
    channel_order: str = "rgb",
    terminal: bool = False,
    num_workers: int = 1,
    overwrite: bool = False,
    follow_links: bool = False,
) -> ConversionSummary:
    """Convert every `.hdf5` and `.h5` file of a folder, searched recursively, into Parquet files of our schema.

    Args:
        hdf5_dir: the folder; episodes are numbered by the natural order of the files' names.
        output_dir: where the files go (see `plan_files`).
        cameras: `<camera>=<column>` for each, as in `cam_high=image_1`.
        episodes: numbers and ranges such as "3-7"; None: all.
        num_workers, overwrite: see `convert_files`.
        follow_links: read files that are links to others outside of the folder.
        state_keys: see `parse_state_keys`.
        prompt, prompt_attribute, action_key, encoding, fps, channel_order, terminal: see `Hdf5Options`.

    Raises:
        DataError: a fault in a file or in the options, naming place and remedy.
    """
    paths = find_episodes(hdf5_dir, follow_links)
    with open_hdf5(paths[0]) as file, reading(paths[0]):
        _require_aloha(file, paths[0])
        available = sorted(map(str, get_item(file, IMAGES, h5py.Group, paths[0])))
    options = Hdf5Options(
        cameras=parse_cameras(cameras, available, str(paths[0])),
        state_columns=parse_state_keys(state_keys),
        action_key=action_key,
        encoding=encoding or ImageEncoding(),
        fps=fps,
        prompt=prompt,
        prompt_attribute=prompt_attribute,
        channel_order=channel_order,
        terminal=terminal,
    )
    chosen = parse_episodes(episodes, range(len(paths)), str(hdf5_dir))
    headers = {index: _read_header(paths[index], options) for index in chosen}
    first = headers[chosen[0]]
    for index, header in headers.items():
        if (header.state_widths, header.per_action_dim) != (first.state_widths, first.per_action_dim):
            raise DataError(
                f"{paths[index]}: state has {_widths(header)} values and action {header.per_action_dim}, in "
                f"{paths[chosen[0]]} they have {_widths(first)} and {first.per_action_dim}; convert these files apart"
            )
    files = plan_files(
        output_dir,
        chosen,
        total=len(paths),
        lengths={index: header.length for index, header in headers.items()},
        settings=_settings(options),
        sources=lambda members: {
            paths[index].relative_to(hdf5_dir).as_posix(): fingerprint(paths[index]) for index in members
        },
    )
    convert = functools.partial(_convert_file, hdf5_dir, options, (first.state_widths, first.per_action_dim))
    return convert_files(files, convert, num_workers=num_workers, overwrite=overwrite)


def find_episodes(folder: Path, follow_links: bool = False) -> list[Path]:
    """The HDF5 files of a folder, `episode_2` before `episode_10`.

    Raises:
        DataError: there are none, or one is a link to a file elsewhere and `follow_links` is not given.
    """
    paths = files_below(folder, SUFFIXES, "--hdf5_dir")
    for path in paths:
        file_in(folder, path.relative_to(folder), follow_links)
    if not paths:
        raise DataError(f"--hdf5_dir: {folder} holds no file that ends in {' or '.join(SUFFIXES)}")
    return sorted(paths, key=lambda path: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", str(path))])


def _require_aloha(file: h5py.File, path: Path) -> None:
    """Raise a DataError, which names the command that reads it, where a file has another layout."""
    check_links(file, IMAGES, path)
    if IMAGES in file:
        return
    check_links(file, "data", path)
    data = file.get("data")
    demos = sorted(name for name in map(str, data) if name.startswith("demo_")) if isinstance(data, h5py.Group) else []
    if demos:
        raise DataError(
            f"{path}: is in robomimic's layout ({len(demos)} demonstrations in one file, data/{demos[0]}/...); only "
            f"ALOHA's is read here, one episode a file with {IMAGES}/<camera>: convert it with scripts/convert.py, "
            "--preset robomimic or libero (docs/convert.md)"
        )
    raise DataError(
        f"{path}: no group {IMAGES!r} (at the top: {', '.join(map(str, file)) or 'nothing'}), so it is not in ALOHA's "
        f"layout, which alone is read here; look with: python scripts/convert.py --from hdf5 {path} --inspect"
    )


def _settings(options: Hdf5Options) -> dict[str, Any]:
    """The options that files depend on."""
    keys_by_column = {column: list(keys) for column, keys in options.state_columns.items()}
    return {
        "cameras": options.cameras,
        "state_keys": list(options.state_keys),
        **({} if list(options.state_columns) == [STATE] else {"state_columns": keys_by_column}),
        "action_key": options.action_key,
        "fps": options.fps,
        "prompt": options.prompt,
        "prompt_attribute": options.prompt_attribute,
        "channel_order": options.channel_order,
        "terminal": options.terminal,
        **options.encoding.settings(),
    }


def _convert_file(folder: Path, options: Hdf5Options, widths: tuple[dict[str, int], int], file: OutputFile) -> None:
    paths = [folder / name for name in file.sources]
    with open_hdf5(paths[0]) as first:
        sim = _flag(first, "sim")
    with EpisodeFileWriter(
        file.path,
        cameras=list(options.cameras.values()),
        state_dim=widths[0],
        per_action_dim=widths[1],
        metadata=file.metadata(
            {
                "source": folder.resolve().name,
                "source_format": "HDF5, ALOHA layout",
                "fps": options.fps,
                "robot_type": None,
                "cameras": options.cameras,
                "state_keys": list(options.state_keys),
                "state_columns": list(options.state_columns),
                "state_names": None,
                "action_names": None,
                "units": UNITS,
                "sim": sim,
            }
        ),
        source=str(folder),
    ) as writer:
        for index, path in zip(file.episodes, paths, strict=True):
            length = _read_header(path, options).length
            with open_hdf5(path) as episode, reading(path):
                writer.write_episode(index, length, _read_episode(episode, path, length, options))


def _read_header(path: Path, options: Hdf5Options) -> _Header:
    """Check that a file has every array that the options name, and all of one length."""
    with open_hdf5(path) as file, reading(path):
        check_names(options.cameras, sorted(map(str, get_item(file, IMAGES, h5py.Group, path))), "camera", str(path))
        lengths, widths = {}, {}
        for key in (*options.state_keys, options.action_key):
            array = get_item(file, key, h5py.Dataset, path)
            if array.shape is None or array.ndim != 2 or array.dtype.kind not in "fiu":
                raise DataError(f"{path}: {key} is {array.dtype} {array.shape}; wanted numbers (steps, values)")
            lengths[key], widths[key] = array.shape
            require_written(array, path)
        for camera in options.cameras:
            array = get_item(file, f"{IMAGES}/{camera}", h5py.Dataset, path)
            _is_compressed(array, path, camera)
            lengths[f"{IMAGES}/{camera}"] = len(array)
            require_written(array, path)
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{key} {length}" for key, length in lengths.items())
            raise DataError(f"{path}: steps differ ({counts}); the file is damaged or incomplete, so record it again")
        length = lengths[options.action_key]
        if length == 0:
            raise DataError(f"{path}: holds no steps; remove it or record it again")
    columns = {column: sum(widths[key] for key in keys) for column, keys in options.state_columns.items()}
    return _Header(length, columns, widths[options.action_key])


def _widths(header: _Header) -> str:
    """The values of a state for a message."""
    return " + ".join(map(str, header.state_widths.values()))


def _read_episode(file: h5py.File, path: Path, length: int, options: Hdf5Options) -> Iterator[Steps]:
    prompt = _prompt(file, path, options)
    frames = {column: _frames(file, path, camera, options) for camera, column in options.cameras.items()}
    for begin in range(0, length, ROWS_PER_BLOCK):
        end = min(begin + ROWS_PER_BLOCK, length)
        yield Steps(
            images={column: [next(images) for _ in range(begin, end)] for column, images in frames.items()},
            state=np.concatenate([read_rows(file[key], begin, end, path) for key in options.state_keys], axis=1),
            action=read_rows(file[options.action_key], begin, end, path),
            prompts=[prompt] * (end - begin),
            extra={TIMESTAMP: (np.arange(begin, end) / options.fps).astype(np.float32)},
            terminal=options.terminal,
        )


def _frames(file: h5py.File, path: Path, camera: str, options: Hdf5Options) -> Iterator[bytes]:
    """The encoded frames of one camera."""
    array = file[f"{IMAGES}/{camera}"]
    compressed = _is_compressed(array, path, camera)
    lengths = None
    if compressed and "compress_len" in file.keys():
        lengths = _compressed_lengths(file, path, len(array))
    for begin in range(0, len(array), ROWS_PER_BLOCK):
        block = read_rows(array, begin, begin + ROWS_PER_BLOCK, path)
        if not compressed:
            for image in block:
                yield options.encoding(image if options.channel_order == "rgb" else image[..., ::-1])
            continue
        encoded = [np.asarray(frame, dtype=np.uint8).tobytes().rstrip(b"\0") for frame in block]
        if lengths is not None:  # one row for each camera, in an order that the file does not tell
            frame_lengths = np.array([len(frame) for frame in encoded])
            lengths = lengths[(lengths[:, begin : begin + len(frame_lengths)] == frame_lengths).all(axis=1)]
            if not len(lengths):
                raise DataError(
                    f"{path}: {camera} from frame {begin} on is not as long as compress_len says for any camera; the "
                    "file is damaged, so record it again"
                )
        for i, frame in enumerate(encoded, start=begin):
            if not (frame.startswith(b"\xff\xd8\xff") and frame.endswith(b"\xff\xd9")):
                raise DataError(f"{path}: {camera} frame {i} is not a whole JPEG image; record that episode again")
            is_rgb = options.channel_order == "rgb"
            if is_rgb and options.encoding.fits(frame):
                yield frame
            else:
                yield options.encoding(_decoded(frame, path, camera, i)[..., :: 1 if is_rgb else -1])


def _compressed_lengths(file: h5py.File, path: Path, steps: int) -> np.ndarray:
    """compress_len as (cameras, steps); one dimension is the only camera's."""
    array = get_item(file, "compress_len", h5py.Dataset, path)
    if array.shape is None or array.ndim not in (1, 2) or array.dtype.kind not in "fiu" or array.shape[-1] != steps:
        raise DataError(f"{path}: compress_len is {array.dtype} {array.shape}; wanted numbers (cameras, {steps})")
    return np.atleast_2d(read_rows(array, 0, len(array), path))


def _decoded(frame: bytes, path: Path, camera: str, index: int) -> np.ndarray:
    """The pixels of a JPEG image."""
    try:
        with Image.open(io.BytesIO(frame), formats=("JPEG",)) as image:
            return np.asarray(upright_rgb(image))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: {camera} frame {index} can't be decoded ({error}); record it again") from None


def _is_compressed(array: h5py.Dataset, path: Path, camera: str) -> bool:
    """Whether frames are JPEG bytes rather than pixels, from the array's shape."""
    if array.shape is None:
        raise DataError(f"{path}: {IMAGES}/{camera} is empty; record that episode again")
    if array.ndim == 4 and array.shape[3] == 3 and array.dtype == np.uint8:
        return False
    if (array.ndim == 2 and array.dtype == np.uint8) or (
        array.ndim == 1 and h5py.check_vlen_dtype(array.dtype) == np.uint8
    ):
        return True
    raise DataError(
        f"{path}: {IMAGES}/{camera} is {array.dtype} {array.shape}; wanted uint8 (steps, height, width, 3), or JPEG "
        "bytes as uint8 (steps, longest)"
    )


def _prompt(file: h5py.File, path: Path, options: Hdf5Options) -> str:
    """The instruction of a file: its attribute, or --prompt where it has none or an empty one."""
    name = options.prompt_attribute
    if name is not None and name in file.attrs:
        text = attribute_text(file, name, path)
        if text.strip():
            return text
    if options.prompt:
        return options.prompt
    fault = "is empty" if name in file.attrs else f"is not there (found: {', '.join(map(str, file.attrs)) or 'none'})"
    raise DataError(f"{path}: attribute {name!r} {fault}; give --prompt as well, for files that have none")


def _flag(file: h5py.File, name: str) -> bool | None:
    """An attribute that says yes or no; None where it is not there, or says something else."""
    try:
        value = np.asarray(file.attrs[name])
    except (KeyError, OSError, TypeError, ValueError):
        return None
    return bool(value.item()) if value.size == 1 and value.dtype.kind in "biu" else None
