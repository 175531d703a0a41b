"""`VLADataset.batch` against samples made one by one, the slow way; `dataset[i]` and the loader's batches follow it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data.dataset import MixtureDataset, VLADataset
from data.processing import PromptTokenizer, VLAImageProcessor, build_observation, collate_fn
from tests.helpers import episode_rows, write_rows
from utils.config_utils import DataConfig, MixtureEntry

CAMERAS = ("image_1", "image_2")


@pytest.fixture
def open_dataset(tmp_path: Path, tiny_paligemma_dir: Path):
    """Opens episodes of 6, 1 and 9 steps, of which image_2 lacks some frames, as a dataset of a wider model."""

    def make(max_seq_len: int, dataset_index: int = 0, seed: int = 0, horizon: int | None = 3) -> VLADataset:
        rows = [
            row
            for i, length in enumerate((6, 1, 9))
            for row in episode_rows(length, seed=seed + i, cameras=CAMERAS, state_dim=3, action_dim=2)
        ]
        for i in (0, 4, 8):
            rows[i]["image_2"] = None
        path = write_rows(tmp_path / f"{seed}.parquet", rows)
        return VLADataset(
            [path],
            DataConfig(state_dim=4, max_seq_len=max_seq_len, cache_dir=str(tmp_path / "cache")),
            horizon=5,
            per_action_dim=4,
            cameras=CAMERAS,
            image_processor=VLAImageProcessor(16, 24, (0.5,) * 3, (0.5,) * 3, 3),
            prompt_tokenizer=PromptTokenizer.from_pretrained(str(tiny_paligemma_dir), 48),
            entry=MixtureEntry(
                path=(str(path),), name=str(seed), weight=1.0, state_dim=3, per_action_dim=2, horizon=horizon
            ),
            dataset_index=dataset_index,
        )

    return make


def slow_sample(dataset: VLADataset, row: int) -> dict:
    """One sample by slices, with the functions that serving uses."""
    store = dataset.store
    episode, step = store.locate(row)
    begin, end = store.episode_starts[episode : episode + 2].tolist()
    images = {
        camera: [store.image(camera, i) for i in range(max(begin, row - dataset.max_seq_len + 1), row + 1)]
        for camera in dataset.cameras
    }
    sample = build_observation(
        {camera: None if None in frames else frames for camera, frames in images.items()},
        store.prompt(row),
        np.pad(store.state[row], (0, 1)),
        cameras=dataset.cameras,
        max_seq_len=dataset.max_seq_len,
        image_processor=dataset.image_processor,
        prompt_tokenizer=dataset.prompt_tokenizer,
    )
    action, is_pad = np.zeros((5, 4), np.float32), np.ones(5, bool)
    for k in range(5):
        if k < (dataset.valid_horizon) and row + k < end:
            action[k, :2], is_pad[k] = store.action[row + k], False
    sample |= {"action": torch.from_numpy(action), "action_is_pad": torch.from_numpy(is_pad)}
    return sample | {"dataset_index": dataset.dataset_index, "episode_index": episode, "frame_index": step}


def assert_same(batch: dict, expected: dict) -> None:
    assert batch.keys() == expected.keys()
    for key, value in expected.items():
        if torch.is_tensor(value):
            assert torch.equal(batch[key], value) and batch[key].dtype == value.dtype, key
        else:
            assert batch[key] == value, key


@pytest.mark.parametrize("max_seq_len", [1, 3])
@pytest.mark.parametrize("horizon", [3, None])
def test_a_batch_holds_what_samples_hold(open_dataset, max_seq_len, horizon):
    dataset = open_dataset(max_seq_len, horizon=horizon)
    indices = np.random.default_rng(0).permutation(16)[:11]
    assert_same(dataset.batch(indices), collate_fn([slow_sample(dataset, i) for i in indices.tolist()]))
    for i in range(16):
        assert_same(collate_fn([dataset[i]]), collate_fn([slow_sample(dataset, i)]))
    with pytest.raises(IndexError):
        dataset[16]


def test_a_mixtures_batch_keeps_the_order_of_its_samples(open_dataset):
    parts = [open_dataset(2), open_dataset(2, dataset_index=1, seed=3)]
    mixture = MixtureDataset(parts)
    indices = np.random.default_rng(1).permutation(32)[:20]
    images = np.empty(parts[0].image_shape(20), np.uint8)
    arrays = mixture.arrays(indices, images.swapaxes(0, 1))
    expected = collate_fn([slow_sample(parts[i // 16], i % 16) for i in indices.tolist()])
    for key, value in expected.items():
        got = images[CAMERAS.index(key)].transpose(0, 1, 4, 2, 3) if key in CAMERAS else arrays[key]
        assert got == value if isinstance(value, list) else np.array_equal(got, value.numpy()), key


def test_two_instructions_that_are_equal_after_cutting(tmp_path, tiny_paligemma_dir, caplog):
    prompts = ["press the button", "press the window", "press  the button\n", "open the window"]
    rows = [{**row, "prompt": text} for i, text in enumerate(prompts) for row in episode_rows(2, seed=i)]
    path = write_rows(tmp_path / "a.parquet", rows)

    def warnings(max_len: int) -> list[str]:
        caplog.clear()
        VLADataset(
            [path],
            DataConfig(state_dim=4, cache_dir=str(tmp_path / "cache")),
            horizon=2,
            per_action_dim=4,
            cameras=("image_1",),
            image_processor=VLAImageProcessor(16, 16, (0.5,) * 3, (0.5,) * 3, 3),
            prompt_tokenizer=PromptTokenizer.from_pretrained(str(tiny_paligemma_dir), max_len),
        )
        return [record.getMessage() for record in caplog.records if "the same" in record.getMessage()]

    assert warnings(48) == [], "which differ by spaces alone mean the same"
    assert warnings(4) == [
        "instructions 'press the button' and 'press the window' are the same 4 tokens to the model: raise "
        "data.prompt_max_len, or word them differently"
    ]
