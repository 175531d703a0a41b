"""An exponential moving average of the weights that train: smoother weights for evaluation.

The decay warms up as min(decay, (1 + n) / (10 + n)) over the updates n, so that the first averages follow the
weights instead of holding on to their initial values (TensorFlow's ExponentialMovingAverage with `num_updates`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class WeightAverage:
    """The average of a model's trained parameters: in the same dtype, on the same device, sharded in the same way."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """
        Args:
            model: on the device where it trains; the average starts from its present weights.
            decay: share of the old average that each update keeps once warmed up, in (0, 1).
        """
        self.decay, self.updates = decay, 0
        self.weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.average = {name: weight.detach().clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights that an optimizer step has changed."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(list(self.average.values()), list(self.weights.values()), 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """As a context: the model has the averaged weights; afterwards it has its own again, to the bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Any]:
        """`updates`, and `weights` by parameter name."""
        return {"updates": self.updates, "weights": self.average}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue an average.

        Raises:
            KeyError: the state has no average of a parameter that trains now.
        """
        self.updates = state["updates"]
        for name, average in self.average.items():
            average.copy_(state["weights"][name])

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self.weights.items():
            own = weight.clone()
            weight.copy_(self.average[name])
            self.average[name].copy_(own)
