"""Recorded episodes for the viewer of a page: their frames and numbers, and what a policy says beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from data.comparison.against import sampled_columns
from data.comparison.fit import statistics_fit
from data.comparison.page import fit_section
from data.comparison.profile import control_rate
from data.dataset import VLADataset
from data.decoding import decode_frame
from data.schema import ACTION, PLAN, STATE, camera_column, image_columns, vector_names
from utils.config_utils import Config
from utils.page.content import Curve, Episode, Film, Mark, Section
from utils.page.episodes import MAX_EPISODES, curves_of, sampled_steps
from utils.page.pictures import chosen_steps, film, film_frames

PIXELS = 160  # that a frame is decoded to at least
Frame = bytes | memoryview | np.ndarray | None


class DatasetEpisodes:
    """Episodes of a dataset, as `inference.page` asks for them."""

    def __init__(self, dataset: VLADataset) -> None:
        self._dataset = dataset
        self.rate = control_rate(dataset.store.files)

    def show(
        self,
        number: int,
        films: int,
        title: str,
        drawn_KTA: np.ndarray,
        curves: Callable[[Sequence[int]], list[Curve]],
        marks: Sequence[Mark],
    ) -> Episode:
        """One episode.

        Args:
            number: of it in the dataset's files.
            films: how many the page has.
            title: of the episode.
            drawn_KTA: what the policy said at each of the T steps, K draws, physical units.
            curves: from the steps that have values to further curves.
            marks: steps to see.
        """
        store, names = self._dataset.store, self._dataset.names
        begin, end = store.episode_starts[number : number + 2].tolist()
        cameras = [camera for camera in self._dataset.cameras if store.has_camera(camera)]
        sampled = sampled_steps(end - begin, [mark.step for mark in marks])
        action = np.asarray(store.action[begin:end])[:, : drawn_KTA.shape[2]]
        return Episode(
            title=title,
            text=f"{store.prompt(begin)}\n{store.describe(begin)}, {end - begin} steps",
            steps=end - begin,
            rate=self.rate,
            sampled=sampled,
            films=_films(cameras, end - begin, films, lambda camera, step: store.image(camera, begin + step)),
            curves=[
                *curves(sampled),
                *curves_of("action", names[ACTION][: action.shape[1]], action, sampled, drawn=drawn_KTA),
                *curves_of("state", names[STATE], np.asarray(store.state[begin:end]), sampled),
            ],
            marks=list(marks),
        )

    def fit(self, title: str, statistics: Mapping[str, Any], config: Config) -> Section:
        """The dataset's own episodes, not others of its files, beside the statistics of a policy."""
        return fit_section(title, *statistics_fit(sampled_columns(self._dataset, config), statistics, config.data))


def rollout_episodes(path: Callable[[str, int], Path], lines: Sequence[Mapping[str, Any]]) -> list[Episode]:
    """Recorded rollouts (`main_eval.py --record`), at most MAX_EPISODES, failures first.

    Args:
        path: (task, seed) -> file of an episode.
        lines: of episodes.jsonl; with `uncertainty` and `alarm_step` these are shown.
    """
    chosen = sorted(lines, key=lambda line: line["success"])[:MAX_EPISODES]
    return [_rollout(line, path(line["task"], line["seed"]), len(chosen)) for line in chosen]


def _rollout(line: Mapping[str, Any], path: Path, episodes: int) -> Episode:
    table = pq.read_table(path)
    metadata, steps = table.schema.metadata or {}, table.num_rows
    cameras = image_columns(table.schema)
    marks = []
    if line.get("alarm_step") is not None:
        marks.append(
            Mark(line["alarm_step"], "warning", "alarm: the policy is unsure for longer than in its successes")
        )
    sampled = sampled_steps(steps, [mark.step for mark in marks])
    curves = []
    planned = (
        np.flatnonzero([plan is not None for plan in table[PLAN].to_pylist()]) if PLAN in table.column_names else []
    )
    known = line.get("uncertainty") or []
    if len(known) and len(known) == len(planned):
        values = np.full((steps, 1), np.nan)
        for begin, value in zip(planned, known, strict=True):
            values[begin:] = np.nan if value is None else value
        curves += curves_of("policy", ["uncertainty"], values, sampled)
    for column in (ACTION, STATE):
        values = np.array(table[column].to_pylist(), np.float32)
        curves += curves_of(column, vector_names(metadata, column, values.shape[1]), values, sampled)
    films = episodes * len(cameras)
    frames = {camera: table[camera_column(camera, table.column_names, path)] for camera in cameras}
    outcome = "success" if line["success"] else "failure"
    rate = metadata.get(b"control_hz")
    return Episode(
        title=f"{line['task']}, seed {line['seed']}: {outcome}",
        text=f"{line['prompt']}\n{outcome} after {line['steps']} steps and {line['plans']} plans",
        steps=steps,
        rate=json.loads(rate) if rate else None,
        sampled=sampled,
        films=_films(cameras, steps, films, lambda camera, step: frames[camera][step].as_py()),
        curves=curves,
        marks=marks,
    )


def _films(cameras: Sequence[str], steps: int, films: int, frame: Callable[[str, int], Frame]) -> list[Film]:
    shown = chosen_steps(steps, film_frames(films))
    made = [film(camera, shown, [_pixels(frame(camera, step)) for step in shown], films) for camera in cameras]
    return [one for one in made if one is not None]


def _pixels(frame: Frame) -> np.ndarray | None:
    return frame if frame is None or isinstance(frame, np.ndarray) else decode_frame(frame, PIXELS, PIXELS)
