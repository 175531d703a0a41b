"""Sampling a chunk that continues the one being executed.

Real-time chunking (Black, Galliker & Levine 2025, "Real-Time Execution of Action Chunking Flow Policies", arXiv
2506.07339, sec. 3) inpaints the steps that will have been executed before the new chunk arrives. The velocity is
guided by the pseudo-inverse method (Song et al. 2023, "Pseudoinverse-Guided Diffusion Models for Inverse Problems";
Pokle et al. 2023, arXiv 2310.04432, for flows):

    denoised(x) = x + (1 - t) v(x, t)
    guided v    = v + min(beta, (1 - t) / (t r^2)) (weight (target - denoised))^T d denoised / d x
    r^2         = (1 - t)^2 / (t^2 + (1 - t)^2)

The vector-Jacobian product goes through the network: it is what moves the free steps along with the committed ones.

Shape letters: B batch, T horizon, A per_action_dim.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.context import ActionPrefix

Velocity = Callable[[Tensor, float], Tensor]  # (x_BTA, time) -> velocity_BTA


def joined(prefixes: Sequence[ActionPrefix]) -> ActionPrefix:
    """The prefixes of several samples, guided alike, as the prefix of their batch."""
    first = prefixes[0]
    assert all((p.max_guidance_weight, p.clean) == (first.max_guidance_weight, first.clean) for p in prefixes)
    action_BTA = torch.cat([prefix.action_BTA for prefix in prefixes])
    weight_BT = torch.cat([prefix.weight_BT for prefix in prefixes])
    return dataclasses.replace(first, action_BTA=action_BTA, weight_BT=weight_BT)


def soft_mask(horizon: int, delay: int, overlap: int, schedule: str = "exp") -> Tensor:
    """How much each step of a new chunk must follow the old one (arXiv 2506.07339, eq. 5), float32 (T,).

    1 for the `delay` steps that run before the new chunk arrives, decaying up to `overlap`, where the old chunk ends,
    and 0 from there.

    Args:
        horizon: T.
        delay: committed steps d; at most `overlap`.
        overlap: steps that the old chunk covers, H - s.
        schedule: `exp`, about exponentially, as in the paper; `linear`; `ones`, not at all before `overlap`; `zeros`,
            at once.

    Raises:
        ValueError: not 0 <= delay <= overlap <= horizon.
    """
    if not 0 <= delay <= overlap <= horizon:
        raise ValueError(
            f"delay {delay}, overlap {overlap}, horizon {horizon}: wanted 0 <= delay <= overlap <= horizon; the old "
            "chunk must cover every step that runs before the new one arrives"
        )
    weight_T = torch.zeros(horizon)
    weight_T[:delay] = 1.0
    decay = (overlap - torch.arange(delay, overlap)) / (overlap - delay + 1)
    weight_T[delay:overlap] = {
        "exp": decay * torch.expm1(decay) / math.expm1(1.0),
        "linear": decay,
        "ones": torch.ones_like(decay),
        "zeros": torch.zeros_like(decay),
    }[schedule]
    return weight_T


def guidance_weight(time: float, max_weight: float) -> float:
    """min(beta, (1 - t) / (t r^2)) = min(beta, (t^2 + (1 - t)^2) / (t (1 - t))), beta at both ends of [0, 1]."""
    rest = 1 - time
    return min(max_weight, (time**2 + rest**2) / max(time * rest, 1e-8))


def guided(velocity: Velocity, prefix: ActionPrefix) -> Velocity:
    """The velocity field bent towards `prefix` (normalized units); it runs the network in a graph, even in no_grad.

    Where every weight of a sample is 0, its velocity is unchanged.
    """
    target_BTA, weight_BT1 = prefix.target_BTA(), prefix.weight_BT[..., None]

    def field(x_BTA: Tensor, time: float) -> Tensor:
        with torch.enable_grad():
            x_BTA = x_BTA.detach().requires_grad_()
            velocity_BTA = velocity(x_BTA, time)
            denoised_BTA = x_BTA + (1 - time) * velocity_BTA
            error_BTA = weight_BT1 * (target_BTA - denoised_BTA.detach())
            (pull_BTA,) = torch.autograd.grad(denoised_BTA, x_BTA, error_BTA)
        return velocity_BTA.detach() + guidance_weight(time, prefix.max_guidance_weight) * pull_BTA

    return field
