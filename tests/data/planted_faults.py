"""Clean demonstrations, and one fault for every kind of finding that the doctor knows."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data.doctor.examine import Requirements
from tests.helpers import write_rows

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


def clean_files() -> Files:
    """The rows of every file, without a fault."""
    train = [row for i, length in enumerate(LENGTHS) for row in episode(length, i)]
    cuts = (0, A_ROWS, sum(LENGTHS[:5]), sum(LENGTHS))
    files = {name: train[cuts[i] : cuts[i + 1]] for i, name in enumerate(TRAIN)}
    files["val.parquet"] = [row for i, length in enumerate(VAL_LENGTHS) for row in episode(length, 100 + i)]
    return files


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
        requirements: what the config asks for.
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
    requirements: Requirements | None = None
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


def unclosed(files: Files) -> None:
    """Ten recordings as one episode, of a smooth motion."""
    plain(files)
    rows = []
    for i in range(10):
        phase = np.random.default_rng(70 + i).uniform(-1, 1, 3)
        rows += episode(22, 70 + 2 * i)
        for t, row in enumerate(rows[-22:]):
            row["state"] = np.append(phase * 0.8 + 0.01 * t, row["state"][3]).astype(np.float32).tolist()
    for t, row in enumerate(rows):
        row["is_first"], row["is_last"], row["is_terminal"] = t == 0, t == len(rows) - 1, t == len(rows) - 1
        for name in ("episode_index", "frame_index", "timestamp"):
            del row[name]
    files["c.parquet"] += rows


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
        requirements=Requirements(widths={"action": ("per_action_dim", 7), "state": ("data.state_dim", 4)}),
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
    Fault(
        "frame_index_contradicts",
        "a.parquet",
        1,
        each(*[put_all(name, "frame_index", lambda i, r: 1000 - r["frame_index"]) for name in (*TRAIN, *VAL)]),
        name="everywhere",
        episode=0,
    ),
    Fault(
        "timestamp_not_increasing",
        "c.parquet",
        1,
        put_all("c.parquet", "timestamp", lambda i, r: -i / 20),
        name="everywhere",
        episode=5,
    ),
    Fault("short_episode", "val.parquet", 49, lambda files: files["val.parquet"].extend(episode(1, 120)), episode=2),
    Fault("short_episode", "b.parquet", 16, requirements=Requirements(horizon=24), episode=3, name="horizon"),
    Fault("unclosed_episode", "c.parquet", 76, unclosed, episode=8, also={"episode_length_outlier"}),
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
        requirements=Requirements(count_tokens=lambda prompt: len(prompt.split()) + 2, prompt_max_len=5),
        episode=1,
    ),
    # labels
    Fault(
        "label_contradicts",
        "a.parquet",
        30,
        put_all("a.parquet", "success", lambda i, r: not 30 <= i < 52),
        episode=1,
        name="an outcome that changes",
    ),
    Fault(
        "label_contradicts",
        "b.parquet",
        20,
        put_all("b.parquet", "intervention", lambda i, r: None if i in (20, 21) else True),
        episode=3,
        name="null",
    ),
    Fault("label_contradicts", "c.parquet", None, put_all("c.parquet", "success", lambda i, r: 1.0), name="numbers"),
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
    Fault(
        "angle_wraps",
        "a.parquet",
        9,
        each(
            *[
                put_all(
                    name,
                    "state",
                    lambda i, r: [(r["frame_index"] * 0.35 + np.pi) % (2 * np.pi) - np.pi, *r["state"][1:]],
                )
                for name in (*TRAIN, *VAL)
            ]
        ),
        episode=0,
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
    Fault("not_8_bit", "c.parquet", 62, put("c.parquet", 62, "image_1", converted("I;16")), episode=7),
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
