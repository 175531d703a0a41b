"""Denoising diffusion over action chunks (Ho et al. 2020, "DDPM", sec. 3; Song et al. 2021, "DDIM", sec. 4; for robot
actions Chi et al. 2023, "Diffusion Policy").

    x_t = sqrt(a_t) action + sqrt(1 - a_t) noise        t = 0 is almost data, t = num_train_timesteps - 1 almost noise
    loss = |denoiser(x_t, t, context) - target|^2
    target: the noise (epsilon), the action (sample), or v = sqrt(a_t) noise - sqrt(1 - a_t) action

The noise levels a_t and the sampler's steps are those of diffusers' schedulers.

Shape letters: B batch, K noise draws per sample, N = B K rows, T horizon, A per_action_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from model.action_head.base import ActionHeadBase, Generators, existing_dims, randn, step_mean
from model.action_head.transformer import ActionTransformer
from model.action_head.unet import ConditionalUnet1D
from model.context import Context
from model.normalizer import ActionRange
from utils.config_utils import ActionHeadConfig

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DDPMScheduler

# Two verbs each: `encode_context` once per prediction, `denoise` once per step.
DENOISERS: dict[str, type[nn.Module]] = {"unet": ConditionalUnet1D, "transformer": ActionTransformer}


class DiffusionActionHead(ActionHeadBase):
    """A denoiser (`denoiser`) trained on DDPM's noise levels; samples by DDIM or DDPM (`scheduler`)."""

    is_stochastic = True

    def __init__(self, config: ActionHeadConfig, context_dim: int, state_dim: int, action_range: ActionRange) -> None:
        super().__init__()
        self.config = config
        self.denoiser = DENOISERS[config.denoiser](config, context_dim, state_dim)
        # Early steps divide by a small sqrt(a_t), so that a denoised action needs a bound. It must not cut off what
        # the data holds: standardised actions reach many sigmas.
        self.clip_sample_range = config.clip_sample_range or action_range.extremes_2A.abs().max().item()
        self.training_levels = self.noise_levels("ddpm")

    def loss(
        self, context: Context, action_BTA: Tensor, action_is_pad_BT: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Mean squared error of `prediction_type` per action step, float32 (B, T), over existing A and the draws.

        The context is encoded once for all `noise_draws_per_sample` draws.
        """
        draws, levels = self.config.noise_draws_per_sample, self.training_levels
        action_is_pad_BT = action_is_pad_BT.bool()
        exists_B1A = existing_dims(context, self.per_action_dim)
        action_BTA = action_BTA.float().masked_fill(action_is_pad_BT[..., None], 0.0) * exists_B1A
        action_NTA = action_BTA.repeat_interleave(draws, dim=0)
        noise_NTA = randn(action_NTA.shape, generator, action_NTA.device)
        noise_NTA = noise_NTA * exists_B1A.repeat_interleave(draws, dim=0)
        timestep_N = self._timesteps(len(action_NTA), generator, action_NTA.device)
        x_NTA = levels.add_noise(action_NTA, noise_NTA, timestep_N)
        predicted_NTA = self.denoiser.denoise(
            x_NTA,
            timestep_N / self.config.num_train_timesteps,
            self.denoiser.encode_context(context),
            action_is_pad_BT.repeat_interleave(draws, dim=0),
        )
        if self.config.prediction_type == "epsilon":
            target_NTA = noise_NTA
        elif self.config.prediction_type == "sample":
            target_NTA = action_NTA
        else:
            target_NTA = levels.get_velocity(action_NTA, noise_NTA, timestep_N)
        return step_mean((predicted_NTA.float() - target_NTA).square(), exists_B1A, action_is_pad_BT)

    def sample(self, context: Context, generator: Generators = None, num_inference_steps: int = 10) -> Tensor:
        """Actions denoised from gaussian noise, float32 (B, T, A), normalized.

        DDIM draws noise once, at the start; DDPM again at every step.

        Args:
            context: the fused observation.
            generator: see the base class.
            num_inference_steps: noise levels visited, of the `num_train_timesteps` in training.

        Raises:
            ValueError: more steps than noise levels.
        """
        if not 1 <= num_inference_steps <= self.config.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps is {num_inference_steps}; this diffusion head was trained on "
                f"{self.config.num_train_timesteps} noise levels, so give 1 to {self.config.num_train_timesteps}"
            )
        levels = self.noise_levels(self.config.scheduler)
        levels.set_timesteps(num_inference_steps)
        encoded = self.denoiser.encode_context(context)
        batch, device = len(context.tokens_BLE), context.tokens_BLE.device
        exists_B1A = existing_dims(context, self.per_action_dim)
        x_BTA = randn((batch, self.horizon, self.per_action_dim), generator, device) * exists_B1A
        source = list(generator) if isinstance(generator, Sequence) else generator
        for timestep in levels.timesteps.tolist():
            time_B = torch.full((batch,), timestep / self.config.num_train_timesteps, device=device)
            predicted_BTA = self.denoiser.denoise(x_BTA, time_B, encoded).float()
            x_BTA = levels.step(predicted_BTA, timestep, x_BTA, generator=source).prev_sample * exists_B1A
        return x_BTA

    def noise_levels(self, scheduler: str) -> DDIMScheduler | DDPMScheduler:
        """diffusers' scheduler over this head's noise levels: `ddpm` or `ddim`.

        Raises:
            ImportError: diffusers is not installed.
        """
        try:
            from diffusers import DDIMScheduler, DDPMScheduler
        except ImportError:
            raise ImportError(
                "action_head_config.type diffusion needs the diffusers package: pip install diffusers"
            ) from None
        return {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}[scheduler](
            num_train_timesteps=self.config.num_train_timesteps,
            beta_schedule=self.config.beta_schedule,
            prediction_type=self.config.prediction_type,
            clip_sample=True,
            clip_sample_range=self.clip_sample_range,
            timestep_spacing="trailing",
        )

    def _timesteps(self, count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        source = device if generator is None else generator.device
        levels = self.config.num_train_timesteps
        return torch.randint(levels, (count,), generator=generator, device=source).to(device)
