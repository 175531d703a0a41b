"""Which files a path stands for, and reading them in batches."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import utils.parquet_utils as module
from utils.parquet_utils import DataError, batches, files_below, open_parquet, resolve_parquet_files


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def names(root: Path, *specs: object) -> list[str]:
    return [Path(path).relative_to(root).as_posix() for path in resolve_parquet_files(list(specs), "--data_path")]


def test_a_folder_stands_for_its_files_in_the_order_of_their_names(tmp_path):
    for name in ("b.parquet", "a/z.parquet", "a-b/a.parquet", "c/d/e.parquet", "notes.txt"):
        touch(tmp_path / name)
    ordered = ["a/z.parquet", "a-b/a.parquet", "b.parquet", "c/d/e.parquet"]
    assert names(tmp_path, tmp_path) == ordered == [p.relative_to(tmp_path).as_posix() for p in sorted_paths(tmp_path)]
    assert names(tmp_path, tmp_path / "c", tmp_path / "b.parquet") == ["c/d/e.parquet", "b.parquet"]


def sorted_paths(root: Path) -> list[Path]:
    return sorted(root.rglob("*.parquet"))


def test_linked_folders_are_read_and_a_link_that_leads_back_is_not_followed(tmp_path):
    touch(tmp_path / "nas/b.parquet")
    touch(tmp_path / "train/a.parquet")
    (tmp_path / "train/linked").symlink_to(tmp_path / "nas")
    (tmp_path / "train/again").symlink_to(tmp_path / "train")
    assert names(tmp_path, tmp_path / "train") == ["train/a.parquet", "train/linked/b.parquet"]
    assert names(tmp_path, str(tmp_path / "train/l*")) == ["train/linked/b.parquet"]


def test_hidden_files_and_folders_are_left_out_and_named(tmp_path, caplog):
    for name in ("good.parquet", ".Trash-1000/files/failed.parquet", "._good.parquet", ".cache/x.txt"):
        touch(tmp_path / name)
    with caplog.at_level(logging.INFO):
        assert names(tmp_path, tmp_path) == ["good.parquet"]
    assert "left out, since its name begins with a dot: " in caplog.text and "and 2 more" in caplog.text
    assert resolve_parquet_files([tmp_path.as_uri()], "k") == [f"{tmp_path.as_uri()}/good.parquet"]
    with pytest.raises(DataError, match="matches no Parquet file"):
        (tmp_path / "good.parquet").unlink()
        resolve_parquet_files(tmp_path, "k")


def test_a_folder_named_like_a_file_is_a_folder(tmp_path):
    touch(tmp_path / "demos/run1.parquet/part-0.parquet")
    touch(tmp_path / "demos/run1.parquet/_SUCCESS")
    for spec in (tmp_path / "demos", tmp_path / "demos/run1.parquet", f"{tmp_path}/demos/*.parquet"):
        assert names(tmp_path, spec) == ["demos/run1.parquet/part-0.parquet"]


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path / "demos/a.parquet")
    for spec in ("~/demos", "~/demos/a.parquet", "~/demos/*.parquet"):
        assert names(tmp_path, spec) == ["demos/a.parquet"]


def test_one_file_under_two_names(tmp_path):
    path = touch(tmp_path / "a/x.parquet")
    (tmp_path / "a/y.parquet").symlink_to(path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(DataError, match=r"--data_path names \S+y.parquet more than once \(as \S+x.parquet too\)"):
        names(tmp_path, tmp_path / "a")
    with pytest.raises(DataError, match="more than once"):
        names(tmp_path, path, tmp_path / "b/x.parquet")


def test_what_is_no_file(tmp_path):
    (tmp_path / "gone.parquet").symlink_to(tmp_path / "nothing")
    for spec in (tmp_path, tmp_path / "gone.parquet"):
        with pytest.raises(DataError, match=r"--data_path: \S+gone.parquet is a link to nothing; remove it"):
            names(tmp_path, spec)
    (tmp_path / "gone.parquet").unlink()
    os.mkfifo(tmp_path / "pipe.parquet")
    with pytest.raises(DataError, match="is no regular file"):
        names(tmp_path, tmp_path)
    with pytest.raises(DataError, match=r"'\S*no\\x00thing' matches no Parquet file"):
        names(tmp_path, f"{tmp_path}/no\0thing")


def test_what_is_there_instead(tmp_path):
    for name in ("raw/a.hdf5", "raw/day/b.hdf5", "raw/notes.txt"):
        touch(tmp_path / name)
    (tmp_path / "empty").mkdir()
    for spec, found in (
        ("raw", r" \(found: 2 \.hdf5, 1 \.txt\)"),
        ("empty", r" \(found: no file at all\)"),
        ("trian", r" \(there is no such file or folder\)"),
        ("tr*", ""),
    ):
        message = rf"--data_path: '\S+' matches no Parquet file{found}; give a file, a folder or a glob, or convert"
        with pytest.raises(DataError, match=message):
            resolve_parquet_files(tmp_path / spec, "--data_path")
    with pytest.raises(DataError, match=r"--hdf5_dir: \S+trian: no such folder; correct the path"):
        files_below(tmp_path / "trian", (".hdf5",), "--hdf5_dir")
    with pytest.raises(DataError, match=r"--hdf5_dir: \S+a.hdf5 is a file; give the folder that it is in"):
        files_below(tmp_path / "raw/a.hdf5", (".hdf5",), "--hdf5_dir")


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    def refuse(path: str):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(module.os, "scandir", refuse)
    with pytest.raises(DataError, match=r"--data_path: \S+ can't be listed \(Permission denied\); make it readable"):
        files_below(tmp_path, (".parquet",), "--data_path")


def test_time_is_linear_in_the_number_of_files(tmp_path):
    for i in range(10_000):
        (tmp_path / f"{i}.parquet").touch()
    started = time.perf_counter()
    assert len(resolve_parquet_files(tmp_path, "k")) == 10_000
    assert time.perf_counter() - started < 5  # quadratic: minutes


def test_batches_of_large_rows_are_short_and_begin_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BYTES_PER_BATCH", 4096)
    frames = [bytes([i % 251]) * 1000 for i in range(100)]
    table = pa.table({"image": pa.array([{"bytes": b} for b in frames]), "n": np.arange(100)})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=30, use_dictionary=False)
    with open_parquet(path) as file:
        for first in (0, 1, 29, 30, 64, 99):
            got = list(batches(file, path, ["image", "n"], 64, first_row=first))
            assert [row for row, _ in got] == (first + np.cumsum([0, *(b.num_rows for _, b in got)])[:-1]).tolist()
            assert max(batch.num_rows for _, batch in got) <= 4
            assert [r["bytes"] for _, b in got for r in b["image"].to_pylist()] == frames[first:]
        assert max(batch.num_rows for _, batch in batches(file, path, ["n"], 64)) == 64


def test_a_struct_whose_batch_pyarrow_cannot_hold_is_read_in_smaller_ones(tmp_path, monkeypatch):
    """As a struct column beyond 2 GB that is small in the file, because its frames repeat."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": np.arange(50)}), path, row_group_size=20)
    whole = module._rows_from

    def limited(file, columns, size, first_row, use_threads):
        for i, batch in enumerate(whole(file, columns, size, first_row, use_threads)):
            if i and size > 4:
                raise pa.ArrowNotImplementedError("Nested data conversions not implemented for chunked array outputs")
            yield batch

    monkeypatch.setattr(module, "_rows_from", limited)
    with open_parquet(path) as file:
        got = [(row, batch["n"].to_pylist()) for row, batch in batches(file, path, ["n"], 16)]
    assert sum((values for _, values in got), []) == list(range(50)) and [row for row, _ in got] == [
        v[0] for _, v in got
    ]


def test_a_column_that_is_there_twice(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["n", "n"]), path)
    with open_parquet(path) as file, pytest.raises(DataError, match="column 'n' is there 2 times; keep one of them"):
        next(batches(file, path, ["n"], 1))
