"""Odd and damaged Parquet episodes, and what a correct reading of them is; see benchmarks/odd_data.py."""

from __future__ import annotations

import io
import json
import math
import pathlib
import random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.odd_values import DIM, Run, damaged, replaced, require
from data.doctor.examine import examine
from data.episode_store import EpisodeStore
from data.processing import VLAImageProcessor
from data.statistics import calculate_statistics
from utils.parquet_utils import resolve_parquet_files

PROCESSOR = VLAImageProcessor(16, 16, (0.5,) * 3, (0.5,) * 3, 3)


def frame(rng: np.random.Generator, format: str = "JPEG") -> bytes:
    """A random encoded picture."""
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, format)
    return buffer.getvalue()


def good_table(seed: int) -> pa.Table:
    """Two episodes of five rows."""
    rng = np.random.default_rng(seed)
    first = [t % 5 == 0 for t in range(10)]
    last = [t % 5 == 4 for t in range(10)]
    vector = pa.list_(pa.float32())
    return pa.table(
        {
            "image_1": pa.array([frame(rng) for _ in first], pa.binary()),
            "image_2": pa.array([frame(rng, "PNG") if t % 3 else None for t in range(10)], pa.binary()),
            "state": pa.array(rng.normal(size=(10, DIM)).astype(np.float32).tolist(), vector),
            "action": pa.array(rng.normal(size=(10, DIM)).astype(np.float32).tolist(), vector),
            "is_first": first,
            "is_last": last,
            "is_terminal": last,
            "prompt": ["press the button"] * 5 + ["open the window"] * 5,
        }
    )


def odd_column(rng: random.Random, table: pa.Table) -> pa.Table:
    """A table with one column dropped, doubled, renamed, of another type, or with other values."""
    i = rng.randrange(table.num_columns)
    name, column = table.column_names[i], table.column(i)
    values = column.to_pylist()
    kind = rng.randrange(9)
    if kind == 0:
        return table.remove_column(i)
    if kind == 1:
        return table.append_column(rng.choice([name, f"{name}_bytes", "image_1", "extra"]), column)
    if kind == 2:
        names = list(table.column_names)
        names[i] = rng.choice(["observation.state", f"{name}_bytes", name.upper(), "state", "prompt"])
        return table.rename_columns(names)
    if kind in (3, 4):  # other values of the same type
        for row in rng.sample(range(len(values)), rng.choice([1, 1, 3, len(values)])):
            values[row] = odd_value(rng, name, values)
        types = [column.type, pa.list_(pa.float64())] if name in ("state", "action") else [column.type]
        return replaced(table, i, name, values, types)
    if kind == 5 and name.startswith("image"):
        kind_of = pa.struct([("bytes", rng.choice([pa.binary(), pa.large_binary()])), ("path", pa.string())])
        return replaced(table, i, name, [v and {"bytes": v, "path": None} for v in values], [kind_of])
    types = [
        *(pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float32(), DIM), pa.list_(pa.int32())),
        *(pa.list_(pa.bool_()), pa.list_(pa.string()), pa.string(), pa.large_string(), pa.large_binary(), pa.int64()),
        *(
            pa.float32(),
            pa.bool_(),
            pa.null(),
            pa.int8(),
            pa.dictionary(pa.int32(), pa.string()),
            pa.list_(pa.float16()),
        ),
    ]
    if rng.random() < 0.3:
        values = [rng.choice(values) for _ in values]
    return replaced(table, i, name, values, rng.sample(types, len(types)))


def odd_value(rng: random.Random, name: str, values: list[Any]) -> Any:
    value = rng.choice(values)
    if name in ("state", "action"):
        odd = list(value) if isinstance(value, list) and value else [0.0] * DIM
        odd[rng.randrange(len(odd))] = rng.choice([math.nan, math.inf, 1e39, 1e300, None, 0.0, -0.0, 1e-45, 3.0])
        return rng.choice([None, [], odd[:-1], odd + [0.0], odd, value])
    if name.startswith("image"):
        value = value if isinstance(value, bytes) and value else b"\xff\xd8"
        return rng.choice([None, b"", b"x", value[: len(value) // 2], value + bytes(9), damaged(rng, value), value])
    return (
        rng.choice([None, "", " ", "\t\n", "x" * 5000, "\u0000", value])
        if name == "prompt"
        else rng.choice([None, True, False])
    )


def write_table(rng: random.Random, table: pa.Table, path: pathlib.Path) -> None:
    pq.write_table(
        table,
        path,
        row_group_size=rng.choice([1, 3, 100]),
        compression=rng.choice(["none", "snappy", "zstd"]),
        use_dictionary=rng.random() < 0.5,
        data_page_version=rng.choice(["1.0", "2.0"]),
        write_page_checksum=True,
    )


def parquet_values(rng: random.Random, folder: pathlib.Path) -> Run:
    """One or two files whose schema, values and rows are odd."""
    tables = [good_table(rng.randrange(20)) for _ in range(rng.choice([1, 2]))]
    paths = [folder / f"{i}.parquet" for i in range(len(tables))]
    for i in range(len(tables)):
        for _ in range(rng.choice([0, 1, 1, 2])):
            if rng.random() < 0.3:
                rows = list(range(len(tables[i])))
                del rows[rng.randrange(len(rows))]
                rows = rng.choice([rows, rows[::-1], rows + rows, rng.sample(rows, len(rows)), [], rows[:3]])
                tables[i] = tables[i].take(pa.array(rows, pa.int64()))
            else:
                tables[i] = odd_column(rng, tables[i])
            if not tables[i].num_rows or not tables[i].num_columns:
                break
        write_table(rng, tables[i], paths[i])
    return reading(rng, folder, tables)


def parquet_bytes(rng: random.Random, folder: pathlib.Path) -> Run:
    """A file whose bytes are damaged; its pages carry checksums."""
    table, path = good_table(rng.randrange(20)), folder / "a.parquet"
    write_table(rng, table, path)
    path.write_bytes(damaged(rng, path.read_bytes()))
    return reading(rng, folder, [table])


def reading(rng: random.Random, folder: pathlib.Path, tables: list[pa.Table]) -> Run:
    """Open, compare and decode as training does; or look as the doctor does, or make statistics."""
    how = rng.choice(["store", "store", "doctor", "statistics"])

    def run() -> None:
        files = resolve_parquet_files(folder, "--data_path")
        if how == "doctor":
            json.dumps(examine(files, num_workers=0).to_dict(), allow_nan=False)
        elif how == "statistics":
            made = calculate_statistics(files, DIM, DIM, num_workers=1, val_fraction=0.5, name="x")
            require(
                all(math.isfinite(x) for name in ("state", "action") for x in made[name]["mean"]), "mean is not finite"
            )
        else:
            options = {"state_dim": DIM, "per_action_dim": DIM, "cameras": ("image_1", "image_2")}
            store = EpisodeStore(files, cache_dir=folder / "cache", **options)
            compare_store(store, tables)
            for row in range(len(store)):
                for camera in store.cameras:
                    data = store.image(camera, row)
                    if data is not None:
                        PROCESSOR(data)

    return run


def compare_store(store: EpisodeStore, tables: list[pa.Table]) -> None:
    """Every accepted row is what a plain reading of the tables says, and could be accepted."""
    row = 0
    for table in tables:
        columns = {
            name: table[name].to_pylist() for name in set(table.column_names) if table.column_names.count(name) == 1
        }
        for i in range(table.num_rows):
            for name, mine in (("state", store.state), ("action", store.action)):
                values = columns[name][i]
                require(values is not None and len(values) == DIM and None not in values, f"{name} {values} accepted")
                with np.errstate(over="ignore"):
                    wanted = np.array(values, np.float32)
                require(
                    np.isfinite(wanted).all() and (mine[row] == wanted).all(), f"{name} {values} read as {mine[row]}"
                )
            require(store.prompt(row) == columns["prompt"][i] and columns["prompt"][i].strip(), "prompt differs")
            for camera in store.cameras:
                value = columns.get(camera, columns.get(f"{camera}_bytes", [None] * table.num_rows))[i]
                value = value["bytes"] if isinstance(value, dict) else value
                found = store.image(camera, row)
                require(
                    (found is None) == (value is None) and (found is None or bytes(found) == value), f"{camera} differs"
                )
            begins = row in store.episode_starts
            require(begins == columns["is_first"][i], "an episode begins where is_first is not")
            row += 1
    require(row == len(store), f"{len(store)} rows accepted of {row}")
