"""Odd and damaged LeRobot datasets, and what a correct conversion of them is; see benchmarks/odd_data.py."""

from __future__ import annotations

import pathlib
import random
import shutil

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.odd_values import FIXTURES, ODD, Run, damaged, odd_json, replaced, require
from data.convert.lerobot import convert_lerobot

CAMERAS = ["observation.images.front=image_1", "observation.images.wrist=image_2"]


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
