"""LeRobot datasets read in place: the same samples as from their lossless conversion, and the converter's errors."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from data.convert.lerobot_export import Layout, export_lerobot
from data.convert.video import VideoEncoding
from data.dataset import VLADataset
from data.episode_store import EpisodeStore
from data.lerobot_table import LeRobotTable
from data.loader import make_loader
from data.processing import PromptTokenizer, VLAImageProcessor
from data.sampler import StepBatchSampler
from data.schema import vector_names
from data.statistics import calculate_statistics
from data.tables import open_table
from model.tiny.paligemma import make_tiny_paligemma
from tests.data.convert.lerobot_fixtures import (
    CAMERAS,
    DATASETS,
    FIXTURES,
    FRONT,
    WRIST,
    edit_info,
    edit_table,
    reference,
    replaced,
    video_files,
)
from utils.config_data import DataConfig, LeRobotConfig, MixtureEntry
from utils.config_reader import ConfigError
from utils.parquet_utils import DataError, resolve_parquet_files
from utils.recordings import LeRobotFolder, fingerprint, resolve_recordings

OPTIONS = {"state_dim": 7, "per_action_dim": 7}
MAPPING = LeRobotConfig(cameras=tuple(CAMERAS))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tiny_paligemma(folder, prompts=["put the cube into the box"])
    return PromptTokenizer.from_pretrained(str(folder), 48)


def source(version, kind):
    return FIXTURES / f"lerobot_{version}_{kind}"


def folder(root, **mapping):
    return LeRobotFolder(root, LeRobotConfig(**{"cameras": tuple(CAMERAS), **mapping}))


def open_store(recording, tmp_path, cameras=("image_1", "image_2")):
    return EpisodeStore([recording], **OPTIONS, cameras=cameras, cache_dir=tmp_path / "cache")


def open_dataset(recordings, tmp_path, tokenizer, max_seq_len=1, size=96, fit="stretch", **options):
    return VLADataset(
        recordings,
        DataConfig(state_dim=7, max_seq_len=max_seq_len, cache_dir=str(tmp_path / "cache"), **options),
        horizon=5,
        per_action_dim=7,
        cameras=("image_1", "image_2"),
        image_processor=VLAImageProcessor(size, size, (0.5,) * 3, (0.5,) * 3, 3, fit),
        prompt_tokenizer=tokenizer,
    )


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for key in one:
        same = torch.equal(one[key], other[key]) if torch.is_tensor(one[key]) else one[key] == other[key]
        assert same, key


@pytest.mark.parametrize("fit", ["stretch", "pad", "pad_bytes"])
@pytest.mark.parametrize(("version", "kind"), DATASETS)
def test_batches_are_those_of_the_lossless_conversion(converted, tmp_path, tokenizer, version, kind, fit):
    files = resolve_parquet_files(str(converted[version, kind]), "--x")
    for max_seq_len, size in ((1, 96), (3, 64)):
        options = {"max_seq_len": max_seq_len, "size": size, "fit": fit}
        plain = open_dataset(files, tmp_path, tokenizer, **options)
        in_place = open_dataset([folder(source(version, kind))], tmp_path, tokenizer, **options)
        assert len(plain) == len(in_place) == 189
        assert plain.store.prompts == in_place.store.prompts
        order = np.random.default_rng(1).permutation(189)
        for rows in (order[:48], np.arange(40, 0, -1), np.arange(180, 189)):
            assert_equal(plain.batch(rows), in_place.batch(rows))


@pytest.mark.parametrize("version", ["v21", "v30"])
def test_training_batches_with_workers_are_the_same(converted, tmp_path, tokenizer, version):
    """The stream of a training run, seed for seed, with forked workers."""
    files = resolve_parquet_files(str(converted[version, "video"]), "--x")
    streams = []
    for recordings in (files, [folder(source(version, "video"))]):
        dataset = open_dataset(recordings, tmp_path, tokenizer, val_fraction=0.2)
        sampler = StepBatchSampler(len(dataset), 16, seed=3)
        streams.append(iter(make_loader(dataset, num_workers=2, batch_sampler=sampler, seed=3)))
    for _ in range(6):
        assert_equal(next(streams[0]), next(streams[1]))


def test_spawned_workers_read_the_same_frames(tmp_path):
    store = open_store(folder(source("v30", "video")), tmp_path)
    wanted = [store.image("image_1", row).tobytes() for row in range(0, 189, 20)]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_frames_of, (store, list(range(0, 189, 20)))) == wanted


def _frames_of(store, rows):
    return [store.image("image_1", row).tobytes() for row in rows]


def test_frames_are_what_lerobot_itself_reads(tmp_path):
    store, wanted = open_store(folder(source("v30", "video")), tmp_path), reference("video")
    assert np.array_equal(store.state, wanted["state"]) and np.array_equal(store.action, wanted["action"])
    for i, row in enumerate(wanted["frame_index"].tolist()):
        assert np.array_equal(store.image("image_1", row), wanted["front"][i])
        assert np.array_equal(store.image("image_2", row), wanted["wrist"][i])
    episodes = np.repeat(np.arange(store.num_episodes), np.diff(store.episode_starts))
    assert np.array_equal(episodes, wanted["episode_index"])
    assert [store.prompt(row) for row in range(len(store))] == wanted["task"].tolist()


def test_the_cache_holds_packets_and_no_frames(tmp_path):
    store = open_store(folder(source("v30", "video")), tmp_path)
    videos = sum(path.stat().st_size for feature in (FRONT, WRIST) for path in video_files("v30", feature))
    assert (store.folder / "packets.bin").stat().st_size < videos
    store.image("image_1", 50)
    opened = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    assert not any(path.endswith(".mp4") for path in opened), "no video stays open"


def test_key_frames_far_apart_are_named(converted, tmp_path, caplog):
    """Of 44 frames with one key frame, a random one takes decoding of 22; a key frame every second frame takes 1.5."""
    files = sorted(converted["v30", "video"].glob("*.parquet"))
    for gop in (2, 60):
        root, encoding = tmp_path / str(gop), VideoEncoding("h264", 23, gop=gop, preset="veryfast")
        export_lerobot(files, root, Layout(20, {"image_1": FRONT}, video=encoding))
        caplog.clear()
        open_store(LeRobotFolder(root, LeRobotConfig()), tmp_path, ("image_1",))
        assert ("packets are decoded for each frame" in caplog.text) == (gop == 60)


def test_a_cache_is_shared_and_a_changed_video_is_noticed(dataset, tmp_path):
    root = dataset("v30", "video")
    first, again = open_store(folder(root), tmp_path), open_store(folder(root), tmp_path)
    assert first.folder == again.folder
    video = sorted((root / "videos").rglob("*.mp4"))[0]
    os.utime(video, ns=(1, 1))
    assert open_store(folder(root), tmp_path).folder != first.folder
    other = open_store(folder(root, prompt="stack"), tmp_path)
    assert other.prompts == ["stack"] and other.folder != first.folder


@pytest.mark.parametrize("name", ["packets.bin", "video_rows.npy", "packet_starts.npy", "packet_checksums.npy"])
def test_damage_of_the_cache_is_mended(tmp_path, caplog, name):
    store = open_store(folder(source("v30", "video")), tmp_path)
    wanted = [store.image("image_1", row).tobytes() for row in range(189)]
    content = bytearray((store.folder / name).read_bytes())
    content[len(content) * 2 // 3] ^= 4
    (store.folder / name).write_bytes(content)
    again = open_store(folder(source("v30", "video")), tmp_path)
    assert [again.image("image_1", row).tobytes() for row in range(189)] == wanted
    for row in range(189):  # the changed packet may be the other camera's
        again.image("image_2", row)
    assert "is damaged" in caplog.text and "it is built again" in caplog.text


@pytest.mark.parametrize(("version", "kind"), [("v21", "image"), ("v30", "video")])
def test_statistics_are_those_of_the_conversion(converted, version, kind):
    files = resolve_parquet_files(str(converted[version, kind]), "--x")
    options = {"name": "x", "val_fraction": 0.3, "action_mode": "delta", "horizon": 4}
    plain = calculate_statistics(files, 7, 7, **options)
    in_place = calculate_statistics([folder(source(version, kind))], 7, 7, **options)
    assert plain["state"] == in_place["state"] and plain["action"] == in_place["action"]
    assert in_place["files"] == [f"lerobot:{source(version, kind)}"] and in_place["rows"] == 189
    assert 0 < in_place["bytes_read"] < in_place["file_bytes"]


def test_one_list_may_mix_both(converted, tmp_path, tokenizer):
    files = resolve_parquet_files(str(converted["v30", "image"]), "--x")
    both = open_dataset([*files, folder(source("v30", "video"))], tmp_path, tokenizer)
    assert len(both) == 378 and both.store.num_episodes == 12
    video = open_dataset([folder(source("v30", "video"))], tmp_path, tokenizer)
    assert torch.equal(both.batch([189 + 70])["image_2"], video.batch([70])["image_2"])
    assert both.describe(189 + 50) == f"lerobot:{source('v30', 'video')} row 50 (episode 8, step 2)"


def test_values_are_called_as_the_dataset_says():
    with open_table(folder(source("v30", "image"))) as table:
        assert vector_names(table.schema.metadata, "action", 7) == [f"a{d}" for d in range(7)]


def test_names_of_cameras(tmp_path, dataset):
    by_name = open_store(LeRobotFolder(source("v30", "video"), LeRobotConfig()), tmp_path, ("wrist", "front"))
    mapped = open_store(folder(source("v30", "video")), tmp_path)
    assert np.array_equal(by_name.image("wrist", 9), mapped.image("image_2", 9))
    one = LeRobotConfig(cameras=(f"{WRIST}=image_1",))
    store = open_store(LeRobotFolder(source("v30", "video"), one), tmp_path, ("image_1",))
    assert np.array_equal(store.image("image_1", 9), mapped.image("image_2", 9)) and not store.has_camera("image_2")
    with pytest.raises(DataError, match=f"no camera is called image_1 .*{FRONT}, {WRIST}.*data.lerobot.*cameras: "):
        open_store(LeRobotFolder(source("v30", "video"), LeRobotConfig()), tmp_path)
    root = dataset("v21", "image")
    info = json.loads((root / "meta/info.json").read_text())
    del info["features"][WRIST]
    edit_info(root, features=info["features"])
    only = open_store(LeRobotFolder(root, LeRobotConfig()), tmp_path, ("image_1",))
    assert bytes(only.image("image_1", 3)), "the only camera is the main one"


def test_a_path_with_settings(tmp_path):
    root = source("v30", "video")
    text = f"lerobot:{root}?cameras={FRONT}=image_1,{WRIST}=image_2&episodes=0,3-4&prompt=pick%20it&tolerance_s=1e-3"
    (found,) = resolve_recordings(text, "--data_path", LeRobotConfig(follow_links=True))
    wanted = LeRobotConfig(
        cameras=tuple(CAMERAS), episodes=("0", "3-4"), prompt="pick it", tolerance_s=1e-3, follow_links=True
    )
    assert found == LeRobotFolder(root, wanted)
    store = open_store(found, tmp_path)
    assert store.prompts == ["pick it"] and np.diff(store.episode_starts).tolist() == [31, 25, 60]
    with pytest.raises(DataError, match=r"--data_path: .*unknown key lerobot.camera; did you mean lerobot.cameras\?"):
        resolve_recordings(f"lerobot:{root}?camera=x", "--data_path")
    with pytest.raises(DataError, match="lerobot.tolerance_s is 'soon'"):
        resolve_recordings(f"lerobot:{root}?tolerance_s=soon", "--data_path")


def test_paths(tmp_path, monkeypatch):
    root = source("v30", "image")
    link = tmp_path / "link"
    link.symlink_to(root)
    with pytest.raises(DataError, match="--x names lerobot:.* more than once"):
        resolve_recordings([f"lerobot:{root}", f"lerobot:{link}"], "--x")
    with pytest.raises(DataError, match=r"--x: \S+ is a LeRobot dataset .*; write lerobot:\S+ to read it as it is, or"):
        resolve_recordings([tmp_path, root], "--x")
    with pytest.raises(DataError, match="--x: lerobot:/nowhere: no such folder; give a LeRobot dataset's, or owner/na"):
        resolve_recordings("lerobot:/nowhere", "--x")
    with pytest.raises(DataError, match="info.json: No such file.*wanted the folder of a LeRobot dataset"):
        LeRobotTable(*resolve_recordings(f"lerobot:{tmp_path}", "--x"))
    monkeypatch.chdir(root.parent)
    assert resolve_recordings(f"lerobot:{root.name}", "--x")[0].root.is_dir()


def test_commands_that_take_parquet_files_alone():
    with pytest.raises(
        DataError, match="--data_path: lerobot:x is a LeRobot dataset, and Parquet files are wanted here"
    ):
        resolve_parquet_files("lerobot:x", "--data_path")


def test_a_dataset_of_the_hub(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    asked = []

    def download(repository, **options):
        asked.append((repository, options))
        return str(source("v30", "video"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (found,) = resolve_recordings("lerobot:team/cubes@v1.2?episodes=0", "--x", MAPPING)
    assert found.root == source("v30", "video") and found.mapping.follow_links and found.mapping.episodes == ("0",)
    patterns = ["meta/**", "data/**", "videos/**"]
    assert asked == [("team/cubes", {"repo_type": "dataset", "revision": "v1.2", "allow_patterns": patterns})]
    assert "team/cubes is at" in caplog.text


@pytest.mark.parametrize("name", ["team/cubes", "team/cubes@main"])
def test_a_hub_that_is_not_reached(monkeypatch, tmp_path, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="lerobot:team/cubes: no such folder, nor could it be downloaded") as caught:
        resolve_recordings(f"lerobot:{name}", "--train_data_override")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 420


def change_timestamps(root, change):
    for path in sorted((root / "data").rglob("*.parquet")):
        edit_table(path, lambda table: replaced(table, "timestamp", change(table["timestamp"].to_numpy())))


def slow_clock(root):
    change_timestamps(root, lambda t: (t * 1.001).astype(np.float32))


def wrong_rate(root):
    edit_info(root, fps=50)


def fewer_frames(root):
    path = sorted((root / "meta/episodes").rglob("*.parquet"))[0]
    name = f"videos/{FRONT}/to_timestamp"
    edit_table(path, lambda table: replaced(table, name, [v - 0.5 for v in table[name].to_pylist()]))


def missing_video(root):
    sorted((root / "videos" / FRONT).rglob("*.mp4"))[0].unlink()


def short_video(root):
    path = sorted((root / "videos" / FRONT).rglob("*.mp4"))[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def depth(root):
    info = json.loads((root / "meta/info.json").read_text())
    info["features"][FRONT]["info"] = {"is_depth_map": True}
    edit_info(root, features=info["features"])


def row_lost(root):
    path = sorted((root / "data").rglob("*.parquet"))[0]
    edit_table(path, lambda table: table.slice(0, len(table) - 1))


def links(root):
    path = sorted((root / "videos" / FRONT).rglob("*.mp4"))[0]
    shutil.move(path, root.parent / "elsewhere.mp4")
    path.symlink_to(root.parent / "elsewhere.mp4")


FAULTS = {
    slow_clock: r"episode 0 frame \d+: .* has no frame within .*raise lerobot.tolerance_s",
    wrong_rate: "info.json says 50 frames per second, the rows' time stamps 20; correct fps there",
    fewer_frames: r"has \d+ frames .* for 31 rows; .*leave that episode out \(lerobot.episodes\)",
    missing_video: "no such video file; the source is incomplete",
    short_video: "not a readable video file|its first frame can't be decoded|damaged",
    depth: "is a depth map .*which is not read; choose a camera of colour images",
    row_lost: "has 11 rows of it, meta/episodes says 12; fetch the dataset again",
    links: "leads to a file outside of that folder; give lerobot.follow_links if you trust it",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_contradictions_are_found_when_the_cache_is_built(dataset, tmp_path, fault):
    root = dataset("v30", "video")
    fault(root)
    with pytest.raises(DataError, match=FAULTS[fault]) as caught:
        open_store(folder(root), tmp_path)
    assert "--" not in str(caught.value), "flags of the converter have no meaning here"
    assert not list((tmp_path / "cache").glob("*/meta.json"))


def test_settings_that_do_not_fit(tmp_path):
    root = source("v30", "video")
    cases = {
        "no camera 'observation.images.frnt' .*did you mean 'observation.images.front'": {
            "cameras": ("observation.images.frnt=image_1",)
        },
        "lerobot.cameras 'front': wanted <camera>=<column>": {"cameras": ("front",)},
        "is given twice": {"cameras": (f"{FRONT}=image_1", f"{WRIST}=image_1")},
        "no feature 'observation.stat'.*did you mean 'observation.state'": {"state_key": ("observation.stat",)},
        "no feature 'task'": {"task_key": "task"},
        "lerobot.episodes: .* has no episode 9": {"episodes": ("9",)},
        "lerobot.tolerance_s is 0.1; wanted less than half a frame": {"tolerance_s": 0.1},
    }
    for message, mapping in cases.items():
        with pytest.raises(DataError, match=message):
            LeRobotTable(folder(root, **mapping))


def test_settings_that_do_nothing():
    with pytest.raises(ConfigError, match="data.lerobot says how lerobot:/path is read, but no data path begins so"):
        DataConfig(train_parquet_files=("demos",), lerobot=MAPPING)
    with pytest.raises(ConfigError, match="data.mixture a: lerobot says how lerobot:/path is read, but its path"):
        DataConfig(mixture=(MixtureEntry(path=("demos",), name="a", lerobot=MAPPING),))
    with pytest.raises(ConfigError, match="lerobot.empty_prompt does nothing; remove it"):
        LeRobotConfig(prompt="a", empty_prompt="b")
    with pytest.raises(ConfigError, match="lerobot.prompt is ' '; give an instruction"):
        LeRobotConfig(prompt=" ")
    assert DataConfig(train_parquet_files=("lerobot:a",), lerobot=MAPPING).lerobot == MAPPING


def test_a_groot_dataset_is_not_read_by_guess(dataset, tmp_path):
    root = dataset("v21", "video")
    (root / "meta/modality.json").write_text("{}")
    with pytest.raises(DataError, match=r"GR00T dataset.*python scripts/convert.py --from lerobot .* --preset groot"):
        LeRobotTable(folder(root))
    assert LeRobotTable(folder(root, task_key="task_index")).num_rows == 189
    assert LeRobotTable(folder(root, prompt="stack")).num_rows == 189


def test_a_changed_mapping_or_file_is_another_recording(dataset):
    root = dataset("v21", "video")
    first = fingerprint(folder(root))
    assert fingerprint(folder(root)) == first and first[0] == f"lerobot:{root.resolve()}"
    assert fingerprint(folder(root, prompt="x")) != first
    video = sorted((root / "videos").rglob("*.mp4"))[-1]
    video.write_bytes(video.read_bytes() + b"\0")
    assert fingerprint(folder(root)) != first


def test_task_key_and_empty_prompt(dataset, tmp_path):
    root = dataset("v21", "image")
    tasks = [json.loads(line) for line in (root / "meta/tasks.jsonl").read_text().splitlines()]
    for path in sorted((root / "data").rglob("*.parquet")):
        table = pq.read_table(path)
        pq.write_table(table.append_column("annotation.task", [[1] * len(table)]), path)
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["annotation.task"] = {"dtype": "int64", "shape": [1], "names": None}
    edit_info(root, features=info["features"])
    assert open_store(folder(root, task_key="annotation.task"), tmp_path).prompts == [tasks[1]["task"]]


@pytest.mark.parametrize("version", ["v21", "v30"])
def test_the_doctor_reads_it_too(version):
    from data.doctor.examine import examine

    seen = examine([folder(source(version, "video"))], num_workers=0)
    plain = seen.to_dict()
    assert seen.may_train, plain["findings"]
    about = plain["datasets"]["train"]
    assert about["episodes"] == 6 and about["steps"] == 189 and about["rate_hz"] == pytest.approx(20, abs=0.1)
    assert about["cameras"]["image_1"] == {"files": 1, "frames": 189, "sizes": {"96x96 video": 189}}
    assert about["files"][0]["bytes"] > 10_000


def test_the_doctor_goes_on_after_a_fault(dataset):
    from data.doctor.examine import examine

    root = dataset("v30", "video")
    slow_clock(root)
    seen = examine([folder(root)], num_workers=0)
    kinds = {finding.kind for finding in seen.findings.listed}
    assert "corrupt_data" in kinds and not seen.may_train
    missing = dataset("v21", "video")
    (missing / "meta/info.json").unlink()
    seen = examine([folder(missing)], num_workers=0)
    assert [finding.kind for finding in seen.findings.listed] == ["unreadable_file"]
