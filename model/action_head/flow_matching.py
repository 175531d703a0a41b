"""Flow matching over action chunks (Lipman et al. 2023, "Flow Matching for Generative Modeling", sec. 4.1;
for robot actions as in Black et al. 2024, "pi0", sec. IV).

    x_t = (1 - t) noise + t action        t = 0 is noise, t = 1 is data
    velocity target = action - noise
    loss = |v(x_t, t, context) - (action - noise)|^2

Shape letters: B batch, K noise draws per sample, N = B K rows, T horizon, A per_action_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.action_head.base import ActionHeadBase, draw, existing_dims, step_mean
from model.action_head.guidance import Velocity, guided
from model.action_head.transformer import ActionTransformer, ContextKeysValues, TimeConditions
from model.context import ActionPrefix, Context, ContextSpec
from model.normalizer import ActionRange
from utils.config_utils import ActionHeadConfig


class FlowmatchingActionHead(ActionTransformer, ActionHeadBase):
    """The action transformer, trained to predict velocities; samples by integrating them from noise to action."""

    is_stochastic = True
    continues_chunks = True

    def __init__(self, config: ActionHeadConfig, spec: ContextSpec, state_dim: int, action_range: ActionRange) -> None:
        super().__init__(config, spec, state_dim)

    def loss(
        self, context: Context, action_BTA: Tensor, action_is_pad_BT: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Mean squared velocity error per action step, float32 (B, T), averaged over existing A and the noise draws.

        The context is encoded once for all `noise_draws_per_sample` draws.
        """
        draws = self.config.noise_draws_per_sample
        action_is_pad_BT = action_is_pad_BT.bool()
        exists_B1A = existing_dims(context, self.per_action_dim)
        exists_N1A = exists_B1A.repeat_interleave(draws, dim=0)
        action_NTA = action_BTA.float().masked_fill(action_is_pad_BT[..., None], 0.0).repeat_interleave(draws, dim=0)
        noise_NTA = self._noise(action_NTA.shape, generator, action_NTA.device) * exists_N1A
        action_NTA = action_NTA * exists_N1A
        time = self._time(len(action_NTA), generator, action_NTA.device)
        clean_NT = self._clean_steps(len(action_NTA), generator, action_NTA.device)
        if self.config.max_clean_prefix:
            time = torch.where(clean_NT, 1.0, time[:, None])
        x_NTA, target_NTA = flow_interpolate(noise_NTA, action_NTA, time)
        # Padded action tokens are hidden from the others, so that what they hold can't reach the loss.
        velocity_NTA = self.velocity(
            x_NTA, time, self.encode_context(context), action_is_pad_BT.repeat_interleave(draws, dim=0)
        )
        error_NTA = (velocity_NTA.float() - target_NTA).square().masked_fill(clean_NT[..., None], 0.0)
        return step_mean(error_NTA, exists_B1A, action_is_pad_BT)

    def draw_noise(
        self, generators: Sequence[torch.Generator], device: torch.device, num_inference_steps: int
    ) -> Tensor:
        """Where the integration starts, (B, T, A)."""
        shape = (self.horizon, self.per_action_dim)
        return torch.stack([self._noise(shape, g, g.device) for g in generators]).to(device)

    def schedule(self, num_inference_steps: int, device: torch.device) -> dict[float, TimeConditions]:
        """What time does at every moment that the integrator visits; it is the same for all samples."""
        visited: list[float] = []
        integrate(lambda x, time: visited.append(time) or x, 0.0, num_inference_steps, self.config.integrator)
        times = sorted(set(visited))
        conditions = self.conditions(torch.tensor(times, device=device))
        return {time: conditions.row(i) for i, time in enumerate(times)}

    def sample(
        self,
        context: Context,
        noise: Tensor,
        num_inference_steps: int,
        schedule: dict[float, TimeConditions] | None = None,
        prefix: ActionPrefix | None = None,
    ) -> Tensor:
        """The learned velocity integrated from t = 0 to 1 by `integrator`, float32 (B, T, A), normalized.

        `prefix` is what the chunk has to continue: by guidance, or, where it is clean, as given tokens.

        Raises:
            ValueError: a clean prefix commits more actions than `max_clean_prefix`.
        """
        keys_values = self.encode_context(context)
        exists_B1A = existing_dims(context, self.per_action_dim)
        schedule = schedule or self.schedule(num_inference_steps, noise.device)
        x_BTA = noise * exists_B1A

        def velocity(x_BTA: Tensor, time: float) -> Tensor:
            return self.velocity(x_BTA, schedule[time], keys_values).float() * exists_B1A

        def velocity_of_free_steps(x_BTA: Tensor, time: float) -> Tensor:
            time_BT = torch.where(clean_BT, 1.0, torch.full((len(noise), 1), time, device=noise.device))
            velocity_BTA = self.velocity(x_BTA, time_BT, keys_values).float() * exists_B1A
            return velocity_BTA.masked_fill(clean_BT[..., None], 0.0)

        if prefix is not None and prefix.clean:
            clean_BT = self._committed(prefix)
            x_BTA = torch.where(clean_BT[..., None], prefix.target_BTA(), x_BTA)
            field = velocity_of_free_steps
        else:
            field = velocity if prefix is None else guided(velocity, prefix)
        return integrate(field, x_BTA, num_inference_steps, self.config.integrator)

    def velocity(
        self,
        x_NTA: Tensor,
        time: Tensor | TimeConditions,
        context: ContextKeysValues,
        action_is_pad_NT: Tensor | None = None,
    ) -> Tensor:
        """The velocity field at x_t, (N, T, A), in the compute precision; arguments as in `denoise`."""
        return self.denoise(x_NTA, time, context, action_is_pad_NT)

    def _clean_steps(self, count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Leading steps that training gives clean, bool (N, T): 0 to `max_clean_prefix` of them, uniformly."""
        longest = self.config.max_clean_prefix
        if longest == 0:
            return torch.zeros(count, self.horizon, dtype=torch.bool, device=device)
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


def flow_interpolate(noise_NTA: Tensor, action_NTA: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """The straight path between noise and action, and its velocity; `time` is (N,), or (N, T): one per step.

    Returns:
        x_t = (1 - t) noise + t action, and d x_t / d t = action - noise, both (N, T, A).
    """
    time_NT1 = time.reshape(len(time), -1, 1)
    return (1 - time_NT1) * noise_NTA + time_NT1 * action_NTA, action_NTA - noise_NTA


def _euler(velocity: Velocity, x: Tensor, time: float, step: float) -> Tensor:
    return velocity(x, time)


def _midpoint(velocity: Velocity, x: Tensor, time: float, step: float) -> Tensor:
    return velocity(x + velocity(x, time) * (step / 2), time + step / 2)


def _heun(velocity: Velocity, x: Tensor, time: float, step: float) -> Tensor:
    first = velocity(x, time)
    return (first + velocity(x + first * step, time + step)) / 2


# The mean slope over one step; errors of order 1, 2 and 2 in the step, for 1, 2 and 2 velocities (Hairer, Norsett and
# Wanner 1993, "Solving Ordinary Differential Equations I", sec. II.1).
INTEGRATORS: dict[str, Callable[[Velocity, Tensor, float, float], Tensor]] = {
    "euler": _euler,
    "midpoint": _midpoint,
    "heun": _heun,
}


def integrate(velocity: Velocity, x: Tensor, num_steps: int, integrator: str = "euler") -> Tensor:
    """Follow dx/dt = velocity(x, t) from t = 0 to 1.

    Args:
        velocity: of x and a time in [0, 1], shaped like x.
        x: where to start.
        num_steps: equal steps.
        integrator: `euler`, `midpoint` or `heun`; the latter two evaluate the velocity twice a step.

    Returns:
        x at t = 1.
    """
    slope = INTEGRATORS[integrator]
    for i in range(num_steps):
        x = x + slope(velocity, x, i / num_steps, 1 / num_steps) / num_steps
    return x
