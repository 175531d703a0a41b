"""The schema: cameras of any name in either spelling, and what is written is what is read."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.episode_store import EpisodeStore
from data.schema import (
    COLUMN_TYPES,
    IMAGE,
    LABELS,
    NOISE_SEED,
    PLAN,
    SEED,
    TIMESTAMP,
    camera_column,
    column_type,
    prompts,
    vector_names,
    written_schema,
)
from tests.helpers import episode_rows, write_rows
from utils.parquet_utils import DataError


def test_cameras_of_any_name(tmp_path):
    rows = episode_rows(3)
    for row in rows:
        row["wrist_left_bytes"] = row["front"] = row["image_1"]
    rows[1]["front"] = None
    path = write_rows(tmp_path / "a.parquet", rows)
    cameras = ("image_1", "wrist_left", "front", "nowhere")
    store = EpisodeStore([path], state_dim=4, per_action_dim=4, cameras=cameras, cache_dir=tmp_path / "cache")
    assert [store.has_camera(camera) for camera in cameras] == [True, True, True, False]
    assert bytes(store.image("wrist_left", 2)) == rows[2]["image_1"]
    assert store.image("front", 1) is None and bytes(store.image("front", 2)) == rows[2]["image_1"]


@pytest.mark.parametrize(
    ("said", "names"),
    [
        (b'["x", "y", "z", "grip"]', ["x", "y", "z", "grip", "action[4]"]),
        (b'["x", "y"]', ["x", "y", "action[2]", "action[3]", "action[4]"]),
        (b'["x\\u001b[2J"]', ["x\\x1b[2J", "action[1]", "action[2]", "action[3]", "action[4]"]),
        *((text, [f"action[{d}]" for d in range(5)]) for text in (b"null", b"{}", b"x,y,z", b"\xff", b"3")),
    ],
)
def test_names_of_dimensions(said, names, tmp_path):
    path = write_rows(tmp_path / "a.parquet", episode_rows(3))
    assert vector_names(pq.read_schema(path).metadata, "action", 2) == ["action[0]", "action[1]"]
    table = pq.read_table(path).replace_schema_metadata({b"action_names": said})
    pq.write_table(table, path)
    assert vector_names(pq.read_schema(path).metadata, "action", 5) == names


def test_a_camera_has_one_spelling():
    assert camera_column("wrist", ["image_1", "wrist_bytes"], "a.parquet") == "wrist_bytes"
    assert camera_column("wrist", ["image_1"], "a.parquet") is None
    with pytest.raises(DataError, match="a.parquet: both 'wrist' and 'wrist_bytes' are columns; keep one of them"):
        camera_column("wrist", ["wrist", "wrist_bytes"], "a.parquet")
    with pytest.raises(
        DataError,
        match="a.parquet: no column 'image_1' or 'image_1_bytes' .found: wrist.; name the cameras that .*see docs/",
    ):
        camera_column("image_1", ["wrist"], "a.parquet")


def test_what_is_written_can_be_read():
    extra = (TIMESTAMP, SEED, *LABELS, PLAN, NOISE_SEED)
    schema = written_schema(["image_1", "wrist"], {"state": 7}, 6, extra=extra, metadata={"fps": "20"})
    assert all(column_type(column.name).fits(column.type) for column in schema)
    assert set(schema.names) == {"image_1", "wrist", *COLUMN_TYPES} and schema.metadata == {b"fps": b"20"}
    assert column_type("wrist") is IMAGE and not IMAGE.fits(pa.string())


def test_a_prompt_that_is_no_utf8_is_named(tmp_path):
    rows = episode_rows(4)
    table = pa.Table.from_pylist(rows)
    offsets = pa.py_buffer(np.arange(0, 25, 6, dtype=np.int32).tobytes())
    text = pa.Array.from_buffers(pa.string(), 4, [None, offsets, pa.py_buffer(b"press!" * 2 + b"dr\xfccke" * 2)])
    pq.write_table(table.set_column(table.column_names.index("prompt"), "prompt", text), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet row 2: prompt is not UTF-8 \(.*0xfc.*\); write it anew"):
        prompts(pq.read_table(tmp_path / "a.parquet")["prompt"], "a.parquet", 0)
