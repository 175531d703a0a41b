"""From loader workers to training without copying pixels or paging in new memory for every batch.

Workers decode into slots of memory that all processes share. Through the pipe travel the slot's number and the small
arrays. A slot is used again when nothing of its batch is referenced any more. A worker without a free slot allocates
new memory for the batch, so a batch that someone keeps is never overwritten.
"""

from __future__ import annotations

import math
import mmap
import multiprocessing
import os
import signal
import threading
import weakref
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor
from torch.utils.data import get_worker_info

from data.dataset import Arrays, as_batch
from utils.batch import Batch
from utils.parquet_utils import DataError

WORDS_APART = 2053  # of the images: nine words of a frame of 224 x 224, in different columns
_pool: SlotPool | None = None  # this worker process's memory


class SlotPool:
    """`slots` pieces of shared memory per worker, each large enough for the images of one batch."""

    def __init__(self, workers: int, slots: int, slot_bytes: int) -> None:
        self.slots, self.slot_bytes = slots, slot_bytes
        self._memory = mmap.mmap(-1, max(1, workers * slots * slot_bytes))
        self._busy = mmap.mmap(-1, max(1, workers * slots))  # one byte per slot: workers set it, training clears it

    def take(
        self, worker: int, shape: Sequence[int], pixel_type: DTypeLike = np.uint8
    ) -> tuple[int, np.ndarray] | None:
        """A free slot of this worker as memory of `shape`; None where none is free or large enough."""
        if math.prod(shape) * np.dtype(pixel_type).itemsize > self.slot_bytes:
            return None
        for slot in range(worker * self.slots, (worker + 1) * self.slots):
            if not self._busy[slot]:
                self._busy[slot] = 1
                return slot, self._view(slot, shape, pixel_type)
        return None

    def receive(self, slot: int, shape: Sequence[int], pixel_type: DTypeLike = np.uint8) -> Tensor:
        """The images in a slot; it is freed when the last tensor that shares their storage is gone."""
        block = self._view(slot, shape, pixel_type)
        weakref.finalize(block, self._busy.__setitem__, slot, 0)  # the tensor's storage keeps `block` alive
        return torch.from_numpy(block)

    def _view(self, slot: int, shape: Sequence[int], pixel_type: DTypeLike) -> np.ndarray:
        return np.ndarray(tuple(shape), pixel_type, self._memory, slot * self.slot_bytes)


def use_pool(pool: SlotPool | None) -> None:
    """Make `ImageBlock` of this worker process take memory from `pool`; None: new memory for every batch."""
    global _pool
    _pool = pool


def end_only_for_parent() -> None:
    """In a worker: ignore SIGINT and SIGHUP, and SIGTERM unless the training process sent it.

    A scheduler, Ctrl-C, or a terminal that goes away, signals every process of a job. The training process still needs
    batches to finish its step, and it decides when its workers end. A worker whose training process is gone ends by
    itself.
    """
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, whose users have no scheduler
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for, args=(multiprocessing.parent_process().pid,), daemon=True).start()


def _end_for(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


class ImageBlock:
    """Memory for one batch's images, (V, B, S, H, W, 3), and the slot that it lies in, if any."""

    def __init__(self, shape: Sequence[int], pixel_type: DTypeLike = np.uint8) -> None:
        worker = get_worker_info()
        taken = _pool.take(worker.id, shape, pixel_type) if _pool is not None and worker is not None else None
        self.slot, self.images = taken if taken is not None else (None, np.empty(tuple(shape), pixel_type))


class PackedBatch:
    """A batch on its way from a worker to training: images by slot, everything else by value."""

    def __init__(self, arrays: Arrays, cameras: Sequence[str], block: ImageBlock) -> None:
        """
        Args:
            arrays: everything but the images.
            cameras: names of the block's first dimension.
            block: the images.
        """
        self.cameras, self.slot = list(cameras), block.slot
        self.shape, self.pixel_type = block.images.shape, block.images.dtype
        self.images = torch.from_numpy(block.images) if block.slot is None else None
        self.arrays = arrays
        self.checksum = _folded(block.images, arrays) if get_worker_info() is not None else None

    def unpack(self, pool: SlotPool | None) -> Batch:
        """The batch, in the training process.

        Raises:
            DataError: it is not what the worker handed over.
        """
        images = self.images if self.slot is None else pool.receive(self.slot, self.shape, self.pixel_type)
        if self.checksum is not None and _folded(images.numpy(), self.arrays) != self.checksum:
            raise DataError(
                "a batch changed on its way from a loader worker to training; start again from the last checkpoint "
                "and look after this machine's memory (or set data.num_workers: 0)"
            )
        return as_batch(self.arrays, self.cameras, images)


def _folded(images: np.ndarray, arrays: Arrays) -> int:
    """A checksum of a batch: the CRC-32 of every number, and the exclusive or of a few words of every frame.

    A changed bit in a number can be a wild value, and is found. In pixels it is a speck, and what is looked for is a
    slot that was written to by somebody else: a checksum of all pixels would cost a worker a tenth of its time.
    """
    flat = images.reshape(-1)
    words = flat[: flat.size // 8 * 8].view(np.uint64)
    numbers = 0
    for name in sorted(arrays):
        if isinstance(arrays[name], np.ndarray):
            numbers = zlib.crc32(np.ascontiguousarray(arrays[name]), numbers)
    return int(np.bitwise_xor.reduce(words[::WORDS_APART])) ^ numbers
