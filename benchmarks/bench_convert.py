"""How fast recordings are converted, beside reading the same bytes and writing the same columns with nothing between.

    python benchmarks/bench_convert.py [--quick] [--json convert.json]

"bare" reads the source's files whole, and encodes the columns that the conversion writes, values and frames held in
memory, with the same Parquet options: what the disk and the encoding of columns cost alone. The conversion
(scripts/convert.py, one process) lists episodes, checks, cuts and maps them besides. Both take turns in one run, and
the table has the medians of the rounds. The last rows read a set compressed by gzip in chunks of 50 steps: in whole
chunks, and a frame at a time.
"""

from __future__ import annotations

import io
import json
import os
import pathlib
import shutil
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from google_crc32c import value as crc32c
from PIL import Image

if not __package__:
    import _repository  # noqa: F401

from data.convert.convert import convert, open_source
from data.convert.mapping import read_entries
from data.convert.readers import open_reader
from utils.arguments import CommandParser, run_command
from utils.text_table import text_table

SIZE = 256  # pixels of a frame
CHUNK = 50  # steps, of robomimic's --compress
Columns = tuple[pa.Schema, dict[str, Any]]  # of one file, held in memory
WANTED = {"rlds": 0.5, "hdf5": 0.5, "chunks": 5.0}
MAPS = {
    "rlds": ["image_1=steps/image", "state=steps/state", "action=steps/action", "prompt=steps/text", "fps=10"],
    "hdf5": ["image_1=image", "state=state", "action=action", "prompt=text:go", "fps=10"],
}


def frames(count: int) -> list[bytes]:
    """JPEG frames of about 20 kB, as a camera in front of something with texture gives."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, SIZE // 16, SIZE // 16, 3), dtype=np.uint8)
    encoded = []
    for image in coarse:
        large = np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        noisy = np.clip(large + rng.normal(0, 6, large.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "jpeg", quality=88)
        encoded.append(buffer.getvalue())
    return encoded


def write_rlds(folder: pathlib.Path, episodes: int, steps: int, images: list[bytes]) -> None:
    """Shards as tensorflow_datasets writes them."""
    leaf = {"dtype": "float32", "encoding": "none", "shape": {"dimensions": ["7"]}}
    features = {
        "image": {"image": {"dtype": "uint8", "encodingFormat": "jpeg", "shape": {"dimensions": ["256", "256", "3"]}}},
        "state": {"tensor": leaf},
        "action": {"tensor": leaf},
        "text": {"text": {}},
    }
    steps_feature = {"sequence": {"feature": {"featuresDict": {"features": features}}, "length": "-1"}}
    folder.mkdir(parents=True)
    (folder / "features.json").write_text(json.dumps({"featuresDict": {"features": {"steps": steps_feature}}}))
    with (folder / "bench-train.tfrecord-00000-of-00001").open("wb") as file:
        for episode in range(episodes):
            numbers = np.random.default_rng(episode).normal(size=(2, steps, 7)).astype("<f4")
            lists = {
                "steps/image": _field(1, b"".join(_field(1, images[i % len(images)]) for i in range(steps))),
                "steps/state": _field(2, _field(1, numbers[0].tobytes())),
                "steps/action": _field(2, _field(1, numbers[1].tobytes())),
                "steps/text": _field(1, _field(1, b"push the block") * steps),
            }
            entries = b"".join(_field(1, _field(1, name.encode()) + _field(2, v)) for name, v in lists.items())
            record = _field(1, entries)
            length = struct.pack("<Q", len(record))
            file.write(length + _checksum(length) + record + _checksum(record))


def write_hdf5(folder: pathlib.Path, episodes: int, steps: int, images: list[bytes]) -> None:
    """A file an episode, JPEG padded with zeros as ALOHA's."""
    folder.mkdir(parents=True)
    longest = max(map(len, images))
    for episode in range(episodes):
        rng = np.random.default_rng(episode)
        with h5py.File(folder / f"episode_{episode}.hdf5", "w") as file:
            padded = [np.frombuffer(images[i % len(images)].ljust(longest, b"\0"), np.uint8) for i in range(steps)]
            file["image"] = np.stack(padded)
            file["state"], file["action"] = rng.normal(size=(2, steps, 7)).astype(np.float32)


def write_gzip(path: pathlib.Path, steps: int) -> None:
    """Raw frames compressed in chunks, as robomimic's --compress."""
    small = np.random.default_rng(0).integers(0, 256, (steps, 16, 16, 3), dtype=np.uint8)
    with h5py.File(path, "w") as file:
        pixels = small.repeat(8, axis=1).repeat(8, axis=2)
        file.create_dataset("image", data=pixels, compression="gzip", chunks=(CHUNK, 32, 32, 1))
        file["state"] = file["action"] = np.zeros((steps, 7), np.float32)


def bare(source: pathlib.Path, columns: list[Columns], output_dir: pathlib.Path) -> None:
    """Read every byte of the source, encode every column, and nothing else."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            path.read_bytes()
    output_dir.mkdir()
    for i, (schema, values) in enumerate(columns):
        arrays = [pa.array(values[field.name], field.type) for field in schema]
        pq.write_table(
            pa.table(arrays, schema=schema),
            output_dir / f"{i}.parquet",
            compression="none",
            use_dictionary=["prompt"],
            write_page_checksum=True,
            write_statistics=False,
            row_group_size=512,
        )


def passed_through(name: str, source: pathlib.Path, rounds: int, work: pathlib.Path) -> dict[str, float]:
    """Frames a second of both, and their quotient."""
    entries = read_entries(None, MAPS[name])
    convert(open_source(name, source, entries), work / "first")
    tables = [pq.read_table(path).replace_schema_metadata(None) for path in sorted((work / "first").glob("*.parquet"))]
    count = sum(len(table) for table in tables)
    columns = [(table.schema, {name: _in_memory(table[name]) for name in table.column_names}) for table in tables]
    times: dict[str, list[float]] = {"bare": [], "convert": []}
    for i in range(rounds):
        times["bare"].append(_seconds(lambda i=i: bare(source, columns, work / f"bare{i}")))
        times["convert"].append(_seconds(lambda i=i: convert(open_source(name, source, entries), work / f"all{i}")))
        shutil.rmtree(work / f"bare{i}")
        shutil.rmtree(work / f"all{i}")
    rates = {key: count / statistics.median(values) for key, values in times.items()}
    quotients = [b / c for b, c in zip(times["bare"], times["convert"], strict=True)]
    return {**rates, "ratio": statistics.median(quotients), "frames": count}


def chunks(path: pathlib.Path, rounds: int) -> dict[str, float]:
    """Frames a second in whole chunks and one at a time."""
    reader = open_reader("hdf5", path, {})
    episode = reader.episodes()[0]

    def aligned() -> int:
        return sum(len(block["image"]) for block in reader.blocks(episode, ["image", "state", "action"]))

    count = aligned()
    some = min(count, 2 * CHUNK)

    def one_by_one() -> None:
        with h5py.File(path, "r") as file:
            for i in range(some):
                file["image"][i], file["state"][i], file["action"][i]

    whole = [count / _seconds(aligned) for _ in range(rounds)]
    single = [some / _seconds(one_by_one) for _ in range(rounds)]
    return {"aligned": statistics.median(whole), "one_by_one": statistics.median(single)}


def _in_memory(column: pa.ChunkedArray) -> Any:
    """Frames and texts as Python holds them; numbers as an array of Arrow's, which costs nothing to wrap."""
    is_text = pa.types.is_binary(column.type) or pa.types.is_string(column.type)
    return column.to_pylist() if is_text else column.combine_chunks()


def _field(number: int, data: bytes) -> bytes:
    """A field of bytes in a protocol buffer."""
    length, size = bytearray(), len(data)
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return bytes([number << 3 | 2]) + bytes(length) + data


def _checksum(data: bytes) -> bytes:
    value = crc32c(data)
    return struct.pack("<I", ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--quick", action="store_true", help="a quarter of the episodes, three rounds instead of seven")
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers to this file")
    args = parser.parse_args()
    episodes, steps, rounds = (4, 300, 3) if args.quick else (16, 300, 7)
    load = os.getloadavg()[0]
    images = frames(64)
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        write_rlds(work / "rlds", episodes, steps, images)
        write_hdf5(work / "hdf5", episodes, steps, images)
        write_gzip(work / "gzip.hdf5", 4 * CHUNK)
        found: dict[str, dict[str, float]] = {}
        for name in ("rlds", "hdf5"):
            (work / f"out_{name}").mkdir()
            found[name] = passed_through(name, work / name, rounds, work / f"out_{name}")
        found["chunks"] = chunks(work / "gzip.hdf5", rounds)
        found["chunks"]["ratio"] = found["chunks"]["aligned"] / found["chunks"]["one_by_one"]
    size = sum(map(len, images)) / len(images) / 1000
    print(f"{SIZE} px, {size:.1f} kB a frame, {os.cpu_count()} cores, load average before {load:.1f}")
    rows: list[list[Any]] = [
        [
            "RLDS, JPEG passed on",
            found["rlds"]["convert"],
            found["rlds"]["bare"],
            found["rlds"]["ratio"],
            WANTED["rlds"],
        ],
        [
            "HDF5, JPEG passed on",
            found["hdf5"]["convert"],
            found["hdf5"]["bare"],
            found["hdf5"]["ratio"],
            WANTED["hdf5"],
        ],
    ]
    print(text_table(["frames/s", "converted", "bare", "quotient", "wanted at least"], rows))
    chunk = found["chunks"]
    rows = [["gzip, 50 steps a chunk", chunk["aligned"], chunk["one_by_one"], chunk["ratio"], WANTED["chunks"]]]
    print(text_table(["frames/s", "whole chunks", "one by one", "quotient", "wanted at least"], rows))
    if args.json:
        report = {"load_average_before": load, "cores": os.cpu_count(), "wanted": WANTED, **found}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    failed = [name for name, least in WANTED.items() if found[name]["ratio"] < least]
    if failed:
        raise SystemExit(f"slower than wanted: {', '.join(failed)}")


if __name__ == "__main__":
    run_command(main)
