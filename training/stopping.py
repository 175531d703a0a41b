"""When training stops early (a signal, a time limit, validations that no longer improve), and the best validation."""

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

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
SUCCESS = "success"  # of closed-loop episodes
# Metric -> whether higher is better. Smoothness and spread are left out: no direction of them is better.
HIGHER_IS_BETTER = {SUCCESS: True, "val_loss": False, "val_action_mse": False, "val_action_mae": False}
HIGHER_IS_BETTER |= {f"val/{name}": name in ACCURACIES for name in METRICS if not name.startswith(("smooth", "spread"))}


def require_defined(metric: str, config: Config, *, samples: bool) -> None:
    """Raise a ConfigError where no validation will have this metric.

    Args:
        metric: the value of `training.best_metric`.
        config: of the run.
        samples: whether the action head draws noise, so that two draws differ.
    """
    if metric == SUCCESS and config.training.eval_every_n_epochs is None:
        raise ConfigError(
            "training.best_metric is success, which closed-loop episodes measure; give training.eval_every_n_epochs "
            "and closed_loop.tasks, or another metric"
        )
    draws, head = config.training.val_num_samples, config.model.action_head_config.type
    if "best_of_k" in metric and not (samples and draws > 1):
        raise ConfigError(
            f"training.best_metric is {metric}, which several draws per sample define; give training.val_num_samples "
            f"2 or more (now {draws}) and a head that samples (now {head}), or another metric"
        )


class StopRequest:
    """As a context: SIGTERM, SIGINT and SIGHUP ask for a clean stop instead of ending the process.

    SIGHUP comes when a terminal goes away; where it is ignored (nohup), it stays so.

    A second signal ends the process at once, unless it follows within `FORWARDED_S` seconds: then it is taken for the
    first one, which a launcher passed on although the process had received it itself.
    """

    FORWARDED_S = 2.0

    def __init__(self, max_hours: float | None) -> None:
        """
        Args:
            max_hours: ask for a stop this long after now; None: never.
        """
        self._signal: str | None = None
        self._began, self._max_hours = time.monotonic(), max_hours
        self._previous: dict[int, Any] = {}

    @property
    def reason(self) -> str | None:
        """Why training has to stop; None while it may go on."""
        if self._signal is not None:
            return self._signal
        if self._max_hours is not None and time.monotonic() - self._began >= self._max_hours * 3600:
            return f"training.max_hours {self._max_hours:g} reached"
        return None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._received = signal.Signals(number).name, now
        elif now - self._received > self.FORWARDED_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@dataclass
class BestValidation:
    """The best value of one validation metric so far, and for how many validations none was better.

    Attributes:
        metric: a key of HIGHER_IS_BETTER.
        patience: validations without improvement after which training stops; None: it never does.
        value: the best so far; None before the first validation.
        stale: validations since the best one.
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
        """Whether `patience` validations have passed without a better one."""
        return self.patience is not None and self.stale >= self.patience

    def update(self, values: dict[str, float], step: int) -> bool:
        """Take in the values of a validation after `step`; returns whether it is the best so far.

        Where validations and closed-loop episodes come at different steps, those without the metric only count as done.
        """
        self.step = step
        if self.metric not in values:
            return False
        new = values[self.metric]
        better = self.value is None or (new > self.value if HIGHER_IS_BETTER[self.metric] else new < self.value)
        self.stale = 0 if better else self.stale + 1
        self.value = new if better else self.value
        return better

    def state_dict(self) -> dict[str, Any]:
        """As checkpoints hold it."""
        return {"metric": self.metric, "value": self.value, "stale": self.stale, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue; a best value of another metric is forgotten, since it can't be compared."""
        self.step = state["step"]
        if state["metric"] == self.metric:
            self.value, self.stale = state["value"], state["stale"]
        else:
            logger.info("training.best_metric %s -> %s: the best starts anew", state["metric"], self.metric)
