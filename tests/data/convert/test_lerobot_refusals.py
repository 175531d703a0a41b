"""LeRobot datasets and settings that can't be converted: the place, what was found, what was wanted."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest

from data.convert.episode_writer import ImageEncoding
from data.convert.lerobot import convert_lerobot
from tests.data.convert.lerobot_fixtures import (
    CAMERAS,
    FIXTURES,
    FRONT,
    WRIST,
    edit_info,
    edit_table,
    reference,
    replaced,
)
from utils.parquet_utils import DataError


@pytest.mark.parametrize(
    ("cameras", "options", "message"),
    [
        ([FRONT], {}, rf"wanted <camera>=<column>, as in {FRONT}=image_1"),
        ([f"{FRONT}=prompt"], {}, "a camera's column can't be called so"),
        (["observation.images.frnt=image_1"], {}, rf"no camera '.*frnt' \(found: .*wrist\); did you mean '{FRONT}'"),
        ([], {}, "no camera, and every step needs one; give <camera>=image_1 .*observation.images.wrist"),
        ([f"{FRONT}=image_1", f"{WRIST}=image_1"], {}, "is given twice"),
        (
            CAMERAS,
            {"state_keys": ["observation.sate"]},
            r"info.json: no feature 'observation.sate' \(found: observation.state, action, .*mean 'observation.state'",
        ),
        (CAMERAS, {"action_keys": ["actions"]}, "no feature 'actions'.*did you mean 'action'"),
        (CAMERAS, {"episodes": ["4-6"]}, r"has no episode 6 \(it has 6, from 0 to 5\)"),
        (CAMERAS, {"episodes": ["last"]}, "--episodes 'last': wanted a number or a range"),
        (CAMERAS, {"terminal": "maybe"}, "--terminal is 'maybe'; wanted auto, always, never"),
        (CAMERAS, {"prompt": " "}, "--prompt is ' '; give an instruction"),
    ],
)  # fmt: skip
def test_faulty_options(tmp_path, cameras, options, message):
    with pytest.raises(DataError, match=message):
        convert_lerobot(FIXTURES / "lerobot_v30_image", tmp_path / "out", cameras, **options)
    assert not list(tmp_path.rglob("*.parquet"))


def test_faulty_encoding():
    with pytest.raises(DataError, match="--jpeg_quality is 99; wanted 1 to 95"):
        ImageEncoding(jpeg_quality=99)
    with pytest.raises(DataError, match="--image_format is 'webp'"):
        ImageEncoding("webp")


def test_faulty_metadata(dataset, tmp_path):
    def fails(root, message):
        with pytest.raises(DataError, match=message):
            convert_lerobot(root, tmp_path / "out", CAMERAS)

    fails(tmp_path, r"meta/info.json: No such file.* wanted the folder of a LeRobot dataset \(v2.0, v2.1, v3.0\)")
    root = dataset("v21", "video")
    edit_info(root, codebase_version="v1.6")
    fails(root, "info.json: codebase_version is 'v1.6'; supported are v2.0, v2.1, v3.0")
    edit_info(root, codebase_version="v2.1", video_path=None)
    fails(root, "info.json: video_path is null; wanted a text")
    (root / "meta" / "info.json").write_text("{")
    fails(root, "info.json: not valid JSON")
    (root / "meta" / "info.json").write_text('{"codebase_version": "v2.1", "fps": 20}')
    fails(root, "info.json: the entry 'features' is missing")
    root = dataset("v21", "image")
    (root / "meta" / "tasks.jsonl").write_text('{"task_index": 0, "task": "pick up the red block"}\n')
    fails(root, "episode 1: task_index 1 is not in .*tasks.jsonl")
    (root / "meta" / "tasks.jsonl").write_text('{"task_index": 0, "task": ')
    fails(root, "tasks.jsonl line 1: not valid JSON")
    (root / "meta" / "episodes.jsonl").unlink()
    (root / "meta" / "tasks.jsonl").write_text("")
    fails(root, "episodes.jsonl: No such file")
    root = dataset("v30", "image")
    shutil.rmtree(root / "meta" / "episodes")
    fails(root, "meta/episodes: no Parquet file")


def test_faulty_rows(dataset, tmp_path):
    def fails(change, message, version="v30", **options):
        root = dataset(version, "image")
        edit_table(sorted((root / "data").rglob("*.parquet"))[0], change)
        with pytest.raises(DataError, match=message):
            convert_lerobot(root, tmp_path / "out", CAMERAS, **options)
        assert not list((tmp_path / "out").iterdir())
        shutil.rmtree(root)

    def nan(table):
        state = reference("image")["state"].astype(object)
        state[5, 2] = float("nan")
        return replaced(table, "observation.state", state.tolist())

    def unembedded(table):
        frames = table[FRONT].to_pylist()
        frames[3] = {"bytes": None, "path": "frame-000003.png"}
        return replaced(table, FRONT, frames)

    def tiff(table):
        frames = table[WRIST].to_pylist()
        frames[7]["bytes"] = b"II*\0" + frames[7]["bytes"]
        return replaced(table, WRIST, frames)

    fails(nan, r"episode 0 frame 5: state\[2\] is nan; .*--episodes", episodes=["0"])
    fails(unembedded, f"episode 0 frame 3: {FRONT} is not embedded; wanted the bytes of a JPEG or PNG")
    fails(tiff, f"episode 0 frame 7: {WRIST} begins with b'II\\*")
    fails(lambda table: table.slice(0, 20), "episode 0: found 20 steps, its description says 31", episodes=["0"])
    fails(lambda table: table.slice(1), "episode 0: frame_index is 1 where 0 is due", version="v21")
    fails(
        lambda table: pa.concat_tables([table, replaced(table.slice(30, 1), "frame_index", [31])]),
        "episode 0: found more than 31 steps, its description says 31",
        version="v21",
    )
    fails(lambda table: table.drop_columns(["action"]), "file-000.parquet: no column 'action'")
    fails(
        lambda table: table.set_column(
            table.column_names.index("action"), "action", pa.array([[0.0] * 6] * len(table), pa.list_(pa.float32()))
        ),
        r"file-000.parquet \(episode 0\): 'action' is list.* 186 values in 31 rows; .*info.json says 7 numbers a row",
        episodes=["0"],
    )


def test_faulty_videos(dataset, tmp_path):
    def fails(root, message, **options):
        with pytest.raises(DataError, match=message):
            convert_lerobot(root, tmp_path / "out", CAMERAS, **options)
        assert not [path for path in (tmp_path / "out").iterdir() if "000002" in path.name]
        shutil.rmtree(tmp_path / "out")

    root = dataset("v21", "video")
    (tmp_path / "out").mkdir()
    video = root / "videos" / "chunk-000" / FRONT / "episode_000002.mp4"
    whole = video.read_bytes()
    video.unlink()
    fails(root, "episode_000002.mp4: No such file or directory; .*fetch that file again")
    video.write_bytes(whole[: len(whole) // 2])  # the index at the file's end is gone
    (tmp_path / "out").mkdir()
    fails(root, "episode_000002.mp4: not a readable video file .*fetch it again", num_workers=2)
    shutil.copy(video.with_name("episode_000001.mp4"), video)  # 17 frames for 44 rows
    (tmp_path / "out").mkdir()
    fails(root, r"episode 2 frame 17: .*episode_000002.mp4 has no frame within 0.0001 s of 0.8500 s \(it ends before\)")
    damaged = bytearray(whole)
    middle = whole.index(b"mdat") + 900
    damaged[middle : middle + 200] = bytes(200)
    video.write_bytes(damaged)
    (tmp_path / "out").mkdir()
    fails(root, r"episode 2 frame \d+: .*episode_000002.mp4 can't be decoded at")


@pytest.mark.parametrize("value", [0.05, float("nan")])
def test_time_stamps_that_repeat_or_are_missing(dataset, tmp_path, value):
    root = dataset("v21", "video")
    path = root / "data" / "chunk-000" / "episode_000001.parquet"
    edit_table(path, lambda table: replaced(table, "timestamp", [0.0, 0.05, value, *np.arange(3, 17) / 20]))
    with pytest.raises(
        DataError, match=r"episode 1 frame 2: timestamp (0.05|nan)\S* does not come after the one before"
    ):
        convert_lerobot(root, tmp_path / "out", CAMERAS, episodes=["1"])


def test_video_longer_than_its_rows_is_reported(dataset, tmp_path, caplog):
    root = dataset("v21", "video")
    folder = root / "videos" / "chunk-000" / FRONT
    shutil.copy(folder / "episode_000002.mp4", folder / "episode_000001.mp4")
    convert_lerobot(root, tmp_path / "out", CAMERAS, episodes=["1"])
    assert "episode 1: " in caplog.text and "has 44 frames for 17 rows: the last ones are left out" in caplog.text


def test_depth_maps_are_not_cameras(dataset, tmp_path):
    root = dataset("v30", "image")
    features = json.loads((root / "meta" / "info.json").read_text())["features"]
    features[WRIST]["info"] = {"is_depth_map": True}
    edit_info(root, features=features)
    with pytest.raises(DataError, match=rf"info.json: '{WRIST}' is a depth map"):
        convert_lerobot(root, tmp_path / "out", CAMERAS)
