"""LeRobot datasets written by the lerobot library itself (tests/fixtures), into our schema."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, JpegImagePlugin

from data.convert.episode_writer import ImageEncoding
from data.convert.lerobot import convert_lerobot
from data.convert.video import VideoReader
from data.episode_store import EpisodeStore
from scripts.convert_lerobot import from_lerobot, parse_args
from tests.data.convert.lerobot_fixtures import (
    CAMERAS,
    COLUMNS,
    DATASETS,
    FIXTURES,
    FRONT,
    LENGTHS,
    PNG,
    REPOSITORY,
    STARTS,
    WRIST,
    all_frames,
    bytes_of,
    decode,
    edit_info,
    edit_table,
    nearest,
    read,
    reference,
    replaced,
    video_files,
)
from utils.parquet_utils import DataError

# --- from LeRobot: values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "kind"), DATASETS)
def test_every_value_is_the_reference(converted, version, kind):
    wanted, table = reference(kind), read(converted[version, kind])
    assert np.array_equal(np.array(table["state"].to_pylist(), np.float32), wanted["state"])
    assert np.array_equal(np.array(table["action"].to_pylist(), np.float32), wanted["action"])
    assert table["episode_index"].to_pylist() == wanted["episode_index"].tolist()
    assert table["prompt"].to_pylist() == wanted["task"].tolist()
    frames = np.concatenate([np.arange(length) for length in LENGTHS])
    assert np.array_equal(table["frame_index"], frames)
    assert np.array_equal(table["timestamp"], (frames / 20).astype(np.float32))
    assert np.array_equal(table["is_first"], frames == 0)
    assert np.flatnonzero(table["is_last"]).tolist() == (STARTS[1:] - 1).tolist()
    assert not np.any(table["is_terminal"])  # the datasets have no next.done


@pytest.mark.parametrize("version", ["v21", "v30"])
def test_image_frames_are_the_source_bytes(converted, version):
    table, wanted = read(converted[version, "image"]), reference("image")
    source = pa.concat_tables(
        pq.read_table(path) for path in sorted((FIXTURES / f"lerobot_{version}_image" / "data").rglob("*.parquet"))
    )
    for column, feature in COLUMNS.items():
        frames = table[column].to_pylist()
        assert frames == [frame["bytes"] for frame in source[feature].to_pylist()]
        chosen = np.stack([decode(frames[i]) for i in wanted["frame_index"]])
        assert np.array_equal(chosen, wanted[feature.rsplit(".", 1)[1]])


@pytest.mark.parametrize("version", ["v21", "v30"])
def test_video_frames_are_those_of_a_decode_from_the_beginning(converted, version):
    table = read(converted[version, "video"])
    for column, feature in COLUMNS.items():
        frames = np.stack([decode(frame) for frame in table[column].to_pylist()])
        assert np.array_equal(frames, all_frames(video_files(version, feature)))


def test_v30_video_frames_are_the_reference_within_codec_rounding(converted):
    """Measured: 0 everywhere; 2 leaves room for another build of the decoder and of the colour conversion."""
    table, wanted = read(converted["v30", "video"]), reference("video")
    for column, feature in COLUMNS.items():
        chosen = np.stack([decode(table[column][int(i)].as_py()) for i in wanted["frame_index"]]).astype(np.int16)
        assert np.abs(chosen - wanted[feature.rsplit(".", 1)[1]]).max() <= 2


def test_v21_video_frames_are_the_reference_but_for_their_own_encoding(converted):
    """The reference is of the v3.0 videos: two lossy encodings of the same frames.

    Measured on the reference frames: mean absolute difference at most 2.61 (front) and 0.38 (wrist), single pixels at
    the edges of the moving block up to 118. That it is the right frame shows against the source, which the image
    dataset has: no other frame of the episode is as near.
    """
    table, wanted, source = read(converted["v21", "video"]), reference("video"), read(converted["v21", "image"])
    for column, feature in COLUMNS.items():
        frames = np.stack([decode(frame) for frame in table[column].to_pylist()]).astype(np.int16)
        difference = np.abs(frames[wanted["frame_index"]] - wanted[feature.rsplit(".", 1)[1]])
        assert difference.mean(axis=(1, 2, 3)).max() <= 3
        truth = np.stack([decode(frame) for frame in source[column].to_pylist()]).astype(np.int16)
        assert nearest(frames, truth) == list(range(189))


def test_jpeg_keeps_full_colour_resolution(tmp_path):
    convert_lerobot(FIXTURES / "lerobot_v30_video", tmp_path, CAMERAS, episodes=["1"])
    frames, wanted = read(tmp_path)["image_1"].to_pylist(), all_frames(video_files("v30", FRONT))[31:48]
    for frame, pixels in zip(frames, wanted, strict=True):
        with Image.open(io.BytesIO(frame)) as image:
            assert image.format == "JPEG" and JpegImagePlugin.get_sampling(image) == 0  # 4:4:4
        assert np.abs(decode(frame).astype(np.int16) - pixels).mean() < 2  # measured: 0.9
    convert_lerobot(
        FIXTURES / "lerobot_v30_video", tmp_path / "coarse", CAMERAS, episodes=["1"], encoding=ImageEncoding("jpeg", 20)
    )
    assert len(read(tmp_path / "coarse")["image_1"][0].as_py()) < len(frames[0])


@pytest.mark.parametrize(("version", "kind"), DATASETS)
def test_output_opens_as_a_dataset(converted, tmp_path, version, kind):
    files = sorted(converted[version, kind].glob("*.parquet"))
    store = EpisodeStore(
        files, state_dim=7, per_action_dim=7, cameras=("image_1", "image_2"), cache_dir=tmp_path / "cache"
    )
    assert np.diff(store.episode_starts).tolist() == LENGTHS
    assert np.array_equal(store.state, reference(kind)["state"])
    assert decode(bytes(store.image("image_2", 188))).shape == (96, 96, 3)


def test_metadata_and_row_groups(converted):
    file = pq.ParquetFile(converted["v30", "video"] / "episode_000004.parquet")
    assert file.num_row_groups == 1 and file.metadata.num_rows == 60
    texts = {key.decode(): value.decode() for key, value in file.schema_arrow.metadata.items()}
    assert texts["source"] == "lerobot_v30_video" and texts["source_format"] == "LeRobot v3.0"
    assert texts["robot_type"] == "testarm" and texts["units"].startswith("unknown")
    assert json.loads(texts["fps"]) == 20
    assert json.loads(texts["cameras"]) == {FRONT: "image_1", WRIST: "image_2"}
    assert json.loads(texts["state_names"]) == [f"j{i}" for i in range(7)]
    assert json.loads(texts["action_names"]) == [f"a{i}" for i in range(7)]
    assert json.loads(texts["conversion"])["settings"]["image_format"] == "png"
    types = {field.name: field.type for field in file.schema_arrow}
    assert types["state"] == types["action"] == pa.list_(pa.float32(), 7)
    assert types["image_1"] == pa.binary() and types["timestamp"] == pa.float32()


# --- from LeRobot: options ----------------------------------------------------------------------------------------


def test_v20_is_read_like_v21(converted, dataset, tmp_path):
    root = dataset("v21", "image")
    edit_info(root, codebase_version="v2.0")
    (root / "meta" / "episodes_stats.jsonl").unlink()
    convert_lerobot(root, tmp_path / "out", CAMERAS)
    assert read(tmp_path / "out").equals(read(converted["v21", "image"]))


def test_options(dataset, tmp_path, caplog):
    caplog.set_level("INFO")
    root = dataset("v30", "image")
    path = root / "data" / "chunk-000" / "file-000.parquet"
    done = STARTS[1:] - 1
    grip = np.linspace(0, 1, 189, dtype=np.float32)

    def add(table):
        flags = np.isin(np.arange(189), done[[0, 2]])
        return table.append_column("next.done", pa.array(flags)).append_column("observation.grip", pa.array(grip))

    edit_table(path, add)  # one row group for all episodes, as some writers leave it
    features = json.loads((root / "meta" / "info.json").read_text())["features"]
    features["next.done"] = {"dtype": "bool", "shape": [1], "names": None}
    features["observation.grip"] = {"dtype": "float32", "shape": [1], "names": {"motors": ["grip"]}}
    edit_info(root, features=features)
    options = {"state_keys": ["observation.state", "observation.grip"], "episodes": ["0", "2-3"], "prompt": "go"}
    convert_lerobot(root, tmp_path / "out", [f"{WRIST}=image_1"], **options)
    assert "left out, since --cameras does not name them: observation.images.front" in caplog.text
    table = read(tmp_path / "out")
    assert "image_2" not in table.column_names and set(table["prompt"].to_pylist()) == {"go"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"episode_{i:06d}.parquet" for i in (0, 2, 3)]
    rows = np.concatenate([np.arange(31), np.arange(48, 117)])
    state = np.array(table["state"].to_pylist(), np.float32)
    assert np.array_equal(state[:, :7], reference("image")["state"][rows]) and np.array_equal(state[:, 7], grip[rows])
    assert np.flatnonzero(table["is_terminal"]).tolist() == [30, 30 + 44]  # episode 3 did not end by itself
    names = json.loads(pq.read_schema(tmp_path / "out" / "episode_000000.parquet").metadata[b"state_names"])
    assert names == [*(f"j{i}" for i in range(7)), "grip"]
    convert_lerobot(root, tmp_path / "always", CAMERAS, terminal="always")
    assert np.array_equal(read(tmp_path / "always")["is_terminal"], read(tmp_path / "always")["is_last"])


def test_many_episodes_share_files(monkeypatch, converted, tmp_path):
    monkeypatch.setattr("data.convert.conversion.MAX_FILES", 3)
    convert_lerobot(FIXTURES / "lerobot_v30_video", tmp_path, CAMERAS, encoding=PNG)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"episode_{i:06d}.parquet" for i in (0, 2, 4)]
    assert read(tmp_path).equals(read(converted["v30", "video"]))
    assert pq.ParquetFile(tmp_path / "episode_000002.parquet").num_row_groups == 2


def test_tolerance_of_time_stamps(dataset, tmp_path):
    root = dataset("v30", "video")
    path = root / "data" / "chunk-000" / "file-000.parquet"

    def delay(table):
        return replaced(table, "timestamp", np.asarray(table["timestamp"]) + np.float32(0.01))

    edit_table(path, delay)
    with pytest.raises(DataError, match=r"episode 0 frame 0: .*file-000.mp4 has no frame within 0.0001 s of 0.0100 s"):
        convert_lerobot(root, tmp_path / "out", CAMERAS)
    convert_lerobot(root, tmp_path / "out", CAMERAS, tolerance_s=0.02, encoding=PNG)
    frames = np.stack([decode(frame) for frame in read(tmp_path / "out")["image_1"].to_pylist()])
    assert np.array_equal(frames, all_frames(video_files("v30", FRONT)))
    with pytest.raises(DataError, match="--tolerance_s is 0.03; wanted more than 0 and less than half a frame"):
        convert_lerobot(root, tmp_path / "wide", CAMERAS, tolerance_s=0.03)


@pytest.mark.parametrize("codec", [("libx264", {"g": "250", "bf": "3"}), ("libsvtav1", {"g": "50", "preset": "12"})])
def test_jumping_in_a_video_finds_the_same_frames(tmp_path, codec):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    path = tmp_path / "long.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec[0], 10, options=codec[1])
        stream.width = stream.height = 64
        for i in range(150):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(noise, 2 * i, axis=1), format="rgb24")))
        container.mux(stream.encode())
    frames, reader = all_frames([path]), VideoReader(path)
    for i in [0, 1, 149, 148, 3, 90, 91, 92, 20, 75, 0]:
        assert np.array_equal(reader.frame_at(i / 10, 1e-4, "test"), frames[i])
    with pytest.raises(
        DataError, match=r"test: .*long.mp4 has no frame within 0.0001 s of 15.0000 s \(it ends before\)"
    ):
        reader.frame_at(15.0, 1e-4, "test")
    assert np.array_equal(reader.frame_at(0.0, 1e-4, "test"), frames[0])
    reader.close()


# --- from LeRobot: resuming, processes ----------------------------------------------------------------------------


def test_number_of_processes_does_not_matter(converted, tmp_path):
    convert_lerobot(FIXTURES / "lerobot_v30_video", tmp_path, CAMERAS, encoding=PNG, num_workers=2)
    assert bytes_of(tmp_path) == bytes_of(converted["v30", "video"])


def test_resuming_makes_only_what_is_missing(tmp_path, caplog):
    source, out = FIXTURES / "lerobot_v30_image", tmp_path / "out"
    assert convert_lerobot(source, out, CAMERAS).written == 6
    whole, times = bytes_of(out), {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "episode_000001.parquet").unlink()
    (out / ".episode_000001.parquet.tmp").write_bytes(whole["episode_000001.parquet"][:5000])  # as a kill leaves it
    (out / "episode_000003.parquet").write_bytes(whole["episode_000003.parquet"][:-100])
    summary = convert_lerobot(source, out, CAMERAS)
    assert (summary.written, summary.skipped, summary.rows) == (2, 4, 189)
    assert "episode_000003.parquet is damaged: it is made again" in caplog.text
    assert bytes_of(out) == whole
    now = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert sum(now[name] == times[name] for name in now) == 4
    assert convert_lerobot(source, out, CAMERAS, overwrite=True).written == 6


def killed(command: list[str], out: Path) -> dict[str, bytes]:
    """The files of a conversion that got SIGKILL as soon as there was one; where it is fast that may be all of them."""
    process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(out.glob("*.parquet")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()  # nothing is tidied up
    process.wait()
    with contextlib.suppress(ProcessLookupError):  # its workers end by themselves
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("a worker outlived the conversion")
    return {path.name: path.read_bytes() for path in out.glob("*.parquet")}


def test_killed_conversion_goes_on(converted, tmp_path):
    command = [sys.executable, "scripts/convert_lerobot.py", "--lerobot_dir", str(FIXTURES / "lerobot_v30_video")]
    command += ["--cameras", *CAMERAS, "--image_format", "png", "--num_workers", "2", "--output_dir"]
    complete = bytes_of(converted["v30", "video"])
    for attempt in range(20):
        out = tmp_path / f"out_{attempt}"
        found = killed([*command, str(out)], out)
        assert found.items() <= complete.items()  # only whole files under their names
        if len(found) < 6:
            break
    else:
        pytest.fail("every conversion had ended before it could be killed")
    done = subprocess.run([*command, str(out)], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert f"{6 - len(found)} files written, {len(found)} complete before" in done.stdout
    assert bytes_of(out) == complete


def test_other_settings_or_source_are_noticed(dataset, tmp_path):
    source, out = dataset("v30", "video"), tmp_path / "out"
    convert_lerobot(source, out, CAMERAS, episodes=["1", "5"], encoding=PNG)
    with pytest.raises(DataError, match=r'settings.image_format is "png", now "jpeg".*--overwrite'):
        convert_lerobot(source, out, CAMERAS, episodes=["1"])
    with pytest.raises(DataError, match="episode_000001.parquet was made .* would be mixed with these"):
        convert_lerobot(source, out, CAMERAS, episodes=["0"])
    video = source / "videos" / WRIST / "chunk-000" / "file-000.mp4"
    os.utime(video, ns=(1, 1))
    with pytest.raises(DataError, match=r"sources.videos/.*wrist.*file-000.mp4 is \[\d+, \d+\], now \[\d+, 1\]"):
        convert_lerobot(source, out, CAMERAS, episodes=["1"], encoding=PNG)
    convert_lerobot(source, out, CAMERAS, episodes=["1"], overwrite=True)
    assert [path.name for path in out.iterdir()] == ["episode_000001.parquet"]  # the other one did not belong
    (out / "other.parquet").write_bytes(b"something")
    with pytest.raises(DataError, match="other.parquet is not of a conversion and would be mixed"):
        convert_lerobot(source, out, CAMERAS, episodes=["1"], overwrite=True)


def test_one_conversion_at_a_time(tmp_path):
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(DataError, match="another conversion is writing there"):
            convert_lerobot(FIXTURES / "lerobot_v30_image", tmp_path, CAMERAS)
    finally:
        os.close(handle)


# --- the command line ---------------------------------------------------------------------------------------------


def test_command_line(tmp_path):
    cameras = ["--cameras", *CAMERAS]
    base = ["--lerobot_dir", str(FIXTURES / "lerobot_v30_image"), "--output_dir", str(tmp_path / "out"), *cameras]
    assert "6 files written" in from_lerobot(parse_args([*base, "--num_workers", "1"]))
    command = [sys.executable, "scripts/convert_lerobot.py", *base]
    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "6 complete before" in again.stdout
    command[-1] = "observation.images.wrst=image_2"
    failed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert failed.returncode == 1
    assert (
        failed.stderr.strip().endswith("did you mean 'observation.images.wrist'?") and "Traceback" not in failed.stderr
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lerobot_dir", "d", "--video"], "--video has no meaning without --to_lerobot"),
        (["--to_lerobot", "--data_path", "p", "--prompt", "go"], "--prompt has no meaning with --to_lerobot"),
        (["--to_lerobot"], "--to_lerobot needs --data_path"),
        (["--lerobot_dir", "d", "--num_workers", "0"], "0 is less than 1"),
        ([], "one of the arguments --lerobot_dir --to_lerobot is required"),
    ],
)
def test_faulty_flags(capsys, flags, message):
    with pytest.raises(SystemExit):
        parse_args([*flags, "--output_dir", "o"])
    assert message in capsys.readouterr().err
