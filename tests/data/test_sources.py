"""Caches that several processes build at once, no cache at all, and files behind a URI."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

import data.episode_cache as module
from data.episode_store import EpisodeStore
from tests.helpers import write_episodes
from utils.calculate_normalization_stats import calculate_statistics
from utils.parquet_utils import DataError, resolve_parquet_files

OPTIONS = {"state_dim": 4, "per_action_dim": 4, "cameras": ("image_1",)}


def _open_and_sum(path: Path, cache: Path, barrier, results) -> None:
    barrier.wait()
    store = EpisodeStore([path], cache_dir=cache, **OPTIONS)
    results.put((os.stat(store.folder / "meta.json").st_ino, float(store.state.sum())))


def test_processes_that_build_at_once_share_one_cache(tmp_path):
    path = write_episodes(tmp_path / "a.parquet", [40, 40])
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.SimpleQueue()
    arguments = (path, tmp_path / "cache", barrier, results)
    processes = [context.Process(target=_open_and_sum, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    found = {results.get() for _ in processes}
    for process in processes:
        process.join()
    assert len(found) == 1, "all see the very same file"
    left = sorted(p.name for p in (tmp_path / "cache").iterdir() if p.name != "locks")
    assert len(left) == 1 and not left[0].startswith(".")


def test_a_crash_while_building_leaves_nothing_that_counts(tmp_path, monkeypatch):
    path = write_episodes(tmp_path / "a.parquet", [10])
    monkeypatch.setattr(np, "save", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
    full = rf"\S*/cache can't take it \(no space left.*needs about {path.stat().st_size:,} bytes.*set data\.cache_dir"
    with pytest.raises(DataError, match=full):
        EpisodeStore([path], cache_dir=tmp_path / "cache", **OPTIONS)
    monkeypatch.undo()
    assert len(EpisodeStore([path], cache_dir=tmp_path / "cache", **OPTIONS)) == 10


def test_what_a_killed_build_left_is_removed_and_the_cache_reported(tmp_path, caplog):
    path = write_episodes(tmp_path / "a.parquet", [10])
    with caplog.at_level("INFO"):
        folder = EpisodeStore([path], cache_dir=tmp_path / "cache", **OPTIONS).folder
    folder.rename(folder.with_name(f".{folder.name}.x7_q"))  # as after SIGKILL: gigabytes that nothing refers to
    with caplog.at_level("INFO"):
        EpisodeStore([path], cache_dir=tmp_path / "cache", **OPTIONS)
        EpisodeStore([path], cache_dir=tmp_path / "cache", **OPTIONS)
    assert {one.name for one in (tmp_path / "cache").iterdir()} == {folder.name, "locks"}
    assert caplog.text.count(f"episode cache: 0.1 MB at {folder}") == 3


def test_a_folder_that_cannot_be_written(tmp_path):
    path = write_episodes(tmp_path / "a.parquet", [4])
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"episode cache: \S*file/cache can't take it \(.*; .*set data\.cache_dir to"):
        EpisodeStore([path], cache_dir=tmp_path / "file/cache", **OPTIONS)


def test_without_a_cache_nothing_stays(tmp_path):
    path = write_episodes(tmp_path / "a.parquet", [10])
    store = EpisodeStore([path], cache_dir=tmp_path / "cache", keep_cache=False, **OPTIONS)
    folder, encoded = store.folder, pq.read_table(path)["image_1"].to_pylist()
    assert bytes(store.image("image_1", 4)) == encoded[4] and folder.is_dir()
    assert not (tmp_path / "cache").exists()
    other_split = EpisodeStore([path], keep_cache=False, **OPTIONS)
    assert other_split.folder == folder, "built once for the process"
    del store
    assert folder.is_dir()
    del other_split
    assert not folder.exists()
    assert EpisodeStore([path], keep_cache=False, **OPTIONS).folder != folder


@pytest.fixture
def s3(monkeypatch):
    """A moto S3 server on loopback, with one bucket."""
    server_module = pytest.importorskip("moto.server", reason="moto is in requirements-dev.txt")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    options = f"?endpoint_override={host}:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
    filesystem, _ = fs.FileSystem.from_uri(f"s3://robots{options}")
    filesystem.create_dir("robots")
    yield filesystem, options
    server.stop()


def test_files_in_s3(tmp_path, s3):
    filesystem, options = s3
    local = [write_episodes(tmp_path / f"{name}.parquet", [5, 4], seed=seed) for name, seed in (("a", 0), ("b", 9))]
    for path in local:
        with filesystem.open_output_stream(f"robots/demos/{path.name}") as stream:
            stream.write(path.read_bytes())
    uris = resolve_parquet_files(f"s3://robots/demos{options}", "key")
    assert [str(uri).partition("?")[0] for uri in uris] == [
        "s3://robots/demos/a.parquet",
        "s3://robots/demos/b.parquet",
    ]
    assert resolve_parquet_files(f"s3://robots/demos/b*.parquet{options}", "key") == uris[1:]
    assert resolve_parquet_files(f"s3://robots/demos/a.parquet{options}", "key") == uris[:1]

    remote = EpisodeStore(uris, cache_dir=tmp_path / "remote", **OPTIONS)
    plain = EpisodeStore(local, cache_dir=tmp_path / "local", **OPTIONS)
    np.testing.assert_array_equal(remote.action, plain.action)
    assert all(bytes(remote.image("image_1", i)) == bytes(plain.image("image_1", i)) for i in range(18))
    assert "s3://robots/demos/b.parquet" in remote.describe(12) and "row 3" in remote.describe(12)
    assert calculate_statistics(uris, 4, 4)["action"] == calculate_statistics(local, 4, 4)["action"]

    with pytest.raises(DataError, match="matches no Parquet file"):
        resolve_parquet_files(f"s3://robots/nothing{options}", "key")
    with pytest.raises(DataError, match="key: s3://elsewhere/x can't be listed|matches no Parquet file"):
        resolve_parquet_files(f"s3://elsewhere/x{options}", "key")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("name", ["images.arrow", "state.npy", "action.npy", "episode_starts.npy", "meta.json"])
@pytest.mark.parametrize("damage", [Path.unlink, cut, lambda path: path.write_bytes(b"")])
def test_a_cache_of_which_parts_are_gone_is_made_again(tmp_path, name, damage):
    """As after a cleaner of old files, or a copy that was cut short."""
    path = write_episodes(tmp_path / "a.parquet", [10, 4])
    first = EpisodeStore([path], cache_dir=tmp_path / "cache", **OPTIONS)
    state, image = np.array(first.state), bytes(first.image("image_1", 12))
    damage(first.folder / name)
    again = EpisodeStore([path], cache_dir=tmp_path / "cache", **OPTIONS)
    assert again.folder == first.folder
    np.testing.assert_array_equal(again.state, state)
    assert bytes(again.image("image_1", 12)) == image
    left = {p.name for p in (tmp_path / "cache").iterdir()}
    assert left == {"locks", first.folder.name}


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    path = write_episodes(tmp_path / "a.parquet", [10])

    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(module.fcntl, "flock", no_locks)
    store = EpisodeStore([path], cache_dir=tmp_path / "cache", **OPTIONS)
    assert len(store) == 10
    assert "can't be locked (Function not implemented)" in caplog.text and "-o flock" in caplog.text
    # another process was faster: its cache is kept
    inode = (store.folder / "meta.json").stat().st_ino
    module._build([path], store._spec, store.folder, alone=False)
    assert (store.folder / "meta.json").stat().st_ino == inode
    assert {p.name for p in (tmp_path / "cache").iterdir()} == {"locks", store.folder.name}
