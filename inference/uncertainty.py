"""How unsure a policy is of a prediction, from the sampling that happens anyway, and the best of several draws.

Of one draw the head says what it can (`ActionHeadBase.sample_draws`); of several the number is how far they lie apart.
All in normalized units, so that no dimension's unit weighs more than another's; entropies are in nats.

Shape letters: K predictions, N draws of which each is the best, B batch, T horizon, A per_action_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from inference.alarm import Calibration
from model.action_head.base import ActionHeadBase
from utils.config_utils import InferenceConfig
from utils.misc import derive_seed


class Measured(NamedTuple):
    """Predictions and how unsure they are.

    Attributes:
        action_KBTA: float32, physical units.
        uncertainty_KB: float, NaN where there is no such number; see `uncertainty_kind`.
    """

    action_KBTA: np.ndarray
    uncertainty_KB: np.ndarray


def uncertainty_kind(head: ActionHeadBase, settings: InferenceConfig) -> str | None:
    """What the uncertainty of a prediction is: `spread`, what the head names, or None, where it is always NaN."""
    if settings.best_of > 1:
        return "spread"
    steps_matter = head.uncertainty in ("velocity", "denoised")
    return None if steps_matter and settings.num_inference_steps < 2 else head.uncertainty


def check_best_of(head: ActionHeadBase, best_of: int) -> None:
    """Raise a ValueError where several draws were all the same."""
    if best_of > 1 and not head.is_stochastic:
        raise ValueError(
            f"inference.best_of is {best_of}, but {type(head).__name__} samples nothing, so that all draws are one; "
            "give 1"
        )


def draw_seeds(seeds_KB: Sequence[Sequence[int]], best_of: int) -> list[list[int]]:
    """The seeds of K best_of draws, those of a prediction following each other; the first of them is its own."""
    return [
        [derive_seed("best_of", seed, number) if number else seed for seed in seeds_B]
        for seeds_B in seeds_KB
        for number in range(best_of)
    ]


def best_of_draws(action_MBTA: np.ndarray, normalized_MBTA: np.ndarray, best_of: int) -> Measured:
    """Of every `best_of` draws the medoid: the one with the least mean distance to the others.

    A distance is the root mean square difference over steps and dimensions; of equals the first is taken. The
    uncertainty is the draws' spread, the root mean square of their distances from their mean.

    Args:
        action_MBTA: physical units, the draws of a prediction following each other.
        normalized_MBTA: the same, normalized.
        best_of: N, two or more.
    """
    draws_KNBF = normalized_MBTA.reshape(-1, best_of, *normalized_MBTA.shape[1:2], normalized_MBTA[0, 0].size)
    apart_KNNB = np.sqrt(np.square(draws_KNBF[:, :, None] - draws_KNBF[:, None]).mean(axis=-1))
    best_KB = apart_KNNB.mean(axis=2).argmin(axis=1)
    actions_KNBTA = action_MBTA.reshape(-1, best_of, *action_MBTA.shape[1:])
    chosen = np.take_along_axis(actions_KNBTA, best_KB[:, None, :, None, None], axis=1)[:, 0]
    return Measured(chosen, np.sqrt(draws_KNBF.var(axis=1, ddof=1).mean(axis=-1)))


def alarm_settings(head: ActionHeadBase, settings: InferenceConfig, dataset: str) -> dict[str, Any]:
    """What decides how large uncertainties are and how often they come: an alarm holds for these alone."""
    names = ("num_inference_steps", "best_of", "n_action_steps", "execution", "latency_steps")
    kind = uncertainty_kind(head, settings)
    return {"kind": kind, "dataset": dataset, **{name: getattr(settings, name) for name in names}}


def matching(calibrations: Sequence[Calibration], settings: Mapping[str, Any]) -> tuple[Calibration | None, str]:
    """The calibration for these settings, and in words what is the matter where there is none."""
    if settings["kind"] is None:
        return None, "this policy's predictions have no uncertainty with these settings: no alarm"
    if not calibrations:
        return None, "the uncertainty of this policy was never calibrated: no alarm (scripts/calibrate_alarm.py)"
    differing: list[str] = []
    for calibration in calibrations:
        found = calibration.settings
        differing = [
            f"{key} {found.get(key)}, now {value}" for key, value in settings.items() if found.get(key) != value
        ]
        if not differing:
            return calibration, ""
    return None, (
        f"the uncertainty of this policy was calibrated for other settings ({', '.join(differing)}): no alarm "
        "(scripts/calibrate_alarm.py)"
    )
