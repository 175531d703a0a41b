"""Flow matching over action chunks (Lipman et al. 2023, "Flow Matching for Generative Modeling", sec. 4.1;
for robot actions as in Black et al. 2024, "pi0", sec. IV).

    x_t = (1 - t) noise + t action        t = 0 is noise, t = 1 is data
    velocity target = action - noise
    loss = |v(x_t, t, context) - (action - noise)|^2

Shape letters: B batch, K noise draws per sample, N = B K rows, T horizon, A per_action_dim.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.action_head.base import ActionHeadBase, draw, existing_dims, step_mean
from model.action_head.guidance import guided
from model.action_head.integration import integrate
from model.action_head.transformer import ActionTransformer, ContextKeysValues, TimeConditions
from model.action_head.unsteadiness import wandering
from model.context import ActionPrefix, Context, ContextSpec
from model.normalizer import ActionRange
from utils.config_utils import ActionHeadConfig


class FlowMatching(ActionHeadBase):
    """The flow over action chunks, whatever network predicts its velocity.

    A head gives the network: `encode_context`, `conditions` and `velocity`. The context is encoded once per call for
    all noise draws of a sample or all steps of an integration.
    """

    is_stochastic = True
    continues_chunks = True
    uncertainty = "velocity"  # how much it changes on the way from noise to action
    time_dtype = torch.float32  # of the moments that `conditions` is given

    @property
    def flow_dim(self) -> int:
        """Values per noised action step."""
        return self.per_action_dim

    def flow_dims(self, context: Context) -> Tensor:
        """1.0 for values that are noised, 0.0 for those that stay 0, float32 (B, 1, flow_dim)."""
        return existing_dims(context, self.per_action_dim)

    def action_targets(self, context: Context, action_BTA: Tensor, action_is_pad_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The actions that noise is mixed with, float32 (B, T, flow_dim), and bool (B, T): steps without a loss.

        Tokens of such steps are hidden from the others, so that what they hold can't reach the loss.
        """
        action_is_pad_BT = action_is_pad_BT.bool()
        return action_BTA.float().masked_fill(action_is_pad_BT[..., None], 0.0), action_is_pad_BT

    @abstractmethod
    def encode_context(self, context: Context) -> Any:
        """What `velocity` needs of the context."""

    def sampling_context(self, context: Context, draws: int = 1) -> Any:
        """What `velocity` needs of the context, for so many draws of it and without gradients to it."""
        return self.encode_context(context)

    @abstractmethod
    def conditions(self, time: Tensor) -> Any:
        """What `velocity` needs of time, (N,), or (N, T): one per action token; `.row(i)` of it is one row alone."""

    @abstractmethod
    def velocity(self, x_NTA: Tensor, time: Any, context: Any, action_is_pad_NT: Tensor | None = None) -> Tensor:
        """The velocity field at x_t, (N, T, flow_dim), in the compute precision.

        Args:
            x_NTA: float32, partly noised normalized actions; N is the context's batch or a multiple of it.
            time: as `conditions` takes it, or what that made of it.
            context: from `encode_context`.
            action_is_pad_NT: bool, tokens that others must not attend to; None: all exist.
        """

    def loss(
        self, context: Context, action_BTA: Tensor, action_is_pad_BT: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Mean squared velocity error per action step, float32 (B, T), averaged over existing A and the noise draws."""
        rows, device = len(action_BTA) * self.config.noise_draws_per_sample, action_BTA.device
        noise_NTA = self._noise((rows, self.horizon, self.flow_dim), generator, device)
        time_N = self._time(rows, generator, device)
        clean_NT = self._clean_steps(rows, generator, device)
        return self.loss_at(context, action_BTA, action_is_pad_BT, noise_NTA, time_N, clean_NT)

    def loss_at(
        self,
        context: Context,
        action_BTA: Tensor,
        action_is_pad_BT: Tensor,
        noise_NTA: Tensor,
        time_N: Tensor,
        clean_NT: Tensor | None = None,
    ) -> Tensor:
        """`loss` with chance as arguments.

        Args:
            noise_NTA: float32 (N, T, flow_dim); the draws of a sample follow each other.
            time_N: float, in [0, 1].
            clean_NT: bool, leading steps that are given clean and have no loss; None: none.
        """
        draws = len(noise_NTA) // len(action_BTA)
        exists_B1A = existing_dims(context, self.per_action_dim)
        noised_N1A = self.flow_dims(context).repeat_interleave(draws, dim=0)
        action_BTA, is_pad_BT = self.action_targets(context, action_BTA, action_is_pad_BT)
        action_NTA = action_BTA.repeat_interleave(draws, dim=0) * noised_N1A
        time = time_N
        if clean_NT is not None:
            time = torch.where(clean_NT, 1.0, time_N[:, None])
        x_NTA, target_NTA = flow_interpolate(noise_NTA * noised_N1A, action_NTA, time)
        velocity_NTA = self.velocity(
            x_NTA, time, self.encode_context(context), is_pad_BT.repeat_interleave(draws, dim=0)
        )
        error_NTA = (velocity_NTA.float() - target_NTA)[..., : self.per_action_dim].square()
        if clean_NT is not None:
            error_NTA = error_NTA.masked_fill(clean_NT[..., None], 0.0)
        return step_mean(error_NTA, exists_B1A, is_pad_BT)

    def draw_noise(
        self, generators: Sequence[torch.Generator], device: torch.device, num_inference_steps: int
    ) -> Tensor:
        """Where the integration starts, (B, T, flow_dim)."""
        shape = (self.horizon, self.flow_dim)
        return torch.stack([self._noise(shape, g, g.device) for g in generators]).to(device)

    def schedule(self, num_inference_steps: int, device: torch.device) -> dict[float, Any]:
        """What time does at every moment that the integrator visits; it is the same for all samples."""
        visited: list[float] = []
        integrate(lambda x, time: visited.append(time) or x, 0.0, num_inference_steps, self.config.integrator)
        times = sorted(set(visited))
        conditions = self.conditions(torch.tensor(times, dtype=self.time_dtype, device=device))
        return {time: conditions.row(i) for i, time in enumerate(times)}

    def sample(
        self,
        context: Context,
        noise: Tensor,
        num_inference_steps: int,
        schedule: dict[float, Any] | None = None,
        prefix: ActionPrefix | None = None,
    ) -> Tensor:
        """The learned velocity integrated from t = 0 to 1 by `integrator`, float32 (B, T, A), normalized.

        `prefix` is what the chunk has to continue: by guidance, or, where it is clean, as given tokens.

        Raises:
            ValueError: a clean prefix commits more actions than `max_clean_prefix`.
        """
        return self.sample_draws(context, noise[None], num_inference_steps, schedule, prefix)[0][0]

    def sample_draws(
        self,
        context: Context,
        noise_K: Tensor,
        num_inference_steps: int,
        schedule: dict[float, Any] | None = None,
        prefix: ActionPrefix | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `ActionHeadBase`: all draws are rows of one integration, and the velocity's `wandering` is the measure.

        It is NaN for one step, and with a prefix, which bends the path or holds a part of it.
        """
        if prefix is not None and len(noise_K) > 1:
            draws = [
                self.sample_draws(context, noise[None], num_inference_steps, schedule, prefix) for noise in noise_K
            ]
            return torch.cat([actions for actions, _ in draws]), torch.cat([unsure for _, unsure in draws])
        count, device = len(noise_K), noise_K.device
        encoded = self.sampling_context(context, count)
        noised_N1A, exists_N1A = (
            dims.repeat_interleave(count, dim=0)
            for dims in (self.flow_dims(context), existing_dims(context, self.per_action_dim))
        )
        schedule = schedule or self.schedule(num_inference_steps, device)
        x_NTA = noise_K.transpose(0, 1).flatten(0, 1) * noised_N1A
        met: list[Tensor] = []

        def velocity(x_NTA: Tensor, time: float) -> Tensor:
            met.append(self.velocity(x_NTA, schedule[time], encoded).float() * noised_N1A)
            return met[-1]

        def velocity_of_free_steps(x_BTA: Tensor, time: float) -> Tensor:
            time_B1 = torch.full((len(x_BTA), 1), time, dtype=self.time_dtype, device=device)
            velocity_BTA = self.velocity(x_BTA, torch.where(clean_BT, 1.0, time_B1), encoded).float() * noised_N1A
            return velocity_BTA.masked_fill(clean_BT[..., None], 0.0)

        field = velocity
        if prefix is not None:
            prefix = self._as_wide(prefix)
            field = velocity_of_free_steps if prefix.clean else guided(velocity, prefix)
            if prefix.clean:
                clean_BT = self._committed(prefix)
                x_NTA = torch.where(clean_BT[..., None], prefix.target_BTA(), x_NTA)
        x_NTA = integrate(field, x_NTA, num_inference_steps, self.config.integrator)
        action_NTA = x_NTA[..., : self.per_action_dim] * exists_N1A
        has_measure = prefix is None and num_inference_steps > 1
        unsure_NT = wandering(met if has_measure else [action_NTA], exists_N1A)
        return tuple(values.unflatten(0, (-1, count)).transpose(0, 1) for values in (action_NTA, unsure_NT))

    def _as_wide(self, prefix: ActionPrefix) -> ActionPrefix:
        """A prefix as wide as the noise: what pads the actions is 0, and known to be."""
        padding = self.flow_dim - prefix.action_BTA.shape[-1]
        return dataclasses.replace(prefix, action_BTA=F.pad(prefix.action_BTA, (0, padding)))

    def _clean_steps(self, count: int, generator: torch.Generator | None, device: torch.device) -> Tensor | None:
        """Leading steps that training gives clean, bool (N, T): 0 to `max_clean_prefix` of them, uniformly."""
        longest = self.config.max_clean_prefix
        if longest == 0:
            return None
        length_N1 = (draw(torch.rand, (count, 1), generator, device) * (longest + 1)).floor()
        return torch.arange(self.horizon, device=device) < length_N1

    def _committed(self, prefix: ActionPrefix) -> Tensor:
        """The steps that a clean prefix fixes, bool (B, T)."""
        longest = int(prefix.committed_BT.sum(dim=1).max())
        if longest > self.config.max_clean_prefix:
            raise ValueError(
                f"the prefix commits {longest} actions, but this policy was trained with max_clean_prefix "
                f"{self.config.max_clean_prefix}; train with a longer one, or guide instead (rtc)"
            )
        return prefix.committed_BT

    def _noise(self, shape: Sequence[int], generator: torch.Generator | None, device: torch.device) -> Tensor:
        if self.config.noise_distribution == "gaussian":
            return draw(torch.randn, shape, generator, device)
        return 2 * draw(torch.rand, shape, generator, device) - 1

    def _time(self, count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        if self.config.time_distribution == "uniform":
            time_N = draw(torch.rand, (count,), generator, device)
        else:
            source = device if generator is None else generator.device
            shape_2N = torch.tensor(self.config.time_beta, device=source)[:, None].expand(2, count)
            gamma_2N = torch._standard_gamma(shape_2N.contiguous(), generator=generator)
            time_N = (gamma_2N[0] / gamma_2N.sum(dim=0)).to(device)
        low, high = self.config.time_clamp
        return low + (high - low) * time_N


class FlowmatchingActionHead(ActionTransformer, FlowMatching):
    """The action transformer, trained to predict velocities; samples by integrating them from noise to action."""

    def __init__(self, config: ActionHeadConfig, spec: ContextSpec, state_dim: int, action_range: ActionRange) -> None:
        super().__init__(config, spec, state_dim)

    def velocity(
        self,
        x_NTA: Tensor,
        time: Tensor | TimeConditions,
        context: ContextKeysValues,
        action_is_pad_NT: Tensor | None = None,
    ) -> Tensor:
        """The velocity field at x_t, (N, T, A), in the compute precision; arguments as in `denoise`."""
        return self.denoise(x_NTA, time, context, action_is_pad_NT)


def flow_interpolate(noise_NTA: Tensor, action_NTA: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """The straight path between noise and action, and its velocity; `time` is (N,), or (N, T): one per step.

    Returns:
        x_t = (1 - t) noise + t action, and d x_t / d t = action - noise, both (N, T, A).
    """
    time_NT1 = time.reshape(len(time), -1, 1)
    return (1 - time_NT1) * noise_NTA + time_NT1 * action_NTA, action_NTA - noise_NTA
