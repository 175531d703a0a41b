"""Which samples make which batch: a function of (seed, position) alone, over one dataset or a mixture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from utils.misc import derive_seed

BLOCK = 4096  # positions of a mixture's stream whose datasets are drawn together


class StepBatchSampler(Sampler[list[int]]):
    """An endless stream of batches that can be entered at any optimizer step.

    A single dataset: epoch e is a permutation of all its samples drawn from (seed, e), and epochs follow each
    other without a seam, so every sample comes exactly once per epoch and no batch is short. With
    `probabilities`, epoch e is drawn with replacement instead.

    A mixture: each position of the stream first draws a dataset by `weights`, then takes that dataset's next
    sample from its own stream, as above. Which samples a dataset gives, and in which order, therefore does not
    depend on the other datasets.

    Position p belongs to optimizer step p // batch_size, whatever the number of micro-batches and ranks, so a
    run resumes at any step with `start_step`, also when those change.

    Each item is one micro-batch of one rank: `batch_size / (accumulation x world_size)` indices into the
    concatenation of the datasets.
    """

    def __init__(
        self,
        sizes: int | Sequence[int],
        batch_size: int,
        *,
        seed: int,
        weights: Sequence[float] | None = None,
        probabilities: Sequence[np.ndarray | None] | None = None,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """
        Args:
            sizes: samples of each dataset.
            batch_size: samples per optimizer step, over all micro-batches and ranks.
            seed: of every draw.
            weights: share of each dataset, relative to each other; None: in proportion to the sizes.
            probabilities: per dataset float64 (size,) that sum to 1, or None for a permutation.
            accumulation, rank, world_size: how a step's samples are spread.

        Raises:
            ValueError: batch_size does not divide evenly.
        """
        if batch_size % (accumulation * world_size):
            raise ValueError(
                f"data.batch_size {batch_size} does not divide by gradient_accumulation_steps {accumulation} x "
                f"{world_size} ranks; choose a multiple of {accumulation * world_size}"
            )
        self.sizes = [sizes] if isinstance(sizes, int) else list(sizes)
        self.weights = np.asarray(self.sizes if weights is None else weights, dtype=np.float64)
        self.weights = self.weights / self.weights.sum()
        self.probabilities = probabilities or [None] * len(self.sizes)
        self.num_samples, self.batch_size, self.seed = sum(self.sizes), batch_size, seed
        self.accumulation, self.rank, self.world_size = accumulation, rank, world_size
        self.start_step = 0

    def __iter__(self) -> Iterator[list[int]]:
        micro = self.micro_batch_size
        stream = _Stream(self)
        position = self.start_step * self.batch_size
        while True:
            for part in range(self.accumulation):
                begin = position + (part * self.world_size + self.rank) * micro
                yield stream.take(begin, micro).tolist()
            position += self.batch_size

    @property
    def micro_batch_size(self) -> int:
        """Samples of each item."""
        return self.batch_size // (self.accumulation * self.world_size)

    def epoch_order(self, dataset: int, epoch: int) -> np.ndarray:
        """The samples of one dataset's epoch in order, int64 (size,)."""
        generator = np.random.default_rng(derive_seed("order", self.seed, dataset, epoch))
        size, probabilities = self.sizes[dataset], self.probabilities[dataset]
        if probabilities is None:
            return generator.permutation(size)
        return generator.choice(size, size=size, p=probabilities)

    def block_datasets(self, block: int) -> np.ndarray:
        """The dataset of each position of one block of a mixture's stream, int64 (BLOCK,)."""
        generator, counts = self._block_counts(block)
        return generator.permutation(np.repeat(np.arange(len(self.sizes)), counts))

    def _block_counts(self, block: int) -> tuple[np.random.Generator, np.ndarray]:
        generator = np.random.default_rng(derive_seed("mixture", self.seed, block))
        return generator, generator.multinomial(BLOCK, self.weights)


class PassBatchSampler(Sampler[list[int]]):
    """One pass in order over a dataset that ranks share: batch i of the pass goes to rank i modulo world_size.

    Every rank yields the same number of batches, so that its collectives stay in step with the other ranks'. Its first
    `num_own` batches are its share of the pass, in which no sample comes twice. The rest only fill up.
    """

    def __init__(
        self, size: int, batch_size: int, *, limit: int | None = None, rank: int = 0, world_size: int = 1
    ) -> None:
        """
        Args:
            size: samples of the dataset.
            batch_size: samples per batch; the last of the pass may be shorter.
            limit: samples to take at most, spread evenly over all of them; None: every sample.
            rank, world_size: whose share.
        """
        self.micro_batch_size, self.rank, self.world_size = batch_size, rank, world_size
        taken = size if limit is None else min(size, limit)
        self.samples = np.arange(taken) * size // taken
        batches = math.ceil(taken / batch_size)
        self.num_own = len(range(rank, batches, world_size))
        self.length = math.ceil(batches / world_size)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[int]]:
        for i in range(self.length):
            if i >= self.num_own:
                yield [0]
                continue
            begin = (i * self.world_size + self.rank) * self.micro_batch_size
            yield self.samples[begin : begin + self.micro_batch_size].tolist()


class _Stream:
    """Global sample indices at positions; keeps the orders that were used last."""

    def __init__(self, sampler: StepBatchSampler) -> None:
        self.sampler = sampler
        self.offsets = np.concatenate([[0], np.cumsum(sampler.sizes)])
        self.orders: dict[int, tuple[int, np.ndarray]] = {}  # dataset -> (epoch, order)
        self.block = -1
        self.taken = np.zeros(len(sampler.sizes), dtype=np.int64)  # samples of each dataset before the block

    def take(self, begin: int, count: int) -> np.ndarray:
        """The samples at positions begin to begin + count, int64 (count,)."""
        positions = np.arange(begin, begin + count)
        if len(self.sampler.sizes) == 1:
            return self._samples(0, positions)
        samples = np.empty(count, dtype=np.int64)
        for block in np.unique(positions // BLOCK).tolist():
            if block != self.block:
                self._enter(block)
            here = np.flatnonzero(positions // BLOCK == block)
            within = positions[here] % BLOCK
            for dataset in np.unique(self.datasets[within]).tolist():
                chosen = self.datasets[within] == dataset
                samples[here[chosen]] = self._samples(dataset, self.ranks[within[chosen]])
        return samples

    def _enter(self, block: int) -> None:
        if block < self.block:
            self.block, self.taken = -1, np.zeros_like(self.taken)
        for earlier in range(max(self.block, 0), block):
            self.taken = self.taken + self.sampler._block_counts(earlier)[1]
        self.block, self.datasets = block, self.sampler.block_datasets(block)
        self.ranks = np.empty(BLOCK, dtype=np.int64)  # which of its dataset's samples each position takes
        for dataset in range(len(self.taken)):
            here = self.datasets == dataset
            self.ranks[here] = self.taken[dataset] + np.arange(here.sum())

    def _samples(self, dataset: int, ranks: np.ndarray) -> np.ndarray:
        """Samples number `ranks` of a dataset's endless stream; `ranks` ascend."""
        epochs, places = np.divmod(ranks, self.sampler.sizes[dataset])
        parts = []
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            if self.orders.get(dataset, (-1,))[0] != epoch:
                self.orders[dataset] = epoch, self.sampler.epoch_order(dataset, epoch)
            parts.append(self.orders[dataset][1][places[epochs == epoch]])
        return self.offsets[dataset] + np.concatenate(parts)
