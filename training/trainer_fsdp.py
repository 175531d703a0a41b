"""VLATrainerFSDP: weights, gradients and optimizer moments are spread over the ranks too (see `training/sharding.py`).

Its checkpoints are those of one process, unless `training.checkpoint_format` is `shards`: every rank then writes its
part beside the file.
"""

from __future__ import annotations

import contextlib
import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from model.vla_model import VLAModel
from training.sharding import shard_like, shard_model, whole
from training.trainer_ddp import VLATrainerDDP
from utils.checkpoint import remove_unreferenced_shards
from utils.shards import SUFFIX, save_shards


class VLATrainerFSDP(VLATrainerDDP):
    """Trains a sharded model (FSDP2); needs what `VLATrainerDDP` needs."""

    @property
    def in_shards(self) -> bool:
        """Whether checkpoints stay in parts."""
        return self.config.training.checkpoint_format == "shards"

    def wrap(self, model: VLAModel) -> nn.Module:
        return shard_model(model, self.config, self.device, self.world_size)

    def sync(self, *, last: bool) -> AbstractContextManager:
        self.model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def gather_state(self, state: dict[str, Any]) -> dict[str, Any]:
        return state if self.in_shards else whole(state, keep=self.rank == 0)

    def own_part(self, value: Tensor, parameter: Tensor) -> Tensor:
        return shard_like(value, parameter)

    def write_shards(self, checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
        if not self.in_shards:
            return checkpoint
        return save_shards(checkpoint, path.with_name(f"{path.name}.step_{self.step}{SUFFIX}"))

    def save(self, name: str, same_as: Path | None = None) -> Path:
        path = super().save(name, same_as)
        if self.rank == 0 and self.in_shards:
            remove_unreferenced_shards(path.parent)
        return path

    def clip_gradients(self) -> float:
        limit = self.config.training.grad_clip_norm
        trained = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        norm = nn.utils.clip_grad_norm_(trained, math.inf if limit is None else limit)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    def evaluate(self) -> dict[str, float] | None:
        values = super().evaluate()
        self.model.reshard()  # a training step's backward pass does that; here none follows
        return values
