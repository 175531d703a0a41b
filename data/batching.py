"""Whole batches at a time: what loader workers run.

A batch holds what `collate_fn` makes of the single samples, value for value (tested), at a fraction of the Python
per sample: its numbers are gathered by a few numpy operations, its frames decoded side by side into one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from data.processing import ObservationError
from data.shared_memory import ImageBlock, PackedBatch
from utils.parquet_utils import DataError

if TYPE_CHECKING:
    from data.loader import VLADataset

Arrays = dict[str, Any]


class PackedBatches(Dataset):
    """The samples of one or several datasets; a batch of them comes whole, ready to travel to training."""

    def __init__(self, parts: Sequence[VLADataset]) -> None:
        self.parts = list(parts)
        self.starts = np.cumsum([0] + [len(part) for part in parts])
        self.longest_prompt = max(part.prompt_ids.shape[1] for part in parts)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def image_shape(self, count: int) -> tuple[int, ...]:
        """(V, B, S, H, W, 3) of the images of a batch of `count` samples."""
        first = self.parts[0]
        height, width = first.image_processor.height, first.image_processor.width
        return len(first.cameras), count, first.max_seq_len, height, width, 3

    def __getitems__(self, indices: Sequence[int]) -> PackedBatch:
        """
        Raises:
            DataError: a frame that can't be decoded, naming file and row.
        """
        first, indices_B = self.parts[0], np.asarray(indices)
        count = len(indices_B)
        block = ImageBlock(self.image_shape(count))
        batch: Arrays = {
            "image_mask": np.zeros((count, len(first.cameras)), dtype=bool),
            "vlm_attention_mask": np.zeros((count, first.max_seq_len), dtype=bool),
            "raw_prompt_text": [""] * count,
            "input_ids": np.zeros((count, self.longest_prompt), dtype=np.int64),
            "prompt_mask": np.zeros((count, self.longest_prompt), dtype=bool),
            "state": np.zeros((count, first.state_dim), dtype=np.float32),
            "action": np.zeros((count, first.horizon, first.per_action_dim), dtype=np.float32),
            "action_is_pad": np.zeros((count, first.horizon), dtype=bool),
            "dataset_index": np.zeros(count, dtype=np.int64),
            "episode_index": np.zeros(count, dtype=np.int64),
            "frame_index": np.zeros(count, dtype=np.int64),
        }
        which_B = self.starts.searchsorted(indices_B, side="right") - 1
        for which, part in enumerate(self.parts):
            places = np.flatnonzero(which_B == which)
            if len(places):
                rows = part.rows(indices_B[places] - self.starts[which])
                _fill_numbers(part, batch, places, rows)
                _decode_frames(part, batch, block.images, places, rows)
        longest = int(batch["prompt_mask"].sum(axis=1).max())
        for key in ("input_ids", "prompt_mask"):
            batch[key] = np.ascontiguousarray(batch[key][:, :longest])
        return PackedBatch(batch, first.cameras, block)


def _fill_numbers(dataset: VLADataset, batch: Arrays, places: np.ndarray, rows: np.ndarray) -> None:
    """Everything but pixels of the samples at `rows` of the store, into `places` of the batch."""
    store = dataset.store
    episodes = store.episode_starts.searchsorted(rows, side="right") - 1
    begins, ends = store.episode_starts[episodes], store.episode_starts[episodes + 1]
    is_pad = np.arange(dataset.horizon) >= np.minimum(dataset.own_horizon, ends - rows)[:, None]
    steps = np.minimum(rows[:, None] + np.arange(dataset.horizon), len(store) - 1)
    actions = store.action[steps]
    actions[is_pad] = 0.0
    batch["action"][places, :, : actions.shape[-1]] = actions
    batch["action_is_pad"][places] = is_pad
    batch["state"][places, : store.state.shape[1]] = store.state[rows]
    batch["dataset_index"][places] = dataset.dataset_index
    batch["episode_index"][places] = episodes
    batch["frame_index"][places] = rows - begins
    prompts = store.prompt_index[rows]
    width = dataset.prompt_ids.shape[1]
    batch["input_ids"][places, :width] = dataset.prompt_ids[prompts]
    batch["prompt_mask"][places, :width] = dataset.prompt_mask[prompts]
    for place, prompt in zip(places.tolist(), prompts.tolist(), strict=True):
        batch["raw_prompt_text"][place] = store.prompts[prompt]
    batch["vlm_attention_mask"][places] = rows[:, None] + np.arange(1 - dataset.max_seq_len, 1) >= begins[:, None]


def _decode_frames(
    dataset: VLADataset, batch: Arrays, images: np.ndarray, places: np.ndarray, rows: np.ndarray
) -> None:
    """Frames of the samples at `rows` into `places` of `images`, (V, B, S, H, W, 3); zeros where there are none."""
    counts = batch["vlm_attention_mask"][places].sum(axis=1)
    decode_into, size = dataset.image_processor.decode_into, dataset.max_seq_len
    for slot, camera in enumerate(dataset.cameras):
        present, block = batch["image_mask"][:, slot], images[slot]
        for place, row, count in zip(places.tolist(), rows.tolist(), counts.tolist(), strict=True):
            frames = dataset.frames(camera, range(row - count + 1, row + 1))
            present[place] = frames is not None
            if frames is None or count < size:
                block[place, : size if frames is None else size - count] = 0
            try:
                for step, frame in enumerate(frames or (), start=size - count):
                    decode_into(frame, block[place, step])
            except ObservationError as error:
                raise DataError(f"{dataset.describe(row)}: {camera}: {error}; drop or mend that episode") from None
