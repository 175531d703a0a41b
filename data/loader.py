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
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

if __name__ == "__main__":  # so that "python data/loader.py" finds the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.episode_store import EpisodeStore
from data.processing import (
    ObservationError,
    PromptTokenizer,
    Sample,
    VLAImageProcessor,
    build_observation,
    collate_fn,
)
from utils.config_utils import Config, DataConfig
from utils.misc import derive_seed, set_up_logging
from utils.parquet_utils import DataError, open_parquet, resolve_parquet_files

__all__ = ["StepBatchSampler", "VLADataset", "VLAImageProcessor", "build_dataset", "collate_fn", "make_loader"]

logger = logging.getLogger(__name__)


class VLADataset(Dataset):
    """Parquet episodes as samples of the batch contract, one per time step, in physical units."""

    def __init__(
        self,
        files: Sequence[Path],
        config: DataConfig,
        *,
        horizon: int,
        per_action_dim: int,
        cameras: Sequence[str],
        image_processor: VLAImageProcessor,
        prompt_tokenizer: PromptTokenizer,
    ) -> None:
        """Open the files (see `EpisodeStore`) and tokenize their instructions once.

        Args:
            files: Parquet files in order.
            config: the `data` section: state_dim, max_seq_len, cache_dir.
            horizon: T, actions per sample.
            per_action_dim: A, values per action.
            cameras: image columns that the model reads; no other frame is ever decoded.
            image_processor, prompt_tokenizer: the same objects that serving uses.

        Raises:
            DataError: the files break the schema.
        """
        self.store = EpisodeStore(
            files,
            state_dim=config.state_dim,
            per_action_dim=per_action_dim,
            cameras=cameras,
            cache_dir=config.cache_dir,
        )
        self.horizon, self.max_seq_len, self.cameras = horizon, config.max_seq_len, tuple(cameras)
        self.image_processor, self.prompt_tokenizer = image_processor, prompt_tokenizer
        for camera in cameras:
            if not self.store.has_camera(camera):
                logger.warning("no file has %s: its slot is masked in every sample", camera)
        for prompt in self.store.prompts:
            prompt_tokenizer(prompt)

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> Sample:
        """The sample at a global row.

        Returns:
            The keys of `build_observation`, and `action` float32 (T, A), `action_is_pad` bool (T,),
            `dataset_index`, `episode_index`, `frame_index`.

        Raises:
            DataError: a frame that can't be decoded, naming file and row.
        """
        store = self.store
        episode, step = store.locate(index)
        begin, end = int(store.episode_starts[episode]), int(store.episode_starts[episode + 1])
        rows = range(max(begin, index - self.max_seq_len + 1), index + 1)
        try:
            sample = build_observation(
                {camera: self._frames(camera, rows) for camera in self.cameras},
                store.prompt(index),
                store.state[index],
                cameras=self.cameras,
                max_seq_len=self.max_seq_len,
                image_processor=self.image_processor,
                prompt_tokenizer=self.prompt_tokenizer,
            )
        except ObservationError as error:
            raise DataError(f"{self.describe(index)}: {error}; drop or mend that episode") from None
        valid = min(self.horizon, end - index)
        action = torch.zeros(self.horizon, store.action.shape[1])
        action[:valid] = torch.from_numpy(np.array(store.action[index : index + valid]))
        sample["action"] = action
        sample["action_is_pad"] = torch.arange(self.horizon) >= valid
        sample["dataset_index"] = 0
        sample["episode_index"] = episode
        sample["frame_index"] = step
        return sample

    def previous_action(self, index: int) -> np.ndarray | None:
        """The action executed just before a step, float32 (A,) in physical units; None at an episode's start."""
        _, step = self.store.locate(index)
        return None if step == 0 else np.array(self.store.action[index - 1])

    def describe(self, index: int) -> str:
        """Where a sample comes from: file, row, episode and step."""
        return self.store.describe(index)

    def _frames(self, camera: str, rows: range) -> list[memoryview] | None:
        frames = [self.store.image(camera, row) for row in rows]
        return None if any(frame is None for frame in frames) else frames


class StepBatchSampler(Sampler[list[int]]):
    """An endless stream of batches whose content is a function of (seed, position) alone.

    Epoch e is a permutation of all samples drawn from (seed, e); epochs follow each other without a seam, so
    every sample comes exactly once per epoch and no batch is short. Position p of the stream belongs to
    optimizer step p // batch_size, whatever the number of micro-batches and ranks, so a run resumes at any
    step with `start_step`, also when those change.

    Each item is one micro-batch of one rank: `batch_size / (accumulation x world_size)` sample indices.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size % (accumulation * world_size):
            raise ValueError(
                f"data.batch_size {batch_size} does not divide by gradient_accumulation_steps {accumulation} x "
                f"{world_size} ranks; choose a multiple of {accumulation * world_size}"
            )
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.accumulation, self.rank, self.world_size = accumulation, rank, world_size
        self.start_step = 0

    def __iter__(self) -> Iterator[list[int]]:
        micro = self.batch_size // (self.accumulation * self.world_size)
        position = self.start_step * self.batch_size
        epoch, order = -1, np.empty(0, dtype=np.int64)
        while True:
            for part in range(self.accumulation):
                begin = position + (part * self.world_size + self.rank) * micro
                batch = []
                for p in range(begin, begin + micro):
                    if p // self.num_samples != epoch:
                        epoch = p // self.num_samples
                        order = self.epoch_order(epoch)
                    batch.append(int(order[p % self.num_samples]))
                yield batch
            position += self.batch_size

    def epoch_order(self, epoch: int) -> np.ndarray:
        """The permutation of epoch `epoch`, int64 (num_samples,)."""
        return np.random.default_rng(derive_seed("order", self.seed, epoch)).permutation(self.num_samples)


def make_loader(
    dataset: Dataset,
    *,
    num_workers: int,
    batch_sampler: StepBatchSampler | None = None,
    batch_size: int = 1,
    seed: int = 0,
) -> DataLoader:
    """A loader with persistent, seeded workers: endless and shuffled with a sampler, else one pass in order."""
    options = {"persistent_workers": True, "prefetch_factor": 4} if num_workers else {}
    order = {"batch_sampler": batch_sampler} if batch_sampler is not None else {"batch_size": batch_size}
    return DataLoader(
        dataset,
        num_workers=num_workers,
        collate_fn=collate_fn,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(derive_seed("loader", seed)),
        worker_init_fn=_init_worker if num_workers else None,
        **order,
        **options,
    )


def build_dataset(
    config: Config, key: str, image_processor: VLAImageProcessor, prompt_tokenizer: PromptTokenizer
) -> VLADataset | None:
    """The dataset of `data.train_parquet_files` or `data.val_parquet_files` (`key`); None where it is empty.

    Raises:
        DataError: training files are missing, or files break the schema.
    """
    specs = getattr(config.data, key)
    if not specs and key == "val_parquet_files":
        return None
    head = config.model.action_head_config
    return VLADataset(
        resolve_parquet_files(specs, f"data.{key}"),
        config.data,
        horizon=head.horizon,
        per_action_dim=head.per_action_dim,
        cameras=config.cameras,
        image_processor=image_processor,
        prompt_tokenizer=prompt_tokenizer,
    )


def _init_worker(worker_id: int) -> None:
    torch.set_num_threads(1)


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
