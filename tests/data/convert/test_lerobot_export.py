"""Our demonstrations as LeRobot datasets: the structure that the lerobot library writes, and back without a loss."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data.convert.lerobot import convert_lerobot
from data.convert.lerobot_export import Layout, export_lerobot, read_facts
from data.convert.video import VideoEncoding, encode_video
from scripts.convert_lerobot import parse_args, to_lerobot
from tests.data.convert.lerobot_fixtures import (
    CAMERAS,
    COLUMNS,
    FIXTURES,
    FRONT,
    LENGTHS,
    PNG,
    decode,
    nearest,
    read,
    reference,
)
from tests.helpers import episode_rows, write_episodes, write_rows
from utils.parquet_utils import DataError


def export(source: Path, output_dir: Path, *flags: str) -> Path:
    arguments = ["--to_lerobot", "--data_path", str(source), "--output_dir", str(output_dir), "--num_workers", "1"]
    to_lerobot(parse_args([*arguments, *flags]))
    return output_dir


@pytest.fixture(scope="module")
def exported(converted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    return {
        "image": export(converted["v30", "image"], folder / "image"),
        "video": export(converted["v30", "image"], folder / "video", "--video"),  # the frames that lerobot encoded
    }


@pytest.mark.parametrize("kind", ["image", "video"])
def test_structure_is_that_of_lerobot(exported, kind):
    ours, theirs = exported[kind], FIXTURES / f"lerobot_v30_{kind}"
    files = [sorted(path.relative_to(root).as_posix() for path in root.rglob("*.*")) for root in (ours, theirs)]
    assert files[0] == files[1]

    infos = [json.loads((root / "meta" / "info.json").read_text()) for root in (ours, theirs)]
    assert list(infos[0]) == list(infos[1])
    for feature in infos[1]["features"].values() if kind == "video" else ():
        if feature["dtype"] == "video":
            feature["info"]["video.preset"] = 8  # lerobot's is 12
    assert list(infos[0]["features"]) == list(infos[1]["features"])
    assert infos[0] == infos[1]

    stats = [json.loads((root / "meta" / "stats.json").read_text()) for root in (ours, theirs)]
    assert stats[0].keys() == stats[1].keys()
    for key, wanted in stats[1].items():
        assert list(stats[0][key]) == list(wanted)
        for name, value in wanted.items():
            assert np.shape(stats[0][key][name]) == np.shape(value)

    tasks = [pq.read_table(root / "meta" / "tasks.parquet") for root in (ours, theirs)]
    assert tasks[0].equals(tasks[1]) and tasks[0].schema.equals(tasks[1].schema)
    notes = [json.loads(table.schema.metadata[b"pandas"]) for table in tasks]
    assert [notes[0][key] for key in ("index_columns", "column_indexes", "columns")] == [
        notes[1][key] for key in ("index_columns", "column_indexes", "columns")
    ]
    assert tasks[0].to_pandas().index.name == "task"

    episodes = [pq.read_table(root / "meta" / "episodes" / "chunk-000" / "file-000.parquet") for root in (ours, theirs)]
    assert episodes[0].schema.equals(episodes[1].schema)
    for name in episodes[1].column_names:
        if not name.startswith("stats/"):
            assert episodes[0][name].to_pylist() == episodes[1][name].to_pylist()

    data = [pq.ParquetFile(root / "data" / "chunk-000" / "file-000.parquet") for root in (ours, theirs)]
    tables = [file.read() for file in data]
    assert tables[0].schema.equals(tables[1].schema)
    assert tables[0].equals(tables[1])  # for images: bytes and paths too
    assert [[file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] for file in data] == [LENGTHS] * 2
    features = [json.loads(table.schema.metadata[b"huggingface"])["info"]["features"] for table in tables]
    assert features[0] == features[1]


def test_statistics_are_those_of_lerobot(exported):
    """Numbers as v3.0 has them; images as v2.1 has them, since 3.0's sums are in float32 (its std is off by 0.045)."""
    theirs = FIXTURES / "lerobot_v30_image"
    names = ["meta", "episodes", "chunk-000", "file-000.parquet"]
    rows = [pq.read_table(root.joinpath(*names)).to_pylist() for root in (exported["image"], theirs)]
    lines = (FIXTURES / "lerobot_v21_image" / "meta" / "episodes_stats.jsonl").read_text().splitlines()
    for ours, wanted, line in zip(*rows, lines, strict=True):
        for name in wanted:
            if name.startswith("stats/"):
                _, key, stat = name.split("/")
                is_image = "images" in key and stat in ("mean", "std")
                value = json.loads(line)["stats"][key][stat] if is_image else wanted[name]
                # one bin of a quantile's histogram: a quantile at a step's time stamp falls on either side of a bin
                spread = np.ptp([ours[f"stats/{key}/max"], ours[f"stats/{key}/min"]]) / 5000
                tolerance = 1e-7 + (spread if stat.startswith("q") else 0)
                np.testing.assert_allclose(ours[name], value, rtol=1e-6, atol=tolerance, err_msg=name)
    totals = [json.loads((root / "meta" / "stats.json").read_text()) for root in (exported["image"], theirs)]
    for key, wanted in totals[1].items():
        for stat in ("min", "max", "mean", "std", "count"):
            tolerance = 6e-3 if "images" in key else 1e-7
            np.testing.assert_allclose(totals[0][key][stat], wanted[stat], rtol=1e-6, atol=tolerance)
        for stat in ("q01", "q10", "q50", "q90", "q99"):  # ours of all steps, lerobot's the outermost of the episodes'
            side = -1 if stat in ("q90", "q99") else 1
            assert np.all(side * (np.array(totals[0][key][stat]) - np.array(wanted[stat])) > -1e-3)
    action = reference("image")["action"]
    np.testing.assert_allclose(
        totals[0]["action"]["q90"], np.quantile(action, 0.9, axis=0), atol=np.ptp(action, axis=0).max() / 50
    )


def test_round_trip_is_exact(converted, exported, tmp_path):
    convert_lerobot(exported["image"], tmp_path / "back", CAMERAS)
    back, table = read(tmp_path / "back"), read(converted["v30", "image"])
    assert back.equals(table)
    for name in ("fps", "robot_type", "cameras", "state_names", "action_names"):
        schemas = [
            pq.read_schema(root / "episode_000000.parquet") for root in (tmp_path / "back", converted["v30", "image"])
        ]
        assert schemas[0].metadata[name.encode()] == schemas[1].metadata[name.encode()]


def test_round_trip_of_our_own_recordings(tmp_path):
    """Files that hold half an episode, single steps, flags of both kinds, a state of one number; small target files."""
    rows = [row for i, n in enumerate([5, 1, 130, 3]) for row in episode_rows(n, seed=i, state_dim=1, image_size=16)]
    for row in rows[6:136]:
        row["is_terminal"] = False
    for row in rows[100:136]:
        row["prompt"] = "then close it"
    write_rows(tmp_path / "ours" / "a.parquet", rows[:40], row_group_size=7)
    write_rows(tmp_path / "ours" / "b.parquet", rows[40:])
    files = [tmp_path / "ours" / "a.parquet", tmp_path / "ours" / "b.parquet"]
    camera = "observation.images.image_1"
    layout = Layout(fps=12.5, cameras={"image_1": camera}, next_done=True, data_files_size_in_mb=0.02)
    assert export_lerobot(files, tmp_path / "lerobot", layout, num_workers=2) == (4, 139)
    assert len(list((tmp_path / "lerobot" / "data").rglob("*.parquet"))) == 3
    convert_lerobot(tmp_path / "lerobot", tmp_path / "back", [f"{camera}=image_1"])
    back = read(tmp_path / "back").to_pylist()
    for row, wanted in zip(back, rows, strict=True):
        assert {key: row[key] for key in wanted} == wanted
    assert back[40]["timestamp"] == np.float32(34 / 12.5)
    tasks = pq.read_table(tmp_path / "lerobot" / "meta" / "episodes" / "chunk-000" / "file-000.parquet")["tasks"]
    assert tasks[2].as_py() == ["press the button", "then close it"]


@pytest.mark.parametrize(("codec", "limit_mb"), [("av1", 0.02), ("h264", 0.015)])
def test_exported_video_shows_the_frames(converted, tmp_path, codec, limit_mb):
    layout = Layout(
        fps=20,
        cameras=COLUMNS,
        video=VideoEncoding.choose(codec, 18),
        video_files_size_in_mb=limit_mb,  # several episodes in a file, several files
    )
    files = sorted(converted["v30", "image"].glob("*.parquet"))
    export_lerobot(files, tmp_path / "lerobot", layout)
    videos = sorted((tmp_path / "lerobot" / "videos" / FRONT / "chunk-000").iterdir())
    assert 1 < len(videos) < 6
    info = json.loads((tmp_path / "lerobot" / "meta" / "info.json").read_text())["features"][FRONT]["info"]
    assert (info["video.codec"], info["video.crf"]) == (codec, 18)
    convert_lerobot(tmp_path / "lerobot", tmp_path / "back", CAMERAS, encoding=PNG)
    back, source = read(tmp_path / "back"), read(converted["v30", "image"])
    numbers = ["state", "action", "prompt", "timestamp", "is_last", "is_terminal"]
    assert back.select(numbers).equals(source.select(numbers))
    for column in COLUMNS:
        frames = [
            np.stack([decode(frame) for frame in table[column].to_pylist()]).astype(np.int16)
            for table in (back, source)
        ]
        assert np.abs(frames[0] - frames[1]).mean() < 3  # measured: 1.2
        assert nearest(*frames) == list(range(189))


def test_exported_video_does_not_depend_on_processes(converted, exported, tmp_path):
    export(converted["v30", "image"], tmp_path / "two", "--video", "--num_workers", "2")
    for path in (exported["video"] / "videos").rglob("*.mp4"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(exported["video"])).read_bytes()


def test_faulty_exports(tmp_path):
    def fails(source, message, *flags, name="lerobot"):
        with pytest.raises(DataError, match=message):
            export(source, tmp_path / name, *flags)
        assert not (tmp_path / "lerobot").exists()

    good = write_episodes(tmp_path / "good.parquet", [4, 3], image_size=16)
    fails(good, "good.parquet does not say how many frames per second it has; give --fps")
    fails(good, "can't be a camera's name in LeRobot", "--fps", "10", "--cameras", "a/b=image_1")
    fails(good, "no column 'image_2'", "--fps", "10", "--cameras", "front=image_1", "side=image_2")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    fails(good, "used holds something else than a LeRobot dataset", "--fps", "10", "--overwrite", name="used")
    odd = write_episodes(tmp_path / "odd.parquet", [3], image_size=15)
    fails(
        odd,
        "frames of 15x15 can't be stored as video, which needs even numbers; leave out --video",
        "--fps",
        "10",
        "--video",
    )
    sizes = episode_rows(3, image_size=16) + episode_rows(3, seed=1, image_size=18)
    fails(
        write_rows(tmp_path / "sizes.parquet", sizes), "are 18x18, those of the first episode are 16x16", "--fps", "10"
    )
    mixed = episode_rows(3, image_size=16)
    mixed[1]["image_1"] = episode_rows(1, image_size=18)[0]["image_1"]
    fails(
        write_rows(tmp_path / "mixed.parquet", mixed),
        r"\+ 1: image_1 is RGB of 18x18; wanted RGB of one size",
        "--fps",
        "10",
    )
    broken = episode_rows(3, image_size=16)
    broken[2]["image_1"] = broken[2]["image_1"][:-200]
    fails(write_rows(tmp_path / "broken.parquet", broken), r"\+ 2: image_1 can't be decoded", "--fps", "10")
    absent = episode_rows(3, cameras=("image_1", "image_2"), image_size=16)
    absent[1]["image_2"] = None
    fails(
        write_rows(tmp_path / "absent.parquet", absent),
        "row 1: image_2 is null; .*leave that camera out",
        "--fps",
        "10",
    )
    flags = episode_rows(4, image_size=16)
    flags[2]["is_first"] = True
    fails(write_rows(tmp_path / "flags.parquet", flags), "flags.parquet row 2: is_first is true", "--fps", "10")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["used"]  # no half datasets


def test_facts_come_from_metadata(converted, tmp_path):
    files = sorted(converted["v30", "image"].glob("*.parquet"))
    assert read_facts(files)["fps"] == 20 and read_facts(files)["robot_type"] == "testarm"
    recorded = write_episodes(tmp_path / "recorded.parquet", [3], image_size=16)
    edit = pq.read_table(recorded).replace_schema_metadata(
        {"control_hz": "80.0"}
    )  # as scripts/record_demos.py writes it
    pq.write_table(edit, recorded)
    export(recorded, tmp_path / "lerobot")
    info = json.loads((tmp_path / "lerobot" / "meta" / "info.json").read_text())
    assert info["fps"] == 80 and info["robot_type"] is None
    assert list(info["features"])[0] == "observation.images.image_1"
    with pytest.raises(DataError, match="lerobot is there already; .*--overwrite"):
        export(recorded, tmp_path / "lerobot")
    export(recorded, tmp_path / "lerobot", "--overwrite", "--fps", "5", "--robot_type", "arm")
    info = json.loads((tmp_path / "lerobot" / "meta" / "info.json").read_text())
    assert info["fps"] == 5 and info["robot_type"] == "arm"
    with pytest.raises(DataError, match="20, 80.0 frames per second|80.0, 20 frames per second"):
        read_facts([*files, recorded])


def test_odd_video_is_refused(tmp_path):
    frames = [np.zeros((16, 15, 3), np.uint8)]
    with pytest.raises(DataError, match="frames of 15x16 can't be stored as video"):
        encode_video(tmp_path / "odd.mp4", frames, 10, VideoEncoding.choose(None, None))
    with pytest.raises(DataError, match="this PyAV has no encoder for vp8"):
        VideoEncoding.choose("vp8", None)


def test_further_sensors_and_cameras_there_and_back(tmp_path):
    """A force in a column of its own, three cameras of any names: into LeRobot and back as they were."""
    cameras = ("front", "wrist.left", "side")
    rows = [row for seed in range(2) for row in episode_rows(6, seed=seed, cameras=cameras, image_size=16)]
    for i, row in enumerate(rows):
        row["force"] = [float(i), -float(i)]
    path = write_rows(tmp_path / "ours.parquet", rows)
    features = {camera: f"observation.images.{camera.replace('.', '_')}" for camera in cameras}
    layout = Layout(fps=10, cameras=features, state_columns=("state", "force"))
    assert export_lerobot([path], tmp_path / "lerobot", layout) == (2, 12)
    info = json.loads((tmp_path / "lerobot" / "meta" / "info.json").read_text())["features"]
    assert info["observation.force"]["shape"] == [2] and info["observation.state"]["shape"] == [4]
    assert set(features.values()) <= set(info)
    options = [f"{feature}={camera}" for camera, feature in features.items()]
    keys = ["observation.state", "observation.force=force"]
    convert_lerobot(tmp_path / "lerobot", tmp_path / "back", options, state_keys=keys)
    back = read(tmp_path / "back")
    for name in (*cameras, "state", "force", "action"):
        assert back[name].to_pylist() == [row[name] for row in rows], name
    again = convert_lerobot(tmp_path / "lerobot", tmp_path / "back", options, state_keys=keys)
    assert again.written == 0
    facts = read_facts(sorted((tmp_path / "back").glob("*.parquet")))
    assert facts["state_columns"] == ["state", "force"] and list(facts["cameras"].values()) == list(cameras)
    with pytest.raises(DataError, match="--state_key 'a=action': wanted <key>, or <key>=<column>"):
        convert_lerobot(tmp_path / "lerobot", tmp_path / "b", options, state_keys=["a=action"])


def test_labels_go_over_when_asked_for_and_are_said_to_stay_otherwise(tmp_path):
    rows = [row for seed in range(2) for row in episode_rows(6, seed=seed, image_size=16)]
    for i, row in enumerate(rows):
        row |= {"intervention": i % 6 > 3, "success": i < 6, "seed": i // 6, "force": [float(i)], "plan": [0.0] * 4}
    source = write_rows(tmp_path / "ours.parquet", rows)

    def said(name, *flags):
        arguments = ["--to_lerobot", "--data_path", str(source), "--output_dir", str(tmp_path / name), "--fps", "10"]
        return to_lerobot(parse_args([*arguments, "--num_workers", "1", *flags])).splitlines()

    assert said("plain")[1] == (
        "left out: intervention (--labels writes it), success (--labels writes it), seed, "
        "force (--state_columns state force writes it), plan"
    )
    assert said("whole", "--labels", "--state_columns", "state", "force")[1] == "left out: seed, plan"
    columns = pq.read_table(next((tmp_path / "whole" / "data").rglob("*.parquet")))
    assert columns["next.success"].to_pylist() == [i == 5 for i in range(12)]  # true where the episode ends
    convert_lerobot(tmp_path / "whole", tmp_path / "back", ["observation.images.image_1=image_1"])
    back = read(tmp_path / "back")
    for name in ("intervention", "success"):
        assert back[name].to_pylist() == [row[name] for row in rows], name
    plain = write_episodes(tmp_path / "unlabelled.parquet", [3], image_size=16)
    with pytest.raises(
        DataError, match=r"--labels: .*unlabelled.parquet .* neither intervention nor success; leave it"
    ):
        export(plain, tmp_path / "none", "--fps", "10", "--labels")
    source = tmp_path / "*.parquet"
    with pytest.raises(
        DataError, match=r"--labels: .*unlabelled.parquet has no intervention, which .*ours.parquet has"
    ):
        said("some", "--labels")
