"""Every preset of configs/sources on small files in the layout that its set is described with.

Frames have their step drawn into the middle and four colours in the corners (`step_of`, `wrong_corner`), so that a
frame of another step, mirrored, or with red and blue exchanged is noticed. libero and groot are tested in
test_convert.py, calvin with its reader in test_calvin.py.
"""

from __future__ import annotations

import io
import json
import shutil
import struct
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from google_crc32c import value as crc32c
from PIL import Image

from data.convert.convert import convert, open_source
from data.convert.episode_writer import ImageEncoding
from data.convert.mapping import presets, read_entries
from tests.data.convert.lerobot_fixtures import FIXTURES, FRONT, WRIST
from tests.data.convert.test_formats import FORMATS, check, decode_frame, read, step_of, wrong_corner

ELSEWHERE = {"libero", "groot", "calvin"}  # tested in other files
STEPS = 7
CORNERS = {(0, 0): (255, 0, 0), (0, 1): (0, 255, 0), (1, 0): (0, 0, 255), (1, 1): (128, 128, 128)}


def picture(step: int, size: int = 64) -> np.ndarray:
    """A frame that tells its step, its orientation and the order of its colours."""
    frame = np.full((size, size, 3), 70, np.uint8)
    for (bottom, right), colour in CORNERS.items():
        frame[bottom * (size - 12) : size if bottom else 12, right * (size - 12) : size if right else 12] = colour
    block = size // 8
    for bit in range(6):
        frame[size // 2 - 6 : size // 2 + 6, block * (bit + 1) : block * (bit + 2)] = 255 if step >> bit & 1 else 0
    return frame


def film(first: int, count: int = STEPS) -> np.ndarray:
    return np.stack([picture(first + i) for i in range(count)])


def jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "jpeg", quality=95, subsampling=0)
    return buffer.getvalue()


def numbers(seed: int, width: int, count: int = STEPS) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def converted(preset: str, path: Path, output_dir: Path, *items: str) -> pa.Table:
    convert(open_source(None, path, read_entries(preset, items)), output_dir, encoding=ImageEncoding("png"))
    return read(output_dir)


def values(table: pa.Table, name: str) -> np.ndarray:
    return np.array(table[name].to_pylist(), np.float32)


def check_frames(table: pa.Table, steps: list[int], *cameras: str) -> None:
    for camera in cameras:
        frames = [decode_frame(frame) for frame in table[camera].to_pylist()]
        assert [step_of(frame) for frame in frames] == steps, camera
        assert [wrong_corner(frame) for frame in frames] == [None] * len(frames), camera


def test_every_preset_is_tested():
    here = {name for name in presets() if any(f"test_{name}" in test for test in globals())}
    assert here | ELSEWHERE == set(presets())


# --- HDF5 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["robomimic", "robocasa"])
def test_robomimic_and_test_robocasa(preset, tmp_path):
    names = {
        "robomimic": ("agentview_image", "robot0_eye_in_hand_image", "robot0_eef_pos", "robot0_eef_quat"),
        "robocasa": (
            *("robot0_agentview_left_image", "robot0_eye_in_hand_image"),
            *("robot0_base_to_eef_pos", "robot0_base_to_eef_quat"),
        ),
    }[preset]
    with h5py.File(tmp_path / "demo.hdf5", "w") as file:
        for number, first in ((10, 30), (2, 10)):  # written out of order: demo_2 comes before demo_10
            demo = file.create_group(f"data/demo_{number}")
            for name in names[:2]:
                demo.create_dataset(f"obs/{name}", data=film(first), compression="gzip", chunks=(3, 64, 64, 1))
            for width, name in zip((3, 4, 2), (*names[2:], "robot0_gripper_qpos"), strict=True):
                demo[f"obs/{name}"] = numbers(number + width, width).astype(np.float64)
            demo["actions"], demo["dones"] = numbers(number, 7), np.arange(STEPS) == STEPS - 1
            demo.attrs["num_samples"] = STEPS
            demo.attrs["ep_meta"] = json.dumps({"lang": f"open drawer {number}", "layout_id": 3})
        file["mask/train"] = np.array([b"demo_10"])
        file["data"].attrs["env_args"] = json.dumps({"env_name": "Lift"})
    given = ["prompt=text:lift the cube"] if preset == "robomimic" else []
    table = converted(preset, tmp_path / "demo.hdf5", tmp_path / "out", *given)
    check_frames(table, [*range(10, 10 + STEPS), *range(30, 30 + STEPS)], "image_1", "image_2")
    assert np.array_equal(values(table, "action"), np.concatenate([numbers(2, 7), numbers(10, 7)]))
    states = [np.concatenate([numbers(n + width, width) for width in (3, 4, 2)], axis=1) for n in (2, 10)]
    assert np.array_equal(values(table, "state"), np.concatenate(states))
    prompts = ["lift the cube"] * 2 if given else ["open drawer 2", "open drawer 10"]
    assert table["prompt"].to_pylist() == [text for text in prompts for _ in range(STEPS)]
    assert np.flatnonzero(table["is_terminal"]).tolist() == [STEPS - 1, 2 * STEPS - 1]
    part = converted(preset, tmp_path / "demo.hdf5", tmp_path / "part", "filter=train", *given)
    check_frames(part, list(range(30, 30 + STEPS)), "image_1")


@pytest.mark.parametrize("compressed", [False, True])
def test_aloha(compressed, tmp_path):
    cameras = ("cam_high", "cam_left_wrist", "cam_right_wrist")
    for number in (10, 9):
        with h5py.File(tmp_path / f"episode_{number}.hdf5", "w") as file:
            file.attrs["sim"], file.attrs["compress"] = False, compressed
            for name in cameras:
                frames = film(number)
                if compressed:
                    encoded = [jpeg(frame) for frame in frames]
                    longest = max(map(len, encoded)) + 50
                    frames = np.stack([np.frombuffer(e.ljust(longest, b"\0"), np.uint8) for e in encoded])
                file[f"observations/images/{name}"] = frames
            file["observations/qpos"], file["observations/qvel"] = numbers(number, 14), numbers(0, 14)
            file["action"] = numbers(-number % 97, 14)
    table = converted("aloha", tmp_path, tmp_path / "out", "prompt=text:insert the battery")
    steps = [*range(9, 9 + STEPS), *range(10, 10 + STEPS)]
    check_frames(table, steps, "image_1", "image_2", "image_3")
    assert np.array_equal(values(table, "state"), np.concatenate([numbers(9, 14), numbers(10, 14)]))
    assert np.array_equal(values(table, "action"), np.concatenate([numbers(88, 14), numbers(87, 14)]))
    assert set(table["prompt"].to_pylist()) == {"insert the battery"} and not any(table["is_terminal"].to_pylist())
    assert table["timestamp"][1].as_py() == pytest.approx(1 / 50)


def test_robotwin(tmp_path):
    """Frames went through cv2.imencode in RGB, so a standard decoder exchanges red and blue; S<longest> strings."""
    for number in range(2):
        path = tmp_path / "data" / f"episode{number}.hdf5"
        path.parent.mkdir(exist_ok=True)
        with h5py.File(path, "w") as file:
            for camera in ("head_camera", "left_camera", "right_camera"):
                encoded = np.array([jpeg(frame[..., ::-1]) for frame in film(8 * number)], dtype="S")
                file[f"observation/{camera}/rgb"] = encoded
            file["joint_action/vector"], file["endpose/left_endpose"] = numbers(number, 14), numbers(0, 7)
    table = converted("robotwin", tmp_path / "data", tmp_path / "out", "prompt=text:stack the bowls")
    check_frames(table, [*range(STEPS - 1), *range(8, 8 + STEPS - 1)], "image_1", "image_2", "image_3")
    assert np.array_equal(values(table, "state"), np.concatenate([numbers(n, 14)[:-1] for n in range(2)]))
    assert np.array_equal(values(table, "action"), np.concatenate([numbers(n, 14)[1:] for n in range(2)]))


def test_robomind(tmp_path):
    """One trajectory a folder, frames as objects of encoded bytes, BGR in the franka and UR subsets."""
    for number, name in enumerate(("0201_9", "0201_10")):
        path = tmp_path / "success_episodes" / "train" / name / "data" / "trajectory.hdf5"
        path.parent.mkdir(parents=True)
        with h5py.File(path, "w") as file:
            frames = file.create_dataset(
                "observations/rgb_images/camera_top", (STEPS,), dtype=h5py.vlen_dtype(np.uint8)
            )
            for i, frame in enumerate(film(8 * number)):
                frames[i] = np.frombuffer(jpeg(frame[..., ::-1]), np.uint8)
            file["puppet/joint_position"], file["master/joint_position"] = numbers(number, 8), numbers(number + 5, 8)
    items = ["prompt=text:put the bread on the plate", "success=file:success_episodes"]
    table = converted("robomind", tmp_path, tmp_path / "out", *items)
    check_frames(table, [*range(STEPS), *range(8, 8 + STEPS)], "image_1")
    assert np.array_equal(values(table, "state"), np.concatenate([numbers(0, 8), numbers(1, 8)]))
    assert np.array_equal(values(table, "action"), np.concatenate([numbers(5, 8), numbers(6, 8)]))
    assert all(table["success"].to_pylist())


def test_minari(tmp_path):
    """N + 1 observations for N actions; images as pixels."""
    path = tmp_path / "data" / "main_data.hdf5"
    path.parent.mkdir()
    with h5py.File(path, "w") as file:
        for number in (11, 2):
            episode = file.create_group(f"episode_{number}")
            episode["observations/image"] = film(number, STEPS + 1)
            episode["observations/state"] = numbers(number, 5, STEPS + 1)
            episode["actions"], episode["rewards"] = numbers(number + 50, 3), np.zeros(STEPS)
            episode["terminations"], episode["truncations"] = np.arange(STEPS) == STEPS - 1, np.zeros(STEPS, bool)
            episode["infos/success"] = np.arange(STEPS) >= 4
            episode.attrs["id"] = number
    table = converted("minari", path, tmp_path / "out", "prompt=text:open the door", "success=infos/success")
    check_frames(table, [*range(2, 2 + STEPS), *range(11, 11 + STEPS)], "image_1")
    assert np.array_equal(values(table, "state"), np.concatenate([numbers(n, 5, STEPS + 1)[:-1] for n in (2, 11)]))
    assert np.array_equal(values(table, "action"), np.concatenate([numbers(52, 3), numbers(61, 3)]))
    assert np.flatnonzero(table["is_terminal"]).tolist() == [STEPS - 1, 2 * STEPS - 1]
    assert all(table["success"].to_pylist())


# --- RLDS ---------------------------------------------------------------------------------------------------------


def field(number: int, data: bytes) -> bytes:
    """A field of bytes in a protocol buffer."""
    size, length = bytearray(), len(data)
    while length > 0x7F:
        size.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([number << 3 | 2]) + bytes(size) + bytes([length]) + data


def varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def feature(items: list[bytes] | np.ndarray) -> bytes:
    """A tf.train.Feature: bytes, float32 (also of float64), or int64 (also of bool)."""
    if isinstance(items, list):
        return field(1, b"".join(field(1, item) for item in items))
    if items.dtype.kind == "f":
        return field(2, field(1, items.astype("<f4").tobytes()))
    return field(3, field(1, b"".join(map(varint, items.astype(np.int64).ravel().tolist()))))


def write_shard(path: Path, episodes: list[dict[str, list[bytes] | np.ndarray]]) -> None:
    def checksum(data: bytes) -> bytes:
        value = crc32c(data)
        return struct.pack("<I", ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    with path.open("wb") as file:
        for episode in episodes:
            entries = (field(1, field(1, k.encode()) + field(2, feature(v))) for k, v in episode.items())
            record = field(1, b"".join(entries))
            length = struct.pack("<Q", len(record))
            file.write(length + checksum(length) + record + checksum(record))


def nested(leaves: dict[str, dict]) -> dict:
    """features.json of names such as `observation/state`."""
    tree: dict = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        below = tree
        for parent in parents:
            below = below.setdefault(parent, {"featuresDict": {"features": {}}})["featuresDict"]["features"]
        below[last] = leaf
    return {"featuresDict": {"features": tree}}


def tensor(width: int, dtype: str = "float64") -> dict:
    return {"tensor": {"dtype": dtype, "encoding": "none", "shape": {"dimensions": [str(width)]}}}


IMAGE = {"image": {"dtype": "uint8", "encodingFormat": "jpeg", "shape": {"dimensions": ["64", "64", "3"]}}}
SCALAR = {"tensor": {"dtype": "bool", "encoding": "none", "shape": {}}}


def write_rlds(folder: Path, leaves: dict[str, dict], episodes: list[dict]) -> Path:
    folder.mkdir(parents=True)
    steps = {"sequence": {"feature": nested(leaves), "length": "-1"}}
    metadata = nested({"file_path": {"text": {}}})
    features = {"featuresDict": {"features": {"steps": steps, "episode_metadata": metadata}}}
    (folder / "features.json").write_text(json.dumps(features))
    name = folder.parent.name
    write_shard(folder / f"{name}-train.tfrecord-00000-of-00001", episodes)
    split = {"name": "train", "shardLengths": [str(len(episodes))]}
    (folder / "dataset_info.json").write_text(json.dumps({"splits": [split]}))
    return folder


def test_droid(tmp_path):
    leaves = {
        "observation/exterior_image_1_left": IMAGE,
        "observation/wrist_image_left": IMAGE,
        "observation/joint_position": tensor(7),
        "observation/gripper_position": tensor(1),
        "action_dict/joint_velocity": tensor(7),
        "action_dict/gripper_position": tensor(1),
        "action": tensor(7),
        "language_instruction": {"text": {}},
        "is_terminal": SCALAR,
    }
    episodes = []
    for number, text in enumerate((b"close the lid", b"")):
        frames = [jpeg(frame) for frame in film(8 * number)]
        episodes.append(
            {
                "steps/observation/exterior_image_1_left": frames,
                "steps/observation/wrist_image_left": frames,
                "steps/observation/joint_position": numbers(number, 7),
                "steps/observation/gripper_position": numbers(number + 10, 1),
                "steps/action_dict/joint_velocity": numbers(number + 20, 7),
                "steps/action_dict/gripper_position": numbers(number + 30, 1),
                "steps/action": numbers(number + 40, 7),
                "steps/language_instruction": [text] * STEPS,
                "steps/is_terminal": np.arange(STEPS) == STEPS - 1,
                "episode_metadata/file_path": [b"/droid/success/x.h5"],
            }
        )
    path = write_rlds(tmp_path / "droid" / "1.0.1", leaves, episodes)
    table = converted("droid", path, tmp_path / "out")
    check_frames(table, [*range(STEPS), *range(8, 8 + STEPS)], "image_1", "image_2")
    assert table["image_1"].to_pylist() == [jpeg(f) for f in (*film(0), *film(8))]  # untouched
    for name, (many, one) in {"state": (0, 10), "action": (20, 30)}.items():
        parts = [np.concatenate([numbers(n + many, 7), numbers(n + one, 1)], axis=1) for n in range(2)]
        assert np.array_equal(values(table, name), np.concatenate(parts))
    assert table["prompt"].to_pylist() == ["close the lid"] * STEPS + ["do something useful"] * STEPS
    assert np.flatnonzero(table["is_terminal"]).tolist() == [STEPS - 1, 2 * STEPS - 1]


def test_bridge(tmp_path):
    """The first action is all zero and its step is left out."""
    leaves = {
        "observation/image_0": IMAGE,
        "observation/state": tensor(7),
        "action": tensor(7),
        "language_instruction": {"text": {}},
        "is_terminal": SCALAR,
    }
    action = numbers(1, 7)
    action[0] = 0
    episode = {
        "steps/observation/image_0": [jpeg(frame) for frame in film(0)],
        "steps/observation/state": numbers(0, 7),
        "steps/action": action,
        "steps/language_instruction": [b"put the pot on the stove"] * STEPS,
        "steps/is_terminal": np.zeros(STEPS, bool),
    }
    path = write_rlds(tmp_path / "bridge_dataset" / "1.0.0", leaves, [episode])
    table = converted("bridge", path.parent, tmp_path / "out")
    check_frames(table, list(range(1, STEPS)), "image_1")
    assert np.array_equal(values(table, "action"), action[1:]) and action[1:].any(axis=1).all()
    assert np.array_equal(values(table, "state"), numbers(0, 7)[1:])
    assert table["timestamp"].to_pylist() == pytest.approx((np.arange(STEPS - 1) / 5).tolist())


# --- others -------------------------------------------------------------------------------------------------------


def test_umi(tmp_path):
    path = FORMATS / "zarr" / "umi_tiny.zarr.zip"
    check(
        converted("umi", path, tmp_path / "out", "prompt=text:serve the cup"),
        np.load(FORMATS / "zarr" / "expected_zip.npz"),
        (1, 1),
    )


def rename(table: pa.Table, names: dict[str, str]) -> pa.Table:
    return table.rename_columns([names.get(name, name) for name in table.column_names])


def test_agibot(tmp_path):
    """A LeRobot dataset with any4lerobot's names for AgiBot World."""
    root = Path(shutil.copytree(FIXTURES / "lerobot_v30_image", tmp_path / "agibot"))
    names = {FRONT: "observation.images.head", WRIST: "observation.images.hand_left"}
    names |= {"observation.state": "observation.states.joint.position", "action": "actions.joint.position"}
    info_path = root / "meta" / "info.json"
    info = json.loads(info_path.read_text())
    info["features"] = {names.get(name, name): given for name, given in info["features"].items()}
    info["features"]["observation.images.hand_right"] = info["features"]["observation.images.hand_left"]
    effector = {"dtype": "float32", "shape": [2], "names": None}
    info["features"] |= {"observation.states.effector.position": effector, "actions.effector.position": effector}
    info_path.write_text(json.dumps(info))
    (path,) = (root / "data").rglob("*.parquet")
    original = pq.read_table(path)
    table = rename(original, names)
    table = table.append_column("observation.images.hand_right", table["observation.images.hand_left"])
    count = len(table)
    for seed, name in enumerate(("observation.states.effector.position", "actions.effector.position")):
        table = table.append_column(name, pa.array(numbers(seed, 2, count).tolist(), pa.list_(pa.float32(), 2)))
    pq.write_table(table.replace_schema_metadata(None), path)
    found = converted("agibot", root, tmp_path / "out")
    for seed, (name, key) in enumerate({"state": "observation.state", "action": "action"}.items()):
        stored = np.array(original[key].to_pylist(), np.float32).reshape(count, -1)
        assert np.array_equal(values(found, name), np.concatenate([stored, numbers(seed, 2, count)], axis=1))
    for camera, key in {"image_1": FRONT, "image_2": WRIST, "image_3": WRIST}.items():
        assert found[camera].to_pylist() == [frame["bytes"] for frame in original[key].to_pylist()]
