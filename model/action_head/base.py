"""What every action head offers, and what heads share.

Shape letters: B batch, L context tokens, E context width, T horizon, A per_action_dim, S state_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.action_head.guidance import ActionPrefix
from model.context import Context
from utils.config_utils import ActionHeadConfig

Generators = torch.Generator | Sequence[torch.Generator] | None


class ActionHeadBase(nn.Module, ABC):
    """A head sees the context and normalized actions; never pixels, text or physical units.

    Made by `build_action_head` as `Head(config, context_dim, state_dim, action_range)`; see there.

    Attributes:
        config: its section of the configuration.
        is_stochastic: whether two samples of one context differ, so that a spread and a best of k mean something.
        continues_chunks: whether `sample` takes a `prefix` (`model.action_head.guidance.ActionPrefix`, normalized)
            that the chunk is to continue.
    """

    config: ActionHeadConfig
    is_stochastic: bool = False
    continues_chunks: bool = False

    @property
    def horizon(self) -> int:
        """T, action steps per prediction."""
        return self.config.horizon

    @property
    def per_action_dim(self) -> int:
        """A, values per action step."""
        return self.config.per_action_dim

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

    def sample(
        self,
        context: Context,
        generator: Generators = None,
        num_inference_steps: int = 10,
        prefix: ActionPrefix | None = None,
    ) -> Tensor:
        """Actions for a context, float32 (B, T, A), normalized.

        Args:
            generator: one for the batch, one per sample (then a sample's noise does not depend on what else is
                in the batch), or None for torch's global one.
            num_inference_steps: integration or denoising steps, for heads that iterate.
            prefix: what the chunk has to continue, normalized; only for heads that `continues_chunks`.
        """
        batch, device = len(context.tokens_BLE), context.tokens_BLE.device
        noise = self.draw_noise(batch, generator, device, num_inference_steps)
        return self.sample_from(context, noise, num_inference_steps, prefix=prefix)

    def draw_noise(
        self, batch_size: int, generator: Generators, device: torch.device, num_inference_steps: int
    ) -> Tensor | None:
        """All that chance decides in one `sample`, float32 (B, ...); None for heads that leave nothing to it."""
        return None

    def schedule(self, num_inference_steps: int, device: torch.device) -> Any:
        """What `sample_from` computes from the number of steps alone, so that it can be kept; None: nothing."""
        return None

    @abstractmethod
    def sample_from(
        self,
        context: Context,
        noise: Tensor | None,
        num_inference_steps: int,
        schedule: Any = None,
        prefix: ActionPrefix | None = None,
    ) -> Tensor:
        """`sample` without chance: a function of tensors, which, without a prefix, never waits for the GPU.

        Args:
            noise: from `draw_noise`.
            schedule: from `schedule`, for the same steps and weights; None: computed here.
            prefix: as for `sample`.
        """


def existing_dims(context: Context, per_action_dim: int) -> Tensor:
    """1.0 for action dimensions that a sample's dataset has, 0.0 for the others, float32 (B, 1, A)."""
    if context.action_dim_mask_BA is None:
        return torch.ones(len(context.tokens_BLE), 1, per_action_dim, device=context.tokens_BLE.device)
    return context.action_dim_mask_BA[:, None].float()


def step_mean(error_NTA: Tensor, exists_B1A: Tensor, action_is_pad_BT: Tensor) -> Tensor:
    """Mean error per action step, (B, T), over existing dimensions and draws; zero where `action_is_pad_BT`.

    Args:
        error_NTA: one row per sample, or several consecutive ones (draws).
        exists_B1A: from `existing_dims`.
        action_is_pad_BT: bool.
    """
    weight_B1A = exists_B1A / exists_B1A.sum(dim=-1, keepdim=True)
    error_BKTA = error_NTA.unflatten(0, (len(weight_B1A), -1)) * weight_B1A[:, None]
    return error_BKTA.sum(dim=-1).mean(dim=1).masked_fill(action_is_pad_BT, 0.0)


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
