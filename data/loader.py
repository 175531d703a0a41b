"""Batches for training and evaluation, made by worker processes from what `data/dataset.py` reads.

python data/loader.py --data_path data/samples     # self-test: prints what the files hold
"""

from __future__ import annotations

import functools
import logging
import math
import multiprocessing
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    # "python data/loader.py" puts data/ first on the path, where Python's own `statistics` would be looked for: the
    # repository takes its place.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.dataset import MixtureDataset, VLADataset
from data.episode_store import EpisodeStore
from data.processing import ObservationError, PromptTokenizer, VLAImageProcessor, collate_fn
from data.sampler import PassBatchSampler, StepBatchSampler
from data.schema import VECTORS, vector_width
from data.shared_memory import ImageBlock, PackedBatch, SlotPool, end_only_for_parent, use_pool
from data.tables import cameras_of, open_table
from data.weighting import check_weighting, sample_probabilities
from utils.arguments import CommandParser, run_command
from utils.batch import Batch
from utils.config_utils import Config, DataConfig, MixtureEntry
from utils.misc import derive_seed, set_up_logging
from utils.parquet_utils import DataError
from utils.recordings import Recording, resolve_recordings

__all__ = [
    "VLADataset",
    "VLAImageProcessor",
    "build_datasets",
    "build_loaders",
    "build_sampler",
    "collate_fn",
    "make_loader",
    "open_dataset",
    "open_for_evaluation",
]

logger = logging.getLogger(__name__)

LOST_WORKER = re.compile(r"DataLoader worker .*(killed by signal|exited unexpectedly)")  # torch's words
PREFETCH = 4  # batches that each worker makes ahead


class PackedBatches(Dataset):
    """What loader workers run: whole batches, their images in shared memory where there is a free slot."""

    def __init__(self, datasets: Sequence[VLADataset]) -> None:
        self.dataset, self.first = MixtureDataset(datasets), datasets[0]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> PackedBatch:
        """The batch of some samples; raises the DataError of `VLADataset.batch`."""
        block = ImageBlock(self.first.image_shape(len(indices)), self.first.image_processor.pixel_type)
        arrays = self.dataset.arrays(np.asarray(indices), block.images.swapaxes(0, 1))
        return PackedBatch(arrays, self.first.cameras, block)


class BatchLoader:
    """torch's DataLoader over samples, with pixels handed over in shared memory (see `data/shared_memory.py`)."""

    def __init__(self, dataset: VLADataset | MixtureDataset, loader: DataLoader, pool: SlotPool | None) -> None:
        self.dataset, self.batch_sampler = dataset, loader.batch_sampler
        self._loader, self._pool = loader, pool

    def __len__(self) -> int:
        """Batches of one pass; a loader of training data is endless and has no length."""
        return len(self._loader)

    def close(self) -> None:
        """End the workers; iterating again starts new ones.

        Where they are left to the garbage collector, torch waits five seconds for each: the queue that would tell a
        worker to end may be collected before it has.
        """
        if self._loader._iterator is not None:
            self._loader._iterator._shutdown_workers()
            self._loader._iterator = None

    def _start(self) -> Iterator[PackedBatch]:
        """Start the workers. torch would let the death of one raise an error in the middle of whatever runs then, such
        as the optimizer's step; asking for the next batch finds it as well."""
        if threading.current_thread() is not threading.main_thread():
            return iter(self._loader)
        before = signal.getsignal(signal.SIGCHLD)
        batches = iter(self._loader)
        signal.signal(signal.SIGCHLD, before)
        return batches

    def __iter__(self) -> Iterator[Batch]:
        batches = self._start()
        while True:
            try:
                packed = next(batches, None)
            except RuntimeError as error:
                raise _worker_error(error) from None
            if packed is None:
                return
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
        slots = PREFETCH + 3  # besides those prefetched: one being made, two in use
        first = batches.first
        slot_bytes = math.prod(first.image_shape(largest)) * first.image_processor.pixel_type.itemsize
        if multiprocessing.get_start_method() == "fork":  # else workers share no memory of this process
            pool = SlotPool(num_workers, slots, slot_bytes)
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


def _worker_error(error: RuntimeError) -> Exception:
    """A DataError for a loader worker that died, and any other error as it is."""
    if not LOST_WORKER.search(str(error)):
        return error
    reason = str(error).splitlines()[0]
    return DataError(
        f"a loader worker died ({reason}), perhaps for want of memory: start again from the last checkpoint, with "
        "fewer data.num_workers where it happens again"
    )


def _as_it_is(packed: PackedBatch) -> PackedBatch:
    return packed


def _init_worker(pool: SlotPool | None, worker_id: int) -> None:
    torch.set_num_threads(1)
    use_pool(pool)
    end_only_for_parent()


def open_dataset(
    config: Config,
    image_processor: VLAImageProcessor,
    prompt_tokenizer: PromptTokenizer,
    paths: Recording | Sequence[Recording],
    key: str,
    dataset_index: int = 0,
    split: Literal["all", "train", "val"] = "all",
) -> VLADataset:
    """Recorded data as a policy with this config reads it.

    Args:
        config: of the policy.
        image_processor, prompt_tokenizer: the policy's.
        paths: files, folders, globs or lerobot:/path.
        key: the config key or flag that `paths` come from, for errors.
        dataset_index: which of `config.datasets` it is, or is like: decides name, widths and statistics.
        split: see VLADataset.

    Raises:
        DataError: files are missing, or break the schema.
    """
    entry = config.datasets[dataset_index]
    return VLADataset(
        resolve_recordings(paths, key, entry.lerobot),
        config.data,
        horizon=config.model.action_head_config.horizon,
        per_action_dim=config.model.action_head_config.per_action_dim,
        cameras=config.cameras,
        reads_state=config.reads_state,
        image_processor=image_processor,
        prompt_tokenizer=prompt_tokenizer,
        entry=entry,
        dataset_index=dataset_index,
        split=split,
    )


def open_for_evaluation(
    config: Config,
    image_processor: VLAImageProcessor,
    prompt_tokenizer: PromptTokenizer,
    paths: Sequence[str] | None,
    dataset_index: int = 0,
) -> dict[str, VLADataset]:
    """Recorded data to evaluate a policy on: a dataset per path, or, without paths, what its config held out (`val`).

    Raises:
        DataError: files are missing or break the schema, or the config holds nothing out.
    """
    data, open_one = config.data, functools.partial(open_dataset, config, image_processor, prompt_tokenizer)
    if paths:
        return {path: open_one(path, "--eval_data_path", dataset_index) for path in paths}
    if data.val_parquet_files:
        return {"val": open_one(data.val_parquet_files, "data.val_parquet_files", dataset_index)}
    if data.val_fraction:
        entry = config.datasets[dataset_index]
        return {"val": open_one(entry.path, f"the training data of {entry.name}", dataset_index, "val")}
    raise DataError(
        "--split val: the checkpoint's config holds nothing out (data.val_parquet_files, data.val_fraction); give "
        "--eval_data_path"
    )


def build_datasets(
    config: Config, image_processor: VLAImageProcessor, prompt_tokenizer: PromptTokenizer
) -> tuple[MixtureDataset, MixtureDataset | None]:
    """The training and the validation data of a config; no validation data where it names none.

    Validation is `val_parquet_files` (single dataset), or the episodes that `val_fraction` holds out of every
    dataset.

    Raises:
        DataError: training files are missing, files break the schema, val_fraction holds out no episode, or
            sample_weighting leaves out everything or changes nothing.
    """
    data = config.data
    open_one = functools.partial(open_dataset, config, image_processor, prompt_tokenizer)

    def key(entry: MixtureEntry) -> str:
        return f"data.mixture {entry.name}" if data.mixture else "data.train_parquet_files"

    train = [open_one(entry.path, key(entry), i, "train") for i, entry in enumerate(config.datasets)]
    val = []
    if data.val_parquet_files:
        if data.mixture:
            raise DataError("data.val_parquet_files does not say which dataset of data.mixture it is; use val_fraction")
        val = [open_one(data.val_parquet_files, "data.val_parquet_files")]
    elif data.val_fraction:
        val = [open_one(entry.path, key(entry), i, "val") for i, entry in enumerate(config.datasets)]
    for dataset in val if data.val_fraction else ():
        if not len(dataset):
            used = min(dataset.store.num_episodes, data.max_episodes or dataset.store.num_episodes)
            raise DataError(
                f"dataset {dataset.name}: data.val_fraction {data.val_fraction} of {used} episode holds out none, for "
                "one must be left to train on; record more, or set it to 0"
            )
    samples = {dataset.name: (dataset.store, dataset.rows(np.arange(len(dataset)))) for dataset in train}
    check_weighting(samples, data.sample_weighting)
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
        probabilities=[
            sample_probabilities(dataset.store, dataset.rows(np.arange(len(dataset))), weighting)
            for dataset in train.datasets
        ],
        accumulation=config.training.gradient_accumulation_steps,
        rank=rank,
        world_size=world_size,
    )


def build_loaders(
    config: Config,
    image_processor: VLAImageProcessor,
    prompt_tokenizer: PromptTokenizer,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[BatchLoader, BatchLoader | None]:
    """A rank's share of the training data, endless, and of the validation data, in micro-batches of one size.

    Raises:
        DataError: see `build_datasets`.
    """
    share, workers = {"rank": rank, "world_size": world_size}, config.data.num_workers
    train_set, val_set = build_datasets(config, image_processor, prompt_tokenizer)
    steps = build_sampler(config, train_set, **share)
    train_loader = make_loader(train_set, num_workers=workers, batch_sampler=steps, seed=config.training.seed)
    if val_set is None:
        return train_loader, None
    batches = config.training.val_max_batches
    limit = None if batches is None else batches * config.data.batch_size
    one_pass = PassBatchSampler(len(val_set), steps.micro_batch_size, limit=limit, **share)
    return train_loader, make_loader(val_set, num_workers=workers, batch_sampler=one_pass)


def main() -> None:
    """Self-test: read every file, decode first and last frame of every episode, print what the files hold."""
    parser = CommandParser(__doc__)
    parser.add_argument(
        "--data_path", nargs="+", default=["data/samples"], help="Parquet files, folders, globs or lerobot:/path"
    )
    parser.add_argument("--model_name_or_path", help="directory with tokenizer and image processor; default: none")
    args = parser.parse_args()
    set_up_logging()
    files = resolve_recordings(args.data_path, "--data_path")
    with open_table(files[0]) as table:
        _, first = next(table.batches(list(VECTORS), 1))
    cameras = cameras_of(files)
    state_dim, per_action_dim = (vector_width(first.column(name), name, files[0]) for name in VECTORS)
    store = EpisodeStore(files, state_dim=state_dim, per_action_dim=per_action_dim, cameras=cameras)
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
            cameras=cameras[:1],
            image_processor=VLAImageProcessor.from_pretrained(args.model_name_or_path),
            prompt_tokenizer=PromptTokenizer.from_pretrained(args.model_name_or_path, DataConfig().prompt_max_len),
        )
        batch = dataset.batch([0, len(dataset) - 1])
        for key, value in batch.items():
            print(f"  {key}: {f'{value.dtype} {tuple(value.shape)}' if torch.is_tensor(value) else value}")
    print("ok")


if __name__ == "__main__":
    run_command(main)
