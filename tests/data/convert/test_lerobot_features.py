"""Features of the newest LeRobot datasets: read by a mapping, or named as left out with what to do."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.convert.convert import convert, open_source
from data.convert.episode_writer import ImageEncoding
from data.convert.inspection import describe
from data.convert.lerobot import convert_lerobot
from data.convert.mapping import read_entries
from data.convert.readers import open_reader
from data.lerobot_table import LeRobotTable
from tests.data.convert.lerobot_fixtures import CAMERAS, FIXTURES, FRONT
from tests.data.convert.test_formats import decode_frame, read
from utils.config_data import LeRobotConfig
from utils.parquet_utils import DataError
from utils.recordings import LeRobotFolder

BASE = [f"image_1={FRONT}", "state=observation.state", "action=action", "prompt=task"]
PERSISTENT = pa.list_(
    pa.struct([("role", pa.string()), ("content", pa.string()), ("style", pa.string()), ("timestamp", pa.float32())])
)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A copy of a dataset of lerobot's with more columns; the rows of an episode share their persistent language."""
    root = Path(shutil.copytree(FIXTURES / "lerobot_v30_image", tmp_path / "dataset"))
    (path,) = (root / "data").rglob("*.parquet")
    table = pq.read_table(path)
    frames = table["frame_index"].to_numpy()
    said = [
        {"role": "assistant", "content": text, "style": "subtask", "timestamp": begin}
        for text, begin in (("reach", 0.0), ("grasp", 0.25))
    ]
    added = {
        "pose": (pa.array([[[f, 1, 2], [3, 4, 5]] for f in frames.astype(float)]), "float64", [2, 3]),
        "note": (pa.array([f"note {f}" for f in frames]), "string", [1]),
        "open": (pa.array(frames % 2 == 0), "bool", [1]),
        "next.success": (pa.array(frames > 5), "bool", [1]),
        "language_persistent": (pa.array([said] * len(frames), PERSISTENT), "language", [1]),
        "language_events": (pa.array([[]] * len(frames), PERSISTENT), "language", [1]),
        "depth": (table[FRONT].combine_chunks(), "image", [96, 96, 3]),
    }
    info = json.loads((root / "meta/info.json").read_text())
    for name, (values, dtype, shape) in added.items():
        table = table.append_column(name, values)
        info["features"][name] = {"dtype": dtype, "shape": shape, "names": None}
    info["features"]["depth"]["video_info"] = {"video.is_depth_map": True}  # the older spelling, at the older place
    pq.write_table(table.replace_schema_metadata(None), path)
    (root / "meta/info.json").write_text(json.dumps(info))
    return root


def run(root: Path, output_dir: Path, *items: str) -> pa.Table:
    convert(open_source("lerobot", root, read_entries(None, [*BASE, *items])), output_dir)
    return read(output_dir)


def test_axes_flags_and_texts(dataset, tmp_path):
    table = run(dataset, tmp_path / "out", "state=pose,open", "prompt=note", "terminal=next.success")
    frames = table["frame_index"].to_pylist()
    assert table["state"].to_pylist() == [[f, 1, 2, 3, 4, 5, f % 2 == 0] for f in frames]
    assert table["prompt"].to_pylist() == [f"note {f}" for f in frames]
    assert np.array_equal(table["is_terminal"], table["is_last"])  # every episode is longer than 6 steps


def test_language_by_its_style(dataset, tmp_path):
    table = run(dataset, tmp_path / "out", "prompt=language_persistent:subtask")
    wanted = ["grasp" if seconds >= 0.25 - 1e-4 else "reach" for seconds in table["timestamp"].to_pylist()]
    assert table["prompt"].to_pylist() == wanted and set(wanted) == {"reach", "grasp"}
    with pytest.raises(DataError, match=r"language_persistent says nothing in the style 'plan' .*found: subtask"):
        run(dataset, tmp_path / "other", "prompt=language_persistent:plan")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("prompt=language_events", r"'language_events' is not read: language of single steps; use task, or"),
        ("image_1=depth", r"'depth' is a depth map .*choose a camera of colour images"),
        ("state=note", "state is made from 'note', which is no array of numbers"),
        ("state=observation.stat", "no key 'observation.stat' .*did you mean 'observation.state'"),
        ("fps=30", "the mapping says 30 steps a second, the source 20; correct fps"),
        ("tolerance_s=1", "tolerance_s is 1; wanted more than 0 and less than half a frame"),
        ("modality=no", "modality is False|modality is 'no'"),
    ],
)
def test_what_is_not_read_is_named(dataset, tmp_path, item, message):
    with pytest.raises(DataError, match=message):
        run(dataset, tmp_path / "out", item)


def test_inspection_names_what_is_left_out(dataset):
    text = describe(open_reader("lerobot", dataset, {}))
    for line in ("pose +float64", "language_events +not read: ", "depth +not read: a depth map", "prompt: task"):
        assert any(re.search(line, row) for row in text.splitlines()), line


def test_a_dataset_without_cameras_or_state(dataset, tmp_path):
    info = json.loads((dataset / "meta/info.json").read_text())
    del info["features"]["observation.state"]
    (dataset / "meta/info.json").write_text(json.dumps(info))
    entries = read_entries(None, BASE) | {"state": {"constant": [0]}}
    convert(open_source("lerobot", dataset, entries), tmp_path / "out")
    assert set(map(tuple, read(tmp_path / "out")["state"].to_pylist())) == {(0,)}
    info["features"] = {k: v for k, v in info["features"].items() if v["dtype"] not in ("image", "video")}
    (dataset / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match=r"info.json: the dataset has no camera, .*record it again with cameras"):
        open_source("lerobot", dataset, entries)


def test_a_path_that_is_no_dataset(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such file or folder; give the folder of a LeRobot dataset"):
        open_source("lerobot", tmp_path / "nowhere", read_entries(None, BASE))


def test_the_older_command_makes_frames_smaller_too(tmp_path):
    small = ImageEncoding(short_side=48)
    convert_lerobot(FIXTURES / "lerobot_v30_image", tmp_path / "out", CAMERAS, episodes=["5"], encoding=small)
    assert decode_frame(read(tmp_path / "out")["image_1"][0].as_py()).shape == (48, 48, 3)


def test_outcomes_and_corrections_are_read_by_every_way(dataset, tmp_path):
    """lerobot-eval writes next.success, its DAgger strategy intervention: converted by both commands, and in place."""
    (path,) = (dataset / "data").rglob("*.parquet")
    table = pq.read_table(path)
    episode, frames = table["episode_index"].to_numpy(), table["frame_index"].to_numpy()
    table = table.set_column(
        table.column_names.index("next.success"), "next.success", pa.array((frames > 5) & (episode != 2))
    )
    pq.write_table(table.append_column("intervention", pa.array(frames % 4 == 1)), path)
    info = json.loads((dataset / "meta/info.json").read_text())
    info["features"]["intervention"] = {"dtype": "bool", "shape": [1], "names": None}
    (dataset / "meta/info.json").write_text(json.dumps(info))

    mapped = run(dataset, tmp_path / "mapped")
    convert_lerobot(dataset, tmp_path / "older", CAMERAS)
    in_place = LeRobotTable(LeRobotFolder(dataset, LeRobotConfig(cameras=(f"{FRONT}=image_1",))))
    batches = [batch for _, batch in in_place.batches(["success", "intervention"], 7)]
    for found in (mapped, read(tmp_path / "older"), pa.Table.from_batches(batches)):
        assert np.array_equal(found["success"], episode != 2)
        assert np.array_equal(found["intervention"], frames % 4 == 1)
    shifted = run(dataset, tmp_path / "shifted", "action_shift=1", "success=never")
    starts = np.flatnonzero(shifted["is_first"])
    assert np.array_equal(np.asarray(shifted["intervention"]), np.asarray(shifted["frame_index"]) % 4 == 0)
    assert not np.asarray(shifted["success"]).any() and len(starts) == len(set(episode.tolist()))


def test_what_nothing_is_made_of_is_named(dataset, tmp_path, caplog):
    with caplog.at_level("INFO"):
        run(dataset, tmp_path / "out")
    (line,) = [record.getMessage() for record in caplog.records if "left out, since nothing names" in record.message]
    assert "language_events (language)" in line and "depth (image)" in line and "note (string)" in line
    assert "next.success" not in line and "action" not in line
