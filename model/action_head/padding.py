"""What training shows past an episode's end."""

from __future__ import annotations

import torch
from torch import Tensor


def repeat_last(action_BTA: Tensor, action_is_pad_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Actions whose last one fills the steps past an episode's end, and bool (B, T): steps without a loss.

    Those are none, except in samples of nothing but padding, which only fill a batch.
    """
    last_B = (~action_is_pad_BT).sum(dim=1).clamp(min=1) - 1
    step_BT = torch.arange(action_BTA.shape[1], device=last_B.device).minimum(last_B[:, None])
    action_BTA = action_BTA.gather(1, step_BT[..., None].expand_as(action_BTA))
    return action_BTA, action_is_pad_BT.all(dim=1, keepdim=True).expand_as(action_is_pad_BT)
