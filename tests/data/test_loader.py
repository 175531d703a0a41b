"""VLADataset, EpisodeStore and the batch sampler on real Parquet files."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from data.episode_store import EpisodeStore
from data.loader import VLADataset, collate_fn, make_loader
from data.processing import PromptTokenizer, VLAImageProcessor
from data.sampler import StepBatchSampler
from tests.helpers import episode_rows, write_broken, write_episodes, write_rows
from utils.config_utils import DataConfig
from utils.parquet_utils import DataError, resolve_parquet_files


@pytest.fixture(scope="module")
def tokenizer(tiny_paligemma_dir):
    return PromptTokenizer.from_pretrained(str(tiny_paligemma_dir), 48)


@pytest.fixture
def make_dataset(tmp_path, tokenizer):
    def make(files, *, cameras=("image_1",), horizon=4, max_seq_len=1, state_dim=4, per_action_dim=4, **config):
        return VLADataset(
            files,
            DataConfig(state_dim=state_dim, max_seq_len=max_seq_len, cache_dir=str(tmp_path / "cache"), **config),
            horizon=horizon,
            per_action_dim=per_action_dim,
            cameras=cameras,
            image_processor=VLAImageProcessor(32, 32, (0.5,) * 3, (0.5,) * 3, Image.Resampling.BICUBIC),
            prompt_tokenizer=tokenizer,
        )

    return make


def test_one_sample_per_step_with_the_next_actions(tmp_path, make_dataset):
    path = write_episodes(tmp_path / "a.parquet", [6, 3])
    dataset = make_dataset([path])
    table = pq.read_table(path).to_pydict()
    assert len(dataset) == 9 and dataset.store.num_episodes == 2
    sample = dataset[4]  # two steps before the first episode's end
    assert sample["image_1"].shape == (1, 3, 32, 32) and sample["image_1"].dtype == torch.uint8
    np.testing.assert_array_equal(sample["action"][:2].numpy(), np.float32(table["action"][4:6]))
    assert sample["action_is_pad"].tolist() == [False, False, True, True]
    assert sample["action"][2:].abs().sum() == 0
    np.testing.assert_array_equal(sample["state"].numpy(), np.float32(table["state"][4]))
    assert (sample["episode_index"], sample["frame_index"]) == (0, 4)
    assert dataset[6]["episode_index"] == 1 and dataset[6]["frame_index"] == 0
    assert dataset.previous_action(6) is None
    np.testing.assert_array_equal(dataset.previous_action(7), np.float32(table["action"][6]))


def test_frames_come_from_this_episode_only(tmp_path, make_dataset):
    path = write_episodes(tmp_path / "a.parquet", [4, 4])
    single, triple = make_dataset([path]), make_dataset([path], max_seq_len=3)
    first_of_second = triple[4]
    assert first_of_second["vlm_attention_mask"].tolist() == [False, False, True]
    assert first_of_second["image_1"][:2].sum() == 0
    later = triple[6]
    assert later["vlm_attention_mask"].all()
    for slot, row in enumerate((4, 5, 6)):
        assert torch.equal(later["image_1"][slot], single[row]["image_1"][0])


def test_episode_runs_across_files_and_row_groups(tmp_path, make_dataset):
    rows = episode_rows(7)
    files = [write_rows(tmp_path / "a.parquet", rows[:4]), write_rows(tmp_path / "b.parquet", rows[4:])]
    dataset = make_dataset(files)
    assert dataset.store.num_episodes == 1
    np.testing.assert_array_equal(dataset[2]["action"].numpy(), np.float32([row["action"] for row in rows[2:6]]))
    assert "b.parquet row 1 (episode 0, step 5)" in dataset.describe(5)


def test_resized_frame_equals_the_backbone_processors_own(tmp_path, make_dataset):
    path = write_episodes(tmp_path / "a.parquet", [2])
    encoded = pq.read_table(path)["image_1"][0].as_py()
    expected = Image.open(io.BytesIO(encoded)).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(make_dataset([path])[0]["image_1"][0].permute(1, 2, 0).numpy(), np.array(expected))


@pytest.mark.parametrize("spelling", ["image_1_bytes", "struct"])
def test_image_spellings(tmp_path, make_dataset, spelling):
    rows = episode_rows(3)
    plain = write_rows(tmp_path / "plain.parquet", rows)
    for row in rows:
        encoded = row.pop("image_1")
        row.update(
            {"image_1_bytes": encoded} if spelling != "struct" else {"image_1": {"bytes": encoded, "path": None}}
        )
    other = write_rows(tmp_path / "other.parquet", rows)
    for a, b in zip(make_dataset([plain]), make_dataset([other]), strict=True):
        assert torch.equal(a["image_1"], b["image_1"])


def test_absent_camera_keeps_its_slot(tmp_path, make_dataset, caplog):
    path = write_episodes(tmp_path / "a.parquet", [3])
    sample = make_dataset([path], cameras=("image_1", "image_2"))[0]
    assert sample["image_mask"].tolist() == [True, False]
    assert sample["image_2"].shape == (1, 3, 32, 32)
    assert "no file has image_2" in caplog.text


def test_camera_absent_at_single_steps(tmp_path, make_dataset):
    rows = episode_rows(4, cameras=("image_1", "image_2"))
    rows[1]["image_2"] = None
    path = write_rows(tmp_path / "a.parquet", rows)
    dataset = make_dataset([path], cameras=("image_1", "image_2"))
    assert [dataset[i]["image_mask"].tolist()[1] for i in range(4)] == [True, False, True, True]


def test_only_frames_that_the_model_reads_are_decoded(tmp_path, make_dataset):
    rows = episode_rows(3, cameras=("image_1", "image_2"))
    for row in rows:
        row["image_2"] = b"not an image"
    path = write_rows(tmp_path / "a.parquet", rows)
    assert make_dataset([path])[0]["image_1"].any()  # image_2 is never touched
    with pytest.raises(DataError, match=r"a\.parquet row 0 .*image_2: image: 12 bytes is no readable"):
        make_dataset([path], cameras=("image_1", "image_2"))[0]


def test_collate_pads_prompts_on_the_right(tmp_path, make_dataset):
    path = write_episodes(tmp_path / "a.parquet", [2, 2])
    dataset = make_dataset([path])
    short, long = sorted((dataset[0], dataset[2]), key=lambda sample: len(sample["input_ids"]))
    batch = collate_fn([short, long])
    length = len(short["input_ids"])
    assert batch["input_ids"].shape == batch["prompt_mask"].shape == (2, len(long["input_ids"]))
    assert batch["prompt_mask"][0].sum() == length and not batch["prompt_mask"][0, length:].any()
    assert torch.equal(batch["input_ids"][0, :length], short["input_ids"])
    assert batch["raw_prompt_text"] == [short["raw_prompt_text"], long["raw_prompt_text"]]
    assert batch["dataset_index"].dtype == torch.int64 and batch["action"].shape == (2, 4, 4)


def test_cache_is_reused_and_rebuilt_when_a_source_changes(tmp_path):
    path = write_episodes(tmp_path / "a.parquet", [4])
    options = dict(state_dim=4, per_action_dim=4, cameras=("image_1",), cache_dir=tmp_path / "cache")
    first = EpisodeStore([path], **options)
    stamp = (first.folder / "meta.json").stat().st_mtime_ns
    again = EpisodeStore([path], **options)
    assert again.folder == first.folder and (again.folder / "meta.json").stat().st_mtime_ns == stamp
    write_episodes(path, [5], seed=3)
    assert len(EpisodeStore([path], **options)) == 5
    assert not list((tmp_path / "cache").glob(".*")), "temporary folders must not stay"


def test_store_returns_the_very_bytes(tmp_path):
    path = write_episodes(tmp_path / "a.parquet", [1200], image_size=4)
    store = EpisodeStore([path], state_dim=4, per_action_dim=4, cameras=("image_1",), cache_dir=tmp_path / "cache")
    encoded = pq.read_table(path)["image_1"].to_pylist()
    assert all(bytes(store.image("image_1", row)) == encoded[row] for row in (0, 511, 512, 1023, 1024, 1199))


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_order_is_the_samplers(tmp_path, make_dataset, workers):
    dataset = make_dataset([write_episodes(tmp_path / "a.parquet", [5, 5])])
    sampler = StepBatchSampler(len(dataset), 4, seed=7)
    loader = make_loader(dataset, num_workers=workers, batch_sampler=sampler)
    expected = list(itertools.islice(sampler, 6))
    batches = list(itertools.islice(loader, 6))
    starts = dataset.store.episode_starts
    got = [(starts[b["episode_index"]] + b["frame_index"].numpy()).tolist() for b in batches]
    assert got == expected


def test_sampler_epochs_are_whole_and_differ():
    sampler = StepBatchSampler(10, 4, seed=0)
    stream = list(itertools.chain.from_iterable(itertools.islice(sampler, 10)))
    epochs = [stream[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_sampler_resumes_anywhere_and_is_independent_of_ranks_and_micro_batches():
    whole = list(itertools.islice(StepBatchSampler(11, 8, seed=3), 12))
    resumed = StepBatchSampler(11, 8, seed=3)
    resumed.start_step = 5
    assert list(itertools.islice(resumed, 7)) == whole[5:]
    ranks = [StepBatchSampler(11, 8, seed=3, accumulation=2, rank=rank, world_size=2) for rank in range(2)]
    streams = [list(itertools.islice(rank, 24)) for rank in ranks]
    for step, batch in enumerate(whole):
        merged = [i for part in range(2) for stream in streams for i in stream[2 * step + part]]
        assert merged == batch
    with pytest.raises(ValueError, match="batch_size 8 does not divide .* choose a multiple of 3"):
        StepBatchSampler(11, 8, seed=0, world_size=3)


def _set(row, key, value):
    return lambda rows: rows[row].__setitem__(key, value)


def _drop(*keys):
    return lambda rows: [row.pop(key) for row in rows for key in keys]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_drop("action"), r"bad\.parquet: no column 'action' \(found: .*image_1"),
        (_drop("prompt"), r"no column 'prompt'"),
        (_drop("image_1"), r"no column 'image_1' or 'image_1_bytes'"),
        (_set(3, "action", [0.0] * 6), r"bad\.parquet row 3: action has 6 values, config wants per_action_dim 4"),
        (_set(6, "state", [0.0] * 3), r"bad\.parquet row 6: state has 3 values, config wants data\.state_dim 4"),
        (_set(2, "state", [0.0, float("nan"), 0.0, 0.0]), r"bad\.parquet row 2: state\[1\] is nan"),
        (_set(7, "action", [0.0, 0.0, float("inf"), 0.0]), r"bad\.parquet row 7: action\[2\] is inf"),
        (_set(4, "action", None), r"bad\.parquet row 4: action is null"),
        (_set(1, "prompt", "  "), r"bad\.parquet row 1: prompt is '  '"),
        (_set(1, "prompt", None), r"bad\.parquet row 1: prompt is None"),
        (_set(0, "is_first", False), r"row 0: the data begin here but is_first is false"),
        (_set(2, "is_first", True), r"row 2: is_first is true but the row before is not is_last"),
        (_set(5, "is_first", False), r"row 5: is_first is false but the row before is is_last"),
        (_set(8, "is_last", False), r"row 8: (the data end here|is_terminal is true)"),
        (_set(1, "is_terminal", True), r"row 1: is_terminal is true but is_last is not"),
        (_set(3, "is_last", None), r"row 3: is_last is null"),
        (_set(5, "image_1", None), r"row 5: image_1 is null"),
    ],
)
def test_bad_rows_are_named(tmp_path, make_dataset, spoil, message):
    path = write_broken(tmp_path / "bad.parquet", spoil)
    with pytest.raises(DataError, match=message):
        make_dataset([path])
    left = [path.name for path in (tmp_path / "cache").iterdir()]
    assert left in ([], ["locks"]), "a refused file must leave no cache"


def test_row_numbers_count_past_the_first_read_batch(tmp_path):
    rows = [row for i in range(3) for row in episode_rows(300, seed=i, image_size=2)]
    rows[777]["action"] = [1.0]
    path = write_rows(tmp_path / "bad.parquet", rows, row_group_size=100)
    with pytest.raises(DataError, match="row 777: action has 1 values"):
        EpisodeStore([path], state_dim=4, per_action_dim=4, cameras=("image_1",), cache_dir=tmp_path / "cache")


def test_unreadable_image_names_file_and_row(tmp_path, make_dataset):
    dataset = make_dataset([write_broken(tmp_path / "bad.parquet", _set(5, "image_1", b"\xff\xd8 torn"))])
    with pytest.raises(DataError, match=r"bad\.parquet row 5 \(episode 1, step 0\): image_1: .*no readable JPEG"):
        dataset[5]


def test_empty_and_damaged_files(tmp_path, make_dataset):
    whole = write_episodes(tmp_path / "whole.parquet", [3])
    empty = tmp_path / "empty.parquet"
    pq.write_table(pq.read_table(whole).slice(0, 0), empty)
    with pytest.raises(DataError, match=r"empty\.parquet: holds no rows"):
        make_dataset([empty])
    torn = tmp_path / "torn.parquet"
    torn.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"torn\.parquet: not a readable Parquet file"):
        make_dataset([torn])


def test_damaged_image_pages_are_named(tmp_path, make_dataset):
    """The statistics never read them: training meets them first."""
    path = write_episodes(tmp_path / "a.parquet", [6])
    group = pq.ParquetFile(path).metadata.row_group(1)
    column = next(group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == "image_1")
    spoiled = bytearray(path.read_bytes())
    start = min(offset for offset in (column.dictionary_page_offset, column.data_page_offset) if offset)
    spoiled[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(spoiled)
    with pytest.raises(DataError, match=r"a\.parquet: .*image_1 can't be read from row 0 on .*; record or convert it"):
        make_dataset([path])


def test_jpeg_frames_come_out_as_pil_decodes_them(tmp_path, make_dataset):
    rows = episode_rows(2)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    for row in rows:
        row["image_1"] = buffer.getvalue()
    frame = make_dataset([write_rows(tmp_path / "a.parquet", rows)])[1]["image_1"][0]
    np.testing.assert_array_equal(frame.permute(1, 2, 0).numpy(), np.array(Image.open(buffer)))


def test_both_spellings_at_once_are_refused(tmp_path, make_dataset):
    rows = episode_rows(2)
    for row in rows:
        row["image_1_bytes"] = row["image_1"]
    with pytest.raises(DataError, match="both 'image_1' and 'image_1_bytes'"):
        make_dataset([write_rows(tmp_path / "a.parquet", rows)])


def test_resolving_files(tmp_path):
    a, b = (write_episodes(tmp_path / "sub" / name, [2]) for name in ("a.parquet", "b.parquet"))
    assert resolve_parquet_files(str(tmp_path), "key") == [a, b]
    assert resolve_parquet_files([str(tmp_path / "sub" / "b*.parquet"), str(a)], "key") == [b, a]
    with pytest.raises(DataError, match="data.train_parquet_files is empty"):
        resolve_parquet_files([], "data.train_parquet_files")
    with pytest.raises(DataError, match="key: .*nothing.* matches no Parquet file"):
        resolve_parquet_files(str(tmp_path / "nothing"), "key")
    with pytest.raises(DataError, match="more than once"):
        resolve_parquet_files([str(a), str(tmp_path)], "key")


def test_self_test_script(tmp_path):
    path = write_episodes(tmp_path / "a.parquet", [4, 5])
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "data/loader.py", "--data_path", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert "1 files, 2 episodes, 9 steps" in result.stdout and "prompt: press the button" in result.stdout
    result = subprocess.run([*command[:-1], "/nothing"], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 1 and "matches no Parquet file" in result.stderr


def test_a_dataset_crosses_to_a_worker_that_is_not_forked(tmp_path, make_dataset):
    """As spawn and forkserver do (macOS, Python 3.14): pickled, its cache mapped again."""
    dataset = make_dataset([write_episodes(tmp_path / "a.parquet", [5, 4], image_size=32)])
    there = pickle.loads(pickle.dumps(dataset))
    for index in range(len(dataset)):
        for key, value in dataset[index].items():
            assert torch.equal(value, there[index][key]) if torch.is_tensor(value) else value == there[index][key]


SPAWNED = """
import multiprocessing, pickle, sys
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    from data.loader import make_loader
    with open(sys.argv[2], "rb") as file:
        dataset = pickle.load(file)
    rows = [row for batch in make_loader(dataset, num_workers=2, batch_size=2) for row in batch["frame_index"].tolist()]
    assert rows == [0, 1, 2, 3, 4, 0, 1, 2, 3], rows
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_of_every_start_method(tmp_path, make_dataset, method):
    dataset = make_dataset([write_episodes(tmp_path / "a.parquet", [5, 4], image_size=32)])
    (tmp_path / "dataset").write_bytes(pickle.dumps(dataset))
    (tmp_path / "program.py").write_text(SPAWNED)
    command = [sys.executable, str(tmp_path / "program.py"), method, str(tmp_path / "dataset")]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
