"""Odd and damaged data for benchmarks/fuzz_data.py, and what a correct reading of them is.

A kind makes a folder of good data, changes it at random and gives two functions: one that reads it as the program
does, and one that compares what was read with a plain reading of the same files (`to_pylist`, no shared code).
"""

from __future__ import annotations

import io
import json
import math
import pathlib
import random
import shutil
from collections.abc import Callable
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from benchmarks import crafted_files
from benchmarks.crafted_files import places
from data.convert.hdf5 import convert_hdf5
from data.convert.lerobot import convert_lerobot
from data.doctor.examine import examine
from data.episode_store import EpisodeStore
from data.processing import ObservationError, VLAImageProcessor
from data.statistics import calculate_statistics
from model.normalizer import Normalizer
from utils.config_utils import ConfigError, config_from_dict, config_to_dict, load_config
from utils.misc import WriteError
from utils.parquet_utils import DataError, resolve_parquet_files
from utils.statistics import StatisticsError, load_statistics

OURS = (ConfigError, DataError, ObservationError, StatisticsError, WriteError)
FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "tests" / "fixtures"
CAMERAS = ["observation.images.front=image_1", "observation.images.wrist=image_2"]
PROCESSOR = VLAImageProcessor(16, 16, (0.5,) * 3, (0.5,) * 3, 3)
DIM = 3
ODD = (
    None, True, False, 0, 1, -1, 2, 7, 1.5, 1e30, -1e30, 2**31, 2**63, 2**70, math.nan, math.inf, "", "x", "0", " \n",
    "\u0000", "\u00fc" * 50, "~", "../..", [], [[]], {}, [1], ["a", None], {"a": 1}, [math.nan], "{episode_index}",
)  # fmt: skip
Run = Callable[[], None]
Kind = Callable[[random.Random, pathlib.Path], Run]


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Some bytes changed, cut, doubled or put in."""
    try:
        return crafted_files.damaged(rng, data)
    except ValueError:  # nothing is left to change
        return b""


class WrongRowError(AssertionError):
    """A row was accepted that is not what the files hold."""


def require(fact: Any, what: str) -> None:
    """Raise a WrongRowError unless something holds."""
    if not fact:
        raise WrongRowError(what)


# --- our Parquet --------------------------------------------------------------------------------------------------


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


def replaced(table: pa.Table, i: int, name: str, values: list[Any], types: list[pa.DataType]) -> pa.Table:
    """A table with a column of the first of these types that can hold the values."""
    for kind in types:
        try:
            return table.set_column(i, name, pa.array(values, kind))
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            continue
    return table


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


# --- LeRobot ------------------------------------------------------------------------------------------------------


def lerobot_rows(root: pathlib.Path) -> dict[int, list[tuple]]:
    """episode_index -> (state, action, frames) of each row, in order, read plainly."""
    episodes: dict[int, list[tuple]] = {}
    for path in sorted((root / "data").rglob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            frames = tuple(row[text.partition("=")[0]]["bytes"] for text in CAMERAS)
            key = (tuple(row["observation.state"]), tuple(row["action"]), *frames)
            episodes.setdefault(row["episode_index"], []).append(key)
    return episodes


ORIGINAL = {version: lerobot_rows(FIXTURES / f"lerobot_{version}_image") for version in ("v21", "v30")}


def odd_json(rng: random.Random, text: str) -> str:
    """JSON, or lines of it, with an odd value at one place, or damaged text."""
    if rng.random() < 0.3:
        return damaged(rng, text.encode()).decode("utf-8", errors="surrogateescape")
    lines = text.splitlines() if text.count("\n{") else [text]
    i = rng.randrange(len(lines))
    lines[i] = json.dumps(with_odd(rng, json.loads(lines[i])))
    if rng.random() < 0.1:
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
    return "\n".join(lines) + "\n"


def with_odd(rng: random.Random, value: Any) -> Any:
    """A nested value with an odd one at a place, or an entry less."""
    place = rng.choice([(), *places(value)])
    if not place:
        return rng.choice(ODD)
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    if rng.random() < 0.25:
        del inner[place[-1]]
    else:
        inner[place[-1]] = rng.choice(ODD)
    return value


def lerobot_metadata(rng: random.Random, folder: pathlib.Path) -> Run:
    """A dataset whose metadata are odd or damaged."""
    version = rng.choice(["v21", "v30"])
    root = pathlib.Path(shutil.copytree(FIXTURES / f"lerobot_{version}_image", folder / "data"))
    path = rng.choice([p for p in (root / "meta").rglob("*") if p.is_file() and p.name != "stats.json"])
    if path.suffix != ".parquet":
        path.write_text(odd_json(rng, path.read_text()), errors="surrogateescape")
    elif rng.random() < 0.3:
        path.write_bytes(damaged(rng, path.read_bytes()))
    else:
        table = pq.read_table(path)
        name = rng.choice([n for n in table.column_names if not n.startswith("stats/")])
        values = table[name].to_pylist()
        values[rng.randrange(len(values))] = rng.choice([*ODD, rng.choice(values)])
        table = replaced(
            table, table.column_names.index(name), name, values, [table[name].type, pa.float64(), pa.string()]
        )
        pq.write_table(table.drop_columns([name]) if rng.random() < 0.1 else table, path)
    return converting(rng, root, folder / "out", ORIGINAL[version])


def lerobot_data(rng: random.Random, folder: pathlib.Path) -> Run:
    """A dataset with odd columns of numbers in one of its files."""
    version = rng.choice(["v21", "v30"])
    root = pathlib.Path(shutil.copytree(FIXTURES / f"lerobot_{version}_image", folder / "data"))
    path = rng.choice(sorted((root / "data").rglob("*.parquet")))
    table = pq.read_table(path)
    name = rng.choice(["frame_index", "episode_index", "timestamp", "task_index", "index", "next.done", "rows"])
    if name == "rows" or name not in table.column_names:
        rows = list(range(len(table)))
        at = rng.randrange(len(rows))
        rows = rng.choice(
            [rows[:at] + rows[at + 1 :], rows[:at] + rows[at:] + rows[at:], rows[at:] + rows[:at], rows[:at]]
        )
        table = table.take(pa.array(rows, pa.int64()))
    else:
        values = table[name].to_pylist()
        values[rng.randrange(len(values))] = rng.choice([*ODD, rng.choice(values)])
        kinds = [table[name].type, pa.float64(), pa.string(), pa.int8()]
        table = replaced(table, table.column_names.index(name), name, values, kinds)
    pq.write_table(table, path, row_group_size=rng.choice([5, 1000]))
    return converting(rng, root, folder / "out", ORIGINAL[version])


def converting(rng: random.Random, root: pathlib.Path, out: pathlib.Path, original: dict[int, list[tuple]]) -> Run:
    """Convert, and compare each episode with the one of that number before the change."""
    prompt = rng.choice([None, None, "go"])

    def run() -> None:
        convert_lerobot(root, out, CAMERAS, prompt=prompt)
        for path in sorted(out.glob("*.parquet")):
            rows = pq.read_table(path).to_pylist()
            require(rows and rows[0]["is_first"] and rows[-1]["is_last"], f"{path.name} is no whole episode")
            index = rows[0]["episode_index"]
            found = [(tuple(r["state"]), tuple(r["action"]), r["image_1"], r["image_2"]) for r in rows]
            require(found == original.get(index), f"episode {index} has other rows than it had")
            require(all(r["prompt"].strip() for r in rows), f"episode {index} has no instruction")

    return run


# --- HDF5, statistics, configuration ------------------------------------------------------------------------------


def hdf5_file(rng: random.Random, folder: pathlib.Path) -> Run:
    """An episode with odd arrays and attributes, or damaged bytes; its arrays carry checksums."""
    path = folder / "in" / "episode_0.hdf5"
    path.parent.mkdir()
    values = np.random.default_rng(rng.randrange(20))
    arrays: dict[str, Any] = {
        "action": values.normal(size=(6, DIM)).astype(np.float32),
        "observations/qpos": values.normal(size=(6, DIM)).astype(np.float32),
        "observations/images/cam": values.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8),
    }
    with h5py.File(path, "w", libver="latest") as file:  # whose addresses carry checksums too
        name = rng.choice([*arrays, None])
        if name is not None:
            array = arrays[name]
            odd = rng.randrange(7)
            arrays[name] = [
                *(array[:-1], array.astype(np.float64), array.astype(np.int16), array[..., :1], array[:0]),
                *(np.array("text", dtype="S4"), np.where(array == array.flat[0], np.nan, array.astype(np.float64))),
            ][odd]
            if rng.random() < 0.2:
                del arrays[name]
        for key, array in arrays.items():
            options = (
                {"chunks": True, "fletcher32": True} if array.ndim and array.size and array.dtype.kind != "S" else {}
            )
            file.create_dataset(key, data=array, **options)
        file.attrs["prompt"] = rng.choice(["go", b"go", ["go"], ["a", "b"], 3, "", h5py.Empty("S1"), np.float32(1)])
        if rng.random() < 0.3:
            file["compress_len"] = rng.choice([[1] * 6, [[1] * 6], "x", 3, [[]]])
    if rng.random() < 0.5:
        path.write_bytes(damaged(rng, path.read_bytes()))

    def run() -> None:
        out = folder / "out"
        convert_hdf5(path.parent, out, ["cam=image_1"], prompt=rng.choice([None, "go"]), prompt_attribute="prompt")
        table = pq.read_table(out / "episode_000000.parquet")
        for column, key in (("state", "observations/qpos"), ("action", "action")):
            found, wanted = np.array(table[column].to_pylist(), np.float32), np.asarray(arrays[key], np.float32)
            require(found.shape == wanted.shape and (found == wanted).all(), f"{column} differs")
        require(set(table["prompt"].to_pylist()) == {"go"}, "another instruction")

    return run


def statistics_file(rng: random.Random, folder: pathlib.Path) -> Run:
    """A statistics file with an odd value, or damaged."""
    values = {"min": -2.0, "q01": -1.0, "mean": 0.0, "q99": 1.0, "max": 2.0, "std": 0.5}
    column = {name: [value] * DIM for name, value in values.items()}
    settings = {"action_mode": "absolute", "absolute_action_dims": [], "val_fraction": 0.0, "split_seed": 0}
    content = settings | {"max_episodes": None, "datasets": {"default": {"state": column, "action": dict(column)}}}
    content = json.loads(json.dumps(content))
    path = folder / "stats.json"
    path.write_text(odd_json(rng, json.dumps(content)), errors="surrogateescape")
    kind = rng.choice(["min_max", "quantile", "mean_std"])

    def run() -> None:
        head = {"action_head_config": {"per_action_dim": DIM}}
        data = {"train_parquet_files": "x", "state_dim": DIM, "normalization_type": kind}
        config = config_from_dict({"data": data, "model": head})
        statistics = load_statistics(str(path), config, "c.yaml")
        for name, buffer in Normalizer.from_config(config, statistics).named_buffers():
            require(bool(buffer.double().isfinite().all()), f"{name} is not finite")

    return run


def config_file(rng: random.Random, folder: pathlib.Path) -> Run:
    """A configuration of this repository with an odd value, or damaged."""
    source = rng.choice(sorted((pathlib.Path(__file__).resolve().parents[1] / "configs").glob("*.yaml")))
    for path in source.parent.glob("*.yaml"):
        shutil.copy(path, folder)
    path, text = folder / source.name, source.read_text(encoding="utf-8")
    if rng.random() < 0.4:
        path.write_bytes(damaged(rng, text.encode()))
    else:
        tree = yaml.safe_load(text)
        path.write_text(yaml.safe_dump(with_odd(rng, tree), allow_unicode=True), encoding="utf-8")

    def run() -> None:
        config = load_config(path)
        require(config_from_dict(config_to_dict(config)) == config, "a configuration is not what it was saved as")

    return run


KINDS: dict[str, Kind] = {
    "parquet_values": parquet_values,
    "parquet_bytes": parquet_bytes,
    "lerobot_metadata": lerobot_metadata,
    "lerobot_data": lerobot_data,
    "hdf5_file": hdf5_file,
    "statistics_file": statistics_file,
    "config_file": config_file,
}
