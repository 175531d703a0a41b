"""LeRobot datasets that contradict themselves: no other episode's frames or words, every malformed entry named."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import data.convert.lerobot_rows as module
from data.convert.lerobot import convert_lerobot
from data.convert.lerobot_rows import RowReader
from data.convert.video import VideoEncoding, VideoReader, encode_video
from tests.data.convert.lerobot_fixtures import (
    CAMERAS,
    FRONT,
    LENGTHS,
    PNG,
    STARTS,
    WRIST,
    edit_info,
    edit_table,
    read,
    replaced,
)
from utils.parquet_utils import DataError

EPISODES = "meta/episodes/chunk-000/file-000.parquet"


def fails(root: Path, message: str, cameras: list[str] = CAMERAS, **options) -> None:
    with pytest.raises(DataError, match=message):
        convert_lerobot(root, root.with_name("out"), cameras, **options)


def edit_rows(path: Path, change) -> None:
    """Rewrite a small Parquet file with `change(row)` for every row."""
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        change(row)
    pq.write_table(pa.Table.from_pylist(rows), path)


def edit_lines(path: Path, change) -> None:
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    for entry in entries:
        change(entry)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


# --- frames and words of the right episode ------------------------------------------------------------------------


def test_no_frame_of_the_next_episode(dataset):
    root = dataset("v30", "video")
    stop = pq.read_table(root / EPISODES)[f"videos/{FRONT}/to_timestamp"][1].as_py() - 0.5

    def short(row):
        if row["episode_index"] == 1:
            row[f"videos/{FRONT}/to_timestamp"] -= 0.5

    edit_rows(root / EPISODES, short)
    fails(root, rf"episode 1: \S+file-000.mp4 has 7 frames \([\d.]+ to {stop:g} s\) for 17 rows; the frames behind are")


def test_no_frame_outside_of_the_episodes_part_of_a_video(dataset):
    """As many frames as rows, but the rows' time stamps begin a step late: the last row's is the next episode's."""
    root = dataset("v30", "video")
    edit_table(
        sorted((root / "data").rglob("*.parquet"))[0],
        lambda table: replaced(table, "timestamp", table["timestamp"].to_numpy() + np.float32(0.05)),
    )
    fails(
        root, r"episode 0 frame 30: its time, \S+ s into \S+mp4, is outside of the episode's part of it \(0.0000 to 1"
    )


def test_no_frame_of_two_episodes(dataset):
    root = dataset("v30", "video")

    def shifted(row):
        if row["episode_index"] == 1:
            row[f"videos/{FRONT}/from_timestamp"] += 0.1
            row[f"videos/{FRONT}/to_timestamp"] += 0.1

    edit_rows(root / EPISODES, shifted)
    fails(root, r"file-000.mp4: its frames from [\d.]+ to [\d.]+ s are those of episodes 1 and 2 at once in meta/epis")


def test_an_episode_that_the_metadata_lack_is_missed(dataset, caplog):
    root = dataset("v30", "image")

    path = root / "meta/info.json"
    path.write_text(path.read_text().replace('"total_episodes": 6', '"total_episodes": 7'))
    convert_lerobot(root, root.with_name("out"), CAMERAS)
    assert "info.json says total_episodes 7, but meta/episodes lists 6: those alone are read" in caplog.text


@pytest.mark.parametrize("version", ["v21", "v30"])
def test_tasks_that_contradict_each_other(dataset, version):
    root = dataset(version, "image")

    def other(entry):
        if entry["episode_index"] == 2:
            entry["tasks"] = ["open the window"]

    edit = edit_lines if version == "v21" else edit_rows
    edit(root / ("meta/episodes.jsonl" if version == "v21" else EPISODES), other)
    fails(root, r"episode 2: its rows say task \d+, '.*' in tasks\.\w+, but meta/episodes says 'open the window'; ")
    convert_lerobot(root, root.with_name("all"), CAMERAS, prompt="go")
    assert set(read(root.with_name("all"))["prompt"].to_pylist()) == {"go"}


def test_two_tasks_of_one_number(dataset):
    root = dataset("v21", "image")
    with (root / "meta/tasks.jsonl").open("a") as file:
        file.write('{"task_index": 0, "task": "something else"}\n')
    fails(root, r"tasks.jsonl: task_index 0 is there twice, with different contents")


@pytest.mark.parametrize("version", ["v21", "v30"])
def test_empty_instructions(dataset, version):
    """The remedy must not replace the instructions of the other episodes."""
    root = dataset(version, "image")
    tasks = {}

    def empty(entry):
        if "task_index" in entry:
            name = "task" if "task" in entry else "__index_level_0__"
            tasks[entry["task_index"]] = entry[name]
            entry[name] = "" if entry["task_index"] == 1 else entry[name]
        else:
            entry["tasks"] = ["" if task == tasks[1] else task for task in entry["tasks"]]

    edit, suffix = (edit_lines, "jsonl") if version == "v21" else (edit_rows, "parquet")
    edit(root / f"meta/tasks.{suffix}", empty)
    edit(root / ("meta/episodes.jsonl" if version == "v21" else EPISODES), empty)
    message = r"(\d) of 6 episodes have no instruction \(their task is empty\): ([\d -]+); leave them out "
    with pytest.raises(DataError, match=message + r"\(--episodes ([\d -]+)\), or give an .* alone \(--empty_p") as info:
        convert_lerobot(root, root.with_name("out"), CAMERAS)
    others = str(info.value).partition("--episodes ")[2].partition(")")[0].split()
    convert_lerobot(root, root.with_name("some"), CAMERAS, episodes=others)
    convert_lerobot(root, root.with_name("filled"), CAMERAS, empty_prompt="press the button")
    kept, filled = (set(read(root.with_name(name))["prompt"].to_pylist()) for name in ("some", "filled"))
    assert "" not in kept and filled == kept | {"press the button"}
    fails(root, "--prompt replaces every instruction, --empty_prompt empty ones alone", prompt="a", empty_prompt="b")


def test_a_rate_that_contradicts_the_time_stamps(dataset):
    root = dataset("v30", "image")
    edit_info(root, fps=5)
    fails(root, r"episode 0: \S+info.json says 5 frames per second, the rows' time stamps 20; correct fps there")


def test_episodes_without_steps_are_left_out(dataset, caplog):
    root = dataset("v30", "image")
    edit_rows(root / EPISODES, lambda row: row.update(length=0) if row["episode_index"] == 1 else None)
    out = root.with_name("out")
    convert_lerobot(root, out, CAMERAS)
    assert caplog.text.count("episode 1 has no steps: left out") == 1
    assert len(list(out.glob("*.parquet"))) == 5 and len(read(out)) == sum(LENGTHS) - LENGTHS[1]
    edit_rows(root / EPISODES, lambda row: row.update(length=0))
    fails(root, "meta: no episodes; record some")


def test_rotated_video(tmp_path):
    """Frames come as players show them: turned by the display matrix of the track's header."""
    path = tmp_path / "a.mp4"
    y, x = np.mgrid[0:32, 0:48]
    frame = np.stack([4 * x, 6 * y, 90 + 0 * x], axis=-1).astype(np.uint8)
    encode_video(path, [frame] * 3, 10, VideoEncoding.choose("h264", 12))
    plain = VideoReader(path).frame_at(0.1, 1e-3, "here")
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4
    matrix = at + 4 + (32 if data[at] else 20) + 16
    for numbers, quarters in (((0, 1, -1, 0), -1), ((0, -1, 1, 0), 1), ((-1, 0, 0, -1), 2), ((1, 0, 0, 1), 0)):
        a, b, c, d = (65536 * n for n in numbers)
        data[matrix : matrix + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
        path.write_bytes(data)
        np.testing.assert_array_equal(VideoReader(path).frame_at(0.1, 1e-3, "here"), np.rot90(plain, quarters))


def test_depth_is_no_camera(dataset, tmp_path):
    root = dataset("v30", "image")
    features = json.loads((root / "meta/info.json").read_text())["features"]
    for shape, names in (
        ([96, 96, 1], ["height", "width", "channels"]),
        ([1, 96, 96], ["channels", "height", "width"]),
    ):
        edit_info(root, features=features | {FRONT: features[FRONT] | {"shape": shape, "names": names}})
        fails(root, rf"info.json: '{FRONT}' is a depth map \(shape .*choose a camera of colour images")
    edit_info(root, features=features)
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((96, 96), 3000, np.uint16)).save(deep)

    def spoil(table):
        frames = table[FRONT].to_pylist()
        frames[4]["bytes"] = deep.read_bytes()
        return replaced(table, FRONT, frames)

    edit_table(sorted((root / "data").rglob("*.parquet"))[0], spoil)
    fails(root, f"episode 0 frame 4: {FRONT} is a PNG of 16 bits a value, depth and not colour")


# --- several features as the action -------------------------------------------------------------------------------


def test_the_action_may_be_spread_over_features(dataset):
    root = dataset("v30", "image")
    features = json.loads((root / "meta/info.json").read_text())["features"]
    whole = dict(features)
    action = whole.pop("action")
    whole["action.arm"] = action | {"shape": [5], "names": action["names"][:5]}
    whole["action.buttons"] = {"dtype": "bool", "shape": [2], "names": None}
    edit_info(root, features=whole)
    values = []

    def split(table):
        actions = np.array(table["action"].to_pylist())
        buttons = actions[:, 5:] > 0
        values.append(np.concatenate([actions[:, :5], buttons], axis=1).astype(np.float32))
        table = table.append_column("action.arm", pa.array(actions[:, :5].tolist(), pa.list_(pa.float64())))
        return table.append_column("action.buttons", pa.array(buttons.tolist(), pa.list_(pa.bool_()))).drop(["action"])

    for path in sorted((root / "data").rglob("*.parquet")):
        edit_table(path, split)
    convert_lerobot(root, root.with_name("out"), CAMERAS, action_keys=["action.arm", "action.buttons"])
    np.testing.assert_array_equal(read(root.with_name("out"))["action"].to_pylist(), np.concatenate(values))
    fails(root, "no feature 'action'", episodes=["0"])


# --- reading rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row_group_size", [1000, 50, 7])
def test_a_row_group_is_read_once_for_all_its_episodes(tmp_path, monkeypatch, row_group_size):
    episode = np.repeat(np.arange(40), 25)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"episode_index": episode, "n": np.arange(1000)}), path, row_group_size=row_group_size)
    read_rows = [0]
    original = module.batches

    def counting(file, path, columns, size, **options):
        for row, batch in original(file, path, columns, size, **options):
            read_rows[0] += batch.num_rows * (columns == ["n"])
            yield row, batch

    monkeypatch.setattr(module, "batches", counting)
    reader = RowReader(path, ["n"])

    def rows(index):
        return [n for batch in reader.episode(index) for n in batch["n"].to_pylist()]

    for index in range(40):
        assert rows(index) == list(range(25 * index, 25 * index + 25))
    assert read_rows[0] <= 1000 + 64
    assert rows(3) == list(range(75, 100)) and rows(40) == [] and rows(30) == list(range(750, 775))


def test_an_episode_in_two_places(dataset, converted):
    """Rows of an episode need not lie together; they are in order."""
    root = dataset("v30", "image")
    path = sorted((root / "data").rglob("*.parquet"))[0]
    moved = [*range(20), *range(STARTS[1], STARTS[2]), *range(20, STARTS[1])]
    edit_table(path, lambda table: table.take(moved + list(range(STARTS[2], len(table)))))
    convert_lerobot(root, root.with_name("out"), CAMERAS, encoding=PNG)
    assert read(root.with_name("out")).equals(read(converted["v30", "image"]))


# --- malformed metadata -------------------------------------------------------------------------------------------

JSONL_FAULTS = [
    ('{\n "task_index": 0\n}', r"tasks.jsonl line 1: not valid JSON \(.*\); wanted one object a line"),
    ('[{"task_index": 0, "task": "a"}]', r"tasks.jsonl line 1: is \[.*; wanted one object a line"),
    ('{"task_index": "zero", "task": "a"}', "tasks.jsonl line 1: task_index is 'zero'; wanted a number"),
    ('{"task_index": 0.5, "task": "a"}', "tasks.jsonl line 1: task_index is 0.5; wanted a whole number"),
    ('{"task_index": true, "task": "a"}', "tasks.jsonl line 1: task_index is True; wanted a number"),
    ('{"task_index": -1, "task": "a"}', "tasks.jsonl line 1: task_index is -1; wanted a whole number from 0 to "),
    ('{"task_index": 0, "task": 5}', "tasks.jsonl line 1: task is 5; wanted a text"),
    ('{"task_index": 0}', "tasks.jsonl line 1: the entry 'task' is missing"),
    ('{"task_index": 0, "task": null}', r"episode 0: task 0 is null, no instruction; .*\(--empty_prompt\)"),
    ('{"task_index": NaN, "task": "a"}', "tasks.jsonl line 1: task_index is nan; wanted a number"),
    ('{"task_index": 1e400, "task": "a"}', "tasks.jsonl line 1: task_index is inf; wanted a number"),
    ("[" * 100_000, "tasks.jsonl line 1: not valid JSON"),
    (b'{"task\xff', "tasks.jsonl line 1: not valid JSON"),
]


@pytest.mark.parametrize(("content", "message"), JSONL_FAULTS)
def test_malformed_tasks(dataset, content, message):
    root = dataset("v21", "image")
    edit_lines(root / "meta/episodes.jsonl", lambda entry: entry.pop("tasks"))
    (root / "meta/tasks.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    fails(root, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": None}, "info.json: fps is null; wanted a number"),
        ({"fps": "20"}, "info.json: fps is '20'; wanted a number"),
        ({"fps": 0}, "info.json: fps is 0; wanted more than 0"),
        ({"fps": float("nan")}, "info.json: fps is nan; wanted a number"),
        ({"features": []}, r"info.json: features is \[\]; wanted an object"),
        ({"features": {FRONT: None}}, f"info.json: feature '{FRONT}' is null; wanted an object with a dtype"),
        ({"features": {FRONT: {"dtype": 3}}}, f"info.json: feature '{FRONT}' is .*; wanted an object with a dtype"),
        ({"chunks_size": 0}, "info.json: chunks_size is 0; wanted 1 or more"),
        ({"robot_type": ["arm"]}, r"info.json: robot_type is \['arm'\]; wanted a text"),
        ({"data_path": 7}, "info.json: data_path is 7; wanted a text"),
        ({"data_path": "data/{episode}.parquet"}, r"data_path has the field \{episode\}; wanted episode_chunk"),
        ({"data_path": "data/{0}"}, r"info.json: data_path has the field \{0\}; wanted episode_chunk, "),
    ],
)  # fmt: skip
def test_malformed_info(dataset, changes, message):
    root = dataset("v21", "image")
    edit_info(root, **changes)
    fails(root, message)


@pytest.mark.parametrize("content", ["[]", "null", "3", '"text"'])
def test_info_that_is_no_object(dataset, content):
    root = dataset("v21", "image")
    (root / "meta/info.json").write_text(content)
    fails(root, r"info.json: is .*; wanted a JSON object; fetch that file again")


def test_metadata_that_went_through_pandas(dataset, converted):
    """Integers became floats, a missing value null or NaN."""
    root = dataset("v30", "image")

    def floats(row):
        row.update({key: float(row[key]) for key in ("data/chunk_index", "data/file_index", "length")})

    edit_rows(root / EPISODES, floats)
    convert_lerobot(root, root.with_name("floats"), CAMERAS, encoding=PNG)
    assert read(root.with_name("floats")).equals(read(converted["v30", "image"]))
    for value, shown in ((None, "null"), (float("nan"), "nan"), (1.5, "1.5")):
        edit_rows(root / EPISODES, lambda row, value=value: row.update({"data/file_index": value}))
        fails(root, rf"file-000.parquet: episode 0: data/file_index is {shown}; wanted a .*; fetch the dataset again")
    edit_rows(root / EPISODES, lambda row: row.update({"data/file_index": 0, "tasks": [3]}))
    fails(root, r"file-000.parquet: episode 0: tasks is \[3\]; wanted a list of texts")


def test_columns_of_another_type(dataset):
    def spoiled(name, values):
        root = dataset("v30", "image")
        path = sorted((root / "data").rglob("*.parquet"))[0]
        edit_table(path, lambda table: table.set_column(table.column_names.index(name), name, values(len(table))))
        return root

    fails(spoiled("timestamp", lambda n: pa.array(["x"] * n)), "'timestamp' is string; wanted a number in every row")


@pytest.mark.parametrize("name", ["frame_index", "task_index"])
def test_columns_with_nulls(dataset, name):
    root = dataset("v30", "image")
    path = sorted((root / "data").rglob("*.parquet"))[0]
    edit_table(path, lambda table: replaced(table, name, [None] + table[name].to_pylist()[1:]))
    fails(root, rf"file-000.parquet \(episode 0\): '{name}' has 1 nulls; wanted a number in every row")


# --- output -------------------------------------------------------------------------------------------------------


def test_output_that_cannot_be(dataset, tmp_path):
    root = dataset("v30", "image")
    (tmp_path / "file").write_text("")
    for place, reason in (("file", "File exists"), ("file/out", "Not a directory")):
        with pytest.raises(ValueError, match=rf"\S+{place}: not written \({reason}\); choose another --output_dir"):
            convert_lerobot(root, tmp_path / place, CAMERAS)
    assert (tmp_path / "file").read_text() == ""


def test_a_full_disk(dataset, tmp_path, monkeypatch):
    root = dataset("v30", "image")

    def full(self, table, **_):
        raise OSError(28, "Error writing bytes to file. Detail: [errno 28] No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    message = r"episode_000000.parquet: not written \(No space left on device, [\d,]+ bytes are free\); it needs more "
    with pytest.raises(ValueError, match=message + r"than [\d,]+ bytes; what is complete is kept: make room"):
        convert_lerobot(root, tmp_path / "out", CAMERAS)
    assert not list((tmp_path / "out").iterdir())


def test_a_file_system_without_locks(dataset, tmp_path, monkeypatch, caplog):
    import data.convert.conversion as conversion

    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(conversion.fcntl, "flock", no_locks)
    convert_lerobot(dataset("v30", "image"), tmp_path / "out", CAMERAS, episodes=["1"])
    assert "no lock (Function not implemented): see that no other conversion writes there" in caplog.text
    assert WRIST and len(read(tmp_path / "out")) == LENGTHS[1]


@pytest.mark.parametrize("record", [b"{", b"[]", b"null", b'{"settings": 3}', b"\xff"])
def test_files_whose_record_is_damaged(dataset, tmp_path, record):
    out = tmp_path / "out"
    out.mkdir()
    table = pa.table({"a": [1]}).replace_schema_metadata({b"conversion": record})
    pq.write_table(table, out / "x.parquet")
    with pytest.raises(DataError, match="x.parquet is not of a conversion and would be mixed"):
        convert_lerobot(dataset("v30", "image"), out, CAMERAS, overwrite=True)
    assert (out / "x.parquet").exists()
