"""ROS recordings: the same messages as mcap, as rosbag2 in sqlite3 and as a ROS 1 bag, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rosbags.highlevel import AnyReader
from rosbags.rosbag1 import Writer as Writer1
from rosbags.rosbag2 import StoragePlugin
from rosbags.rosbag2 import Writer as Writer2
from rosbags.typesys import Stores, get_typestore

from data.convert.convert import convert, open_source
from data.convert.episode_writer import ImageEncoding
from data.convert.inspection import describe
from data.convert.mapping import read_entries
from data.convert.readers import open_reader
from tests.data.convert.test_formats import FORMATS, check, read
from utils.parquet_utils import DataError

FOLDER = FORMATS / "mcap_ros2"
ROS1, ROS2 = get_typestore(Stores.ROS1_NOETIC), get_typestore(Stores.ROS2_HUMBLE)


def rewrite(
    source: Path, target: Path, kind: str, stays: Callable[[str, int], bool] = lambda topic, count: True
) -> None:
    """Write the messages of a sample again in another container; `stays` says which by topic and number."""
    writer = Writer1(target) if kind == "ros1" else Writer2(target, version=9, storage_plugin=StoragePlugin[kind])
    counts: dict[str, int] = {}
    with AnyReader([source]) as reader, writer:
        topics = {}
        for connection in reader.connections:
            store = ROS1 if kind == "ros1" else ROS2
            topics[connection.topic] = writer.add_connection(connection.topic, connection.msgtype, typestore=store)
        for connection, stamp, raw in reader.messages():
            number = counts[connection.topic] = counts.get(connection.topic, -1) + 1
            if stays(connection.topic, number):
                data = ROS2.cdr_to_ros1(bytes(raw), connection.msgtype) if kind == "ros1" else bytes(raw)
                writer.write(topics[connection.topic], stamp, data)


def run(path: Path, tmp_path: Path, *items: str) -> None:
    source = open_source(None, path, read_entries(None, [str(FOLDER / "map.yaml"), *items]))
    convert(source, tmp_path / "out", encoding=ImageEncoding("png"))


@pytest.mark.parametrize("kind", ["SQLITE3", "MCAP", "ros1"])
def test_every_container_gives_the_same(tmp_path, kind):
    for i in range(2):
        name = f"episode_{i}.bag" if kind == "ros1" else f"episode_{i}"
        (tmp_path / "in").mkdir(exist_ok=True)
        rewrite(FOLDER / f"episode_{i}.mcap", tmp_path / "in" / name, kind)
    run(tmp_path / "in", tmp_path)
    check(read(tmp_path / "out"), np.load(FOLDER / "expected.npz"), (0, 0))


def test_a_topic_that_stops(tmp_path):
    rewrite(FOLDER / "episode_0.mcap", tmp_path / "bag", "SQLITE3", lambda topic, n: topic != "/command" or n < 8)
    message = r"bag: /command stops: at step \d+ its newest message is 0\.\d+ s old, 0.1 are allowed; leave that ep"
    with pytest.raises(DataError, match=message):
        run(tmp_path / "bag", tmp_path, "max_age_s=0.1")
    run(tmp_path / "bag", tmp_path, "max_age_s=.inf")  # asked for by name: the last command holds
    assert len(read(tmp_path / "out")) == 9


def test_a_topic_without_messages(tmp_path):
    rewrite(FOLDER / "episode_0.mcap", tmp_path / "bag", "SQLITE3", lambda topic, n: topic != "/command")
    with pytest.raises(DataError, match=r"bag: no key '/command#data' \(found: .*/command \(no messages\)"):
        run(tmp_path / "bag", tmp_path)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("max_age_s=0", "max_age_s is 0; wanted seconds"),
        ("state=/joint_states#position{joint_9}", r"/joint_states has no value named 'joint_9' in position \(found: "),
        ("state=/joint_state#position", "no key '/joint_state#position' .*did you mean '/joint_states#position'"),
        ("clock=/nothing", "no topic '/nothing'"),
        ("state=/task", "state is made from '/task', which is no array of numbers"),
    ],
)
def test_faulty_mappings(tmp_path, item, message):
    with pytest.raises(DataError, match=message):
        run(FOLDER, tmp_path, item)


def test_a_recording_that_is_cut_short(tmp_path):
    folder = Path(shutil.copytree(FOLDER, tmp_path / "in"))
    whole = (folder / "episode_1.mcap").read_bytes()
    (folder / "episode_1.mcap").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"episode_1.mcap: .*(record|fetch) it again"):
        run(folder, tmp_path)
    with pytest.raises(DataError, match="holds no .mcap, .bag, .db3"):
        (tmp_path / "empty").mkdir()
        run(tmp_path / "empty", tmp_path)


def test_what_inspection_shows():
    text = describe(open_reader("rosbag", FOLDER, {}))
    assert "/joint_states#position" in text and "of joint_" in text and "/cam_wrist/image_raw" in text
