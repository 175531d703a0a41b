"""A server that records: episodes as training data, apart from each other, whole or absent, and never in the way."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from vla_client import PolicyClient

from data.convert import served
from data.convert.episode_writer import ImageEncoding
from data.convert.served import FULL, OLDEST, SERVED, FolderFullError, ServedEpisode, ServedFolder, start_writer, work
from data.loader import VLADataset
from data.processing import processors_from_config
from inference.predictor import VLAPredictor
from inference.serving import recording
from inference.serving.recording import Recorder
from scripts import serve_policy
from tests.helpers import write_episodes
from tests.inference.checkpoints import train_tiny
from tests.inference.serving.servers import running
from utils.misc import DiskFullError, WriteError

FLOW = Path(__file__).resolve().parents[2] / "fixtures/policies/flow.pth.tar"


@pytest.fixture(scope="module")
def predictor(tmp_path_factory, tiny_paligemma_dir):
    folder = tmp_path_factory.mktemp("run")
    demos = write_episodes(folder / "demos.parquet", [6, 5])
    return VLAPredictor.from_checkpoint(train_tiny(folder, tiny_paligemma_dir, [demos]), device="cpu")


def folder_at(path, max_bytes=10**9, when_full=FULL):
    return ServedFolder(path, {"policy": "tiny"}, ImageEncoding("png"), max_bytes, when_full)


@contextlib.contextmanager
def recorder_to(folder):
    """A recorder whose writer is a thread of this process."""
    folder.prepare()
    ours, theirs = Pipe()
    thread = threading.Thread(target=work, args=(theirs, folder))
    thread.start()
    recorder = Recorder(ours)
    try:
        yield recorder
    finally:
        recorder.close()
        thread.join(20)
        assert not thread.is_alive()
        theirs.close()
        recorder._threads[1].join(20)  # the last reports, which still come
        assert not recorder._threads[1].is_alive()


def observation(number, prompt="open the window"):
    rng = np.random.default_rng(number)
    return {
        "observation/image": rng.integers(0, 256, (40, 48, 3), dtype=np.uint8),
        "observation/state": rng.normal(size=4).astype(np.float32),
        "prompt": prompt,
        "seed": 1000 + number,
    }


def rows_of(path):
    return pq.read_table(path).to_pydict()


def test_episodes_of_several_connections_are_kept_apart_as_they_were(predictor, tmp_path):
    folder = folder_at(tmp_path / "sessions")
    plans = {}
    with recorder_to(folder) as recorder, running(predictor, recorder=recorder) as server:
        with PolicyClient(port=server.port) as first, PolicyClient(port=server.port) as second:
            for number in range(6):
                for client, offset, prompt in ((first, 0, "open the window"), (second, 100, "close the door")):
                    asked = observation(offset + number, prompt)
                    plans[asked["seed"]] = client.predict(asked, reset=number in (0, 4))
    files = folder.files()
    assert [len(rows_of(path)["prompt"]) for path in files] == [4, 4, 2, 2] and not list(folder.path.glob(".*"))
    for path in files:
        rows = rows_of(path)
        assert len(set(rows["prompt"])) == 1 and rows["is_first"][0] and rows["is_last"][-1]
        for i, seed in enumerate(rows["noise_seed"]):
            asked = observation(seed - 1000)
            frame = np.asarray(Image.open(io.BytesIO(rows["image_1"][i])))
            np.testing.assert_array_equal(frame, asked["observation/image"])
            np.testing.assert_array_equal(np.float32(rows["state"][i]), asked["observation/state"])
            np.testing.assert_array_equal(np.float32(rows["plan"][i]).reshape(4, 4), plans[seed])
            np.testing.assert_array_equal(np.float32(rows["action"][i]), plans[seed][0])
        metadata = pq.read_schema(path).metadata
        assert json.loads(metadata[SERVED.encode()]) == {"policy": "tiny"} and float(metadata[b"request_hz"]) > 0


def test_encoded_frames_stay_as_they_are_and_the_episode_can_be_trained_on(predictor, tmp_path):
    folder, frame = folder_at(tmp_path), ImageEncoding(jpeg_quality=50)(observation(0)["observation/image"])
    with recorder_to(folder) as recorder, running(predictor, recorder=recorder) as server:
        with PolicyClient(port=server.port) as client:
            for number in range(3):
                client.predict({**observation(number), "observation/image": frame})
    (path,) = folder.files()
    assert rows_of(path)["image_1"] == [frame] * 3
    config = predictor.config
    dataset = VLADataset(
        [path],
        config.data,
        horizon=config.model.action_head_config.horizon,
        per_action_dim=4,
        cameras=config.cameras,
        reads_state=True,
        image_processor=processors_from_config(config)[0],
        prompt_tokenizer=predictor.prompt_tokenizer,
    )
    assert len(dataset) == 3 and dataset[0]["action"].shape == (4, 4)


def test_a_writer_that_hangs_slows_nobody_and_is_said_once(predictor, monkeypatch, caplog):
    monkeypatch.setattr(recording, "MAX_WAITING", 5)
    ours, theirs = Pipe()
    recorder = Recorder(ours)
    big = observation(0) | {"observation/image": np.zeros((600, 600, 3), np.uint8)}  # more than a pipe holds
    with running(predictor, recorder=recorder) as server, PolicyClient(port=server.port) as client:
        told, began = [], time.perf_counter()
        for _ in range(20):
            client.predict(big)
            told += [text for text in client.warnings if "recording" in text]
        assert time.perf_counter() - began < 10
        url = f"http://127.0.0.1:{server.port}/metrics"
        metrics = urllib.request.urlopen(url).read().decode()
    assert len(told) == 1 and "can't keep up" in told[0]
    assert recorder.lost >= 10 and float(re.search(r"^vla_recording_lost_steps (\S+)", metrics, re.M)[1]) >= 10
    assert "vla_recording_trouble 1.0" in metrics
    assert sum("can't keep up" in record.message for record in caplog.records if "recording" in record.name) == 1
    theirs.close()
    recorder.close()


def test_steps_that_were_left_out_cut_the_episode(tmp_path, monkeypatch):
    monkeypatch.setattr(recording, "MAX_WAITING_BYTES", 100)
    folder = folder_at(tmp_path)
    plan, state = np.zeros((4, 2), np.float32), np.zeros(3, np.float32)
    with recorder_to(folder) as recorder:
        for number in range(4):
            size = 11 if number == 2 else 5  # the third one is too large
            recorder.add(7, {"image_1": np.zeros((size, size, 3), np.uint8)}, state, "go", plan, number, False)
            deadline = time.monotonic() + 10
            while recorder._bytes and time.monotonic() < deadline:
                time.sleep(0.005)
    assert [rows_of(path)["noise_seed"] for path in folder.files()] == [[0, 1], [3]] and recorder.lost == 1


def episode(name, number=0, steps=3, value=0.0):
    result = ServedEpisode(f"served_{name}", {"image_1": []})
    for i in range(steps):
        plan = np.full((2, 2), value, np.float32)
        step = {"state": np.zeros(2, np.float32), "plan": plan, "prompt": "go", "seed": i, "seconds": i / 10}
        result.add({"image_1": bytes(ImageEncoding("png")(np.full((8, 8, 3), number, np.uint8)))}, step)
    return result


def test_a_folder_at_its_limit_keeps_the_oldest_or_makes_room(tmp_path):
    kept = folder_at(tmp_path / "kept", max_bytes=15_000)
    kept.prepare()
    with pytest.raises(FolderFullError, match=r"--record_max_mb allows 15,000: nothing more is recorded; raise it"):
        for number in range(20):
            kept.write(episode(f"{number:02d}"))
    assert kept.files()[0].name == "served_00.parquet" and 1 <= len(kept.files()) < 20
    moving = folder_at(tmp_path / "moving", max_bytes=15_000, when_full=OLDEST)
    moving.prepare()
    for number in range(20):
        moving.write(episode(f"{number:02d}"))
    assert moving.files()[-1].name == "served_19.parquet" and len(moving.files()) == len(kept.files())


def test_a_full_disk_is_said_and_recording_goes_on_when_there_is_room(tmp_path, monkeypatch, caplog):
    folder, plan = folder_at(tmp_path), np.zeros((2, 2), np.float32)
    real, full = pq.ParquetWriter.write_table, threading.Event()

    def write(self, *arguments, **options):
        if full.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *arguments, **options)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", write)
    with recorder_to(folder) as recorder:

        def one_episode():
            before = recorder.written + recorder.lost
            recorder.add(1, {"image_1": np.zeros((8, 8, 3), np.uint8)}, plan[0], "go", plan, 0, True)
            recorder.end(1)
            deadline = time.monotonic() + 10
            while recorder.written + recorder.lost == before and time.monotonic() < deadline:
                time.sleep(0.005)

        full.set()
        one_episode()
        one_episode()
        assert "not written (No space left on device" in recorder.trouble and recorder.lost == 2
        full.clear()
        one_episode()
        assert recorder.trouble is None and recorder.written == 1
    said = [record.message for record in caplog.records if record.name.endswith("recording")]
    assert len(said) == 2 and "No space left" in said[0] and said[1] == "recording: episodes are written again"
    assert len(folder.files()) == 1 and not list(tmp_path.glob(".*"))


def test_the_oldest_go_where_the_disk_itself_is_full(tmp_path, monkeypatch):
    folder = folder_at(tmp_path, when_full=OLDEST)
    for number in range(3):
        folder.write(episode(f"{number}"))
    real = pq.ParquetWriter.write_table

    def write(self, *arguments, **options):
        if len(folder.files()) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *arguments, **options)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", write)
    folder.write(episode("3"))
    assert [path.name for path in folder.files()] == ["served_2.parquet", "served_3.parquet"]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EFBIG, errno.EACCES])
def test_no_recording_goes_where_that_makes_no_room(tmp_path, monkeypatch, number):
    folder = folder_at(tmp_path, when_full=OLDEST)
    for name in "012":
        folder.write(episode(name))

    def write(*_, **__):
        raise OSError(number, "no")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", write)
    with pytest.raises(WriteError, match=os.strerror(number)):
        folder.write(episode("3"))
    assert len(folder.files()) == 3


def test_an_episode_that_no_room_is_enough_for_costs_no_other(tmp_path, monkeypatch):
    folder = folder_at(tmp_path, max_bytes=15_000, when_full=OLDEST)
    folder.write(episode("0"))
    large = episode("1")
    large.size = 15_001
    with pytest.raises(FolderFullError, match="15,001 bytes, and --record_max_mb allows 15,000 for all of them"):
        folder.write(large)
    monkeypatch.setattr(pq.ParquetWriter, "write_table", no_space)
    monkeypatch.setattr(served.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    large.size = 10_000  # more than the disk has with the other removed
    with pytest.raises(DiskFullError, match="No space left on device, 10 bytes are free"):
        folder.write(large)
    assert len(folder.files()) == 1


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_oldest_that_can_not_be_removed_ends_no_writer(tmp_path, monkeypatch):
    folder, plan, remove = (
        folder_at(tmp_path, max_bytes=7_000, when_full=OLDEST),
        np.zeros((2, 2), np.float32),
        Path.unlink,
    )

    def unlink(self, missing_ok=False):
        if self.suffix == ".parquet":
            raise PermissionError(errno.EACCES, "Permission denied")
        remove(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    with recorder_to(folder) as recorder:
        for number in range(4):
            recorder.add(1, {"image_1": np.zeros((8, 8, 3), np.uint8)}, plan[0], "go", plan, number, True)
    assert recorder.written >= 1 and recorder.lost >= 1 and recorder.written + recorder.lost == 4
    assert "Permission denied); served_" in recorder.trouble and "can't be removed to make room" in recorder.trouble


def test_what_another_server_is_writing_stays(tmp_path):
    fresh, left = (tmp_path / f".served_{name}.parquet.tmp" for name in ("fresh", "left"))
    for path in (fresh, left):
        path.write_bytes(b"PAR1")
    os.utime(left, (time.time() - 2 * served.LEFT_AFTER_S,) * 2)
    folder_at(tmp_path).prepare()
    assert list(tmp_path.iterdir()) == [fresh]


def test_numbers_that_are_no_data_lose_their_episode_alone(tmp_path):
    folder = folder_at(tmp_path)
    with pytest.raises(ValueError, match="must be a finite number"):
        folder.write(episode("0", value=np.nan))
    folder.write(episode("1"))
    assert [path.name for path in folder.files()] == ["served_1.parquet"]


def test_long_episodes_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(served, "MAX_STEPS", 4)
    folder, plan = folder_at(tmp_path), np.zeros((2, 2), np.float32)
    with recorder_to(folder) as recorder:
        for number in range(10):
            recorder.add(1, {"image_1": np.zeros((8, 8, 3), np.uint8)}, plan[0], "go", plan, number, False)
    assert [len(rows_of(path)["prompt"]) for path in folder.files()] == [4, 4, 2]


def test_the_writing_process_finishes_what_it_has_when_the_server_is_killed(tmp_path):
    flags = ["--checkpoint_path", str(FLOW), "--port", "0", "--record", str(tmp_path / "sessions")]
    server = subprocess.Popen([sys.executable, "scripts/serve_policy.py", *flags], stderr=subprocess.PIPE, text=True)
    port = next(int(found[1]) for line in server.stderr if (found := re.search(r"serving on \S+ port (\d+)", line)))
    with PolicyClient(port=port) as client:
        size = client.policy["image_size"]
        asked = {key: np.zeros((*size, 3), np.uint8) for key in client.policy["cameras"].values()}
        asked |= {"observation/state": np.zeros(client.policy["state_dim"], np.float32), "prompt": "go"}
        for _ in range(5):
            client.predict(asked)
        time.sleep(0.5)  # the queue is empty by now
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
    deadline = time.monotonic() + 20
    while not list((tmp_path / "sessions").glob("*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.05)
    (path,) = (tmp_path / "sessions").glob("*.parquet")
    assert len(rows_of(path)["prompt"]) == 5 and not list((tmp_path / "sessions").glob(".*"))


def test_a_writer_that_ended_is_said(tmp_path, caplog):
    pipe, process = start_writer(folder_at(tmp_path))
    process.kill()
    process.wait()
    recorder = Recorder(pipe)
    plan = np.zeros((2, 2), np.float32)
    for number in range(3):
        recorder.add(1, {"image_1": np.zeros((8, 8, 3), np.uint8)}, plan[0], "go", plan, number, False)
    deadline = time.monotonic() + 10
    while recorder.lost < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    recorder.close()
    assert recorder.lost == 3 and "the process that writes has ended" in recorder.trouble


def test_a_folder_that_can_not_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="choose another --record"):
        folder_at(tmp_path / "file" / "below").prepare()


def test_flags_of_recording_need_a_folder(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve_policy.py", "--checkpoint_path", "C", "--record_max_mb", "5"])
    with pytest.raises(SystemExit):
        serve_policy.parse_args()
    assert "--record_max_mb needs --record FOLDER" in capsys.readouterr().err
