"""Recording: the files' schema, determinism, failures of the expert, and errors."""

import io
import pathlib
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.convert.episode_writer import ImageEncoding
from scripts._recording import record, record_attempt
from scripts.record_demos import format_summaries, parse_args
from tests.helpers import needs

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
SAMPLES = REPOSITORY / "data" / "samples"
TASKS = ("reach-v3", "handle-press-v3")  # short ones
COLUMNS = ["state", "action", "is_first", "is_last", "is_terminal", "prompt", "episode_index", "frame_index", "seed"]

needs_simulator = needs("metaworld")


def arguments(output_dir, *flags, tasks=TASKS, episodes=3):
    base = ["--tasks", *tasks, "--episodes", str(episodes), "--output_dir", str(output_dir), "--image_size", "32"]
    return parse_args([*base, *flags])


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Two tasks, recorded by two processes from two cameras; reach fails with seed 1."""
    folder = tmp_path_factory.mktemp("recorded")
    flags = ["--num_workers", "2", "--second_camera", "gripperPOV", "--max_episode_steps", "47"]
    return folder, record(arguments(folder, *flags))


def check_file(path, images):
    """Every property that a recorded file has, whatever was recorded."""
    file = pq.ParquetFile(path)
    table = file.read()
    assert table.column_names == images + COLUMNS
    assert table.schema.field("image_1").type == pa.binary()
    assert table.schema.field("state").type == table.schema.field("action").type == pa.list_(pa.float32(), 4)
    rows = table.to_pylist()
    episodes = [row["episode_index"] for row in rows]
    assert episodes == sorted(episodes) and set(episodes) == set(range(max(episodes) + 1))
    for before, row, after in zip([None, *rows[:-1]], rows, [*rows[1:], None], strict=True):
        is_first = before is None or before["episode_index"] != row["episode_index"]
        is_last = after is None or after["episode_index"] != row["episode_index"]
        assert (row["is_first"], row["is_last"], row["is_terminal"]) == (is_first, is_last, is_last)
        assert row["frame_index"] == (0 if is_first else before["frame_index"] + 1)
        assert is_first or row["seed"] == before["seed"]
    assert np.abs([row["action"] for row in rows]).max() <= 1.0
    assert file.num_row_groups == max(episodes) + 1
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert {row["prompt"] for row in rows} == {metadata["instruction"]}
    assert metadata["task"] == path.stem and metadata["control_hz"] == "80.0"
    for row in rows[:3]:
        for column in images:
            image = Image.open(io.BytesIO(row[column]))
            assert image.size == (int(metadata["image_size"]),) * 2 and image.mode == "RGB"
    return rows, metadata


@pytest.mark.parametrize("task", ["button-press-topdown-v3", "window-open-v3"])
def test_the_committed_samples(task):
    rows, metadata = check_file(SAMPLES / f"{task}.parquet", ["image_1"])
    assert sorted({row["seed"] for row in rows}) == [0, 1, 2]
    assert metadata["command"] in (SAMPLES / "README.md").read_text()
    assert sum(path.stat().st_size for path in SAMPLES.iterdir()) <= 2_000_000


def test_jpeg_is_close_and_png_is_exact():
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, 16:] = (200, 30, 60)
    png = np.asarray(Image.open(io.BytesIO(ImageEncoding("png", 95)(image))))
    jpeg = np.asarray(Image.open(io.BytesIO(ImageEncoding("jpeg", 95)(image))))
    np.testing.assert_array_equal(png, image)
    assert np.abs(jpeg.astype(int) - image).mean() < 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "reach-v2"], "unknown metaworld task 'reach-v2'; did you mean 'reach-v3'?"),
        (["--env", "metawrld"], "unknown environment 'metawrld'; did you mean 'metaworld'?"),
        (["--tasks", "reach-v3", "reach-v3"], "names a task twice: reach-v3 reach-v3"),
        (["--episodes", "0"], "--episodes is 0, must be at least 1"),
        (["--jpeg_quality", "100"], "--jpeg_quality is 100; wanted 1 to 95"),
        (["--max_attempts_factor", "0.5"], "--max_attempts_factor is 0.5, must be at least 1"),
    ],
)
def test_arguments_that_cannot_be(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        record(arguments(tmp_path, *flags))
    assert list(tmp_path.iterdir()) == []


def test_a_tier_stands_for_its_tasks(tmp_path):
    existing = tmp_path / "stick-push-v3.parquet"  # of the very hard ones
    existing.write_bytes(b"precious")
    for tasks in ("very_hard", "all"):
        with pytest.raises(FileExistsError, match="stick-push-v3.parquet exists already"):
            record(arguments(tmp_path, "--tasks", tasks))
    assert list(tmp_path.iterdir()) == [existing]


def test_existing_output_is_kept(tmp_path):
    existing = tmp_path / "reach-v3.parquet"
    existing.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="reach-v3.parquet exists already; .* --overwrite"):
        record(arguments(tmp_path))
    with pytest.raises(FileExistsError, match="reach-v3.parquet is no recording of this script, so it is not replaced"):
        record(arguments(tmp_path, "--overwrite"))
    assert existing.read_bytes() == b"precious"


def test_output_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/out: not written \(.*\); choose another --output_dir"):
        record(arguments(tmp_path / "file/out"))


@pytest.mark.parametrize("command", [["scripts/record_demos.py"], ["-m", "scripts.record_demos"]])
def test_runs_as_script_and_as_module(tmp_path, command):
    flags = ["--tasks", "windw-open-v3", "--episodes", "1", "--output_dir", str(tmp_path)]
    run = subprocess.run([sys.executable, *command, *flags], cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.strip() == "error: unknown metaworld task 'windw-open-v3'; did you mean 'window-open-v3'?"


class TestRecording:
    pytestmark = needs_simulator

    @pytest.mark.parametrize("task", TASKS)
    def test_files_are_complete(self, recorded, task):
        folder, summaries = recorded
        rows, metadata = check_file(folder / f"{task}.parquet", ["image_1", "image_2"])
        summary = next(summary for summary in summaries if summary.task == task)
        assert (summary.kept, summary.steps) == (3, len(rows))
        assert metadata["second_camera"] == "gripperPOV" and "--second_camera gripperPOV" in metadata["command"]
        assert task in format_summaries(summaries)
        assert {path.name for path in folder.iterdir()} == {f"{name}.parquet" for name in TASKS}

    def test_failed_episodes_are_dropped_and_counted(self, recorded):
        folder, summaries = recorded
        seeds = pq.read_table(folder / "reach-v3.parquet", columns=["seed"])["seed"].unique().to_pylist()
        assert summaries[0].dropped == max(seeds) + 1 - len(seeds) > 0

    def test_files_do_not_depend_on_the_number_of_processes(self, recorded, tmp_path):
        folder, _ = recorded
        flags = ["--num_workers", "1", "--second_camera", "gripperPOV", "--max_episode_steps", "47"]
        record(arguments(tmp_path, *flags, tasks=TASKS[:1]))
        assert pq.read_table(tmp_path / "reach-v3.parquet").equals(pq.read_table(folder / "reach-v3.parquet"))

    def test_an_expert_that_never_succeeds_is_an_error(self, tmp_path):
        flags = ["--num_workers", "1", "--max_episode_steps", "5", "--seed", "4"]
        with pytest.raises(RuntimeError, match=r"reach-v3: the expert succeeded in 0 of 9 attempts \(seeds 4 to 12\)"):
            record(arguments(tmp_path, *flags))
        assert list(tmp_path.iterdir()) == []

    def test_stops_shortly_after_success(self, tmp_path):
        lengths = [
            len(record_attempt(arguments(tmp_path, "--steps_after_success", steps), "reach-v3", seed=0).actions)
            for steps in ("0", "5")
        ]
        assert lengths[1] == lengths[0] + 5

    def test_noise_is_executed_but_not_recorded(self, tmp_path):
        calm = record_attempt(arguments(tmp_path), "reach-v3", seed=0)
        noisy = record_attempt(arguments(tmp_path, "--noise_scale", "0.5"), "reach-v3", seed=0)
        again = record_attempt(arguments(tmp_path, "--noise_scale", "0.5"), "reach-v3", seed=0)
        np.testing.assert_array_equal(calm.states[0], noisy.states[0])
        np.testing.assert_array_equal(calm.actions[0], noisy.actions[0])  # the expert's own, before any noise shows
        assert not np.array_equal(calm.states[5], noisy.states[5])
        np.testing.assert_array_equal(noisy.states, again.states)
        assert np.abs(noisy.actions).max() <= 1.0
