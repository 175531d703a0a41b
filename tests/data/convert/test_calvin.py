"""CALVIN: steps of their own files, and an annotation that is a pickle and runs nothing."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from data.convert.convert import convert, open_source
from data.convert.episode_writer import ImageEncoding
from data.convert.mapping import read_entries
from data.convert.readers.calvin import read_object_array
from tests.data.convert.test_formats import decode_frame, read
from utils.parquet_utils import DataError

WINDOWS, TEXTS = [(3, 72), (80, 84)], ["open the drawer", "öffne die Schublade"]


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """A split of 90 steps and two annotated windows, in the layout of the dataset's README."""
    folder = tmp_path / "training"
    (folder / "lang_annotations").mkdir(parents=True)
    for number in range(90):
        rng = np.random.default_rng(number)
        np.savez(
            folder / f"episode_{number:07d}.npz",
            rgb_static=rng.integers(0, 256, (20, 20, 3), dtype=np.uint8),
            rgb_gripper=np.full((8, 8, 3), number, np.uint8),
            robot_obs=np.arange(15) + number,
            rel_actions=rng.normal(size=7),
        )
    annotation = {
        "language": {"ann": TEXTS, "task": ["a", "b"], "emb": np.ones((2, 1, 4), np.float32)},
        "info": {"episodes": [], "indx": WINDOWS},
    }
    np.save(folder / "lang_annotations" / "auto_lang_ann.npy", annotation)
    np.save(folder / "ep_start_end_ids.npy", np.array([[0, 59], [60, 89]]))
    return folder


def run(folder: Path, output_dir: Path, *items: str):
    source = open_source("calvin", folder, read_entries("calvin", items))
    return convert(source, output_dir, encoding=ImageEncoding("png"))


def test_windows_with_their_instructions(split, tmp_path):
    assert run(split, tmp_path / "out").rows == 75
    table = read(tmp_path / "out")
    assert table["prompt"].to_pylist() == [TEXTS[0]] * 70 + [TEXTS[1]] * 5
    numbers = [*range(3, 73), *range(80, 85)]
    assert [row[0] for row in table["state"].to_pylist()] == numbers
    wanted = np.random.default_rng(3).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    assert np.array_equal(decode_frame(table["image_1"][0].as_py()), wanted)
    assert [int(decode_frame(frame)[0, 0, 0]) for frame in table["image_2"].to_pylist()] == numbers


def test_recordings_without_instructions(split, tmp_path):
    assert run(split, tmp_path / "out", "windows=episodes", "prompt=text:play").rows == 90
    assert np.flatnonzero(read(tmp_path / "out")["is_last"]).tolist() == [59, 89]
    with pytest.raises(DataError, match="no key 'language'"):
        run(split, tmp_path / "other", "windows=episodes")


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_arrays_alone_are_read(tmp_path, protocol):
    content = {"a": np.arange(6, dtype=">i4").reshape(2, 3), "b": [np.float64(2.5)], "c": np.array(["x", "yy"])}
    if protocol == 2:
        content.pop("c"), content.pop("a"), content.pop("b")  # bytes of protocol 2 need a name that is not NumPy's
        content["d"] = ["text"]
    path = object_array(tmp_path / "x.npy", content, protocol)
    found = read_object_array(path)
    assert found.keys() == content.keys()
    for key, wanted in content.items():
        assert np.array_equal(found[key], wanted)


def object_array(path: Path, content: object, protocol: int = 4) -> Path:
    array = np.empty((), dtype=object)
    array[()] = content
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        pickle.dump(content if protocol == 2 else array, file, protocol=protocol)
    return path


@pytest.mark.parametrize(
    "content",
    [Evil(), {"language": Evil()}, np.array([Evil()], dtype=object), print, {"a": np.random.default_rng(0)}, {1, 2}],
    ids=["call", "nested", "in an array", "function", "generator", "set"],
)
def test_whatever_else_a_pickle_names_is_refused_and_not_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = object_array(tmp_path / "x.npy", content)
    if content == {1, 2}:  # a set has an opcode of its own and names nothing
        assert read_object_array(path) == {1, 2}
        return
    with pytest.raises(DataError, match=r"x.npy: its pickle (names|has) .*nothing of it is run"):
        read_object_array(path)
    assert not Path("executed").exists()


def test_a_forged_type_does_not_make_pointers_of_bytes(tmp_path):
    """An array of objects whose contents are raw bytes would be addresses."""
    array = np.empty(1, dtype=object)
    array[0] = 1
    data = pickle.dumps(array, protocol=2).replace(b"]", b"U\x08AAAAAAAA", 1)
    path = object_array(tmp_path / "x.npy", [0])
    head = path.read_bytes()[: path.read_bytes().index(b"\n") + 1]
    path.write_bytes(head + data)
    with pytest.raises(DataError, match="x.npy: "):
        read_object_array(path)


def test_damaged_splits(split, tmp_path):
    (split / "episode_0000070.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"episode_0000070.npz: not a readable .npz file .*fetch it again"):
        run(split, tmp_path / "out")
    (split / "episode_0000070.npz").unlink()
    with pytest.raises(DataError, match=r"episode_0000070.npz: no such file; the dataset is incomplete"):
        run(split, tmp_path / "out")
    (split / "lang_annotations" / "auto_lang_ann.npy").unlink()
    with pytest.raises(DataError, match=r"auto_lang_ann.npy: no such file; say windows: episodes"):
        run(split, tmp_path / "out")
