"""Odd and damaged data for benchmarks/fuzz_data.py, and what a correct reading of them is.

A kind makes a folder of good data, changes it at random and gives two functions: one that reads it as the program
does, and one that compares what was read with a plain reading of the same files (`to_pylist`, no shared code).
"""

from __future__ import annotations

import json
import pathlib
import random
import shutil
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import yaml

from benchmarks.odd_lerobot import lerobot_data, lerobot_metadata
from benchmarks.odd_parquet import parquet_bytes, parquet_values
from benchmarks.odd_values import DIM, Kind, Run, damaged, odd_json, require, with_odd
from data.convert.hdf5 import convert_hdf5
from data.processing import ObservationError
from model.normalizer import Normalizer
from utils.config_utils import ConfigError, config_from_dict, config_to_dict, load_config
from utils.misc import WriteError
from utils.parquet_utils import DataError
from utils.statistics import StatisticsError, load_statistics

OURS = (ConfigError, DataError, ObservationError, StatisticsError, WriteError)


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
