"""What every action head offers, and what heads share.

Shape letters: B batch, L context tokens, E context width, T horizon, A per_action_dim, S state_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.context import ActionPrefix, Context
from utils.config_utils import ActionHeadConfig


class ActionHeadBase(nn.Module, ABC):
    """A head sees the context and normalized actions; never pixels, text or physical units.

    Made by `build_action_head` as `Head(config, spec, state_dim, action_range)`; see there.

    Attributes:
        config: its section of the configuration.
        is_stochastic: whether two samples of one context differ, so that a spread and a best of k mean something.
        continues_chunks: whether `sample` takes a `prefix` that the chunk is to continue.
        wants_keys_values: whether it reads `Context.keys_values`, which are collected for no other head.
        wants_tokens: whether it reads `Context.tokens_BLE`, which may mean nothing otherwise.
        uncertainty: what `sample_draws` says of how unsure it was: a name; None: nothing.
    """

    config: ActionHeadConfig
    is_stochastic: bool = False
    continues_chunks: bool = False
    wants_keys_values: bool = False
    wants_tokens: bool = True
    uncertainty: str | None = None

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

    def adapt(self, config: ActionHeadConfig, dtype: torch.dtype) -> None:
        """Freeze, quantize and adapt what `config` says, in place; frozen weights are stored in `dtype`."""

    def exact_parts(self) -> list[nn.Module]:
        """Parts that compute in float32 whatever the rest computes in."""
        return []

    def draw_noise(
        self, generators: Sequence[torch.Generator], device: torch.device, num_inference_steps: int
    ) -> Tensor | None:
        """The noise of one `sample`, float32 (B, ...) on `device`, or None for heads that sample nothing.

        Args:
            generators: on the CPU, one per sample, so that a sample's noise depends neither on what else is in the
                batch nor on the device.
            device: where `sample` runs.
            num_inference_steps: as for `sample`.
        """
        return None

    def schedule(self, num_inference_steps: int, device: torch.device) -> Any:
        """What `sample` computes from the number of steps alone, so that a caller can keep it; None: nothing."""
        return None

    @abstractmethod
    def sample(
        self,
        context: Context,
        noise: Tensor | None,
        num_inference_steps: int,
        schedule: Any = None,
        prefix: ActionPrefix | None = None,
    ) -> Tensor:
        """Actions for a context, float32 (B, T, A), normalized: a function of tensors, in which nothing is random.

        Without a prefix the host never waits for the GPU.

        Args:
            context: the fused observation.
            noise: from `draw_noise`.
            num_inference_steps: integration or denoising steps, for heads that iterate.
            schedule: from `schedule`, for the same steps and weights; None: computed here.
            prefix: what the chunk has to continue, normalized; only for heads that `continues_chunks`.
        """

    def sample_draws(
        self,
        context: Context,
        noise_K: Tensor | Sequence[None],
        num_inference_steps: int,
        schedule: Any = None,
        prefix: ActionPrefix | None = None,
    ) -> tuple[Tensor, Tensor]:
        """K draws for each context as `sample` makes them, (K, B, T, A), and how unsure it was, float32 (K, B, T).

        The latter is what `uncertainty` names, per action step; NaN where there is no such number.
        """
        draws = [self.sample(context, noise, num_inference_steps, schedule, prefix) for noise in noise_K]
        return torch.stack(draws), draws[0].new_full((len(draws), *draws[0].shape[:2]), torch.nan)


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


def draw(
    kind: Callable[..., Tensor], shape: Sequence[int], generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """float32 noise, drawn where the generator lives, so that a seed on the CPU means the same on a GPU.

    Args:
        kind: `torch.randn` (standard normal) or `torch.rand` (uniform in [0, 1)).
        shape: of the noise.
        generator: None: torch's global one of `device`.
        device: where the noise is wanted.
    """
    source = device if generator is None else generator.device
    return kind(tuple(shape), generator=generator, device=source).to(device)
