"""What an alarm is calibrated on: the uncertainty of every plan of episodes that succeeded.

Closed-loop episodes of the policy itself are the right ones: the rate then holds for such episodes. Recorded episodes
that the policy was not trained on (its validation data) stand in where there is no simulator. There the policy sees the
states that somebody else reached, not those that its own actions lead to, so that its own episodes may alarm more
often.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inference.alarm import CalibrationError
from inference.closed_loop.execution import EXECUTION_STRATEGIES, ExecutionSettings
from inference.policy_files import is_stamp_of
from inference.predictor import VLAPredictor
from utils.misc import derive_seed, read_json_lines


def rollout_settings(folders: Sequence[Path], checkpoint_path: str) -> dict[str, Any]:
    """The settings of inference that closed-loop evaluations of one policy were run with.

    Args:
        folders: --output_dir of main_eval.py --env.
        checkpoint_path: of the policy.

    Returns:
        Settings of `inference` by name, and `dataset`.

    Raises:
        CalibrationError: no such results, of another policy, of a control, or run with different settings.
    """
    found: list[dict[str, Any]] = []
    for folder in folders:
        try:
            settings = json.loads((folder / "rollout_settings.json").read_text(encoding="utf-8"))
            execution = settings["execution"]
            chosen = {name: settings[name] for name in ("num_inference_steps", "dataset")}
        except (OSError, ValueError, KeyError):
            raise CalibrationError(
                f"{folder}: no closed-loop results of a policy; give an --output_dir of main_eval.py --env"
            ) from None
        if settings.get("control") != "policy" or settings.get("prompts") not in ("own", None):
            raise CalibrationError(
                f"{folder}: results of {settings.get('control')!r} with prompts {settings.get('prompts')!r}; give "
                "those of the policy as it is to be used"
            )
        if not is_stamp_of(settings.get("checkpoint_stamp"), checkpoint_path):
            raise CalibrationError(
                f"{folder}: results of {settings.get('checkpoint')}, not of the weights in {checkpoint_path}; evaluate "
                "these first"
            )
        chosen |= {"best_of": settings.get("best_of", 1), "execution": execution["strategy"]}
        chosen |= {name: execution[name] for name in ("n_action_steps", "latency_steps")}
        found.append(chosen)
        if chosen != found[0]:
            raise CalibrationError(f"{folder}: run with {chosen}, {folders[0]} with {found[0]}; give results alike")
    return found[0]


def rollout_uncertainty(folders: Sequence[Path]) -> list[list[float]]:
    """The uncertainty of every plan of each successful episode of closed-loop evaluations.

    Raises:
        CalibrationError: no episode has finished, or an earlier version recorded them, which did not keep it.
    """
    episodes = []
    for folder in folders:
        path = folder / "episodes.jsonl"
        if not path.is_file():
            raise CalibrationError(f"{folder}: no episode has finished; run that main_eval.py --env again")
        for episode in read_json_lines(path):
            if "uncertainty" not in episode:
                raise CalibrationError(f"{folder}: episodes of an earlier version, without uncertainty; use --restart")
            if episode["success"]:
                episodes.append([math.nan if value is None else value for value in episode["uncertainty"]])
    return episodes


def recorded_uncertainty(predictor: VLAPredictor, dataset: Any, batch_size: int = 32) -> list[list[float]]:
    """The uncertainty of the plans that a policy makes along recorded episodes that succeeded, as often as it plans.

    Args:
        predictor: the policy.
        dataset: a VLADataset; where a column `success` says that an episode failed, it is left out.
        batch_size: plans made together.
    """
    execution = ExecutionSettings.from_config(predictor.settings, predictor.horizon)
    every = EXECUTION_STRATEGIES[execution.strategy].interval(execution)
    rows_N = dataset.rows(np.arange(len(dataset)))
    places = [dataset.store.locate(int(row)) for row in rows_N]
    succeeded = dataset.store.label("success", otherwise=True)[rows_N]
    planned = [i for i, (_, step) in enumerate(places) if succeeded[i] and step % every == 0]
    episodes: dict[int, list[float]] = {}
    for first in range(0, len(planned), batch_size):
        indices = planned[first : first + batch_size]
        seeds = [derive_seed("alarm", *places[i]) for i in indices]
        uncertainty_KB = predictor.predict_measured(dataset.batch(indices), [seeds]).uncertainty_KB
        for i, value in zip(indices, uncertainty_KB[0], strict=True):
            episodes.setdefault(places[i][0], []).append(float(value))
    return list(episodes.values())
