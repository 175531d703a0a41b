"""The doctor: every planted fault with its file and row, nothing on clean data, and the command around it."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import inspect_parquet
from data.doctor.examine import Wanted, examine
from data.doctor.findings import KINDS, MAX_PER_FILE
from data.doctor.report import write_plots
from data.episode_store import EpisodeStore
from data.processing import ObservationError, VLAImageProcessor
from tests.helpers import write_rows
from utils.parquet_utils import DataError

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ("press the button", "slide the window open")
TRAIN, VAL = ("a.parquet", "b.parquet", "c.parquet"), ("val.parquet",)
# rows per file: a holds episodes 0 and 1 and the first 10 steps of 2; b the rest of 2, 3 and 4; c 5, 6 and 7
LENGTHS, VAL_LENGTHS = (24, 28, 26, 22, 30, 25, 27, 24), (26, 23)
A_ROWS = 24 + 28 + 10

Row = dict[str, Any]
Files = dict[str, list[Row]]


def encode(pixels: np.ndarray, format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=format, **options)
    return buffer.getvalue()


def scene(position: np.ndarray, gripper: float, noise: np.ndarray) -> bytes:
    """A table seen by a noisy camera: a disc where the hand is, smaller when it is shut."""
    y, x = np.mgrid[0:40, 0:40]
    pixels = np.stack([90 + 2 * x, 120 + y, 200 - 2 * x], axis=-1).astype(np.int64)
    disc = (x - 20 - 15 * position[0]) ** 2 + (y - 20 - 15 * position[1]) ** 2 < (4 + 3 * gripper) ** 2
    pixels[disc] = (200, 30, 30 + 100 * position[2])
    return encode(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def episode(length: int, seed: int) -> list[Row]:
    """A hand that goes to a place, shuts there and goes on to another, by a clipped proportional controller."""
    rng = np.random.default_rng(seed)
    position, gripper = rng.uniform(-0.3, 0.3, 3), 1.0
    goals = rng.uniform(-1, 1, (2, 3))
    clock, rows = 0.0, []
    shuts = int(length * rng.uniform(0.4, 0.6))
    for step in range(length):
        command = 0.0 if step >= shuts else 1.0
        goal = goals[0] if step < shuts else goals[1]
        action = np.clip(3 * (goal - position), -1, 1)
        seen = np.append(position + rng.normal(0, 1e-3, 3), gripper)
        rows.append(
            {
                "image_1": scene(position, gripper, rng.integers(-6, 7, (40, 40, 3))),
                "image_2": scene(position[::-1], gripper, rng.integers(-6, 7, (40, 40, 3))),
                "state": seen.astype(np.float32).tolist(),
                "action": np.append(action, command).astype(np.float32).tolist(),
                "is_first": step == 0,
                "is_last": step == length - 1,
                "is_terminal": step == length - 1,
                "prompt": PROMPTS[seed % 2],
                "episode_index": seed,
                "frame_index": step,
                "timestamp": clock,
            }
        )
        position = position + 0.1 * action
        gripper += np.clip(command - gripper, -0.25, 0.25)
        clock += 0.05 * rng.uniform(0.95, 1.05)
    return rows


@pytest.fixture(scope="session")
def clean_rows() -> Files:
    train = [row for i, length in enumerate(LENGTHS) for row in episode(length, i)]
    cuts = (0, A_ROWS, sum(LENGTHS[:5]), sum(LENGTHS))
    files = {name: train[cuts[i] : cuts[i + 1]] for i, name in enumerate(TRAIN)}
    files["val.parquet"] = [row for i, length in enumerate(VAL_LENGTHS) for row in episode(length, 100 + i)]
    return files


@pytest.fixture
def files(clean_rows) -> Files:
    return copy.deepcopy(clean_rows)


def write(folder: Path, files: Files) -> tuple[list[Path], list[Path]]:
    for name, rows in files.items():
        write_rows(folder / name, rows, row_group_size=16)
    return [folder / name for name in files if name not in VAL], [folder / name for name in files if name in VAL]


def replace_column(path: Path, name: str, column: Any, type: pa.DataType | None = None) -> None:
    """Rewrite a file with one column replaced, added, or (None) removed."""
    table = pq.read_table(path)
    if name in table.schema.names:
        index = table.schema.get_field_index(name)
        table = table.remove_column(index)
    if column is not None:
        table = table.append_column(name, pa.array(column, type=type))
    pq.write_table(table, path)


@dataclass
class Fault:
    """A planted fault.

    Attributes:
        kind: what the doctor must say.
        file, row: where; row None for a fault of a file or column.
        spoil: changes the rows before they are written.
        damage: changes the folder after.
        episode: the episode that the finding must name.
        also: further kinds that follow from this fault.
        loads: whether the training loader takes such data; None: as the severity says.
        wanted: what the config asks for.
        name: tells faults of one kind apart.
    """

    kind: str
    file: str
    row: int | None
    spoil: Callable[[Files], Any] | None = None
    damage: Callable[[Path], Any] | None = None
    episode: int | None = None
    also: set[str] = field(default_factory=set)
    loads: bool | None = None
    wanted: Wanted | None = None
    name: str = ""


def put(file: str, row: int, column: str, value: Any) -> Callable[[Files], None]:
    return lambda files: files[file][row].__setitem__(column, value)


def put_all(file: str, column: str, value: Callable[[int, Row], Any]) -> Callable[[Files], None]:
    def spoil(files: Files) -> None:
        for i, row in enumerate(files[file]):
            row[column] = value(i, row)

    return spoil


def put_value(file: str, row: int, column: str, dim: int, value: float) -> Callable[[Files], None]:
    return lambda files: files[file][row][column].__setitem__(dim, value)


def each(*spoilers: Callable[[Files], Any]) -> Callable[[Files], None]:
    return lambda files: [spoil(files) for spoil in spoilers]


def drop_rows(file: str, rows: slice) -> Callable[[Files], None]:
    return lambda files: files[file].__delitem__(rows)


def plain(files: Files) -> None:
    """Without the columns that a recorder may leave out."""
    for rows in files.values():
        for row in rows:
            for name in ("episode_index", "frame_index", "timestamp"):
                del row[name]


def picture(size: tuple[int, int] = (40, 40), **options: Any) -> bytes:
    pixels = np.random.default_rng(5).integers(0, 256, (*size, 3), dtype=np.uint8)
    return encode(pixels, **options)


def converted(mode: str, format: str = "PNG") -> bytes:
    image = Image.open(io.BytesIO(picture())).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return buffer.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(exif=exif)


def freeze(file: str, column: str, dim: int, rows: slice, value: float | None = None) -> Callable[[Files], None]:
    def spoil(files: Files) -> None:
        for row in files[file][rows]:
            row[column][dim] = files[file][rows.start or 0][column][dim] if value is None else value

    return spoil


def shift(file: str, rows: slice, by: list[float]) -> Callable[[Files], None]:
    def spoil(files: Files) -> None:
        for row in files[file][rows]:
            row["state"] = [x + d for x, d in zip(row["state"], by, strict=True)]

    return spoil


def longer(files: Files) -> None:
    """One episode, in place of episode 6, that goes on far longer than the others of its prompt."""
    rows = episode(120, 6)
    files["c.parquet"][25:52] = rows


def more_episodes(files: Files) -> None:
    for i in (108, 110, 112, 114):
        files["val.parquet"] += episode(25, i)


FAULTS = [
    # files and columns
    Fault("unreadable_file", "c.parquet", None, damage=lambda d: (d / "c.parquet").write_bytes(b"PAR1 not really")),
    Fault(
        "unreadable_file",
        "b.parquet",
        None,
        name="truncated",
        damage=lambda d: (d / "b.parquet").write_bytes((d / "b.parquet").read_bytes()[:-2000]),
    ),
    Fault("corrupt_data", "c.parquet", 0, damage=lambda d: spoil_pages(d / "c.parquet", "action")),
    Fault("corrupt_data", "c.parquet", 0, damage=lambda d: spoil_pages(d / "c.parquet", "image_1"), name="images"),
    Fault(
        "empty_file",
        "c.parquet",
        None,
        damage=lambda d: pq.write_table(pq.read_table(d / "c.parquet").slice(0, 0), d / "c.parquet"),
    ),
    Fault(
        "duplicated_file",
        "d.parquet",
        None,
        damage=lambda d: (d / "d.parquet").write_bytes((d / "c.parquet").read_bytes()),
        loads=True,
    ),
    Fault("missing_column", "b.parquet", None, damage=lambda d: replace_column(d / "b.parquet", "action", None)),
    Fault(
        "missing_column",
        "b.parquet",
        None,
        damage=lambda d: replace_column(d / "b.parquet", "image_1", None),
        name="image_1",
    ),
    Fault(
        "missing_column",
        "b.parquet",
        None,
        damage=lambda d: replace_column(d / "b.parquet", "is_last", None),
        name="is_last",
    ),
    Fault(
        "ambiguous_image_column", "b.parquet", None, put_all("b.parquet", "image_1_bytes", lambda i, r: r["image_1"])
    ),
    Fault(
        "wrong_type",
        "a.parquet",
        None,
        damage=lambda d: replace_column(d / "a.parquet", "is_first", [int(i == 0) for i in range(A_ROWS)]),
        name="integer flags",
    ),
    Fault(
        "wrong_type",
        "a.parquet",
        None,
        damage=lambda d: replace_column(d / "a.parquet", "state", ["0 0 0 0"] * A_ROWS),
        name="text states",
    ),
    Fault(
        "wrong_type",
        "a.parquet",
        None,
        damage=lambda d: replace_column(d / "a.parquet", "image_1", [[1, 2, 3]] * A_ROWS),
        name="pixel lists",
    ),
    Fault("camera_missing", "b.parquet", None, damage=lambda d: replace_column(d / "b.parquet", "image_2", None)),
    # rows
    Fault("null_value", "a.parquet", 31, put("a.parquet", 31, "state", None), episode=1, name="state"),
    Fault("null_value", "a.parquet", 31, put("a.parquet", 31, "action", []), episode=1, name="empty action"),
    Fault("null_value", "b.parquet", 20, put("b.parquet", 20, "is_terminal", None), episode=3, name="flag"),
    Fault("null_value", "b.parquet", 20, put("b.parquet", 20, "prompt", None), episode=3, name="prompt"),
    Fault("null_value", "b.parquet", 20, put("b.parquet", 20, "image_1", None), episode=3, name="image_1"),
    Fault("width_varies", "b.parquet", 7, put("b.parquet", 7, "action", [0.1, 0.2, 0.3]), episode=2),
    Fault(
        "width_differs_between_files", "c.parquet", None, put_all("c.parquet", "state", lambda i, r: r["state"] + [0.5])
    ),
    Fault(
        "width_differs_from_config",
        "a.parquet",
        None,
        wanted=Wanted(widths={"action": ("per_action_dim", 7), "state": ("data.state_dim", 4)}),
        loads=True,
    ),
    Fault("nan", "c.parquet", 33, put_value("c.parquet", 33, "state", 2, float("nan")), episode=6),
    Fault("nan", "c.parquet", 33, put_value("c.parquet", 33, "action", 2, None), episode=6, name="null element"),
    Fault("infinity", "val.parquet", 30, put_value("val.parquet", 30, "action", 1, float("-inf")), episode=1),
    Fault(
        "float32_precision",
        "a.parquet",
        9,
        damage=lambda d: replace_column(
            d / "a.parquet", "state", big_states(d / "a.parquet", 9), pa.list_(pa.float64())
        ),
        episode=0,
        also={"state_outlier"},
    ),
    # flags and episodes
    Fault("begins_without_is_first", "a.parquet", 0, put("a.parquet", 0, "is_first", False), episode=0),
    Fault("missing_is_first", "a.parquet", 24, put("a.parquet", 24, "is_first", False), episode=1),
    Fault(
        "missing_is_first",
        "a.parquet",
        24,
        each(plain, put("a.parquet", 24, "is_first", False)),
        episode=1,
        name="without indices",
    ),
    Fault(
        "unexpected_is_first",
        "a.parquet",
        35,
        put("a.parquet", 35, "is_first", True),
        episode=2,
        also={"episode_index_contradicts"},
    ),
    Fault(
        "unexpected_is_first",
        "a.parquet",
        35,
        each(plain, put("a.parquet", 35, "is_first", True)),
        episode=2,
        name="without indices",
    ),
    Fault(
        "missing_is_last",
        "a.parquet",
        51,
        each(put("a.parquet", 51, "is_last", False), put("a.parquet", 51, "is_terminal", False)),
        episode=1,
    ),
    Fault(
        "missing_is_last",
        "a.parquet",
        51,
        each(plain, put("a.parquet", 51, "is_last", False), put("a.parquet", 51, "is_terminal", False)),
        episode=1,
        name="without indices",
    ),
    Fault(
        "unexpected_is_last",
        "b.parquet",
        21,
        put("b.parquet", 21, "is_last", True),
        episode=3,
        also={"episode_index_contradicts"},
    ),
    Fault(
        "unexpected_is_last",
        "b.parquet",
        21,
        each(plain, put("b.parquet", 21, "is_last", True)),
        episode=3,
        name="without indices",
    ),
    Fault(
        "ends_without_is_last",
        "c.parquet",
        75,
        each(put("c.parquet", 75, "is_last", False), put("c.parquet", 75, "is_terminal", False)),
        episode=7,
    ),
    Fault("ends_without_is_last", "c.parquet", 73, drop_rows("c.parquet", slice(74, None)), episode=7, name="cut off"),
    Fault("terminal_without_is_last", "b.parquet", 10, put("b.parquet", 10, "is_terminal", True), episode=2),
    Fault(
        "episode_index_contradicts",
        "a.parquet",
        24,
        each(
            put("a.parquet", 24, "is_first", False),
            put("a.parquet", 23, "is_last", False),
            put("a.parquet", 23, "is_terminal", False),
        ),
        episode=0,
        also={"frame_index_contradicts", "prompt_changes", "timestamp_not_increasing"},
        loads=True,
    ),
    Fault(
        "frame_index_contradicts",
        "a.parquet",
        40,
        each(drop_rows("a.parquet", slice(40, 41)), put_all("a.parquet", "timestamp", lambda i, r: None)),
        episode=1,
    ),
    Fault("short_episode", "val.parquet", 49, lambda files: files["val.parquet"].extend(episode(1, 120)), episode=2),
    Fault("short_episode", "b.parquet", 16, wanted=Wanted(horizon=24), episode=3, name="horizon"),
    Fault("episode_length_outlier", "c.parquet", 25, each(longer, more_episodes), episode=6),
    Fault(
        "duplicated_episode",
        "c.parquet",
        76,
        lambda files: files["c.parquet"].extend(copy.deepcopy(files["a.parquet"][:24])),
        episode=8,
    ),
    Fault(
        "split_overlap",
        "val.parquet",
        26,
        lambda files: files["val.parquet"].__setitem__(slice(26, None), copy.deepcopy(files["a.parquet"][24:52])),
        episode=1,
        loads=True,
    ),
    Fault(
        "split_overlap",
        "val.parquet",
        None,
        lambda files: files.__setitem__("val.parquet", copy.deepcopy(files["c.parquet"])),
        loads=True,
        name="whole file",
    ),
    # prompts
    Fault("empty_prompt", "b.parquet", 3, put("b.parquet", 3, "prompt", "  "), episode=2),
    Fault(
        "invalid_text",
        "c.parquet",
        2,
        damage=lambda d: replace_column(d / "c.parquet", "prompt", bad_utf8(d / "c.parquet", 2)),
        episode=5,
    ),
    Fault(
        "prompt_changes",
        "a.parquet",
        30,
        put_all("a.parquet", "prompt", lambda i, r: PROMPTS[0] if 30 <= i < 52 else r["prompt"]),
        episode=1,
    ),
    Fault(
        "prompt_whitespace", "c.parquet", 0, put_all("c.parquet", "prompt", lambda i, r: r["prompt"] + " \n"), episode=5
    ),
    Fault(
        "prompt_variants",
        "c.parquet",
        0,
        put_all("c.parquet", "prompt", lambda i, r: "Slide the window open." if i < 25 else r["prompt"]),
        episode=5,
    ),
    Fault(
        "prompt_too_long",
        "a.parquet",
        24,
        wanted=Wanted(count_tokens=lambda prompt: len(prompt.split()) + 2, prompt_max_len=5),
        episode=1,
    ),
    # time
    Fault("timestamp_missing", "a.parquet", 12, put("a.parquet", 12, "timestamp", None), episode=0),
    Fault(
        "timestamp_not_increasing",
        "b.parquet",
        25,
        lambda files: put("b.parquet", 25, "timestamp", files["b.parquet"][24]["timestamp"] - 0.01)(files),
        episode=3,
        also={"timestamp_gap"},
    ),
    Fault(
        "timestamp_gap",
        "b.parquet",
        25,
        put_all("b.parquet", "timestamp", lambda i, r: r["timestamp"] + (0.4 if 25 <= i < 38 else 0)),
        episode=3,
    ),
    Fault(
        "irregular_rate",
        "c.parquet",
        None,
        put_all("c.parquet", "timestamp", lambda i, r: r["timestamp"] + 0.018 * (r["frame_index"] % 2)),
        also={"rate_differs"},
    ),
    Fault("rate_differs", "val.parquet", None, put_all("val.parquet", "timestamp", lambda i, r: 2 * r["timestamp"])),
    # numbers
    Fault("state_outlier", "a.parquet", 44, put_value("a.parquet", 44, "state", 1, 300.0), episode=1),
    Fault("action_outlier", "b.parquet", 44, put_value("b.parquet", 44, "action", 0, -40.0), episode=4),
    Fault("action_out_of_bounds", "c.parquet", 5, put_value("c.parquet", 5, "action", 2, 1.4), episode=5),
    Fault("state_jump", "b.parquet", 25, shift("b.parquet", slice(25, 38), [0.9, -0.8, 0.7, 0.0]), episode=3),
    Fault("state_jump", "b.parquet", 45, put_value("b.parquet", 45, "state", 2, 1.9), episode=4, name="spike"),
    Fault(
        "action_jump",
        "b.parquet",
        20,
        each(
            *[put_all(name, "action", lambda i, r: [0.1 * x for x in r["state"]]) for name in (*TRAIN, *VAL)],
            put_value("b.parquet", 20, "action", 1, 0.12),
        ),
        episode=3,
    ),
    Fault(
        "frozen_dimension",
        "a.parquet",
        None,
        each(*[freeze(name, "state", 1, slice(None), 0.25) for name in (*TRAIN, *VAL)]),
        name="everywhere",
    ),
    Fault("frozen_dimension", "c.parquet", None, freeze("c.parquet", "action", 2, slice(None), 0.3), name="one file"),
    Fault("stuck_dimension", "b.parquet", 16, freeze("b.parquet", "state", 0, slice(16, 38)), episode=3),
    Fault(
        "unit_mismatch",
        "c.parquet",
        None,
        put_all("c.parquet", "state", lambda i, r: [57.3 * x for x in r["state"][:3]] + r["state"][3:]),
    ),
    Fault("action_is_state", "c.parquet", None, put_all("c.parquet", "action", lambda i, r: r["state"])),
    Fault("idle", "a.parquet", 30, each(*[put("a.parquet", i, "action", [0.0] * 4) for i in range(30, 43)]), episode=1),
    Fault(
        "repeated_row",
        "c.parquet",
        11,
        lambda files: [
            files["c.parquet"][11].__setitem__(name, files["c.parquet"][10][name])
            for name in ("image_1", "image_2", "state", "action")
        ],
        episode=5,
    ),
    # images
    Fault("undecodable_image", "a.parquet", 17, put("a.parquet", 17, "image_1", b"not an image"), episode=0),
    Fault("undecodable_image", "b.parquet", 1, put("b.parquet", 1, "image_2", picture()[:-300]), episode=2, name="cut"),
    Fault("undecodable_image", "b.parquet", 1, put("b.parquet", 1, "image_1", b""), episode=2, name="no bytes"),
    Fault("odd_sized_image", "a.parquet", 18, put("a.parquet", 18, "image_1", picture((40, 56))), episode=0),
    Fault(
        "blank_image",
        "a.parquet",
        19,
        put("a.parquet", 19, "image_1", encode(np.zeros((40, 40, 3), np.uint8))),
        episode=0,
    ),
    Fault(
        "blank_image",
        "c.parquet",
        60,
        put("c.parquet", 60, "image_2", encode(np.full((40, 40, 3), 128, np.uint8))),
        episode=7,
        name="grey",
    ),
    Fault("not_rgb", "c.parquet", 61, put("c.parquet", 61, "image_1", converted("L")), episode=7, name="grey"),
    Fault("not_rgb", "c.parquet", 61, put("c.parquet", 61, "image_1", converted("RGBA")), episode=7, name="alpha"),
    Fault(
        "not_rgb", "c.parquet", 61, put("c.parquet", 61, "image_1", converted("CMYK", "JPEG")), episode=7, name="cmyk"
    ),
    Fault("not_8_bit", "c.parquet", 62, put("c.parquet", 62, "image_1", converted("I;16")), episode=7, loads=True),
    Fault("image_format", "c.parquet", 63, put("c.parquet", 63, "image_1", converted("RGB", "BMP")), episode=7),
    Fault("turned_image", "c.parquet", 64, put("c.parquet", 64, "image_1", turned()), episode=7),
    Fault("camera_gap", "a.parquet", 5, put("a.parquet", 5, "image_2", None), episode=0),
    Fault(
        "frozen_camera",
        "a.parquet",
        31,
        lambda files: [put("a.parquet", i, "image_1", files["a.parquet"][30]["image_1"])(files) for i in range(31, 42)],
        episode=1,
    ),
    Fault(
        "slow_camera",
        "a.parquet",
        None,
        put_all("a.parquet", "image_2", lambda i, r: r["image_2"]),
        damage=lambda d: replace_column(d / "a.parquet", "image_2", every_second(d / "a.parquet", "image_2")),
    ),
    Fault("identical_cameras", "b.parquet", None, put_all("b.parquet", "image_2", lambda i, r: r["image_1"])),
]


def spoil_pages(path: Path, column: str) -> None:
    """Overwrite the first pages of a column with noise; the file's footer stays whole."""
    group = pq.ParquetFile(path).metadata.row_group(0)
    chunk = next(c for i in range(group.num_columns) if (c := group.column(i)).path_in_schema.split(".")[0] == column)
    begin = chunk.dictionary_page_offset or chunk.data_page_offset
    content = bytearray(path.read_bytes())
    content[begin : begin + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(bytes(content))


def big_states(path: Path, row: int) -> list[list[float]]:
    states = pq.read_table(path)["state"].to_pylist()
    states[row][1] = 1.7e9 + 0.125
    return states


def bad_utf8(path: Path, row: int) -> pa.Array:
    texts = [text.encode() for text in pq.read_table(path)["prompt"].to_pylist()]
    texts[row] = b"press \xff\xfe"
    return pa.Array.from_buffers(pa.string(), len(texts), pa.array(texts, pa.binary()).buffers())


def every_second(path: Path, column: str) -> list[bytes]:
    frames = pq.read_table(path)[column].to_pylist()
    return [frames[i - i % 2] for i in range(len(frames))]


def loads(train: list[Path], val: list[Path], cache: Path) -> bool:
    """Whether the training loader takes the data: both splits open and every frame decodes."""
    decode = VLAImageProcessor(32, 32, (0.5,) * 3, (0.5,) * 3, Image.Resampling.BICUBIC)
    try:
        for split in (train, val):
            store = EpisodeStore(split, state_dim=4, per_action_dim=4, cameras=("image_1", "image_2"), cache_dir=cache)
            for row in range(len(store)):
                assert store.image("image_1", row) is not None
                for camera in store.cameras:
                    frame = store.image(camera, row)
                    if frame is not None:
                        decode(frame)
    except (DataError, ObservationError, AssertionError, OSError, ValueError):
        return False
    return True


def test_clean_data_have_no_findings(tmp_path, clean_rows):
    train, val = write(tmp_path, clean_rows)
    wanted = Wanted(
        widths={"state": ("data.state_dim", 4), "action": ("per_action_dim", 4)},
        horizon=8,
        cameras=("image_1", "image_2"),
        count_tokens=lambda prompt: len(prompt.split()) + 2,
        prompt_max_len=24,
    )
    seen = examine(train, val, wanted)
    assert [finding.message for finding in seen.findings.listed] == []
    assert loads(train, val, tmp_path / "cache")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: "-".join(filter(None, (fault.kind, fault.name))))
def test_planted_fault(fault, tmp_path, files):
    if fault.spoil:
        fault.spoil(files)
    write(tmp_path, files)
    if fault.damage:
        fault.damage(tmp_path)
    paths = sorted(path for path in tmp_path.iterdir())
    train, val = [path for path in paths if path.name not in VAL], [path for path in paths if path.name in VAL]
    seen = examine(train, val, fault.wanted, num_workers=0)
    listed = seen.findings.listed
    found = [(f.kind, Path(f.file).name, f.row) for f in listed]
    assert (fault.kind, fault.file, fault.row) in found
    assert {kind for kind, _, _ in found} == {fault.kind} | fault.also, found
    about = next(f for f in listed if (f.kind, Path(f.file).name, f.row) == (fault.kind, fault.file, fault.row))
    assert about.episode == fault.episode and about.remedy and about.severity == KINDS[fault.kind].severity
    expected = KINDS[fault.kind].severity == "warning" if fault.loads is None else fault.loads
    assert loads(train, val, tmp_path / "cache") == expected


def test_every_kind_is_planted():
    assert {fault.kind for fault in FAULTS} == set(KINDS)
    assert len(KINDS) >= 25


def run(*args: Any) -> int:
    return inspect_parquet.main([*map(str, args), "--num_workers", "0"])


def test_command(tmp_path, files, capsys):
    for fault in ("nan", "state_outlier"):
        next(f for f in FAULTS if f.kind == fault).spoil(files)
    train, val = write(tmp_path, files)
    out, plots = tmp_path / "out" / "report.json", tmp_path / "plots"
    assert run("--data_path", *train, "--val_data_path", *val, "--report", out, "--plots_dir", plots) == 1
    report = json.loads(out.read_text())
    assert set(report) >= {"findings", "errors", "warnings", "counts", "datasets", "may_train"}
    assert report["counts"] == {"nan": 1, "state_outlier": 1} and not report["may_train"]
    for finding in report["findings"]:
        assert set(finding) == {"file", "episode", "row", "severity", "kind", "message", "remedy"}
    assert [f["severity"] for f in report["findings"]] == ["error", "warning"]
    about = report["datasets"]["train"]
    assert (about["episodes"], about["steps"], about["length"]["max"]) == (8, sum(LENGTHS), 30)
    assert about["rate_hz"] == pytest.approx(20, rel=0.02)
    assert [prompt["episodes"] for prompt in about["prompts"]] == [4, 4]
    assert about["cameras"]["image_2"] == {"files": 3, "frames": 206, "sizes": {"40x40 JPEG": 206}}
    assert about["action"]["min"][:3] == [-1, -1, -1] and about["state"]["max"][1] == 300
    assert [file["episodes"] for file in about["files"]] == [3, 2, 3]  # an episode belongs to the file it begins in
    printed = capsys.readouterr().out
    assert f"{train[2]} row 33 (episode 6): state[2] is NaN" in printed
    assert "1 error, 1 warning: training may not start" in printed and str(out) in printed
    for name in ("contact_sheet.png", "state.png", "action.png"):
        pixels = np.asarray(Image.open(plots / name).convert("RGB"))
        assert pixels.shape[1] > 1000 and pixels.shape[0] > 400 and pixels.std() > 15
        assert str(plots / name) in printed
    red = (np.asarray(Image.open(plots / "state.png").convert("RGB")) == (193, 18, 31)).all(axis=-1)
    assert red.sum() > 10  # the outlier


def test_exit_codes(tmp_path, files, capsys):
    put_value("a.parquet", 44, "state", 1, 300.0)(files)
    train, _ = write(tmp_path, files)
    assert run("--data_path", *train) == 0
    assert "1 warning: training may start" in capsys.readouterr().out
    assert run("--data_path", *train, "--strict") == 1
    with pytest.raises(SystemExit, match="2"):
        run("--strict")
    assert "--data_path" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        inspect_parquet.main(["--data_path", str(train[0]), "--num_workers", "-1"])
    result = subprocess.run(
        [sys.executable, ROOT / "inspect_parquet.py", "--data_path", tmp_path / "nowhere"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 2 and "matches no Parquet file" in result.stderr


def test_samples_have_one_constant_dimension(capsys):
    assert run("--data_path", ROOT / "data/samples") == 0
    assert "action[3] is 1 in every row in all 2 files" in capsys.readouterr().out
    assert examine(sorted((ROOT / "data/samples").glob("*.parquet")), num_workers=0).findings.counts == {
        "frozen_dimension": 1
    }


def test_what_a_config_asks(tmp_path, files, tiny_paligemma_dir, capsys):
    write(tmp_path, files)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"data: {{train_parquet_files: [{tmp_path}/a.parquet, {tmp_path}/b.parquet, {tmp_path}/c.parquet], "
        f"val_parquet_files: [{tmp_path}/val.parquet], state_dim: 4, prompt_max_len: 8}}\n"
        f"model: {{vlm_config: {{model_name_or_path: {tiny_paligemma_dir}}}, "
        "action_head_config: {horizon: 24, per_action_dim: 5}}\n"
    )
    out = tmp_path / "report.json"
    assert run("--config_path", config, "--report", out) == 1
    report = json.loads(out.read_text())
    assert report["counts"]["width_differs_from_config"] == 4  # every file
    assert report["counts"]["short_episode"] == 2  # of 22 and 23 steps
    assert set(report["datasets"]) == {"train", "val"}
    counter = inspect_parquet.token_counter(inspect_parquet.load_config(config))
    assert {f["kind"] for f in report["findings"]} >= (
        {"prompt_too_long"} if max(map(counter, PROMPTS)) > 8 else {"short_episode"}
    )


def test_mixtures_are_examined_one_by_one(tmp_path, files, capsys):
    files["c.parquet"][5]["prompt"] = ""
    put_all("c.parquet", "state", lambda i, row: row["state"] + [0.1 * i])(files)
    write(tmp_path, files)
    config = tmp_path / "config.yaml"
    config.write_text(
        "data:\n  state_dim: 5\n  mixture:\n"
        f"  - {{name: narrow, path: [{tmp_path}/a.parquet, {tmp_path}/b.parquet], state_dim: 4}}\n"
        f"  - {{name: wide, path: [{tmp_path}/c.parquet]}}\n"
        "model: {action_head_config: {horizon: 8, per_action_dim: 4}}\n"
    )
    out, plots = tmp_path / "report.json", tmp_path / "plots"
    assert run("--config_path", config, "--report", out, "--plots_dir", plots, "--skip_images") == 1
    report = json.loads(out.read_text())
    assert report["counts"] == {"empty_prompt": 1} and set(report["datasets"]) == {"narrow train", "wide train"}
    assert sorted(path.name for path in (plots / "wide").iterdir()) == ["action.png", "state.png"]


def test_held_out_episodes_must_not_recur(tmp_path, files):
    """`data.val_fraction` holds out whole episodes: a copy of one in training would leak."""
    files["c.parquet"] += copy.deepcopy(files["a.parquet"][:24])
    train, _ = write(tmp_path, {name: files[name] for name in TRAIN})
    for held_out, kind in (([8], "split_overlap"), ([3], "duplicated_episode")):
        wanted = Wanted(held_out=lambda episodes, held_out=held_out: np.isin(np.arange(episodes), held_out))
        seen = examine(train, wanted=wanted, skip_images=True)
        assert [(f.kind, f.episode, f.row) for f in seen.findings.listed] == [(kind, 8, 76)]


def test_processes_see_what_one_sees(tmp_path, files):
    for i in (3, 40, 41):
        put("a.parquet", i, "image_1", b"\xff\xd8 no image")(files)
    train, val = write(tmp_path, files)
    one, two = (examine(train, val, num_workers=workers) for workers in (0, 2))
    assert one.findings.listed == two.findings.listed and len(one.findings.listed) == 3
    for camera in ("image_1", "image_2"):
        np.testing.assert_array_equal(one.frames.facts[camera], two.frames.facts[camera])
        assert one.frames.pictures[camera].keys() == two.frames.pictures[camera].keys()


def test_skipped_images_are_not_read(tmp_path, files):
    train, val = write(tmp_path, files)
    for column in ("image_1", "image_2"):
        spoil_pages(train[0], column)
    assert examine(train, val, skip_images=True).findings.listed == []
    assert set(examine(train, val, num_workers=0).findings.counts) == {"corrupt_data"}


def test_memory_does_not_grow_with_images(tmp_path):
    """Arrow never holds a row group of images, only some pages and batches of it."""
    rows = episode(50, 0)
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    for i, row in enumerate(rows):
        del row["image_2"]
        row["image_1"] = encode(np.roll(noise, i, axis=0), format="PNG")
    many = [
        dict(row, episode_index=e, image_1=row["image_1"] + bytes([e]), state=[x + 0.01 * e for x in row["state"]])
        for e in range(8)
        for row in rows
    ]
    path = tmp_path / "a.parquet"
    table = pq.read_table(write_rows(path, many))
    pq.write_table(table, path, row_group_size=1000, write_batch_size=8)  # pages of 8 rows
    assert pq.ParquetFile(path).num_row_groups == 1 and path.stat().st_size > 40e6
    program = (
        "import sys, pyarrow as pa; from data.doctor.examine import examine; "
        "seen = examine([sys.argv[1]], num_workers=0); "
        "print(sum(seen.findings.counts.values()), pa.default_memory_pool().max_memory())"
    )
    result = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, cwd=ROOT, check=True)
    findings, peak = map(int, result.stdout.split())
    assert findings == 0 and peak < 0.5 * path.stat().st_size


def test_a_camera_that_no_file_has(tmp_path, files):
    """A column of nulls is a camera that is not there; that matters only to a config that reads it."""
    for name in files:
        put_all(name, "image_2", lambda i, row: None)(files)
    train, val = write(tmp_path, files)
    for path in (*train, *val):
        replace_column(path, "image_2", [None] * pq.read_metadata(path).num_rows, pa.binary())
    assert examine(train, val, num_workers=0).findings.listed == []
    wanted = Wanted(cameras=("image_1", "image_2"))
    assert examine(train, val, wanted, num_workers=0).findings.counts == {"camera_missing": 1}


def test_many_findings_are_counted_but_not_all_listed(tmp_path):
    rows = episode(400, 0)
    for row in rows[1::2]:
        row["action"][0] = float("nan")
    path = write_rows(tmp_path / "a.parquet", rows)
    report = examine([path], skip_images=True).to_dict()
    assert report["counts"]["nan"] == 200 and report["not_listed"] == {"nan": 200 - MAX_PER_FILE}
    assert sum(finding["kind"] == "nan" for finding in report["findings"]) == MAX_PER_FILE


def test_nothing_readable(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"")
    seen = examine([path])
    assert seen.findings.counts == {"unreadable_file": 1} and not seen.may_train
    assert seen.to_dict()["datasets"]["train"]["episodes"] == 0
    assert write_plots(seen, tmp_path / "plots") == []
