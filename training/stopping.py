"""When to stop: a signal, a time limit, or validations that no longer improve; and which of them was the best."""

from __future__ import annotations

import difflib
import logging
import os
import signal
import threading
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any

from utils.config_utils import Config, ConfigError
from utils.metrics import ACCURACIES, METRICS

logger = logging.getLogger(__name__)

# Validation metric -> whether higher is better. Smoothness and spread are neither.
HIGHER_IS_BETTER = {"val_loss": False, "val_action_mse": False, "val_action_mae": False}
HIGHER_IS_BETTER |= {f"val/{name}": name in ACCURACIES for name in METRICS if not name.startswith(("smooth", "spread"))}


def require_defined(metric: str, config: Config, *, samples: bool) -> None:
    """Raise a ConfigError where validation would have no value of the metric; `samples`: whether the head does."""
    draws, head = config.training.val_num_samples, config.model.action_head_config.type
    if "best_of_k" in metric and not (samples and draws > 1):
        raise ConfigError(
            f"training.best_metric is {metric}, which several draws per sample define; give training.val_num_samples "
            f"2 or more (now {draws}) and a head that samples (now {head}), or another metric"
        )


class StopRequest:
    """Within it, SIGTERM and SIGINT ask for a clean stop instead of ending the process.

    A second signal ends the process at once. One that follows within `FORWARDED` seconds counts as the same:
    launchers pass on a signal that the whole process group got already.
    """

    FORWARDED = 2.0

    def __init__(self, max_hours: float | None) -> None:
        """
        Args:
            max_hours: ask for a stop once this much time has passed since now; None: never.
        """
        self._signal: str | None = None
        self._began, self._max_hours = time.monotonic(), max_hours
        self._previous: dict[int, Any] = {}

    @property
    def reason(self) -> str | None:
        """Why to stop; None to go on."""
        if self._signal is not None:
            return self._signal
        if self._max_hours is not None and time.monotonic() - self._began >= self._max_hours * 3600:
            return f"training.max_hours {self._max_hours:g} reached"
        return None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._received = signal.Signals(number).name, now
        elif now - self._received > self.FORWARDED:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@dataclass
class BestValidation:
    """The best value of one validation metric so far, and how long ago it was.

    Attributes:
        metric: a key of HIGHER_IS_BETTER.
        patience: validations without improvement after which training stops; None: it never does.
        value: the best so far; None before the first validation.
        stale: validations since then.
        step: the optimizer step of the last validation; 0 before the first.
    """

    metric: str
    patience: int | None
    value: float | None = None
    stale: int = 0
    step: int = 0

    def __post_init__(self) -> None:
        if self.metric not in HIGHER_IS_BETTER:
            near = difflib.get_close_matches(self.metric, HIGHER_IS_BETTER, n=1)
            raise ConfigError(
                f"training.best_metric is {self.metric!r}; {f'did you mean {near[0]}? ' if near else ''}"
                f"Choose one of {', '.join(HIGHER_IS_BETTER)}"
            )

    @property
    def exhausted(self) -> bool:
        """Whether patience is at its end."""
        return self.patience is not None and self.stale >= self.patience

    def update(self, values: dict[str, float], step: int) -> bool:
        """Take in a validation; whether it is the best so far."""
        new = values[self.metric]
        better = self.value is None or (new > self.value if HIGHER_IS_BETTER[self.metric] else new < self.value)
        self.step = step
        self.stale = 0 if better else self.stale + 1
        self.value = new if better else self.value
        return better

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return {"metric": self.metric, "value": self.value, "stale": self.stale, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue; values of another metric can't be compared and are forgotten."""
        self.step = state["step"]
        if state["metric"] == self.metric:
            self.value, self.stale = state["value"], state["stale"]
        else:
            logger.info("training.best_metric %s -> %s: the best starts anew", state["metric"], self.metric)
