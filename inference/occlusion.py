"""Where on a picture does the policy look? Occlusion maps (Zeiler & Fergus 2014, sec. 4.2), drawn over the frames.

A grey patch is moved over a camera's picture, and how far the actions move from the same noise is the colour of its
place. What is not covered by any one patch alone, such as a scene that is told twice, leaves no trace.

Shape letters: P patches, B batch, T horizon, A per_action_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from inference.predictor import VLAPredictor
from inference.sensitivity import SteadyPolicy, blank, spread_evenly
from utils.batch import Batch
from utils.figure_text import drawable, save_figure
from utils.text import file_stem

PATCHES = 8  # along each side
FOLDER = "sensitivity"  # of the pictures, beside sensitivity.json


def draw_occlusion_maps(
    folder: Path,
    predictor: VLAPredictor,
    datasets: Mapping[str, Any],
    frames: int,
    unit: float | None,
    *,
    seed: int = 0,
    batch_size: int = 16,
) -> list[dict[str, Any]]:
    """Occlusion maps of every camera at some frames, spread evenly over the data, as PNG.

    Args:
        folder: of sensitivity.json; pictures go to its folder `sensitivity`.
        predictor: the policy.
        datasets: per name a VLADataset.
        frames: how many.
        unit: what distances of normalized actions are given in: the policy's spread; None: they are given as they are.
        seed: of the noise.
        batch_size: patches predicted together.

    Returns:
        Per map `dataset`, `camera`, `episode`, `row` (the step in the episode), `image` (its path from `folder`) and
        `largest`, the largest distance.
    """
    policy, maps = SteadyPolicy(predictor, seed), []
    chosen = spread_evenly([len(dataset) for dataset in datasets.values()], frames)
    for number, ((name, dataset), indices) in enumerate(zip(datasets.items(), chosen, strict=True)):
        for index in indices.tolist():
            batch = dataset.batch([index])
            place = {"dataset": name, "episode": int(batch["episode_index"]), "row": int(batch["frame_index"])}
            for slot, camera in enumerate(predictor.cameras):
                if not batch["image_mask"][0, slot]:
                    continue
                map_PP = occlusion_map(policy, batch, camera, (number, index), batch_size) / (unit or 1.0)
                picture = f"{file_stem(name)}_episode_{place['episode']:06d}_step_{place['row']:06d}_{camera}.png"
                title = f"{camera}, episode {place['episode']}, step {place['row']}"
                _draw(folder / FOLDER / picture, batch[camera][0, -1], map_PP, title, unit is not None)
                largest = float(map_PP.max())
                maps.append({**place, "camera": camera, "image": f"{FOLDER}/{picture}", "largest": largest})
    return maps


def occlusion_map(
    policy: SteadyPolicy, batch: Batch, camera: str, place: tuple[int, int], batch_size: int
) -> np.ndarray:
    """How far the actions move when each patch of a camera's picture is grey, float64 (PATCHES, PATCHES).

    Args:
        policy: repeats the noise.
        batch: of one observation; of several frames all are covered.
        camera: one that is there.
        place: of the observation, which names its noise.
        batch_size: patches predicted together.
    """
    exists_T = ~batch["action_is_pad"].numpy()[0, : policy.predictor.horizon]
    noise_K = policy.noise([place], 1)
    base_TA = policy.actions(policy.context(batch), noise_K)[0, 0]
    covered, moved = _covered(batch[camera]), []
    for first in range(0, len(covered), batch_size):
        part = covered[first : first + batch_size]
        several = {key: _repeated(value, len(part)) for key, value in batch.items()} | {camera: part}
        noise = noise_K if noise_K[0] is None else noise_K.repeat_interleave(len(part), dim=1)
        action_BTA = policy.actions(policy.context(several), noise)[0]
        moved.append(np.sqrt(np.square(action_BTA - base_TA)[:, exists_T].mean(axis=(1, 2))))
    return np.concatenate(moved).reshape(PATCHES, PATCHES)


def _covered(images_1S3HW: Tensor) -> Tensor:
    """The pictures with each patch grey in turn, (P, S, 3, H, W), row by row."""
    height, width = images_1S3HW.shape[-2:]
    rows, columns = (np.linspace(0, side, PATCHES + 1).round().astype(int) for side in (height, width))
    grey, covered = blank(images_1S3HW), []
    for row in range(PATCHES):
        for column in range(PATCHES):
            images = images_1S3HW.clone()
            patch = (..., slice(rows[row], rows[row + 1]), slice(columns[column], columns[column + 1]))
            images[patch] = grey[patch]
            covered.append(images)
    return torch.cat(covered)


def _repeated(value: Any, count: int) -> Any:
    return value.expand(count, *value.shape[1:]) if torch.is_tensor(value) else list(value) * count


def _draw(path: Path, image_3HW: Tensor, map_PP: np.ndarray, title: str, in_spread: bool) -> None:
    """The picture, and beside it the same under the map."""
    image = image_3HW.permute(1, 2, 0).numpy()
    figure = Figure(figsize=(7.4, 3.5), layout="constrained")
    plain, overlaid = figure.subplots(1, 2)
    grey = image.mean(axis=-1) / (255 if image.dtype == np.uint8 else 1)
    plain.imshow(image)
    overlaid.imshow(grey, cmap="gray", vmin=0, vmax=1)
    extent = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
    opacity = 0.1 + 0.7 * map_PP / max(map_PP.max(), 1e-9)  # where nothing happens the picture stays visible
    drawn = overlaid.imshow(map_PP, cmap="inferno", alpha=opacity, extent=extent, vmin=0, interpolation="nearest")
    for axis in (plain, overlaid):
        axis.axis("off")
    unit = "spreads" if in_spread else "normalized units"
    bar = figure.colorbar(drawn, ax=overlaid, fraction=0.05)
    bar.set_label(f"actions move by ({unit})", fontsize=9)
    figure.suptitle(drawable(title), fontsize=10)
    save_figure(figure, path)
