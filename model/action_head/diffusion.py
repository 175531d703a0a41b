"""Denoising diffusion over action chunks (Ho et al. 2020, "DDPM", sec. 3; Song et al. 2021, "DDIM", sec. 4; for robot
actions Chi et al. 2023, "Diffusion Policy").

    x_t = sqrt(a_t) action + sqrt(1 - a_t) noise        t = 0 is almost data, t = num_train_timesteps - 1 almost noise
    loss = |denoiser(x_t, t, context) - target|^2
    target: the noise (epsilon), the action (sample), or v = sqrt(a_t) noise - sqrt(1 - a_t) action

The noise levels a_t are those of diffusers' schedulers, and the samplers' steps agree with theirs. All noise of a
prediction is drawn before it and every step's factors are known before it, so that it can be compiled.

Shape letters: B batch, K noise draws per sample, N = B K rows, T horizon, A per_action_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from model.action_head.base import ActionHeadBase, draw, existing_dims, step_mean
from model.action_head.transformer import ActionTransformer, TimeConditions
from model.action_head.unet import ConditionalUnet1D, TimeEmbedding
from model.action_head.unsteadiness import wandering
from model.context import ActionPrefix, Context, ContextSpec
from model.normalizer import ActionRange
from utils.config_utils import ActionHeadConfig

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

# Each encodes the context once per prediction (`encode_context`) and time once for all (`conditions`), then `denoise`s.
DENOISERS: dict[str, type[nn.Module]] = {"unet": ConditionalUnet1D, "transformer": ActionTransformer}


class _Step(NamedTuple):
    """One step of the sampler: what time does, then factors.

    Denoised action = action_x x + action_predicted predicted, clipped;
    next x = action (denoised action) + x (x) + predicted (predicted) + noise (fresh noise).
    """

    conditions: TimeConditions | TimeEmbedding
    action_x: float
    action_predicted: float
    action: float
    x: float
    predicted: float
    noise: float


class DiffusionActionHead(ActionHeadBase):
    """A denoiser (`denoiser`) trained on DDPM's noise levels; samples by DDIM or DDPM (`scheduler`)."""

    is_stochastic = True
    uncertainty = "denoised"  # how far the denoised actions of the steps are from the last ones

    def __init__(self, config: ActionHeadConfig, spec: ContextSpec, state_dim: int, action_range: ActionRange) -> None:
        super().__init__()
        self.config = config
        self.denoiser = DENOISERS[config.denoiser](config, spec, state_dim)
        # Early steps divide by a small sqrt(a_t), so that a denoised action needs a bound. It must not cut off what
        # the data holds: standardised actions reach many sigmas.
        self.clip_sample_range = config.clip_sample_range or action_range.extremes_2A.abs().max().item()
        self.training_levels = self.noise_levels()

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
        noise_NTA = draw(torch.randn, action_NTA.shape, generator, action_NTA.device)
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

    def draw_noise(
        self, generators: Sequence[torch.Generator], device: torch.device, num_inference_steps: int
    ) -> Tensor:
        """(B, 1, T, A), where DDIM starts; DDPM's (B, steps, T, A) is also drawn between every two levels."""
        drawn = num_inference_steps if self.config.scheduler == "ddpm" else 1
        shape = (drawn, self.horizon, self.per_action_dim)
        return torch.stack([draw(torch.randn, shape, g, g.device) for g in generators]).to(device)

    def schedule(self, num_inference_steps: int, device: torch.device) -> list[_Step]:
        """The noise levels to visit, each with what time does there and the sampler's coefficients.

        Raises:
            ValueError: more steps than noise levels.
        """
        if not 1 <= num_inference_steps <= self.config.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps is {num_inference_steps}; this diffusion head was trained on "
                f"{self.config.num_train_timesteps} noise levels, so give 1 to {self.config.num_train_timesteps}"
            )
        levels = self.noise_levels()
        levels.set_timesteps(num_inference_steps)
        timesteps = levels.timesteps.tolist()
        conditions = self.denoiser.conditions(levels.timesteps.to(device) / self.config.num_train_timesteps)
        signal = [levels.alphas_cumprod[timestep].item() for timestep in timesteps] + [1.0]  # no noise in the end
        return [
            _Step(conditions.row(i), *self._denoised(signal[i]), *self._previous(signal[i], signal[i + 1]))
            for i in range(num_inference_steps)
        ]

    def sample(
        self,
        context: Context,
        noise: Tensor,
        num_inference_steps: int,
        schedule: list[_Step] | None = None,
        prefix: ActionPrefix | None = None,
    ) -> Tensor:
        """Actions denoised level by level, float32 (B, T, A), normalized.

        Args:
            num_inference_steps: noise levels visited, of the `num_train_timesteps` in training.
        """
        return self.sample_draws(context, noise[None], num_inference_steps, schedule, prefix)[0][0]

    def sample_draws(
        self,
        context: Context,
        noise_K: Tensor,
        num_inference_steps: int,
        schedule: list[_Step] | None = None,
        prefix: ActionPrefix | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `ActionHeadBase`: all draws are rows of one sampling.

        The measure is the `wandering` of the denoised actions that every level implies about those of the last, NaN for
        one step. DDPM's fresh noise between two levels is part of it.
        """
        count, encoded = len(noise_K), self.denoiser.encode_context(context)
        exists_N1A = existing_dims(context, self.per_action_dim).repeat_interleave(count, dim=0)
        noise_NSTA = noise_K.transpose(0, 1).flatten(0, 1) * exists_N1A[:, None]
        x_NTA, denoised = noise_NSTA[:, 0], []
        for i, step in enumerate(schedule or self.schedule(num_inference_steps, noise_K.device)):
            predicted_NTA = self.denoiser.denoise(x_NTA, step.conditions, encoded).float() * exists_N1A
            action_NTA = step.action_x * x_NTA + step.action_predicted * predicted_NTA
            action_NTA = action_NTA.clamp(-self.clip_sample_range, self.clip_sample_range)
            denoised.append(action_NTA)
            x_NTA = step.action * action_NTA + step.x * x_NTA + step.predicted * predicted_NTA
            if step.noise:  # DDPM's, of all steps but the last
                x_NTA = x_NTA + step.noise * noise_NSTA[:, i + 1]
        unsure_NT = wandering(denoised, exists_N1A, denoised[-1])
        return tuple(values.unflatten(0, (-1, count)).transpose(0, 1) for values in (x_NTA, unsure_NT))

    def noise_levels(self) -> DDPMScheduler:
        """diffusers' noise levels as the configuration asks for them.

        Steps are spaced from the highest level down ("trailing": Lin et al. 2024, "Common Diffusion Noise Schedules
        and Sample Steps are Flawed", sec. 3.3): sampling starts from pure noise, so it has to start at that level.

        Raises:
            ImportError: diffusers is not installed.
        """
        try:
            from diffusers import DDPMScheduler
        except ImportError:
            raise ImportError(
                "action_head_config.type diffusion needs the diffusers package: pip install diffusers"
            ) from None
        with torch.device("cpu"):  # also in a model on the meta device: they are numbers, not weights
            return DDPMScheduler(
                num_train_timesteps=self.config.num_train_timesteps,
                beta_schedule=self.config.beta_schedule,
                timestep_spacing="trailing",
            )

    def _denoised(self, a: float) -> tuple[float, float]:
        """Factors of x_t and of the prediction in the action that they imply, at a level of signal a."""
        if self.config.prediction_type == "epsilon":
            return a**-0.5, -(((1 - a) / a) ** 0.5)
        return (0.0, 1.0) if self.config.prediction_type == "sample" else (a**0.5, -((1 - a) ** 0.5))

    def _previous(self, a: float, a_before: float) -> tuple[float, float, float, float]:
        """Factors of the denoised action, of x_t, of the prediction and of fresh noise in x at the level before."""
        if self.config.scheduler == "ddpm":  # Ho et al. 2020, eq. 7
            beta = 1 - a / a_before
            scale = a_before**0.5 * beta / (1 - a), (1 - beta) ** 0.5 * (1 - a_before) / (1 - a)
            return *scale, 0.0, (beta * (1 - a_before) / (1 - a)) ** 0.5
        # Song et al. 2021, eq. 12, sigma = 0: the noise that the prediction implies, at the lower level.
        left = (1 - a_before) ** 0.5
        if self.config.prediction_type == "epsilon":
            noise_x, noise_predicted = 0.0, 1.0
        elif self.config.prediction_type == "sample":
            noise_x, noise_predicted = (1 - a) ** -0.5, -((a / (1 - a)) ** 0.5)
        else:
            noise_x, noise_predicted = (1 - a) ** 0.5, a**0.5
        return a_before**0.5, left * noise_x, left * noise_predicted, 0.0

    def _timesteps(self, count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        source = device if generator is None else generator.device
        levels = self.config.num_train_timesteps
        return torch.randint(levels, (count,), generator=generator, device=source).to(device)
