"""VLATrainerDDP: the same loop over several processes, one per GPU, each with the whole model; only hooks differ."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.vla_model import VLAModel
from training.trainer import VLATrainer
from utils.batch import Batch, example_batch
from utils.config_utils import Config, ConfigError

logger = logging.getLogger(__name__)


class VLATrainerDDP(VLATrainer):
    """Trains over the ranks of the default process group, which must exist (`training/launch.py`).

    The training loader gives this rank's share of every step. The validation loader must give every rank the same
    number of batches, of which the first `val_loader.batch_sampler.num_own` count and the rest fill up.
    """

    def __init__(self, config: Config, *args: Any) -> None:
        """See `VLATrainer`."""
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        super().__init__(config, *args)
        logger.info("%s over %d ranks (%s)", config.training.strategy, self.world_size, dist.get_backend())

    def wrap(self, model: VLAModel) -> nn.Module:
        model = model.to(self.device)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            return model  # DDP would refuse it; the optimizer says more clearly that nothing trains
        # DDP waits for the gradient of every parameter that trains. Those that the loss does not reach are hidden from
        # it while it is built: searching for them in every step (find_unused_parameters) would cost every step.
        unreached = unreached_parameters(model, self.config)
        for parameter in unreached:
            parameter.requires_grad_(False)
        with warnings.catch_warnings():
            # torch 2.13 has another name for broadcast_buffers, which earlier versions do not know.
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = DistributedDataParallel(
                model,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                broadcast_buffers=False,  # statistics and image constants, the same everywhere
                gradient_as_bucket_view=True,
            )
        for parameter in unreached:
            parameter.requires_grad_(True)
        return wrapped

    def sync(self, *, last: bool) -> AbstractContextManager:
        return contextlib.nullcontext() if last else self.model.no_sync()

    def reduce_sum(self, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    def gather_lists(self, items: list[str]) -> list[str]:
        # As JSON in tensors of one length: torch's own gathering of objects would unpickle what other ranks send.
        text = torch.tensor(list(json.dumps(items).encode()), dtype=torch.uint8, device=self.device)
        sizes = torch.zeros(self.world_size, dtype=torch.int64, device=self.device)
        sizes[self.rank] = len(text)
        sizes = self.reduce_sum(sizes).tolist()
        padded = torch.nn.functional.pad(text, (0, max(sizes) - len(text)))
        texts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(texts, padded)
        return [
            item for text, size in zip(texts, sizes, strict=True) for item in json.loads(bytes(text[:size].tolist()))
        ]

    def resume(self, checkpoint: dict[str, Any], path: str) -> None:
        super().resume(checkpoint, path)
        steps = self.gather_lists([str(self.step)])
        if len(set(steps)) > 1:
            raise ConfigError(
                f"{path}: the ranks resumed at different steps ({', '.join(steps)}, in rank order); every machine must "
                "see the same checkpoint: put training.checkpoint_dir on a shared file system"
            )

    def validation_batches(self) -> Iterator[Batch]:
        num_own = self.val_loader.batch_sampler.num_own
        for i, batch in enumerate(super().validation_batches()):
            if i >= num_own:  # a repetition that only keeps this rank's collectives in step with the others'
                batch["action_is_pad"] = torch.ones_like(batch["action_is_pad"])
            yield batch


def unreached_parameters(model: VLAModel, config: Config) -> list[nn.Parameter]:
    """Parameters that would train but get no gradient, found by a forward and a backward pass of an example batch."""
    device = next(model.parameters()).device
    model.train()
    model(example_batch(config, image_size=model.backbone.image_size, device=device)).sum().backward()
    unreached = [p for p in model.parameters() if p.requires_grad and p.grad is None]
    model.zero_grad(set_to_none=True)
    return unreached
