"""Will it fail? An alarm on the uncertainty of predictions, calibrated to a stated share of false alarms.

An episode is a row of plans, each with one number of how unsure the policy was. The alarm goes on when at least
`needed` of the last `window` plans are above `threshold`, and off when fewer than that are above `release`.

What is bounded is the share of *episodes that succeed* in which the alarm ever goes on. An episode's score is the
highest threshold at which its alarm would still go on. Of n successful episodes the (n + 1)(1 - rate)-th smallest
score, rounded up, is the threshold (split conformal prediction: Vovk et al. 2005; Angelopoulos & Bates 2021, sec. 1):
for one more episode like them, the chance of an alarm is at most the rate. `release` is the median of their scores.

A calibration holds for the settings and the weights that it was made with; `inference.policy_files` keeps it beside
them. Simulator processes import this file: it must not need torch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_WINDOW = 1000  # plans


class CalibrationError(ValueError):
    """A calibration that can't be made, or can't be used."""


@dataclass(frozen=True)
class Calibration:
    """When the alarm goes on and off; see the head of this file.

    Attributes:
        threshold, release: of an uncertainty, in the units of its kind.
        needed, window: how many of how many plans.
        false_alarm_rate: the share of successful episodes that may alarm, at most.
        episodes: how many successful ones it was calibrated on.
        source: what they were, in words.
        settings: what the numbers hold for; see `alarm_settings`.
    """

    threshold: float
    release: float
    needed: int
    window: int
    false_alarm_rate: float
    episodes: int
    source: str
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        numbers = (self.threshold, self.release, self.false_alarm_rate)
        if not all(isinstance(number, float | int) and math.isfinite(number) for number in numbers):
            raise CalibrationError("threshold, release and false_alarm_rate must be finite numbers")
        if not (
            isinstance(self.needed, int)
            and isinstance(self.window, int)
            and 1 <= self.needed <= self.window <= MAX_WINDOW
        ):
            raise CalibrationError(
                f"needed {self.needed!r} of window {self.window!r}: wanted 1 <= needed <= window <= {MAX_WINDOW}"
            )
        if self.release > self.threshold:
            raise CalibrationError(f"release {self.release:g} is above threshold {self.threshold:g}")
        if not isinstance(self.settings, dict):
            raise CalibrationError(f"settings are a {type(self.settings).__name__}, wanted an object")


class Alarm:
    """The alarm of one stream of plans.

    Attributes:
        on: whether it stands now.
    """

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        self.restart()

    def restart(self) -> None:
        """Another episode begins."""
        self.on = False
        self._last: deque[float] = deque(maxlen=self.calibration.window)

    def add(self, uncertainty: float) -> bool:
        """Take in the uncertainty of the next plan, NaN where it has none; returns whether the alarm stands."""
        self._last.append(uncertainty)
        limit = self.calibration.release if self.on else self.calibration.threshold
        self.on = sum(value > limit for value in self._last) >= self.calibration.needed
        return self.on


def alarm_score(uncertainty: Sequence[float], needed: int, window: int) -> float:
    """The highest threshold below which an episode's alarm would go on: over all windows the `needed`-th largest value.

    Plans without a number (NaN, None) never count; an episode with too few has -infinity.
    """
    values = np.array([-math.inf if value is None or math.isnan(value) else value for value in uncertainty])
    padded = np.concatenate([np.full(window - 1, -math.inf), values]) if len(values) else np.full(window, -math.inf)
    return float(np.sort(np.lib.stride_tricks.sliding_window_view(padded, window), axis=1)[:, -needed].max())


def calibrated(
    episodes: Sequence[Sequence[float]],
    rate: float,
    needed: int,
    window: int,
    *,
    source: str,
    settings: Mapping[str, Any],
) -> Calibration:
    """The alarm of which at most a share `rate` of successful episodes is a false one.

    Args:
        episodes: the uncertainty of every plan of each successful episode, none of which the policy was trained on.
        rate: in (0, 0.5]; the alarm ends at the median score, which a higher rate's threshold may be below.
        needed, window: how many of how many plans.
        source, settings: see `Calibration`.

    Raises:
        CalibrationError: so few episodes can't hold the rate, or they have no numbers.
    """
    scores = np.sort([alarm_score(uncertainty, needed, window) for uncertainty in episodes])
    place = math.ceil((len(scores) + 1) * (1 - rate) - 1e-9)
    if place > len(scores):
        least = math.ceil(1 / rate - 1 - 1e-9)
        raise CalibrationError(
            f"{len(scores)} successful episodes can't hold a false-alarm rate of {rate:g}, which takes {least} or "
            "more; give more of them, or another --rate"
        )
    threshold, release = float(scores[place - 1]), float(np.median(scores))
    if not math.isfinite(release):
        raise CalibrationError(
            "most of the plans have no uncertainty: this policy's head has none for these settings (one draw, or one "
            f"step); draw several (--best_of 8), or calibrate with fewer than {needed} plans of {window}"
        )
    return Calibration(threshold, release, needed, window, rate, len(scores), source, dict(settings))
