"""Samples of the batch contract from Parquet episodes: one per time step, frames up to now and actions from now on.

Timeline of one sample at step t, `max_seq_len` S = 2 and `horizon` T = 4:

    step      t-2  t-1   t   t+1  t+2  t+3
    frames          *    *
    state                *
    action               *    *    *    *      past the episode's end: zeros, `action_is_pad` True

Samples are made a batch at a time: a few numpy operations gather the numbers, and every frame is decoded into its place
in one block of memory. A single sample is the batch of one without its first axis.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.episode_store import EpisodeStore
from data.processing import ObservationError, PromptTokenizer, Sample, VLAImageProcessor
from data.schema import ACTION, STATE, vector_names
from data.tables import cameras_of, open_table
from data.weighting import left_out_rows
from utils.batch import Batch
from utils.config_utils import DataConfig, MixtureEntry
from utils.parquet_utils import DataError
from utils.recordings import Recording
from utils.splits import used_episodes, validation_episodes

logger = logging.getLogger(__name__)

Arrays = dict[str, Any]  # a batch without its images: numpy arrays, and the list of instructions
PROMPT_KEYS = ("input_ids", "prompt_mask")


class VLADataset(Dataset):
    """Parquet episodes as samples of the batch contract, one per time step, in physical units."""

    def __init__(
        self,
        files: Sequence[Recording],
        config: DataConfig,
        *,
        horizon: int,
        per_action_dim: int,
        cameras: Sequence[str],
        reads_state: bool = True,
        image_processor: VLAImageProcessor,
        prompt_tokenizer: PromptTokenizer,
        entry: MixtureEntry | None = None,
        dataset_index: int = 0,
        split: Literal["all", "train", "val"] = "all",
    ) -> None:
        """Open the files (see `EpisodeStore`), read how they name their values, and tokenize their instructions once.

        Args:
            files: Parquet files and LeRobot datasets in order.
            config: the `data` section: state_dim, state_columns, max_seq_len, cache_dir, sample_weighting.
            horizon: T, actions per sample.
            per_action_dim: A, values per action.
            cameras: the cameras that the model reads, in slot order; no other frame is ever decoded.
            reads_state: whether anything reads the state; if not, files may lack it, and it is zeros.
            image_processor, prompt_tokenizer: the same objects that serving uses.
            entry: a mixture's dataset: its name, widths and horizon; samples are padded to the model's. None: a dataset
                called "default" with the model's widths.
            dataset_index: which statistics the model uses for these samples.
            split: all episodes, or those that `max_episodes` and `val_fraction` leave for training, or those that
                `val_fraction` holds out.

        Raises:
            DataError: the files break the schema, or lack a camera that `data.cameras` names.
        """
        self.name = entry.name if entry is not None else "default"
        self.store = EpisodeStore(
            files,
            state_dim=(entry and entry.state_dim) or config.state_dim,
            per_action_dim=(entry and entry.per_action_dim) or per_action_dim,
            cameras=cameras,
            state_columns=config.state_columns,
            needs_state=reads_state,
            cache_dir=config.cache_dir,
            keep_cache=config.cache,
        )
        self.horizon, self.max_seq_len, self.cameras = horizon, config.max_seq_len, tuple(cameras)
        self.valid_horizon = (entry and entry.horizon) or horizon  # steps past it are padding in every sample
        self.state_dim, self.per_action_dim, self.dataset_index = config.state_dim, per_action_dim, dataset_index
        counted, seed, limit = (self.name, self.store.num_episodes), config.split_seed, config.max_episodes
        used = used_episodes(*counted, seed, limit)
        held_out = validation_episodes(*counted, config.val_fraction, seed, limit)
        chosen = {"all": np.ones_like(used), "train": used & ~held_out, "val": held_out}[split]
        with open_table(self.store.files[0]) as table:
            metadata = table.schema.metadata
        state = [vector_names(metadata, *column) for column in self.store.state_columns.widths.items()]
        action = list(config.action_names) or vector_names(metadata, ACTION, per_action_dim)
        self.names = {STATE: [name for names in state for name in names], ACTION: action}  # of each of their values
        self.episodes = np.flatnonzero(chosen)  # numbers of the store's episodes, in order
        self._rows: np.ndarray | None = None  # the store's row of each sample; None: sample i is row i
        self._left_out = np.zeros(0, np.int64)  # rows of the store that training leaves out (data/weighting.py)
        if split == "train":
            self._left_out = left_out_rows(self.store, config.sample_weighting)
        if len(self._left_out) or not chosen.all():
            kept = np.repeat(chosen, np.diff(self.store.episode_starts))
            kept[self._left_out] = False
            self._rows = np.flatnonzero(kept)
        self.image_processor, self.prompt_tokenizer = image_processor, prompt_tokenizer
        for camera in cameras:
            if self.store.has_camera(camera):
                continue
            if camera in config.cameras and not config.mixture:
                raise DataError(
                    f"data.cameras: the policy is to read {camera}, but no file has a column {camera} or "
                    f"{camera}_bytes (images there: {', '.join(cameras_of(files))}); correct the name, or remove it: a "
                    "slot without a camera needs no name"
                )
            logger.warning("%s: no file has %s: its slot is masked in every sample", self.name, camera)
        if not prompt_tokenizer.reads_state:
            tokens = [prompt_tokenizer(prompt) for prompt in self.store.prompts]
            _warn_of_prompts_cut_to_one(self.store.prompts, tokens)
            self._prompt_ids, self._prompt_mask = _padded(tokens)  # (prompts, tokens of the longest)

    def __len__(self) -> int:
        return len(self.store) if self._rows is None else len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        """One sample: the batch of one without its first axis; see `batch`."""
        return {key: values[0] for key, values in self.batch([range(len(self))[index]]).items()}

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The samples at `indices`, each from 0 to len(self) - 1, as one batch.

        Returns:
            Every key of the batch contract (`utils/batch.py`). State and action are padded with zeros to the model's
            widths; frames before the episode's start and frames of an absent camera are zeros.

        Raises:
            DataError: a frame that can't be decoded, naming file and row.
        """
        images = np.empty(self.image_shape(len(indices)), dtype=self.image_processor.pixel_type)
        arrays = self.arrays(np.asarray(indices), images.swapaxes(0, 1))
        return as_batch(arrays, self.cameras, torch.from_numpy(images))

    def image_shape(self, count: int) -> tuple[int, ...]:
        """(V, B, S, H, W, 3) of the images of a batch of `count` samples."""
        height, width = self.image_processor.height, self.image_processor.width
        return len(self.cameras), count, self.max_seq_len, height, width, 3

    def arrays(self, indices: np.ndarray, images: Iterable[np.ndarray]) -> Arrays:
        """A batch whose images are decoded into given memory.

        Args:
            indices: int (B,), samples of this dataset.
            images: of each sample the memory of its frames, (V, S, H, W, 3), contiguous in its last three axes.

        Returns:
            Every key of the batch but the cameras', as numpy arrays.

        Raises:
            DataError: a frame that can't be decoded, naming file and row.
        """
        arrays = self.numbers(indices)
        num_frames = arrays["vlm_attention_mask"].sum(axis=1).tolist()
        arrays["image_mask"] = np.array(
            [
                [self._decode(camera, row, count, frames) for camera, frames in zip(self.cameras, memory, strict=True)]
                for row, count, memory in zip(self.rows(indices).tolist(), num_frames, images, strict=True)
            ]
        )
        return arrays

    def numbers(self, indices: np.ndarray) -> Arrays:
        """Everything of a batch but what takes decoding: all keys except `image_mask` and the cameras'."""
        store, rows = self.store, self.rows(indices)
        episodes = store.episode_starts.searchsorted(rows, side="right") - 1
        begins = store.episode_starts[episodes]
        ends = store.episode_starts[episodes + 1]
        if len(self._left_out):
            following = np.append(self._left_out, len(store))[self._left_out.searchsorted(rows)]
            ends = np.minimum(ends, following)
        action, is_pad = self._action_window(rows, ends)
        prompts = store.prompt_index[rows]
        state = np.zeros((len(rows), self.state_dim), dtype=np.float32)
        state[:, : store.state.shape[1]] = store.state[rows]
        input_ids, prompt_mask = self._tokens(prompts, state)
        return {
            "vlm_attention_mask": rows[:, None] + np.arange(1 - self.max_seq_len, 1) >= begins[:, None],
            "raw_prompt_text": [store.prompts[prompt] for prompt in prompts.tolist()],
            "input_ids": input_ids,
            "prompt_mask": prompt_mask,
            "state": state,
            "action": action,
            "action_is_pad": is_pad,
            "dataset_index": np.full(len(rows), self.dataset_index, dtype=np.int64),
            "episode_index": episodes,
            "frame_index": rows - begins,
        }

    def _tokens(self, prompts: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and their mask, (B, L), of instructions by number and states; padded to the longest."""
        if self.prompt_tokenizer.reads_state:
            texts = [self.store.prompts[prompt] for prompt in prompts.tolist()]
            encode, index = self.prompt_tokenizer.tensor, self.dataset_index
            return _padded([encode(text, row, index) for text, row in zip(texts, state, strict=True)])
        mask = self._prompt_mask[prompts]
        longest = int(mask.sum(axis=1).max())
        ids = self._prompt_ids[prompts, :longest]
        return np.ascontiguousarray(ids), np.ascontiguousarray(mask[:, :longest])

    def _action_window(self, rows: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The next T actions from each row of the store on, and which of them are padding.

        Args:
            rows: int64 (B,).
            ends: int64 (B,), the row after the last of each row's episode, or the next that is left out.

        Returns:
            float32 (B, T, A), zeros where padded, and bool (B, T).
        """
        store, steps = self.store, np.arange(self.horizon)
        is_pad = steps >= np.minimum(self.valid_horizon, ends - rows)[:, None]
        values = store.action[np.minimum(rows[:, None] + steps, len(store) - 1)]
        values[is_pad] = 0.0
        action = np.zeros((len(rows), self.horizon, self.per_action_dim), dtype=np.float32)
        action[..., : values.shape[-1]] = values
        return action, is_pad

    def _decode(self, camera: str, row: int, count: int, frames: np.ndarray) -> bool:
        """Decode a camera's `count` frames up to a row of the store into the end of `frames`, (S, H, W, 3).

        The rest of `frames` becomes zeros. Returns False, and decodes nothing, where one of the frames is absent.
        """
        encoded = self.store.images(camera, range(row - count + 1, row + 1))
        present = all(frame is not None for frame in encoded)
        before = self.max_seq_len - count if present else self.max_seq_len
        frames[:before] = 0
        if present:
            try:
                for frame, memory in zip(encoded, frames[before:], strict=True):
                    self.image_processor.decode_into(frame, memory)
            except ObservationError as error:
                raise DataError(f"{self.describe(row)}: {camera}: {error}; drop or mend that episode") from None
        return present

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """The store's rows of samples, int64 (B,)."""
        return np.asarray(indices) if self._rows is None else self._rows[indices]

    def previous_action(self, row: int) -> np.ndarray | None:
        """The action executed just before a row of the store, float32 (A,), physical units, padded to the model's
        width; None at an episode's start."""
        if self.store.locate(row)[1] == 0:
            return None
        action = self.store.action[row - 1]
        return np.pad(action, (0, self.per_action_dim - len(action)))

    def describe(self, row: int) -> str:
        """Where a row of the store comes from: file, row in it, episode and step."""
        return self.store.describe(row)

    def describe_step(self, dataset_index: int, episode: int, step: int) -> str:
        """The same by the numbers that a batch carries."""
        return self.describe(int(self.store.episode_starts[episode]) + step)


def _warn_of_prompts_cut_to_one(prompts: Sequence[str], tokens: Sequence[list[int]]) -> None:
    """Warn where two instructions are the same to the model, because both were cut to `data.prompt_max_len`."""
    known: dict[tuple[int, ...], str] = {}
    for prompt, ids in zip(prompts, tokens, strict=True):
        other = known.setdefault(tuple(ids), prompt)
        if " ".join(other.split()) != " ".join(prompt.split()):
            logger.warning(
                "instructions %r and %r are the same %d tokens to the model: raise data.prompt_max_len, or word them "
                "differently",
                *(other, prompt, len(ids)),
            )


class MixtureDataset(Dataset):
    """Several datasets behind one index: the samples of the first, then those of the second, and so on."""

    def __init__(self, datasets: Sequence[VLADataset]) -> None:
        self.datasets = list(datasets)
        self.starts = np.concatenate([[0], np.cumsum([len(dataset) for dataset in datasets])])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def action_names(self) -> list[str]:
        """What the values of an action are called where all datasets agree, else their numbers."""
        names = [dataset.names[ACTION] for dataset in self.datasets]
        return names[0] if all(other == names[0] for other in names) else [f"action[{a}]" for a in range(len(names[0]))]

    def __getitem__(self, index: int) -> Sample:
        dataset, local = self._locate(index)
        return dataset[local]

    def arrays(self, indices: np.ndarray, images: Sequence[np.ndarray]) -> Arrays:
        """See `VLADataset.arrays`; prompts are padded to the longest of all datasets' samples."""
        dataset_of = self.starts.searchsorted(indices, side="right") - 1
        positions = [np.flatnonzero(dataset_of == number) for number in range(len(self.datasets))]
        parts = [
            dataset.arrays(indices[chosen] - start, [images[i] for i in chosen])
            for dataset, start, chosen in zip(self.datasets, self.starts[:-1], positions, strict=True)
            if len(chosen)
        ]
        return parts[0] if len(parts) == 1 else _merge(parts, np.concatenate(positions))

    def describe(self, index: int) -> str:
        """Where a sample comes from: dataset, file, row, episode and step."""
        dataset, local = self._locate(index)
        return f"{dataset.name}: {dataset.describe(int(dataset.rows(np.array([local]))[0]))}"

    def describe_step(self, dataset_index: int, episode: int, step: int) -> str:
        """Where a time step comes from, by the numbers that a batch carries: dataset, file, row, episode and step."""
        dataset = self.datasets[dataset_index]
        return f"{dataset.name}: {dataset.describe_step(dataset_index, episode, step)}"

    def _locate(self, index: int) -> tuple[VLADataset, int]:
        number = int(self.starts.searchsorted(index, side="right")) - 1
        return self.datasets[number], index - int(self.starts[number])


def _merge(parts: Sequence[Arrays], positions: np.ndarray) -> Arrays:
    """One batch of several datasets' samples; `positions` says where each sample of the parts in turn belongs."""
    longest = max(part["input_ids"].shape[1] for part in parts)
    order = np.argsort(positions)
    merged: Arrays = {}
    for key in parts[0]:
        values = [part[key] for part in parts]
        if key in PROMPT_KEYS:
            values = [np.pad(array, ((0, 0), (0, longest - array.shape[1]))) for array in values]
        if isinstance(values[0], list):
            texts = list(itertools.chain(*values))
            merged[key] = [texts[i] for i in order.tolist()]
        else:
            merged[key] = np.concatenate(values)[order]
    return merged


def _padded(tokens: Sequence[Tensor | list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of several texts, int64 (texts, tokens of the longest), and their mask."""
    lengths = np.array([len(ids) for ids in tokens])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.zeros(mask.shape, dtype=np.int64)
    ids[mask] = np.concatenate([np.asarray(one) for one in tokens])
    return ids, mask


def as_batch(arrays: Arrays, cameras: Sequence[str], images: Tensor) -> Batch:
    """Numpy arrays and a block of images, (V, B, S, H, W, 3), as a batch; nothing is copied."""
    batch: Batch = {camera: images[i].permute(0, 1, 4, 2, 3) for i, camera in enumerate(cameras)}
    for key, values in arrays.items():
        batch[key] = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    return batch
