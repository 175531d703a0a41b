"""Samples for training and evaluation: one per time step, with frames up to now and actions from now on.

    python data/loader.py --data_path data/samples     # self-test: prints what it found

Timeline of one sample at step t, `max_seq_len` S = 2 and `horizon` T = 4:

    step      t-2  t-1   t   t+1  t+2  t+3
    frames          *    *
    state                *
    action               *    *    *    *      past the episode's end: zeros, `action_is_pad` True
"""

from __future__ import annotations

import argparse
import functools
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

if __name__ == "__main__":  # so that "python data/loader.py" finds the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.batching import PackedBatches
from data.episode_store import EpisodeStore
from data.processing import (
    Batch,
    ObservationError,
    PromptTokenizer,
    Sample,
    VLAImageProcessor,
    build_observation,
    collate_fn,
)
from data.sampler import PassBatchSampler, StepBatchSampler
from data.shared_memory import PackedBatch, SlotPool, end_only_for_parent, use_pool
from utils.config_utils import Config, DataConfig, MixtureEntry
from utils.misc import derive_seed, set_up_logging
from utils.parquet_utils import DataError, Source, open_parquet, resolve_parquet_files
from utils.splits import used_episodes, validation_episodes

__all__ = ["VLADataset", "VLAImageProcessor", "build_datasets", "build_sampler", "collate_fn", "make_loader"]

logger = logging.getLogger(__name__)

PREFETCH = 4  # batches that each worker makes ahead


class VLADataset(Dataset):
    """Parquet episodes as samples of the batch contract, one per time step, in physical units."""

    def __init__(
        self,
        files: Sequence[Source],
        config: DataConfig,
        *,
        horizon: int,
        per_action_dim: int,
        cameras: Sequence[str],
        image_processor: VLAImageProcessor,
        prompt_tokenizer: PromptTokenizer,
        own: MixtureEntry | None = None,
        dataset_index: int = 0,
        split: Literal["all", "train", "val"] = "all",
    ) -> None:
        """Open the files (see `EpisodeStore`) and tokenize their instructions once.

        Args:
            files: Parquet files in order.
            config: the `data` section: state_dim, max_seq_len, cache_dir.
            horizon: T, actions per sample.
            per_action_dim: A, values per action.
            cameras: image columns that the model reads; no other frame is ever decoded.
            image_processor, prompt_tokenizer: the same objects that serving uses.
            own: name and own widths of a mixture's dataset; samples are padded to the model's. None: the model's.
            dataset_index: which statistics the model uses for these samples.
            split: all episodes, or those that `max_episodes` and `val_fraction` leave for training, or those that
                `val_fraction` holds out.

        Raises:
            DataError: the files break the schema.
        """
        self.name = own.name if own is not None else "default"
        self.store = EpisodeStore(
            files,
            state_dim=(own and own.state_dim) or config.state_dim,
            per_action_dim=(own and own.per_action_dim) or per_action_dim,
            cameras=cameras,
            cache_dir=config.cache_dir,
            keep_cache=config.cache,
        )
        self.horizon, self.max_seq_len, self.cameras = horizon, config.max_seq_len, tuple(cameras)
        self.own_horizon = (own and own.horizon) or horizon
        self._pad_masks = torch.arange(horizon) >= torch.arange(horizon + 1)[:, None]  # by number of valid steps
        self.state_dim, self.per_action_dim, self.dataset_index = config.state_dim, per_action_dim, dataset_index
        of, seed, limit = (self.name, self.store.num_episodes), config.split_seed, config.max_episodes
        held_out, used = validation_episodes(*of, config.val_fraction, seed, limit), used_episodes(*of, seed, limit)
        chosen = {"all": np.ones_like(used), "train": used & ~held_out, "val": held_out}[split]
        self.episodes = np.flatnonzero(chosen)  # of the store, in order
        self._rows: np.ndarray | range = range(len(self.store))
        if not chosen.all():
            self._rows = np.flatnonzero(np.repeat(chosen, np.diff(self.store.episode_starts)))
        self.image_processor, self.prompt_tokenizer = image_processor, prompt_tokenizer
        for camera in cameras:
            if not self.store.has_camera(camera):
                logger.warning("no file has %s: its slot is masked in every sample", camera)
        tokens = [prompt_tokenizer(prompt) for prompt in self.store.prompts]
        lengths = np.array([len(ids) for ids in tokens])
        self.prompt_mask = np.arange(lengths.max()) < lengths[:, None]  # of every prompt, padded to the longest
        self.prompt_ids = np.zeros(self.prompt_mask.shape, dtype=np.int64)
        self.prompt_ids[self.prompt_mask] = np.concatenate(tokens)

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> int:
        """The store's row of a sample; the same number unless a split left episodes out."""
        return int(self._rows[index])

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """The store's rows of several samples, int64 (n,)."""
        return indices if isinstance(self._rows, range) else self._rows[indices]

    def __getitem__(self, index: int) -> Sample:
        """One sample; batches are made by `data/batching.py`, with the same values.

        Returns:
            The keys of `build_observation`, and `action` float32 (T, A), `action_is_pad` bool (T,),
            `dataset_index`, `episode_index`, `frame_index`. State and action are padded with zeros to the model's
            widths.

        Raises:
            DataError: a frame that can't be decoded, naming file and row.
        """
        store, index = self.store, self.row(index)
        episode, step = store.locate(index)
        begin, end = int(store.episode_starts[episode]), int(store.episode_starts[episode + 1])
        rows = range(max(begin, index - self.max_seq_len + 1), index + 1)
        try:
            sample = build_observation(
                {camera: self.frames(camera, rows) for camera in self.cameras},
                store.prompt(index),
                _pad(store.state[index], self.state_dim),
                cameras=self.cameras,
                max_seq_len=self.max_seq_len,
                image_processor=self.image_processor,
                prompt_tokenizer=self.prompt_tokenizer,
            )
        except ObservationError as error:
            raise DataError(f"{self.describe(index)}: {error}; drop or mend that episode") from None
        valid = min(self.own_horizon, end - index)
        action = np.zeros((self.horizon, self.per_action_dim), dtype=np.float32)
        action[:valid, : store.action.shape[1]] = store.action[index : index + valid]
        sample["action"] = torch.from_numpy(action)
        sample["action_is_pad"] = self._pad_masks[valid]
        sample["dataset_index"] = self.dataset_index
        sample["episode_index"] = episode
        sample["frame_index"] = step
        return sample

    def previous_action(self, row: int) -> np.ndarray | None:
        """The action executed just before a row of the store, float32 (A,), physical units, padded to the model's
        width; None at an episode's start."""
        _, step = self.store.locate(row)
        return None if step == 0 else _pad(self.store.action[row - 1], self.per_action_dim)

    def describe(self, row: int) -> str:
        """Where a row of the store comes from: file, row in it, episode and step."""
        return self.store.describe(row)

    def describe_step(self, dataset_index: int, episode: int, step: int) -> str:
        """The same by the numbers that a batch carries."""
        return self.describe(int(self.store.episode_starts[episode]) + step)

    def sample_probabilities(self, weighting: Literal["step", "episode", "task"]) -> np.ndarray | None:
        """Probability of each sample when episodes or tasks (prompts) are to count alike, float64; None: all alike."""
        if weighting == "step":
            return None
        rows = np.asarray(self._rows)
        groups = self.store.prompt_index[rows]
        if weighting == "episode":
            groups = np.searchsorted(self.store.episode_starts, rows, side="right")
        _, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
        return 1.0 / (len(counts) * counts[inverse])

    def frames(self, camera: str, rows: range) -> list[memoryview] | None:
        """Encoded frames of rows of the store; None where the camera is absent from one of them."""
        frames = [self.store.image(camera, row) for row in rows]
        return None if any(frame is None for frame in frames) else frames


class MixtureDataset(Dataset):
    """Several datasets behind one index: the samples of the first, then those of the second, and so on."""

    def __init__(self, datasets: Sequence[VLADataset]) -> None:
        self.datasets = list(datasets)
        self.starts = np.concatenate([[0], np.cumsum([len(dataset) for dataset in datasets])])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Sample:
        dataset, local = self._locate(index)
        return dataset[local]

    def describe(self, index: int) -> str:
        """Where a sample comes from: dataset, file, row, episode and step."""
        dataset, local = self._locate(index)
        return f"{dataset.name}: {dataset.describe(dataset.row(local))}"

    def describe_step(self, dataset_index: int, episode: int, step: int) -> str:
        """Where a time step comes from, by the numbers that a batch carries: dataset, file, row, episode and step."""
        dataset = self.datasets[dataset_index]
        return f"{dataset.name}: {dataset.describe_step(dataset_index, episode, step)}"

    def _locate(self, index: int) -> tuple[VLADataset, int]:
        which = int(self.starts.searchsorted(index, side="right")) - 1
        return self.datasets[which], index - int(self.starts[which])


class BatchLoader:
    """torch's DataLoader over samples, with pixels handed over in shared memory (see `data/shared_memory.py`)."""

    def __init__(self, dataset: VLADataset | MixtureDataset, loader: DataLoader, pool: SlotPool | None) -> None:
        self.dataset, self.batch_sampler = dataset, loader.batch_sampler
        self._loader, self._pool = loader, pool

    def __len__(self) -> int:
        """Batches of one pass; a loader of training data is endless and has no length."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        for packed in self._loader:
            yield packed.unpack(self._pool)


def make_loader(
    dataset: VLADataset | MixtureDataset,
    *,
    num_workers: int,
    batch_sampler: StepBatchSampler | PassBatchSampler | None = None,
    batch_size: int = 1,
    seed: int = 0,
) -> BatchLoader:
    """Batches of a dataset, made by persistent, seeded workers.

    Args:
        dataset: what to load.
        num_workers: processes; 0 loads in this one.
        batch_sampler: an endless, shuffled stream, or a rank's share of one pass; None: one pass in order.
        batch_size: samples per batch of a pass in order.
        seed: of the workers.
    """
    pool, options = None, {}
    batches = PackedBatches(dataset.datasets if isinstance(dataset, MixtureDataset) else [dataset])
    if num_workers:
        largest = batch_size if batch_sampler is None else batch_sampler.micro_batch_size
        pool = SlotPool(
            num_workers, PREFETCH + 3, math.prod(batches.image_shape(largest))
        )  # besides those prefetched: one made, two in use
        options = {"persistent_workers": True, "prefetch_factor": PREFETCH}
    order = {"batch_sampler": batch_sampler} if batch_sampler is not None else {"batch_size": batch_size}
    loader = DataLoader(
        batches,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        generator=torch.Generator().manual_seed(derive_seed("loader", seed)),
        worker_init_fn=functools.partial(_init_worker, pool) if num_workers else None,
        **order,
        **options,
    )
    return BatchLoader(dataset, loader, pool)


def _as_it_is(packed: PackedBatch) -> PackedBatch:
    return packed


def _init_worker(pool: SlotPool, worker_id: int) -> None:
    torch.set_num_threads(1)
    use_pool(pool)
    end_only_for_parent()


def _pad(values: np.ndarray, width: int) -> np.ndarray:
    padded = np.zeros(width, dtype=np.float32)
    padded[: len(values)] = values
    return padded


def build_datasets(
    config: Config, image_processor: VLAImageProcessor, prompt_tokenizer: PromptTokenizer
) -> tuple[MixtureDataset, MixtureDataset | None]:
    """The training and the validation data of a config; no validation data where it names none.

    Validation is `val_parquet_files` (single dataset), or the episodes that `val_fraction` holds out of every
    dataset.

    Raises:
        DataError: training files are missing, or files break the schema.
    """
    data, head = config.data, config.model.action_head_config

    def open_one(index: int, own: MixtureEntry, specs: Sequence[str], key: str, split: str) -> VLADataset:
        return VLADataset(
            resolve_parquet_files(specs, key),
            data,
            horizon=head.horizon,
            per_action_dim=head.per_action_dim,
            cameras=config.cameras,
            image_processor=image_processor,
            prompt_tokenizer=prompt_tokenizer,
            own=own,
            dataset_index=index,
            split=split,
        )

    def key(own: MixtureEntry) -> str:
        return f"data.mixture {own.name}" if data.mixture else "data.train_parquet_files"

    train = [open_one(i, own, own.path, key(own), "train") for i, own in enumerate(config.datasets)]
    val = []
    if data.val_parquet_files:
        if data.mixture:
            raise DataError("data.val_parquet_files does not say which dataset of data.mixture it is; use val_fraction")
        val = [open_one(0, config.datasets[0], data.val_parquet_files, "data.val_parquet_files", "all")]
    elif data.val_fraction:
        val = [open_one(i, own, own.path, key(own), "val") for i, own in enumerate(config.datasets)]
    for dataset in train:
        logger.info("training data %s: %d episodes, %d samples", dataset.name, len(dataset.episodes), len(dataset))
    return MixtureDataset(train), MixtureDataset(val) if val else None


def build_sampler(config: Config, train: MixtureDataset, *, rank: int = 0, world_size: int = 1) -> StepBatchSampler:
    """The sampler of a training run: mixture weights, sampling weights, seed and micro-batches from the config."""
    weighting = config.data.sample_weighting
    return StepBatchSampler(
        [len(dataset) for dataset in train.datasets],
        config.data.batch_size,
        seed=config.training.seed,
        weights=[entry.weight for entry in config.data.mixture] or None,
        probabilities=[dataset.sample_probabilities(weighting) for dataset in train.datasets],
        accumulation=config.training.gradient_accumulation_steps,
        rank=rank,
        world_size=world_size,
    )


def main() -> None:
    """Self-test: read every file, decode first and last frame of every episode, print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", nargs="+", default=["data/samples"], help="Parquet files, folders or globs")
    parser.add_argument("--model_name_or_path", help="directory with tokenizer and image processor; default: none")
    args = parser.parse_args()
    set_up_logging()
    files = resolve_parquet_files(args.data_path, "--data_path")
    first = next(open_parquet(files[0]).iter_batches(batch_size=1, columns=["state", "action"]))
    state_dim, per_action_dim = len(first.column("state")[0]), len(first.column("action")[0])
    store = EpisodeStore(files, state_dim=state_dim, per_action_dim=per_action_dim, cameras=("image_1", "image_2"))
    lengths = np.diff(store.episode_starts)
    decode = VLAImageProcessor(224, 224, (0.5,) * 3, (0.5,) * 3, 3)
    for row in [*store.episode_starts[:-1], *(store.episode_starts[1:] - 1)]:
        for camera in store.cameras:
            frame = store.image(camera, int(row))
            if frame is not None:
                try:
                    decode(frame)
                except ObservationError as error:
                    raise DataError(f"{store.describe(int(row))}: {camera}: {error}") from None
    print(f"{len(files)} files, {store.num_episodes} episodes, {len(store)} steps")
    print(f"episode length: min {lengths.min()}, mean {lengths.mean():.1f}, max {lengths.max()}")
    print(
        f"state {state_dim} values, action {per_action_dim} values, cameras "
        f"{', '.join(camera for camera in store.cameras if store.has_camera(camera))}"
    )
    for prompt in store.prompts:
        print(f"prompt: {prompt}")
    if args.model_name_or_path:
        dataset = VLADataset(
            files,
            DataConfig(state_dim=state_dim),
            horizon=8,
            per_action_dim=per_action_dim,
            cameras=("image_1",),
            image_processor=VLAImageProcessor.from_pretrained(args.model_name_or_path),
            prompt_tokenizer=PromptTokenizer.from_pretrained(args.model_name_or_path, DataConfig().prompt_max_len),
        )
        batch = collate_fn([dataset[0], dataset[len(dataset) - 1]])
        for key, value in batch.items():
            print(f"  {key}: {f'{value.dtype} {tuple(value.shape)}' if torch.is_tensor(value) else value}")
    print("ok")


if __name__ == "__main__":
    try:
        main()
    except (DataError, ObservationError) as error:
        sys.exit(f"error: {error}")
