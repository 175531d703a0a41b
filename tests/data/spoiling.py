"""Clean demonstrations, and what puts a fault into them."""

from __future__ import annotations

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
