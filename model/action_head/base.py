"""What every action head offers, and what heads share.

Shape letters: B batch, L context tokens, E context width, T horizon, A per_action_dim, S state_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.context import Context
from utils.config_utils import ActionHeadConfig

Generators = torch.Generator | Sequence[torch.Generator] | None


class ActionHeadBase(nn.Module, ABC):
    """A head sees the context and normalized actions; never pixels, text or physical units."""

    def __init__(self, config: ActionHeadConfig, context_dim: int, state_dim: int) -> None:
        super().__init__()
        self.config = config
        self.horizon, self.per_action_dim = config.horizon, config.per_action_dim

    @abstractmethod
    def loss(
        self, context: Context, action_BTA: Tensor, action_is_pad_BT: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Loss per action step, float32 (B, T), zero where `action_is_pad_BT`.

        Args:
            context: the fused observation.
            action_BTA: float32, normalized; values where `action_is_pad_BT` is True have no influence.
            action_is_pad_BT: bool, True past the episode's end.
            generator: source of noise; None: torch's global one.
        """

    @abstractmethod
    def sample(self, context: Context, generator: Generators = None, num_inference_steps: int = 10) -> Tensor:
        """Actions for a context, float32 (B, T, A), normalized.

        Args:
            generator: one for the batch, one per sample (then a sample's noise does not depend on what else is
                in the batch), or None for torch's global one.
            num_inference_steps: integration or denoising steps, for heads that iterate.
        """


def randn(shape: Sequence[int], generator: Generators, device: torch.device) -> Tensor:
    """Standard normal float32 noise, drawn where the generator lives (so that a CPU seed means the same on a GPU)."""
    if generator is None or isinstance(generator, torch.Generator):
        source = device if generator is None else generator.device
        return torch.randn(tuple(shape), generator=generator, device=source).to(device)
    assert len(generator) == shape[0], "one generator per sample"
    return torch.cat([randn((1, *shape[1:]), one, device) for one in generator])


def rand(shape: Sequence[int], generator: Generators, device: torch.device) -> Tensor:
    """Uniform float32 noise in [0, 1); see `randn`."""
    if generator is None or isinstance(generator, torch.Generator):
        source = device if generator is None else generator.device
        return torch.rand(tuple(shape), generator=generator, device=source).to(device)
    assert len(generator) == shape[0], "one generator per sample"
    return torch.cat([rand((1, *shape[1:]), one, device) for one in generator])
