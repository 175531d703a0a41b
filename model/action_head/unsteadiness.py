"""How unsure a head was of an action chunk, read off the sampling that happens anyway.

A policy that knows what to do walks straight from noise to action; one that does not is drawn first to one answer and
then to another. Nothing is computed for it but a few sums over what the steps of the sampling produced.

Shape letters: M moments of the sampling, N rows, T horizon, A per_action_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def wandering(values_MNTA: Sequence[Tensor], exists_N1A: Tensor, center_NTA: Tensor | None = None) -> Tensor:
    """The root mean square distance of some values from a centre, over moments and existing A, float32 (N, T).

    Of the velocities that Euler's steps met, about their mean, this is the root of the straightness of the path (Liu et
    al. 2022, "Flow Straight and Fast", sec. 2): their mean is the way from noise to action.

    Args:
        values_MNTA: normalized units; NaN comes back for fewer than two, of which none can wander.
        exists_N1A: 1.0 for action dimensions that exist, else 0.0; values may have more dimensions, which are left out.
        center_NTA: None: their mean.
    """
    if len(values_MNTA) < 2:
        return values_MNTA[0].new_full(values_MNTA[0].shape[:2], torch.nan)
    stacked = torch.stack([values[..., : exists_N1A.shape[-1]] for values in values_MNTA])
    center = stacked.mean(dim=0) if center_NTA is None else center_NTA
    square_NTA = (stacked - center).square().mean(dim=0) * exists_N1A
    return (square_NTA.sum(dim=-1) / exists_N1A.sum(dim=-1)).sqrt()
