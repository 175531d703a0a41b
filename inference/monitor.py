"""What a policy is shown beside what its training data look like, while it acts.

A monitor belongs to one stream of observations (a connection of the server, or a predictor). It looks at as many of
them as it may for COST of the time that predictions take, and after every CHECK of these compares the last WINDOW with
the checkpoint's profile of the training data. What differs is said once a kind.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from utils.comparison.facts import QUANTILES, FrameFacts, Profile, frame_facts
from utils.comparison.kinds import Mismatch
from utils.comparison.mismatch import prompt_mismatches
from utils.comparison.numbers import UNITS, number_mismatches
from utils.comparison.pictures import camera_mismatches
from utils.comparison.rate import KIND, request_rate_mismatch

WINDOW, CHECK = 48, 16  # observations that are compared together, and between two comparisons
RATE_WINDOW, RATE_CHECK = 64, 48  # intervals between requests that are looked at together, and between two looks
COST = 0.015  # share of the time of predictions that looking at their observations may take
ENOUGH_NUMBERS = (*(kind for kind, _ in UNITS.values()), "outside_training", "stuck")  # what a short stretch can show


class Monitor:
    """Compares one stream of observations with the training data; see the head of this file."""

    def __init__(self, training: Profile, horizon: int | None = None) -> None:
        """
        Args:
            training: what the training data look like.
            horizon: actions of a plan, for the rate of the requests. None: the stream keeps no time, as that of a
                simulator, and its rate is not looked at.
        """
        self.training, self.horizon = training, horizon
        self._intervals: deque[float] = deque(maxlen=RATE_WINDOW)
        self._moved: deque[np.ndarray] = deque(maxlen=RATE_WINDOW)
        self._asked = 0
        self._before: tuple[float, np.ndarray] | None = None
        self._looked_at = 0
        self._frames: dict[str, deque[FrameFacts]] = {name: deque(maxlen=WINDOW) for name in training["cameras"]}
        self._same: dict[str, deque[bool]] = {name: deque(maxlen=WINDOW) for name in training["cameras"]}
        self._last: dict[str, int] = {}
        self._states: deque[np.ndarray] = deque(maxlen=WINDOW)
        self._spent = 0.0
        self._predicting = 0.0
        self._told: dict[str, str] = {}
        self._new: list[str] = []

    def look(self, images: Mapping[str, Tensor], state: np.ndarray | None, prompt: str) -> dict[str, str]:
        """Take in an observation.

        Args:
            images: of each camera that is there the newest frame as the model gets it, (3, H, W).
            state: (state_dim,), physical units; None where the policy takes none.
            prompt: the instruction.

        Returns:
            Everything that was found to differ so far, as texts by kind and place.
        """
        started = time.perf_counter()
        if prompt not in self.training["prompts"] and "instruction_unknown prompt" not in self._told:
            self._tell(prompt_mismatches([prompt], self.training))
        self._keep_time(started, state)
        if self._looked_at >= CHECK and self._spent > COST * self._predicting:
            return self._told
        for camera, frame in images.items():
            if camera in self._frames:
                pixels = frame.permute(1, 2, 0).numpy()
                checksum = hash(pixels[::7, ::7].tobytes())
                self._same[camera].append(self._last.get(camera) == checksum)
                self._last[camera] = checksum
                self._frames[camera].append(frame_facts(pixels))
        if state is not None:
            self._states.append(state)
        self._looked_at += 1
        if self._looked_at % CHECK == 0:
            self._tell(self._compared())
        self._spent += time.perf_counter() - started
        return self._told

    def predicted(self, seconds: float) -> None:
        """Take in how long a prediction took: looking at observations may cost a share of it."""
        self._predicting += seconds

    def _keep_time(self, now: float, state: np.ndarray | None) -> None:
        """Take in when an observation came, and from time to time look at the rate."""
        state = np.zeros(0) if state is None else state
        if self._before is not None and self.horizon is not None and state.shape == self._before[1].shape:
            self._intervals.append(now - self._before[0])
            self._moved.append(np.abs(state - self._before[1]))
            self._asked += 1
            if self._asked % RATE_CHECK == 0 and not any(key.startswith(KIND) for key in self._told):
                rates = np.array(self._intervals), np.stack(self._moved)
                found = request_rate_mismatch(*rates, self.training, self.horizon)
                self._tell([] if found is None else [found])
        self._before = now, state

    def _tell(self, found: Iterable[Mismatch]) -> None:
        for mismatch in found:
            key = f"{mismatch.kind} {mismatch.where}"
            if key not in self._told:
                self._told[key] = str(mismatch)
                self._new.append(mismatch.kind)

    def new_kinds(self) -> list[str]:
        """Kinds of mismatch that were found since the last call."""
        kinds, self._new = self._new, []
        return kinds

    def _compared(self) -> list[Mismatch]:
        width = len(self.training["state"]["quantiles"])
        states = np.stack(self._states) if self._states else None
        if states is None or states.shape[1] != width:
            states = np.tile(np.array(self.training["state"]["quantiles"])[:, len(QUANTILES) // 2], (2, 1))
        steps = np.abs(np.diff(states, axis=0)) if len(states) > 1 else np.zeros((1, width))
        quantiles = np.quantile(states, QUANTILES, axis=0).T.tolist()
        session: dict[str, Any] = {
            "cameras": {name: _camera(facts, self._same[name]) for name, facts in self._frames.items() if facts},
            "state": {
                "quantiles": quantiles,
                "steps": np.stack([*np.quantile(steps, (0.5, 0.99), axis=0), steps.max(axis=0)]).T.tolist(),
            },
            "action": self.training["action"]
            | {"steps": np.zeros((len(self.training["action"]["steps"]), 3)).tolist()},
            "response": {"correlation": np.zeros_like(self.training["response"]["correlation"]).tolist()},
        }
        present = self.training | {
            "cameras": {name: facts for name, facts in self.training["cameras"].items() if name in session["cameras"]}
        }
        numbers = number_mismatches(session, present, set()) if self._states else ()
        return [*camera_mismatches(session, present), *(m for m in numbers if m.kind in ENOUGH_NUMBERS)]


def _camera(facts: deque[FrameFacts], same: deque[bool]) -> dict[str, Any]:
    return {
        "thumbnails": [np.mean([fact.thumbnail for fact in facts], axis=0).tolist()],
        "picture": np.mean([fact.picture for fact in facts], axis=0).tolist(),
        "detail": [float(np.median([fact.detail for fact in facts]))],
        "blocks": [float(np.median([fact.blocks for fact in facts]))],
        "still": [float(np.mean(list(same)[1:])) if len(same) > 1 else 0.0],
    }
