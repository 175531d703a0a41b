"""VLATrainerDDP: the same loop over many processes, one per GPU; only hooks are overridden.

`training.strategy: ddp` keeps the whole model on every rank (DistributedDataParallel) and exchanges gradients;
`fsdp` also shards weights, gradients and optimizer moments over the ranks (see `training/sharding.py`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from model.vla_model import VLAModel
from training.sharding import shard_like, shard_model, whole
from training.trainer import Batch, VLATrainer
from utils.checkpoint import remove_unreferenced_shards
from utils.config_utils import Config, ConfigError
from utils.shards import SUFFIX as SHARDS
from utils.shards import save_shards

logger = logging.getLogger(__name__)


class VLATrainerDDP(VLATrainer):
    """Trains over the ranks of the default process group, which must exist (`training/launch.py`).

    The validation loader must give every rank the same number of batches, of which the first
    `val_loader.batch_sampler.num_own` count and the rest fill up.
    """

    def __init__(self, config: Config, *args: Any) -> None:
        """See `VLATrainer`; the training loader gives this rank's share of every step."""
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.sharded = config.training.strategy == "fsdp"
        super().__init__(config, *args)
        logger.info("%s over %d ranks (%s)", config.training.strategy, self.world_size, dist.get_backend())

    def wrap(self, model: VLAModel) -> nn.Module:
        if self.sharded:
            return shard_model(model, self.config, self.device, self.world_size)
        model = model.to(self.device)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            return model  # the optimizer says so
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
        if self.sharded:
            self.model.set_requires_gradient_sync(last)
            return contextlib.nullcontext()
        return contextlib.nullcontext() if last else self.model.no_sync()

    def reduce_sum(self, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    def gather_lists(self, items: list[str]) -> list[str]:
        own = torch.tensor(list(json.dumps(items).encode()), dtype=torch.uint8, device=self.device)  # never pickled
        sizes = torch.zeros(self.world_size, dtype=torch.int64, device=self.device)
        sizes[self.rank] = len(own)
        sizes = self.reduce_sum(sizes).tolist()
        padded = torch.nn.functional.pad(own, (0, max(sizes) - len(own)))
        every = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(every, padded)
        return [item for one, size in zip(every, sizes, strict=True) for item in json.loads(bytes(one[:size].tolist()))]

    def gather_state(self, state: dict[str, Any]) -> dict[str, Any]:
        if not self.sharded or self.config.training.checkpoint_format == "shards":
            return state
        return whole(state, keep=self.rank == 0)

    def set_aside(self, checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
        if self.config.training.checkpoint_format == "file":
            return checkpoint
        return save_shards(checkpoint, path.with_name(f"{path.name}.step_{self.step}{SHARDS}"))

    def save(self, name: str, same_as: Path | None = None) -> Path:
        path = super().save(name, same_as)
        if self.rank == 0 and self.config.training.checkpoint_format == "shards":
            remove_unreferenced_shards(path.parent)
        return path

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        if self.sharded:
            parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            parts = {
                index: {key: shard_like(value, parameters[index]) for key, value in values.items()}
                for index, values in state["state"].items()
                if index < len(parameters)
            }
            state = {**state, "state": parts}
        super().load_optimizer_state(state)

    def load_average(self, state: dict[str, Any]) -> None:
        if self.sharded:
            own = self.ema.weights
            parts = {name: shard_like(value, own[name]) for name, value in state["weights"].items() if name in own}
            state = {**state, "weights": parts}
        super().load_average(state)

    def clip_gradients(self) -> float:
        if not self.sharded:
            return super().clip_gradients()
        limit = self.config.training.grad_clip_norm
        trained = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        norm = nn.utils.clip_grad_norm_(trained, math.inf if limit is None else limit)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    def evaluate(self) -> dict[str, float] | None:
        values = super().evaluate()
        if self.sharded:
            self.model.reshard()  # no backward pass follows that would do it
        return values

    def resume(self, checkpoint: dict[str, Any], path: str) -> None:
        super().resume(checkpoint, path)
        steps = self.gather_lists([str(self.step)])
        if len(set(steps)) > 1:
            raise ConfigError(
                f"{path}: the ranks resumed at different steps ({', '.join(steps)}, in rank order); every machine must "
                "see the same checkpoint: put training.checkpoint_dir on a shared file system"
            )

    def _validation_batches(self) -> Iterable[Batch]:
        own = self.val_loader.batch_sampler.num_own
        for i, batch in enumerate(super()._validation_batches()):
            if i >= own:  # a repetition that only keeps this rank's collectives in step with the others'
                batch["action_is_pad"] = torch.ones_like(batch["action_is_pad"])
            yield batch


def unreached_parameters(model: VLAModel, config: Config) -> list[nn.Parameter]:
    """Parameters that would train but get no gradient, found by one forward and backward pass of a made-up sample."""
    head, frames = config.model.action_head_config, config.data.max_seq_len
    device, side = next(model.parameters()).device, model.backbone.image_size
    flags = {"dtype": torch.bool, "device": device}
    batch: Batch = {
        camera: torch.zeros(1, frames, 3, side, side, dtype=torch.uint8, device=device) for camera in model.cameras
    }
    batch |= {
        "image_mask": torch.ones(1, len(model.cameras), **flags),
        "vlm_attention_mask": torch.ones(1, frames, **flags),
        "raw_prompt_text": [""],
        "input_ids": torch.zeros(1, 2, dtype=torch.int64, device=device),
        "prompt_mask": torch.ones(1, 2, **flags),
        "state": torch.zeros(1, config.data.state_dim, device=device),
        "action": torch.zeros(1, head.horizon, head.per_action_dim, device=device),
        "action_is_pad": torch.zeros(1, head.horizon, **flags),
        "dataset_index": torch.zeros(1, dtype=torch.int64, device=device),
    }
    model.train()
    model(batch).sum().backward()
    unreached = [p for p in model.parameters() if p.requires_grad and p.grad is None]
    model.zero_grad(set_to_none=True)
    return unreached
