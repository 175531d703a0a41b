"""Shared memory slots: reused when free, never while anything of the batch is still referenced."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import pytest
import torch

from data.loader import VLADataset, collate_fn, make_loader
from data.processing import PromptTokenizer, VLAImageProcessor
from data.sampler import StepBatchSampler
from data.shared_memory import SlotPool
from tests.helpers import write_episodes
from utils.config_utils import DataConfig

SHAPE = (1, 2, 1, 4, 4, 3)
BYTES = 2 * 4 * 4 * 3


@pytest.fixture
def dataset(tmp_path: Path, tiny_paligemma_dir: Path) -> VLADataset:
    return VLADataset(
        [write_episodes(tmp_path / "a.parquet", [30, 20], cameras=("image_1", "image_2"))],
        DataConfig(state_dim=4, cache_dir=str(tmp_path / "cache")),
        horizon=4,
        per_action_dim=4,
        cameras=("image_1", "image_2"),
        image_processor=VLAImageProcessor(32, 32, (0.5,) * 3, (0.5,) * 3, 3),
        prompt_tokenizer=PromptTokenizer.from_pretrained(str(tiny_paligemma_dir), 48),
    )


def test_a_slot_is_free_only_when_the_last_view_is_gone():
    pool = SlotPool(workers=1, slots=1, slot_bytes=BYTES)
    slot, memory = pool.take(0, SHAPE)
    memory[:] = 7
    assert pool.take(0, SHAPE) is None, "taken slots are not given twice"
    images = pool.receive(slot, SHAPE)
    view = images[0].permute(0, 1, 4, 2, 3)[1:]
    del images, memory
    gc.collect()
    assert pool.take(0, SHAPE) is None and (view == 7).all(), "a view keeps the slot"
    as_numpy = view.numpy()
    del view
    gc.collect()
    assert pool.take(0, SHAPE) is None and (as_numpy == 7).all(), "so does a numpy array made from it"
    del as_numpy
    gc.collect()
    assert pool.take(0, SHAPE) is not None


def test_workers_have_their_own_slots_and_too_large_a_batch_has_none():
    pool = SlotPool(workers=2, slots=1, slot_bytes=BYTES)
    first, second = pool.take(0, SHAPE), pool.take(1, SHAPE)
    first[1][:], second[1][:] = 1, 2
    assert (first[1] == 1).all() and first[0] != second[0]
    assert SlotPool(1, 1, BYTES).take(0, (2, *SHAPE[1:])) is None


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_equal_collated_samples_also_when_all_are_kept(dataset, workers):
    sampler = StepBatchSampler(len(dataset), 4, seed=3)
    loader = make_loader(dataset, num_workers=workers, batch_sampler=sampler)
    kept = list(itertools.islice(loader, 40))  # many more than there are slots
    for indices, batch in zip(sampler, kept, strict=False):
        expected = collate_fn([dataset[i] for i in indices])
        assert batch.keys() == expected.keys()
        for key, value in expected.items():
            same = torch.equal(batch[key], value) if torch.is_tensor(value) else batch[key] == value
            assert same, key
            assert not torch.is_tensor(value) or batch[key].dtype == value.dtype


def test_a_pass_in_order_is_whole(dataset):
    loader = make_loader(dataset, num_workers=2, batch_size=8)
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader) == 7
        frames = torch.cat([batch["frame_index"] for batch in batches])
        assert frames.tolist() == [*range(30), *range(20)]
