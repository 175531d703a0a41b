"""Integrating a velocity field from noise to action."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from model.action_head.guidance import Velocity


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
