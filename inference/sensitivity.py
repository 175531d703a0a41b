"""Does the policy look, and at what? How far its actions move when a part of what it sees is changed.

Every change is made to recorded observations, and the actions before and after it are sampled from the same noise, so
that only the change counts. A distance is the root mean square difference of normalized actions, over samples, existing
dimensions and the steps that the demonstration still has, given in two units:

    of the spread       the same distance between two draws from different noise: 1 is as far as chance moves an action
    of the variation    the standard deviation of the demonstrated actions over the samples: 1 is as much as they differ

A part that matters moves actions by several spreads; one that the policy ignores by none. A head that samples nothing
has no spread.

Shape letters: K draws, B batch, T horizon, A per_action_dim.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from inference.observations import GREY
from inference.predictor import VLAPredictor
from model.context import Context
from utils.batch import Batch
from utils.misc import derive_seed
from utils.statistics import state_labels

DRAWS = 4  # of every observation, for the spread
NO_INSTRUCTION = "."  # in place of a dropped one, for a policy needs a text


class SteadyPolicy:
    """A policy whose draws are repeated with the same noise: normalized actions of observations, changed or not."""

    def __init__(self, predictor: VLAPredictor, seed: int) -> None:
        self.predictor, self.model, self.seed = predictor, predictor.model, seed
        with torch.no_grad(), self.model.autocast():
            steps = predictor.num_inference_steps
            self._schedule = self.model.action_head.schedule(steps, predictor.device)

    def noise(self, places: Sequence[tuple[int | str, ...]], draws: int) -> Tensor | Sequence[None]:
        """The noise of some draws for observations that are named by where they come from, (K, B, ...)."""
        seeds = [[derive_seed("sensitivity", self.seed, *place, draw) for place in places] for draw in range(draws)]
        noise = self.model.draw_noise(seeds, self.predictor.num_inference_steps)
        return (None,) if noise is None else noise

    @torch.no_grad()
    def context(self, batch: Batch) -> Context:
        """What the head sees of a batch."""
        with self.model.autocast():
            return self.model.encode(self.predictor.engine.prepared(batch))

    @torch.no_grad()
    def actions(self, context: Context, noise_K: Tensor | Sequence[None]) -> np.ndarray:
        """Normalized actions, float32 (K, B, T, A), in the widths of the predictor's dataset."""
        head, predictor = self.model.action_head, self.predictor
        with self.model.autocast():
            draws, _ = head.sample_draws(context, noise_K, predictor.num_inference_steps, self._schedule)
        return draws[..., : predictor.horizon, : predictor.per_action_dim].float().cpu().numpy()

    @torch.no_grad()
    def with_state(self, context: Context, batch: Batch, state_BS: Tensor) -> Context:
        """The context of a batch with another state; nothing else is computed again where the state is not in it."""
        tokenizer = self.predictor.prompt_tokenizer
        if tokenizer.reads_state:
            return self.context(self.with_prompts({**batch, "state": state_BS}, batch["raw_prompt_text"]))
        index_B = batch["dataset_index"].to(self.predictor.device)
        state_BS = self.model.normalizer.normalize_state(state_BS.to(self.predictor.device), index_B)
        return dataclasses.replace(context, state_BS=state_BS)

    def with_prompts(self, batch: Batch, prompts: Sequence[str]) -> Batch:
        """A batch with other instructions."""
        encode, states = self.predictor.prompt_tokenizer.tensor, batch["state"].numpy()
        indices = batch["dataset_index"].tolist()
        tokens = [encode(*one) for one in zip(prompts, states, indices, strict=True)]
        ids_BL = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        lengths_B1 = torch.tensor([[len(ids)] for ids in tokens])
        mask_BL = torch.arange(ids_BL.shape[1]) < lengths_B1
        return {**batch, "input_ids": ids_BL, "prompt_mask": mask_BL, "raw_prompt_text": list(prompts)}


@dataclass
class _Squares:
    """Squared differences summed per horizon step."""

    sum_T: np.ndarray
    count_T: np.ndarray

    def add(self, difference_BTA: np.ndarray, counts_BT: np.ndarray) -> None:
        square_BT = np.square(difference_BTA.astype(np.float64)).mean(axis=-1)
        self.sum_T += np.where(counts_BT, square_BT, 0.0).sum(axis=0)
        self.count_T += counts_BT.sum(axis=0)

    def rms(self) -> tuple[float, list[float]]:
        """Over all steps, and per step; NaN where nothing was counted."""
        with np.errstate(invalid="ignore", divide="ignore"):
            per_step = np.sqrt(self.sum_T / self.count_T)
            return float(np.sqrt(self.sum_T.sum() / self.count_T.sum())), per_step.tolist()


@dataclass
class _Sums:
    """All that is summed over the samples."""

    horizon: int
    groups: dict[str, str] = field(default_factory=dict)  # change -> camera, state or instruction
    changes: dict[str, _Squares] = field(default_factory=dict)

    def of(self, change: str, group: str) -> _Squares:
        self.groups.setdefault(change, group)
        zeros = np.zeros(self.horizon)
        return self.changes.setdefault(change, _Squares(zeros, zeros.copy()))


def measure_sensitivity(
    predictor: VLAPredictor, datasets: Mapping[str, Any], samples: int, *, seed: int = 0, batch_size: int = 16
) -> dict[str, Any]:
    """How far a policy's actions move when cameras, state or instruction are changed.

    Args:
        predictor: the policy; single draws are compared, whatever `inference.best_of` says.
        datasets: per name a VLADataset.
        samples: how many observations, spread evenly over all of them; fewer where there are fewer.
        seed: of the noise, and of which other episode's pictures are shown.
        batch_size: observations predicted together.

    Returns:
        `samples`; `spread` and `variation`, the two units in normalized actions; and `rows`, one a change, each with
        `change`, `group` (camera, state, instruction), `samples`, `in_spread` and `in_variation`, and the same per
        horizon step as `per_step_in_spread` and `per_step_in_variation`. Numbers are None where there is no unit.
    """
    policy, sums = SteadyPolicy(predictor, seed), _Sums(predictor.horizon)
    spread, shown = _Squares(*np.zeros((2, predictor.horizon))), []
    counts: dict[str, int] = {}
    chosen = spread_evenly([len(dataset) for dataset in datasets.values()], samples)
    total = sum(map(len, chosen))
    progress = tqdm(total=total, desc="sensitivity", unit="sample", disable=None)
    for number, (dataset, indices) in enumerate(zip(datasets.values(), chosen, strict=True)):
        for first in range(0, len(indices), batch_size):
            part = indices[first : first + batch_size]
            batch = dataset.batch(part)
            context = policy.context(batch)
            noise_K = policy.noise([(number, int(index)) for index in part], DRAWS)
            base_KBTA = policy.actions(context, noise_K)
            exists_BT = ~batch["action_is_pad"].numpy()[:, : predictor.horizon]
            if len(base_KBTA) > 1:
                apart = np.sqrt(2 * base_KBTA.var(axis=0, ddof=1))  # root mean square distance of two draws
                spread.add(apart, exists_BT)
            shown.append((_demonstrated(policy, batch), exists_BT))
            for change, group, changed, where_B in _changes(policy, dataset, part, batch, context):
                moved_BTA = policy.actions(changed, noise_K[:1])[0] - base_KBTA[0]
                sums.of(change, group).add(moved_BTA, exists_BT & where_B[:, None])
                counts[change] = counts.get(change, 0) + int(where_B.sum())
            progress.update(len(part))
    progress.close()
    units = spread.rms(), _variation(*map(np.concatenate, zip(*shown, strict=True)))
    rows = []
    for change, squares in sums.changes.items():
        row: dict[str, Any] = {"change": change, "group": sums.groups[change], "samples": counts[change]}
        moved, moved_T = squares.rms()
        for name, (unit, unit_T) in zip(("spread", "variation"), units, strict=True):
            row[f"in_{name}"] = _ratio(moved, unit)
            row[f"per_step_in_{name}"] = [_ratio(*pair) for pair in zip(moved_T, unit_T, strict=True)]
        rows.append(row)
    scales = {name: _ratio(unit, 1.0) for name, (unit, _) in zip(("spread", "variation"), units, strict=True)}
    return {"samples": total, **scales, "rows": rows}


def spread_evenly(lengths: Sequence[int], count: int) -> list[np.ndarray]:
    """Indices of `count` samples at even distances over several datasets laid end to end; fewer where there are fewer.

    Returns:
        int64, one array a dataset.
    """
    starts = np.concatenate([[0], np.cumsum(lengths)])
    places = np.unique(np.linspace(0, starts[-1] - 1, min(count, starts[-1])).round().astype(np.int64))
    return [
        places[(begin <= places) & (places < end)] - begin for begin, end in zip(starts[:-1], starts[1:], strict=True)
    ]


def blank(images: Tensor) -> Tensor:
    """Grey pictures of the same shape."""
    return torch.full_like(images, GREY if images.dtype == torch.uint8 else GREY / 255)


def _changes(
    policy: SteadyPolicy, dataset: Any, indices: np.ndarray, batch: Batch, context: Context
) -> Iterator[tuple[str, str, Context, np.ndarray]]:
    """Every change of a batch: its name, its group, the context that comes of it, and bool (B,): where it was one."""
    there_BV = batch["image_mask"].numpy()
    for change, images, where_B in _camera_changes(policy, dataset, indices, batch, there_BV):
        if where_B.any():
            yield change, "camera", policy.context({**batch, **images}), where_B
    everywhere_B = np.ones(len(indices), bool)
    if policy.predictor.config.reads_state:
        mean_S = _mean_state(policy, dataset, batch["state"].shape[1])
        labels = state_labels(policy.predictor.state_widths)
        for dimension, label in enumerate(labels):
            state_BS = batch["state"].clone()
            state_BS[:, dimension] = mean_S[dimension]
            yield f"{label} at its mean", "state", policy.with_state(context, batch, state_BS), everywhere_B
        if len(labels) > 1:
            state_BS = mean_S.expand_as(batch["state"]).clone()
            yield "whole state at its mean", "state", policy.with_state(context, batch, state_BS), everywhere_B
    prompts, others = batch["raw_prompt_text"], _instructions(policy, dataset)
    if len(others) > 1:
        following = dict(zip(others, others[1:] + others[:1], strict=True))
        changed = policy.with_prompts(batch, [following[prompt] for prompt in prompts])
        yield "instruction exchanged", "instruction", policy.context(changed), everywhere_B
    changed = policy.with_prompts(batch, [NO_INSTRUCTION] * len(prompts))
    yield "instruction dropped", "instruction", policy.context(changed), everywhere_B


def _camera_changes(
    policy: SteadyPolicy, dataset: Any, indices: np.ndarray, batch: Batch, there_BV: np.ndarray
) -> Iterator[tuple[str, dict[str, Tensor], np.ndarray]]:
    cameras = policy.predictor.cameras
    rows = dataset.rows(np.arange(len(dataset)))
    episodes = np.searchsorted(dataset.store.episode_starts, rows, side="right") - 1
    begins = np.searchsorted(episodes, episodes[indices])  # the first sample of each one's episode
    beginning = dataset.batch(begins)
    others = _of_another_episode(policy, episodes, indices)
    elsewhere = None if others is None else dataset.batch(others)
    for slot, camera in enumerate(cameras):
        there_B = there_BV[:, slot]
        yield f"{camera} blank", {camera: blank(batch[camera])}, there_B
        first = beginning[camera][:, -1:].expand_as(batch[camera])
        moved_on_B = begins != indices
        yield f"{camera} frozen", {camera: first}, there_B & moved_on_B & beginning["image_mask"].numpy()[:, slot]
        if elsewhere is not None:
            both_B = there_B & elsewhere["image_mask"].numpy()[:, slot]
            exists_BS = elsewhere["vlm_attention_mask"][..., None, None, None]  # that episode may have begun just then
            images = torch.where(exists_BS, elsewhere[camera], elsewhere[camera][:, -1:])
            yield f"{camera} of another episode", {camera: images}, both_B
    for (i, one), (j, other) in itertools.combinations(enumerate(cameras), 2):
        both_B = there_BV[:, i] & there_BV[:, j]
        yield f"{one} and {other} exchanged", {one: batch[other], other: batch[one]}, both_B
    if len(cameras) > 1:
        grey = {camera: blank(batch[camera]) for camera in cameras}
        yield "all cameras blank", grey, there_BV.any(axis=1)


def _of_another_episode(policy: SteadyPolicy, episodes: np.ndarray, indices: np.ndarray) -> np.ndarray | None:
    """For each sample one of another episode, by chance; None where there is but one episode."""
    if episodes[0] == episodes[-1]:
        return None
    found = []
    for index in indices.tolist():
        rng = np.random.default_rng(derive_seed("another episode", policy.seed, index))
        begin, end = np.searchsorted(episodes, [episodes[index], episodes[index] + 1])
        other = int(rng.integers(len(episodes) - (end - begin)))
        found.append(other if other < begin else other + end - begin)
    return np.array(found)


def _mean_state(policy: SteadyPolicy, dataset: Any, width: int) -> Tensor:
    """Of the training data, or, where its statistics do not say, of these; float32 (width,), padded with zeros."""
    statistics = policy.model.statistics[policy.predictor.dataset_index]["state"]
    mean = np.asarray(statistics["mean"] if "mean" in statistics else dataset.store.state.mean(axis=0), np.float32)
    return torch.from_numpy(np.pad(mean, (0, width - len(mean))))


def _instructions(policy: SteadyPolicy, dataset: Any) -> list[str]:
    """Those of the data; where they are but one, with those of training."""
    own = list(dict.fromkeys(dataset.store.prompts))
    trained = policy.predictor.training_data
    return own if len(own) > 1 or trained is None else list(dict.fromkeys([*own, *trained["prompts"]]))


@torch.no_grad()
def _demonstrated(policy: SteadyPolicy, batch: Batch) -> np.ndarray:
    """The demonstrated actions, normalized, float32 (B, T, A)."""
    predictor, device = policy.predictor, policy.predictor.device
    tensors = (batch[name].to(device) for name in ("action", "state", "dataset_index"))
    action_BTA = policy.model.normalizer.normalize_action(*tensors)
    return action_BTA[:, : predictor.horizon, : predictor.per_action_dim].cpu().numpy()


def _variation(action_NTA: np.ndarray, exists_NT: np.ndarray) -> tuple[float, list[float]]:
    """The root mean square distance of actions from their mean at the same horizon step."""
    weight_NT1 = exists_NT[..., None].astype(np.float64)
    mean_TA = (action_NTA * weight_NT1).sum(axis=0) / np.maximum(weight_NT1.sum(axis=0), 1)
    squares = _Squares(*np.zeros((2, action_NTA.shape[1])))
    squares.add(action_NTA - mean_TA, exists_NT)
    return squares.rms()


def _ratio(value: float, unit: float) -> float | None:
    return None if not np.isfinite(value) or not np.isfinite(unit) or unit < 1e-9 else float(value / unit)
