"""--overwrite replaces what a converter makes, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

import data.convert.lerobot_export as module
from data.convert.lerobot import convert_lerobot
from data.convert.lerobot_export import Layout, export_lerobot
from tests.data.convert.lerobot_fixtures import CAMERAS, FRONT, bytes_of
from tests.helpers import write_episodes
from utils.parquet_utils import DataError

LAYOUT = Layout(fps=20, cameras={"image_1": FRONT})


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def files(tmp_path):
    return [write_episodes(tmp_path / "demos/a.parquet", [5, 4])]


def test_what_else_lies_in_the_folder_stays(tmp_path, files):
    out = tmp_path / "out"
    export_lerobot(files, out, LAYOUT)
    before = contents(out)
    for name in ("notes.txt", "images/best.png", ".git/HEAD"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("three weeks of work")
    (out / "data/chunk-000/file-009.parquet").write_text("of the dataset that is replaced")
    with pytest.raises(DataError, match="out is there already; choose another --output_dir, or replace it"):
        export_lerobot(files, out, LAYOUT)
    export_lerobot(files, out, LAYOUT, overwrite=True)
    kept = {name: b"three weeks of work" for name in ("notes.txt", "images/best.png", ".git/HEAD")}
    assert contents(out).keys() == before.keys() | kept.keys() and contents(out).items() >= kept.items()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demos", "out"]  # nothing temporary is left


@pytest.mark.parametrize("link", [False, True])
def test_the_files_that_are_read_are_never_replaced(tmp_path, dataset, link):
    root = dataset("v30", "image")
    convert_lerobot(root, root / "ours", CAMERAS)
    files, before = sorted((root / "ours").glob("*.parquet")), contents(root)
    target = root
    if link:
        target = tmp_path / "link"
        target.symlink_to(root)
    with pytest.raises(DataError, match=r"--data_path: \S+episode_000000.parquet lies inside of --output_dir"):
        export_lerobot(files, target, LAYOUT, overwrite=True)
    assert contents(root) == before


def test_a_fault_on_the_way_replaces_nothing(tmp_path, files, monkeypatch):
    out = tmp_path / "out"
    export_lerobot(files, out, LAYOUT)
    before = contents(out)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_json", full)
    message = r"out: not written \(No space left on device, [\d,]+ bytes are free\); make room, or choose another --out"
    with pytest.raises(ValueError, match=message):
        export_lerobot(files, out, LAYOUT, overwrite=True)
    assert contents(out) == before


def test_places_that_cannot_be(tmp_path, files):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"--output_dir \S+file is a file; choose another"):
        export_lerobot(files, tmp_path / "file", LAYOUT, overwrite=True)
    with pytest.raises(ValueError, match=r"file/out: not written \(File exists: \S+file\); make room, or choose"):
        export_lerobot(files, tmp_path / "file/out", LAYOUT)


def test_the_converter_deletes_its_own_files_alone(tmp_path, dataset):
    root, out = dataset("v30", "image"), tmp_path / "out"
    convert_lerobot(root, out, CAMERAS, prompt="go")
    write_episodes(out / "mine.parquet", [3])
    (out / "notes.txt").write_text("three weeks of work")
    before = bytes_of(out)
    with pytest.raises(DataError, match="mine.parquet is not of a conversion and would be mixed"):
        convert_lerobot(root, out, CAMERAS, episodes=["0"], overwrite=True)
    assert bytes_of(out) == before
    (out / "mine.parquet").unlink()
    convert_lerobot(root, out, CAMERAS, episodes=["0"], overwrite=True)
    assert sorted(bytes_of(out)) == ["episode_000000.parquet", "notes.txt"]


@pytest.mark.parametrize("metadata", [{"control_hz": "fast"}, {"control_hz": "[1]"}])
def test_metadata_that_say_nothing(tmp_path, files, metadata):
    pq.write_table(pq.read_table(files[0]).replace_schema_metadata(metadata), files[0])
    with pytest.raises(DataError, match=r"a.parquet: its metadata (are no JSON|say fps is \[1\])"):
        module.read_facts(files)
