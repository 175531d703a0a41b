"""HDF5 episodes in the ALOHA layout, written as tonyzhaozh/aloha writes them, into our schema."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import data.convert.hdf5_files as hdf5_files
from data.convert.episode_writer import ImageEncoding
from data.convert.hdf5 import convert_hdf5, find_episodes
from data.episode_store import EpisodeStore
from utils.parquet_utils import DataError

REPOSITORY = Path(__file__).resolve().parents[3]
LENGTHS = [70, 5, 9]
CAMERAS = ["cam_high=image_1", "cam_left_wrist=image_2"]
PNG = ImageEncoding("png")


def write_episode(path: Path, length: int, *, compressed: bool = False, seed: int = 0) -> dict:
    """One file, and what is in it: `images` camera -> pixels or JPEG bytes."""
    rng = np.random.default_rng(seed)
    episode = {"action": rng.normal(size=(length, 14)).astype(np.float32), "images": {}}
    episode["qpos"] = rng.normal(size=(length, 14)).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.attrs["sim"] = True
        file["action"] = episode["action"]
        file["observations/qpos"] = episode["qpos"]
        file["observations/qvel"] = np.ones((length, 14))
        lengths = []
        for camera in ("cam_right_wrist", "cam_high", "cam_left_wrist"):  # not in the order of their names
            coarse = rng.integers(0, 256, (length, 6, 8, 3), dtype=np.uint8)
            pixels = coarse.repeat(4, axis=1).repeat(4, axis=2)
            if compressed:
                frames = [jpeg(image) for image in pixels]
                longest = max(map(len, frames)) + 3
                padded = [np.frombuffer(frame.ljust(longest, b"\0"), np.uint8) for frame in frames]
                file[f"observations/images/{camera}"] = np.stack(padded)
                lengths.append([len(frame) for frame in frames])
                episode["images"][camera] = frames
            else:
                file[f"observations/images/{camera}"] = pixels
                episode["images"][camera] = pixels
        if compressed:
            file.attrs["compress"] = True
            file["compress_len"] = np.array(lengths, dtype=np.float64)
    return episode


def jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "jpeg", quality=50)
    return buffer.getvalue()


def decode(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def read(folder: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(folder.glob("*.parquet")))


@pytest.fixture(params=[False, True], ids=["raw", "compressed"])
def source(request, tmp_path):
    """A folder of episodes, and what is in them."""
    folder = tmp_path / "aloha"
    names = ["episode_2.hdf5", "episode_9.hdf5", "episode_10.h5"]  # natural order
    episodes = [
        write_episode(folder / name, length, compressed=request.param, seed=i)
        for i, (name, length) in enumerate(zip(names, LENGTHS, strict=True))
    ]
    return folder, episodes, request.param


def test_every_value_and_frame(source, tmp_path):
    folder, episodes, compressed = source
    summary = convert_hdf5(folder, tmp_path / "out", CAMERAS, prompt="insert the battery", encoding=PNG)
    assert (summary.episodes, summary.rows) == (3, 84)
    table = read(tmp_path / "out")
    for name, key in (("state", "qpos"), ("action", "action")):
        wanted = np.concatenate([episode[key] for episode in episodes])
        assert np.array_equal(np.array(table[name].to_pylist(), np.float32), wanted)
    frames = np.concatenate([np.arange(length) for length in LENGTHS])
    assert table["episode_index"].to_pylist() == np.repeat([0, 1, 2], LENGTHS).tolist()
    assert np.array_equal(table["frame_index"], frames)
    assert np.array_equal(table["timestamp"], (frames / 50).astype(np.float32))
    assert np.flatnonzero(table["is_last"]).tolist() == [69, 74, 83] and not np.any(table["is_terminal"])
    assert set(table["prompt"].to_pylist()) == {"insert the battery"}
    for column, camera in (("image_1", "cam_high"), ("image_2", "cam_left_wrist")):
        wanted = [frame for episode in episodes for frame in episode["images"][camera]]
        stored = table[column].to_pylist()
        if compressed:
            assert stored == wanted  # the bytes, without their padding
        else:
            assert all(np.array_equal(decode(frame), pixels) for frame, pixels in zip(stored, wanted, strict=True))
    files = sorted((tmp_path / "out").glob("*.parquet"))
    store = EpisodeStore(
        files, state_dim=14, per_action_dim=14, cameras=("image_1", "image_2"), cache_dir=tmp_path / "cache"
    )
    assert np.diff(store.episode_starts).tolist() == LENGTHS
    texts = {key.decode(): value.decode() for key, value in pq.read_schema(files[0]).metadata.items()}
    assert json.loads(texts["sim"]) is True and json.loads(texts["fps"]) == 50 and texts["source"] == "aloha"
    assert json.loads(texts["cameras"]) == {"cam_high": "image_1", "cam_left_wrist": "image_2"}


def test_options(source, tmp_path):
    folder, episodes, compressed = source
    with h5py.File(folder / "episode_9.hdf5", "a") as file:
        file.attrs["task"] = "fold the towel"
    convert_hdf5(
        folder,
        tmp_path / "out",
        ["cam_right_wrist=image_1"],
        prompt="insert the battery",
        prompt_attribute="task",
        state_keys=["observations/qpos", "observations/qvel"],
        episodes=["1-2"],
        encoding=PNG,
        fps=20,
        channel_order="bgr",
        terminal=True,
    )
    table = read(tmp_path / "out")
    assert table["prompt"].to_pylist() == ["fold the towel"] * 5 + ["insert the battery"] * 9
    state = np.array(table["state"].to_pylist())
    assert state.shape == (14, 28) and np.all(state[:, 14:] == 1)
    assert np.array_equal(table["is_terminal"], table["is_last"])
    assert table["timestamp"][4].as_py() == np.float32(0.2)
    for frame, wanted in zip(table["image_1"].to_pylist(), episodes[1]["images"]["cam_right_wrist"], strict=False):
        pixels = decode(wanted) if compressed else wanted
        assert np.array_equal(decode(frame), pixels[..., ::-1])


def test_variable_length_frames(tmp_path):
    episode = write_episode(tmp_path / "a" / "episode_0.hdf5", 6, compressed=True)
    with h5py.File(tmp_path / "a" / "episode_0.hdf5", "a") as file:
        del file["observations/images/cam_high"], file["compress_len"]
        frames = file.create_dataset("observations/images/cam_high", (6,), dtype=h5py.vlen_dtype(np.uint8))
        for i, frame in enumerate(episode["images"]["cam_high"]):
            frames[i] = np.frombuffer(frame, np.uint8)
    convert_hdf5(tmp_path / "a", tmp_path / "out", CAMERAS, prompt="go")
    assert read(tmp_path / "out")["image_1"].to_pylist() == episode["images"]["cam_high"]


def test_resuming_and_processes(source, tmp_path):
    folder, _, _ = source

    def run(name: str, **options):
        return convert_hdf5(folder, tmp_path / name, CAMERAS, prompt="go", **options)

    run("one")
    run("two", num_workers=2)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()} == whole
    (tmp_path / "two" / "episode_000001.parquet").write_bytes(b"PAR1")
    summary = run("two")
    assert (summary.written, summary.skipped) == (1, 2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()} == whole
    write_episode(folder / "episode_3.hdf5", 4)  # episode 1 is another one now
    with pytest.raises(
        DataError, match=r"episode_000001.parquet was made .*episodes? .*|sources.episode_3.hdf5 is null"
    ):
        run("two")
    assert [path.name for path in find_episodes(folder)][:3] == ["episode_2.hdf5", "episode_3.hdf5", "episode_9.hdf5"]


def replace(path: Path, key: str, values: np.ndarray | None) -> None:
    with h5py.File(path, "a") as file:
        del file[key]
        if values is not None:
            file[key] = values


HIGH = "observations/images/cam_high"


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        (HIGH, None, r"b.hdf5: no camera 'cam_high' \(found: cam_left_wrist, cam_r"),
        ("action", None, r"b.hdf5: no dataset 'action' \(found: compress_len, observations/images/"),
        ("action", np.zeros((6, 14)), f"b.hdf5: steps differ .*qpos 5, action 6, {HIGH} 5"),
        ("action", np.zeros((5, 7)), "b.hdf5: state has 14 values and action 7, in .*a.hdf5 they have 14 and 14"),
        ("action", np.zeros((5, 2, 7)), r"b.hdf5: action is float64 \(5, 2, 7\); wanted numbers \(steps, values\)"),
        ("action", np.full((5, 14), np.nan), r"episode 1 frame 0: action\[0\] is nan"),
        (HIGH, np.zeros((5, 3, 8, 8), np.uint8), r"is uint8 \(5, 3, 8, 8\); wanted uint8 \(steps, height, width, 3\)"),
        (HIGH, np.ones((5, 90), np.uint8), "cam_high from frame 0 on is not as long as compress_len"),
        ("observations/images", None, "b.hdf5: no group 'observations/images'"),
    ],
)
def test_faulty_files(tmp_path, key, values, message):
    for name, length in (("a", 3), ("b", 5)):
        write_episode(tmp_path / "in" / f"{name}.hdf5", length, compressed=True)
    replace(tmp_path / "in" / "b.hdf5", key, values)
    with pytest.raises(DataError, match=message):
        convert_hdf5(tmp_path / "in", tmp_path / "out", CAMERAS, prompt="go")
    assert not list(tmp_path.rglob("episode_000001.parquet"))


def test_frame_that_is_cut_short(tmp_path):
    write_episode(tmp_path / "in" / "a.hdf5", 3, compressed=True)

    with h5py.File(tmp_path / "in" / "a.hdf5", "a") as file:
        del file["compress_len"]
        file[HIGH][1, 300:] = 0
    with pytest.raises(DataError, match="a.hdf5: cam_high frame 1 is not a whole JPEG image"):
        convert_hdf5(tmp_path / "in", tmp_path / "out", CAMERAS, prompt="go")


def test_faulty_options(tmp_path):
    write_episode(tmp_path / "in" / "a.hdf5", 3)

    def fails(message, folder="in", cameras=CAMERAS, **options):
        with pytest.raises(DataError, match=message):
            convert_hdf5(tmp_path / folder, tmp_path / "out", cameras, **({"prompt": "go"} | options))

    (tmp_path / "empty").mkdir()
    fails("empty holds no file that ends in .hdf5 or .h5", folder="empty")
    fails("no camera 'cam_hihg' .*did you mean 'cam_high'", cameras=["cam_hihg=image_1"])
    fails("give --prompt, or --prompt_attribute", prompt=None)
    fails(
        "a.hdf5: attribute 'task' is not there .*found: sim.*give --prompt as well",
        prompt=None,
        prompt_attribute="task",
    )
    fails("--channel_order is 'gbr'; wanted rgb or bgr", channel_order="gbr")
    fails("--fps is 0; wanted more than 0", fps=0)
    fails("no dataset 'observations/qpso' .*did you mean 'observations/qpos'", state_keys=["observations/qpso"])
    whole = (tmp_path / "in" / "a.hdf5").read_bytes()
    (tmp_path / "in" / "a.hdf5").write_bytes(whole[: len(whole) // 2])
    fails("a.hdf5: not a readable HDF5 file .*record or fetch it again")


def test_command_line(tmp_path):
    write_episode(tmp_path / "in" / "episode_0.hdf5", 3)
    command = [sys.executable, "scripts/convert_hdf5.py", "--hdf5_dir", str(tmp_path / "in")]
    command += ["--output_dir", str(tmp_path / "out"), "--num_workers", "1", "--cameras", *CAMERAS]
    failed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert failed.returncode == 1 and "give --prompt" in failed.stderr and "Traceback" not in failed.stderr
    done = subprocess.run([*command, "--prompt", "go"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "1 episodes, 3 steps: 1 files written" in done.stdout
    assert "left out, since --cameras does not name them: cam_right_wrist" in done.stderr


# --- what is read, and what is damaged ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "prompt"),
    [
        ("pick the cube", "pick the cube"),
        (np.bytes_("pick the cube"), "pick the cube"),
        (["pick the cube"], "pick the cube"),
        (np.array([b"pick the cube"]), "pick the cube"),
        (np.array(b"pick the cube\0\0", dtype="S16"), "pick the cube"),
        ("", "go"),
        (3, r"attribute 'prompt' is .*3.*; wanted one text, the instruction"),
        (["a", "b"], "attribute 'prompt' is 2 values; wanted one text"),
        (h5py.Empty("S1"), "attribute 'prompt' is Empty.*; wanted one text"),
        (np.bytes_("drücke".encode("latin1")), "attribute 'prompt' is 'dr.*cke', not UTF-8; write it as UTF-8"),
    ],
)  # fmt: skip
def test_an_instruction_of_any_kind_or_a_word_about_it(tmp_path, value, prompt):
    path = tmp_path / "in/a.hdf5"
    write_episode(path, 3)
    with h5py.File(path, "r+") as file:
        file.attrs["prompt"] = value
    options = {"prompt_attribute": "prompt", "prompt": "go"}
    if prompt in ("go", "pick the cube"):
        convert_hdf5(path.parent, tmp_path / "out", CAMERAS, **options)
        assert set(read(tmp_path / "out")["prompt"].to_pylist()) == {prompt}
        return
    with pytest.raises(DataError, match=f"a.hdf5: {prompt}"):
        convert_hdf5(path.parent, tmp_path / "out", CAMERAS, **options)


def test_hidden_files_and_linked_folders(tmp_path):
    write_episode(tmp_path / "server/episode_0.hdf5", 3)
    write_episode(tmp_path / "in/day1/episode_0.hdf5", 3)
    write_episode(tmp_path / "in/.trash/episode_1.hdf5", 3)
    (tmp_path / "in/day2").symlink_to(tmp_path / "server")
    with pytest.raises(
        DataError, match=r"day2/episode_0.hdf5 leads to a file outside of that folder; give --follow_li"
    ):
        convert_hdf5(tmp_path / "in", tmp_path / "out", CAMERAS, prompt="go")
    options = {"prompt": "go", "follow_links": True}
    assert convert_hdf5(tmp_path / "in", tmp_path / "out", CAMERAS, **options).episodes == 2


def test_another_layout_is_named_with_the_command_that_reads_it(tmp_path):
    (tmp_path / "in").mkdir()
    with h5py.File(tmp_path / "in/a.hdf5", "w") as file:
        file["obs/rgb"] = file["action"] = np.zeros((5, 7))
    message = r"a.hdf5: no group 'observations/images' \(at the top: action, obs\), .* --from hdf5 \S+a.hdf5 --inspect"
    with pytest.raises(DataError, match=message):
        convert_hdf5(tmp_path / "in", tmp_path / "out", CAMERAS, prompt="go")


def test_robomimics_layout_is_named(tmp_path):
    (tmp_path / "in").mkdir()
    with h5py.File(tmp_path / "in/bowl.hdf5", "w") as file:
        for i in range(3):
            file[f"data/demo_{i}/actions"] = np.zeros((5, 7))
    with pytest.raises(
        DataError,
        match=r"bowl.hdf5: is in robomimic's layout \(3 .* only ALOHA's is read here, .* scripts/convert.py, --pre",
    ):
        convert_hdf5(tmp_path / "in", tmp_path / "out", CAMERAS, prompt="go")


def frames(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (count, 8, 8, 3), dtype=np.uint8)


def write_camera(path: Path, **options) -> h5py.h5d.StoreInfo:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["action"] = file["observations/qpos"] = np.zeros((3, 2), np.float32)
        array = file.create_dataset("observations/images/cam_high", data=frames(), chunks=(1, 8, 8, 3), **options)
        return array.id.get_chunk_info(1)


def test_a_damaged_chunk_is_named(tmp_path):
    chunk = write_camera(tmp_path / "in/a.hdf5", compression="gzip")
    data = bytearray((tmp_path / "in/a.hdf5").read_bytes())
    data[chunk.byte_offset + 20 : chunk.byte_offset + 60] = bytes(40)
    (tmp_path / "in/a.hdf5").write_bytes(data)
    with pytest.raises(
        DataError, match=r"a.hdf5: /observations/images/cam_high is damaged at step 1 \(.*record or fetch"
    ):
        convert_hdf5(tmp_path / "in", tmp_path / "out", CAMERAS[:1], prompt="go")


def test_a_filter_that_is_not_there(tmp_path, monkeypatch):
    write_camera(tmp_path / "in/a.hdf5", compression="lzf")
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda code: False)

    def refuse(self, *_):
        raise OSError("Can't open directory (/usr/local/hdf5/lib/plugin)")

    monkeypatch.setattr(h5py.Dataset, "__getitem__", refuse)
    message = r"a.hdf5: \S+ is compressed with 'lzf' \(filter 32000\), .*; pip install hdf5plugin"
    with h5py.File(tmp_path / "in/a.hdf5") as file, pytest.raises(DataError, match=message):
        hdf5_files.read_rows(file["observations/images/cam_high"], 0, 3, tmp_path / "in/a.hdf5")


def test_compressed_frames_of_one_camera(tmp_path):
    """compress_len of one dimension is the only camera's."""
    encoded = [np.frombuffer(jpeg(image), np.uint8) for image in frames()]
    longest = max(map(len, encoded)) + 10
    (tmp_path / "in").mkdir()
    for name, lengths in (("a", [len(data) for data in encoded]), ("b", [1, 2, 3]), ("c", [5])):
        with h5py.File(tmp_path / f"in/{name}.hdf5", "w") as file:
            file["action"] = file["observations/qpos"] = np.zeros((3, 2), np.float32)
            padded = np.stack([np.pad(data, (0, longest - len(data))) for data in encoded])
            file["observations/images/cam_high"], file["compress_len"] = padded, lengths
    options = {"prompt": "go"}
    convert_hdf5(tmp_path / "in", tmp_path / "out", CAMERAS[:1], episodes=["0"], **options)
    assert read(tmp_path / "out")["image_1"].to_pylist() == [data.tobytes() for data in encoded]
    faults = {
        "1": "b.hdf5: cam_high from frame 0 on is not as long as compress_len",
        "2": r"wanted numbers \(cameras, 3",
    }
    for episode, message in faults.items():
        with pytest.raises(DataError, match=message):
            convert_hdf5(tmp_path / "in", tmp_path / "other", CAMERAS[:1], episodes=[episode], **options)


def test_numbers_beyond_float32(tmp_path):
    path = tmp_path / "in/a.hdf5"
    write_episode(path, 3)
    with h5py.File(path, "r+") as file:
        values = np.array(file["action"], np.float64)
        del file["action"]
        values[1, 0] = 1e300
        file["action"] = values
    with pytest.raises(
        DataError, match=r"episode 0 frame 1: action\[0\] is 1e\+300; every value must be a finite number"
    ):
        convert_hdf5(path.parent, tmp_path / "out", CAMERAS, prompt="go")


@pytest.mark.parametrize("options", [{}, {"chunks": (1, 2)}])
def test_parts_that_were_never_written(tmp_path, options):
    """As after a crash of the recorder: HDF5 reads them as zeros."""
    path = tmp_path / "in/a.hdf5"
    write_episode(path, 3)
    with h5py.File(path, "r+") as file:
        del file["action"]
        action = file.create_dataset("action", (3, 2), np.float32, **options)
        if options:
            action[:2] = 1.0
    with pytest.raises(DataError, match="a.hdf5: parts of /action were never written; the file is incomplete"):
        convert_hdf5(path.parent, tmp_path / "out", CAMERAS, prompt="go")


def test_names_that_are_no_text(tmp_path):
    path = tmp_path / "in/a.hdf5"
    write_episode(path, 3)
    with h5py.File(path, "r+") as file:
        file[b"observations/images/\xff"] = file["observations/images/cam_high"]
        del file["observations/images/cam_high"]
    with pytest.raises(DataError, match=r"a.hdf5: no camera 'cam_high' \(found: "):
        convert_hdf5(path.parent, tmp_path / "out", CAMERAS, prompt="go")
