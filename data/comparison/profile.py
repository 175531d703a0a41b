"""What demonstrations look like, in a few kB: checkpoints keep it, so that a robot's observations can be compared.

A profile is made of the training episodes once at the start of a run (`profile_of`), and of a recorded session by the
same function; `utils/comparison/mismatch.py` compares the two. Frames are looked at as the model gets them, behind the
image processor. A profile is plain lists and numbers:

    {"episodes", "steps", "frames_per_camera", "control_hz",
     "request_hz": of what a server recorded, whose rows are requests and not control steps,
     "cameras": {name: {"thumbnails": (E, GRID, GRID, 3) mean picture of each episode looked at, 0 to 255,
                        "picture": (PICTURE, PICTURE, 3) mean over all frames,
                        "detail", "blocks", "change", "still": one number per episode looked at,
                        "view": how the state is read off its pictures, and how well that goes (`_view`, `_through`),
                        "seen_as": of a session alone, how well it goes with turned pictures (`_seen_as`)}},
     "state", "action": {"quantiles": (width, 9) at QUANTILES, "steps": (width, 3) median, 99 % and largest change,
                         "spread": (width,) how far one episode's quantiles lie from those of all, in ranges},
     "begin": {"state", "action": quantiles of the first BEGIN steps of every episode; of a session the first START},
     "start": {"state": of the first START steps in either},
     "response": {"correlation": (A, S) of actions with the state's change after them,
                  "motion": how the state moves in training (`state_motion`),
                  "unexplained": of a session alone, what that leaves at every delay},
     "prompts": {instruction: episodes}}
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data.comparison.delays import Steps, state_motion, unexplained_motion, unexplained_pictures
from data.episode_store import EpisodeStore
from data.processing import ObservationError, VLAImageProcessor
from data.tables import open_table
from utils.comparison.facts import (
    GRID,
    LAGS,
    QUANTILES,
    TURNS,
    WELL_SEEN,
    FrameFacts,
    Profile,
    frame_facts,
    quantile_distance,
)
from utils.parquet_utils import DataError
from utils.recordings import Recording

EPISODES = 32  # of each dataset, spread evenly, whose frames are looked at
BEGIN = 16  # steps of an episode in which a policy can't have gone far yet
START = 2  # of a session's: even one that is misled is still where it began
STEPS = 48  # consecutive steps of each of them
RIDGE = 0.02  # of the fit that reads the state off thumbnails, in shares of the fields' variance
MOVING = 128  # of each dataset, spread evenly, by which the way that the state moves is told
RESPONSE = 2  # steps within which the state answers to an action
PROMPTS = 200  # the most frequent instructions that are kept


def profile_of(
    store: EpisodeStore,
    cameras: Sequence[str],
    image_processor: VLAImageProcessor,
    episodes: np.ndarray | None = None,
    *,
    against: Profile | None = None,
) -> Profile:
    """The profile of some episodes of a store.

    Args:
        store: of the data; its `state` and `action` are in physical units.
        cameras: those that the policy reads.
        image_processor: of the policy.
        episodes: numbers of the episodes; None: all.
        against: the training's profile, where this is a session to be compared with it: then every frame is looked at,
            and the state is read off them as the training's pictures show it.

    Raises:
        DataError: a frame that can't be decoded.
    """
    episodes = np.arange(store.num_episodes) if episodes is None else episodes
    starts, ends = store.episode_starts[:-1][episodes], store.episode_starts[1:][episodes]
    rows = np.concatenate([np.arange(begin, end) for begin, end in zip(starts, ends, strict=True)])
    looked_at = list(_looked_at(starts, ends, all_frames=against is not None))
    trained = {} if against is None else against["cameras"]
    shown = {}
    for camera in cameras:
        frames = _frames(store, camera, image_processor, looked_at)
        if frames:
            shown[camera] = _camera_profile(frames, store.state, trained.get(camera, {}).get("view"))
    prompts = Counter(store.prompts[i] for i in store.prompt_index[starts].tolist())
    parts = [slice(*ends_of) for ends_of in zip(starts, ends, strict=True)]
    joined = np.isin(rows[1:], starts, invert=True)  # steps from one row to the next of the same episode
    return {
        "episodes": len(episodes),
        "steps": len(rows),
        "frames_per_camera": sum(len(part) for part in looked_at),
        "control_hz": control_rate(store.files),
        "request_hz": control_rate(store.files, ("request_hz",)),
        "cameras": shown,
        "state": _column_profile(store.state[rows], joined),
        "action": _column_profile(store.action[rows], joined),
        "begin": {
            name: _begin(getattr(store, name), starts, ends, BEGIN if against is None else START)
            for name in ("state", "action")
        },
        "start": {"state": _begin(store.state, starts, ends, START)},
        "response": _response([(store.state[part], store.action[part]) for part in parts], against),
        "prompts": dict(prompts.most_common(PROMPTS)),
    }


def control_rate(recordings: Sequence[Recording], keys: Sequence[str] = ("control_hz", "fps")) -> float | None:
    """Control steps a second as the first one's metadata say (recorders and converters write it); None: unknown."""
    with open_table(recordings[0]) as table:
        metadata = table.schema.metadata or {}
    for key in keys:
        try:
            rate = json.loads(metadata[key.encode()])
        except (KeyError, ValueError):
            continue
        if isinstance(rate, int | float) and not isinstance(rate, bool) and rate > 0:
            return float(rate)
    return None


def _looked_at(starts: np.ndarray, ends: np.ndarray, all_frames: bool) -> Iterator[range]:
    """Ranges of rows whose frames are looked at: all, in parts of STEPS, or one part of some episodes.

    Early, middle and late parts of episodes take turns.
    """
    number = len(starts) if all_frames else min(EPISODES, len(starts))
    for i, chosen in enumerate(np.linspace(0, len(starts) - 1, number).round().astype(int).tolist()):
        begin, end = int(starts[chosen]), int(ends[chosen])
        if all_frames:
            parts = max(1, round((end - begin) / STEPS))
            edges = np.linspace(begin, end, parts + 1).round().astype(int).tolist()
            yield from (range(*edge) for edge in itertools.pairwise(edges))
            continue
        spare = max(0, end - begin - STEPS)
        first = begin + spare * (i % 4) // 3
        yield range(first, min(end, first + STEPS))


def _frames(
    store: EpisodeStore, camera: str, image_processor: VLAImageProcessor, looked_at: Sequence[range]
) -> list[tuple[list[int], list[FrameFacts]]]:
    """Per episode looked at the rows that have a frame of this camera, and the frames' facts."""
    memory = np.empty((image_processor.height, image_processor.width, 3), image_processor.pixel_type)
    result = []
    for rows in looked_at if store.has_camera(camera) else ():
        present, facts = [], []
        for row, frame in zip(rows, store.images(camera, rows), strict=True):
            if frame is None:
                continue
            try:
                image_processor.decode_into(frame, memory)
            except ObservationError as error:
                raise DataError(f"{store.describe(row)}: {camera}: {error}; drop or mend that episode") from None
            present.append(row)
            facts.append(frame_facts(memory))
        if facts:
            result.append((present, facts))
    return result


def _camera_profile(
    frames: Sequence[tuple[list[int], list[FrameFacts]]], state: np.ndarray, trained_view: dict[str, Any] | None
) -> dict[str, Any]:
    parts: dict[str, Any] = {name: [] for name in ("thumbnails", "detail", "blocks", "change", "still")}
    pictures = np.concatenate([[fact.picture for fact in facts] for _, facts in frames])
    parts["picture"] = np.round(pictures.mean(axis=0)).astype(int).tolist()
    pairs = []  # per episode (thumbnails (N, fields), states (N, S))
    for rows, facts in frames:
        thumbnails = np.stack([fact.thumbnail for fact in facts])
        change = np.abs(np.diff(thumbnails, axis=0)).mean(axis=(1, 2, 3))
        parts["thumbnails"].append(np.round(thumbnails.mean(axis=0)).astype(int).tolist())
        parts["detail"].append(round(float(np.median([fact.detail for fact in facts])), 4))
        parts["blocks"].append(round(float(np.median([fact.blocks for fact in facts])), 4))
        parts["change"].append(round(float(np.median(change)) if len(change) else 0.0, 4))
        parts["still"].append(round(float((change == 0).mean()) if len(change) else 0.0, 4))
        pairs.append((thumbnails.reshape(len(facts), -1).astype(np.float64), state[rows].astype(np.float64)))
    if trained_view is None:
        parts["view"] = _view(pairs)
    else:
        parts["view"] = _through(pairs, trained_view)
        parts["seen_as"] = _seen_as(pairs, trained_view)
    return parts


def _seen_as(pairs: Sequence[tuple[np.ndarray, np.ndarray]], view: dict[str, Any]) -> dict[str, float]:
    """How well the training's view reads the state off a session's pictures after each of TURNS, and before ("").

    The mean correlation over the dimensions that it read well in training; empty where these are fewer than two.
    """
    known = np.flatnonzero(np.array(view["correlation"]).diagonal() > WELL_SEEN)
    if len(known) < 2:
        return {}
    fit = {name: np.array(view[name]) for name in ("mean", "scale", "weights", "bias")}
    result = {}
    for kind, turn in (("", lambda frames: frames), *TURNS.items()):
        changed = [(turn(x.reshape(-1, GRID, GRID, 3)).reshape(len(x), -1), state) for x, state in pairs]
        result[kind] = round(float(_through_fit(changed, fit)["correlation"].diagonal()[known].mean()), 3)
    return result


def _view(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """A linear fit that reads the state off thumbnails, and how well it does on episodes that it was not fitted to.

    Returns:
        `mean` and `scale` (fields,), `weights` (fields, S) and `bias` (S,) of the fit to all episodes; `explained`
        (S,) and `correlation` (S, S) of what is read (first axis) with what is so, of fits to one half of the episodes
        on the other.
    """
    fit = _fit(pairs)
    # By fours, because the parts of episodes that are looked at take turns so.
    halves = [[pair for i, pair in enumerate(pairs) if i // 4 % 2 == half] for half in (0, 1)]
    checked = [(_fit(halves[1 - i]), halves[i]) for i in (0, 1)] if all(halves) else []
    seen = [_through_fit(part, fitted) for fitted, part in checked]
    width = pairs[0][1].shape[1]
    rounded = {name: np.round(values, 5).tolist() for name, values in fit.items()}
    if not seen:
        return rounded | {
            "explained": [0.0] * width,
            "correlation": np.zeros((width, width)).tolist(),
        }
    return rounded | {
        name: np.round(np.minimum(*(part[name] for part in seen)), 3).tolist() for name in ("explained", "correlation")
    }


def _through(pairs: Sequence[tuple[np.ndarray, np.ndarray]], view: dict[str, Any]) -> dict[str, Any]:
    """A session's states beside what the training's view reads off its pictures: see `_view`.

    `agrees` (S, S) is the share of the variance of a state (second axis) that what is read of a dimension (first axis)
    explains in that dimension's own units, apart from an offset; `agrees_turned` (S,) of its own, with the other sign;
    `unexplained` is what remains at every delay (`unexplained_pictures`).
    A view of pictures unlike those it was fitted to reads anything, which may well correlate, but does not agree.
    """
    fit = {name: np.array(view[name]) for name in ("mean", "scale", "weights", "bias")}
    result = _through_fit(pairs, fit)
    parts = [(_read(thumbnails, fit), states[:, : len(fit["bias"])]) for thumbnails, states in pairs]
    read, states = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    variance = np.where(states.var(axis=0) > 0, states.var(axis=0), np.inf)
    left = np.stack([(states - one[:, None]).var(axis=0) for one in read.T])
    result["agrees"] = np.clip(1 - left / variance, -9.0, 1.0)
    result["agrees_turned"] = np.clip(1 - (states + read).var(axis=0) / variance, -9.0, 1.0)
    rounded = {name: np.round(values, 3).tolist() for name, values in result.items()}
    return rounded | {"unexplained": unexplained_pictures(parts).tolist()}


def _fit(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    thumbnails, states = (np.concatenate([pair[i] for pair in pairs]) for i in (0, 1))
    mean, scale, bias = thumbnails.mean(axis=0), thumbnails.std(axis=0) + 1.0, states.mean(axis=0)
    x = (thumbnails - mean) / scale
    gram = x.T @ x + RIDGE * len(x) * np.eye(x.shape[1])
    return {"mean": mean, "scale": scale, "weights": np.linalg.solve(gram, x.T @ (states - bias)), "bias": bias}


def _read(thumbnails: np.ndarray, fit: dict[str, np.ndarray]) -> np.ndarray:
    """The states that thumbnails, (N, fields), show: (N, S)."""
    return ((thumbnails - fit["mean"]) / fit["scale"]) @ fit["weights"] + fit["bias"]


def _through_fit(pairs: Sequence[tuple[np.ndarray, np.ndarray]], fit: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    width = len(fit["bias"])
    read = [_read(thumbnails, fit) for thumbnails, _ in pairs]
    states = [states[:, :width] for _, states in pairs]
    left = np.concatenate(states) - np.concatenate(read)
    variance = np.concatenate(states).var(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        explained = np.where(variance > 0, 1 - (left**2).mean(axis=0) / variance, 0.0)
    return {
        "explained": np.clip(explained, -9.0, 1.0),
        "correlation": _correlations(np.concatenate(read), np.concatenate(states)),
        "offset": left.mean(axis=0),
    }


def _correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlation of every column of `a` (first axis of the result) with every column of `b`; 0 of a constant one."""
    if len(a) < 3:
        return np.zeros((a.shape[1], b.shape[1]))
    a, b = (x - x.mean(axis=0) for x in (a, b))
    norm = np.sqrt((a**2).sum(axis=0))[:, None] * np.sqrt((b**2).sum(axis=0))
    return np.where(norm > 1e-9, (a.T @ b) / np.maximum(norm, 1e-9), 0.0)


def _column_profile(values: np.ndarray, joined: np.ndarray) -> dict[str, Any]:
    """Of a numeric column, (N, width); `joined` says which rows belong to the episode of the row before."""
    values = values.astype(np.float64)
    steps = np.abs(np.diff(values, axis=0))[joined]
    steps = steps if len(steps) else np.zeros((1, values.shape[1]))
    quantiles = np.quantile(values, QUANTILES, axis=0).T
    episodes = np.split(values, np.flatnonzero(~joined) + 1)
    some = episodes[:: max(1, len(episodes) // EPISODES)]
    distances = [quantile_distance(np.quantile(episode, QUANTILES, axis=0).T, quantiles) for episode in some]
    return {
        "quantiles": _rounded(quantiles),
        "steps": _rounded(np.stack([*np.quantile(steps, (0.5, 0.99), axis=0), steps.max(axis=0)]).T),
        "spread": np.round(np.quantile(distances, 0.9, axis=0), 4).tolist(),
    }


def _begin(values: np.ndarray, starts: np.ndarray, ends: np.ndarray, steps: int) -> list[list[float]]:
    """Quantiles of so many first steps of episodes, (width, 9)."""
    first = [values[begin : min(begin + steps, end)] for begin, end in zip(starts, ends, strict=True)]
    return _rounded(np.quantile(np.concatenate(first).astype(np.float64), QUANTILES, axis=0).T)


def _rounded(values: np.ndarray) -> list[list[float]]:
    return [[float(f"{value:.5g}") for value in row] for row in values.tolist()]


def _response(episodes: Sequence[Steps], against: Profile | None) -> dict[str, Any]:
    """How the state answers to actions: correlation (A, S) of an action with the state's change over the following
    RESPONSE steps, and how it moves, or of a session what the training's way to move leaves unexplained."""
    (_, states), (_, actions) = (part.shape for part in episodes[0])
    some = [
        (state.astype(np.float64), action.astype(np.float64))
        for state, action in episodes[:: max(1, len(episodes) // EPISODES)]
        if len(state) >= 4 * LAGS + 2
    ]
    correlation = np.zeros((actions, states))
    if some:
        commands = np.concatenate([action[:-RESPONSE] for _, action in some])
        correlation = _correlations(commands, np.concatenate([s[RESPONSE:] - s[:-RESPONSE] for s, _ in some]))
    result = {"correlation": np.round(correlation, 3).tolist()}
    if against is None:
        return result | {"motion": state_motion(episodes[:: max(1, len(episodes) // MOVING)])}
    trained = against["response"]
    same_widths = np.shape(trained["correlation"]) == (actions, states)
    if not same_widths or not trained.get("motion"):
        return result | {"unexplained": []}
    return result | {"unexplained": unexplained_motion(episodes, trained["motion"]).tolist()}
