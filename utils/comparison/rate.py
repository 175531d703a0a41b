"""How often a robot asks for actions, beside the control rate of the training data.

A robot asks once a step, or executes several actions of each plan and asks then, so its requests alone don't say its
control rate. What is told: that no number of executed actions fits, or that the state moves faster than it ever did in
training. A robot at half the rate that executes half of what it seems to is not told from one that is right; a recorded
session with its time stamps tells it.
"""

from __future__ import annotations

import numpy as np

from utils.comparison.facts import Profile
from utils.comparison.kinds import Mismatch

ENOUGH = 32  # intervals between requests
PAUSE = 4.0  # times the median, from which an interval is a pause and says nothing
UNSTEADY = 0.5  # share of the median that the middle half of the intervals may spread over
SLOW, FAST = 1.25, 0.75  # of a plan's length, and of one control step
TOO_FAST = 1.4  # times the training's fastest (99 %) change of the state, from which the robot's clock runs faster
KIND = "another_rate"


def request_rate_mismatch(
    intervals_s: np.ndarray, moved: np.ndarray, training: Profile, horizon: int
) -> Mismatch | None:
    """Whether requests come at another rate than the training data's.

    Args:
        intervals_s: (N,), seconds between consecutive requests.
        moved: (N, state_dim), by how much the state changed between them, without its sign.
        training: says `control_hz`; where it does not, nothing is told.
        horizon: actions of a plan.
    """
    hz = training.get("control_hz")
    if not hz or len(intervals_s) < ENOUGH:
        return None
    usual = float(np.median(intervals_s))
    going_on = intervals_s < PAUSE * max(usual, 1e-9)
    low, median, high = np.quantile(intervals_s[going_on], (0.25, 0.5, 0.75))
    if going_on.sum() < ENOUGH or median <= 0 or high - low > UNSTEADY * median:
        return None
    steps = float(median * hz)  # of the training data's, from one request to the next
    evidence = f"a request every {1000 * median:.0f} ms, in which the training data have {steps:.1f} steps"
    remedy = "run the control loop at the training data's rate; a simulator that waits for its policy may ignore this"
    if steps > SLOW * horizon:
        text = f"{evidence}, and a plan has {horizon}"
        return Mismatch(KIND, "requests", text, remedy)
    if steps < FAST:
        return Mismatch(KIND, "requests", f"{evidence}: more than one request a step", remedy)
    usual_step = np.array(training["state"]["steps"])[:, 1]
    far = np.quantile(moved[going_on], 0.95, axis=0) if moved.shape[1] == len(usual_step) else np.zeros(0)
    moving = (usual_step[: len(far)] > 0) & (far > 0)
    if not moving.any():
        return None
    speed = float(np.median(far[moving] / (steps * usual_step[moving])))  # over that of training, a second
    if speed < TOO_FAST:
        return None
    text = f"{evidence}, and the state moves {speed:.2f} times as fast as it does at most in training"
    return Mismatch(KIND, "requests", text, remedy)
