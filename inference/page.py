"""An evaluation over recorded data as a page, and what both kinds of evaluation show: how the policy reacts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from inference.evaluate import Predictions
from inference.policy_files import restamped
from inference.predictor import VLAPredictor
from inference.report import verdict
from utils.config_utils import Config
from utils.metrics import METRICS
from utils.page.content import (
    Block,
    Chart,
    Charts,
    Curve,
    Episode,
    Line,
    Mark,
    Page,
    Picture,
    Pictures,
    Section,
    Table,
    Viewer,
)
from utils.page.episodes import MAX_EPISODES, curves_of, left_out
from utils.page.pictures import film_frames, picture_file

WORST = 3  # episodes whose largest error is marked
MAX_MAPS = 24  # occlusion maps that are shown
CHOICE = "half of them those with the largest errors, the others evenly chosen"


class Recorded(Protocol):
    """The recorded side of an evaluation; `data.viewer.DatasetEpisodes` is one."""

    def show(
        self,
        number: int,
        films: int,
        title: str,
        drawn_KTA: np.ndarray,
        curves: Callable[[Sequence[int]], list[Curve]],
        marks: Sequence[Mark],
    ) -> Episode:
        """One episode with what was predicted in it."""

    def fit(self, title: str, statistics: Mapping[str, Any], config: Config) -> Section:
        """The data beside the statistics of the policy with this configuration."""


def offline_page(
    result: Mapping[str, Any],
    predictions: Mapping[str, Predictions],
    recorded: Mapping[str, Recorded],
    predictor: VLAPredictor,
    folder: Path,
) -> Page:
    """The page of an evaluation over recorded data.

    Args:
        result: content of metrics.json.
        predictions, recorded: per dataset what was predicted, and what was recorded.
        predictor: the policy.
        folder: of the evaluation, for what else was measured there.
    """
    chosen = {name: _chosen(part, MAX_EPISODES // len(predictions) or 1) for name, part in predictions.items()}
    films = len(predictor.cameras) * sum(map(len, chosen.values()))
    shown: list[Episode] = []
    for name, numbers in chosen.items():
        part = predictions[name]
        label = f"{Path(name).name} " if len(predictions) > 1 else ""
        errors = _errors(part)
        worst = sorted(numbers, key=lambda n: -np.nanmean(errors[part.episode_N == n]))[:WORST]
        for number in numbers:
            title = f"{label}episode {number}{', among the largest errors' if number in worst else ''}"
            shown.append(_episode(part, errors, number, recorded[name], films, title))
    policy = result["predictors"]["policy"]
    better = all(
        policy["overall"]["mse_normalized"] < result["predictors"][other]["overall"]["mse_normalized"]
        for other in ("mean_action", "repeat_last_action")
    )
    intro = (
        "At every step the first action of the prediction made there, beside what was done. The error is that of the "
        "whole prediction, in standard deviations of the recorded actions."
    )
    names = next(iter(predictions.values())).action_names
    sections = [
        Section("Errors", [_metrics(result["predictors"]), *_where(policy, result["predictors"], names)]),
        Section("Episodes and predictions", [Viewer(shown)], intro),
        *_fits(recorded, predictor),
        *sensitivity_sections(folder, result),
    ]
    settings = result["settings"]
    facts = [
        ("samples", policy["samples"]),
        ("episodes", sum(len(np.unique(part.episode_N)) for part in predictions.values())),
        ("horizon", settings["horizon"]),
        ("action width", settings["per_action_dim"]),
        ("integration steps", settings["num_inference_steps"]),
        ("draws per observation", settings["num_samples"]),
        ("time per sample", f"{1000 * result['seconds_per_sample']:.1f} ms"),
        ("policy", Path(result["checkpoint"]).name),
    ]
    longest = max((episode.steps for episode in shown), default=0)
    total = sum(len(np.unique(part.episode_N)) for part in predictions.values())
    missing = left_out(len(shown), total, film_frames(films), longest, settings["per_action_dim"], CHOICE)
    title = ", ".join(predictions)
    return Page("evaluation", title, verdict(dict(result)), "good" if better else "warning", facts, sections, missing)


def sensitivity_sections(folder: Path, evaluated: Mapping[str, Any]) -> list[Section]:
    """What `--sensitivity` left in an evaluation's folder: how far changed inputs move the actions, and maps of it.

    Nothing where there is none, or it is of another policy than the evaluation that `evaluated` describes.
    """
    path = folder / "sensitivity.json"
    if not path.is_file():
        return []
    found = restamped(json.loads(path.read_text(encoding="utf-8")))
    if found.get("checkpoint_stamp") != restamped(evaluated)["checkpoint_stamp"]:
        return []
    header = ("what was changed", "input", "in spreads of the policy", "in variation of the demonstrations")
    rows = [[row["change"], row["group"], row["in_spread"], row["in_variation"]] for row in found["rows"]]
    blocks: list[Block] = [Table(header, rows, f"How far the actions move, over {found['samples']} observations")]
    lines = [
        Line(row["change"], list(range(len(steps))), steps)
        for row in sorted(found["rows"], key=lambda row: -(row["in_variation"] or 0))[:6]
        if (steps := row.get("per_step_in_variation"))
    ]
    if lines:
        blocks.append(Charts([Chart("moved, in variation of the demonstrations", "step of the horizon", lines)]))
    maps = [m for m in found.get("maps", []) if (folder / m["image"]).is_file()][:MAX_MAPS]
    if maps:
        pictures = [
            Picture(picture_file(folder / m["image"]), f"{m['camera']}, episode {m['episode']}, row {m['row']}")
            for m in maps
        ]
        blocks.append(Pictures(pictures))
    intro = (
        "The same observations with one input changed. A policy that does not look at a camera does not move when that "
        "camera is blanked. Maps show where covering a patch moves the actions most."
    )
    return [Section("What it looks at", blocks, intro)]


def _chosen(part: Predictions, count: int) -> list[int]:
    """Episodes to show, ascending: up to half of them those with the largest mean error, the others evenly spread."""
    numbers, errors = np.unique(part.episode_N), _errors(part)
    if len(numbers) <= count:
        return numbers.tolist()
    means = [np.nanmean(errors[part.episode_N == number]) for number in numbers]
    worst = numbers[np.argsort(means)[::-1][: count // 2]]
    others = np.setdiff1d(numbers, worst)
    even = others[np.linspace(0, len(others) - 1, count - len(worst)).round().astype(int)]
    return sorted({*worst.tolist(), *even.tolist()})


def _errors(part: Predictions) -> np.ndarray:
    """(N,): mean absolute error of each prediction, in standard deviations of the recorded first actions."""
    scale = part.true_NTA[:, 0].std(axis=0)
    moving = scale > 1e-6
    difference = np.abs(part.predicted_KNTA[0] - part.true_NTA)[:, :, moving] / scale[moving]
    valid = ~part.is_pad_NT
    return (difference.mean(axis=2) * valid).sum(axis=1) / valid.sum(axis=1) if moving.any() else np.zeros(len(valid))


def _episode(part: Predictions, errors: np.ndarray, number: int, recorded: Recorded, films: int, title: str) -> Episode:
    rows = np.flatnonzero(part.episode_N == number)
    rows = rows[np.argsort(part.frame_N[rows])]
    steps = part.frame_N[rows]
    drawn = np.full((len(part.predicted_KNTA), int(steps[-1]) + 1, part.true_NTA.shape[2]), np.nan, np.float32)
    drawn[:, steps] = part.predicted_KNTA[:, rows, 0]
    of_step = np.full((drawn.shape[1], 2), np.nan)
    of_step[steps, 0] = errors[rows]
    of_step[steps, 1] = part.predicted_KNTA[:, rows].std(axis=0).mean(axis=(1, 2))
    names = ["error", "spread of draws"][: 1 + (len(drawn) > 1)]
    largest = int(np.nanargmax(of_step[:, 0]))
    mark = Mark(largest, "warning", f"largest error of this episode: {of_step[largest, 0]:.2g} standard deviations")
    return recorded.show(
        number, films, title, drawn, lambda sampled: curves_of("policy", names, of_step, sampled), [mark]
    )


def _fits(recorded: Mapping[str, Recorded], predictor: VLAPredictor) -> list[Section]:
    """Each dataset beside the policy's statistics."""
    statistics = predictor.model.statistics[predictor.dataset_index]
    return [
        part.fit(f"Do the statistics fit {Path(name).name}?", statistics, predictor.config)
        for name, part in recorded.items()
    ]


def _metrics(predictors: Mapping[str, Any]) -> Table:
    rows = [[metric, *(part["overall"][metric] for part in predictors.values())] for metric in METRICS]
    names = [name.replace("_", " ") for name in predictors]
    kept = [row for row in rows if any(value is not None for value in row[1:])]
    return Table(("metric", *names), kept, "The policy beside two trivial predictors")


def _where(policy: Mapping[str, Any], predictors: Mapping[str, Any], names: Sequence[str]) -> list[Block]:
    steps = [
        Line(name.replace("_", " "), list(range(len(values))), values)
        for name, part in predictors.items()
        if (values := part["per_step"]["mse_normalized"])
    ]
    about = policy["per_dimension"]
    rows = [[name, about["mae"][a], about["mse_normalized"][a]] for a, name in enumerate(names)]
    return [
        Charts([Chart("squared error over the horizon, normalized", "step of the prediction", steps)]),
        Table(("action", "mean absolute error, physical units", "squared error, normalized"), rows, "Each dimension"),
    ]
