"""Pictures of demonstrations: contact sheets, traces and distributions per dimension, episodes and their split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullLocator

from utils.figure_text import axis_label, drawable, save_figure
from utils.text import shortened

MAX_DIMENSIONS = 24  # per figure
FLAGGED = "#c1121f"
SPLIT_COLOURS = {"train": "#1f77b4", "val": "#e07b00", "unused": "#b5b5b5"}
MAX_STRIPS = 40  # files drawn as strips of episodes
MAX_BARS = 40  # prompts drawn as bars
TRACE_COLOURS = ("#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#17becf", "#7f7f7f", "#bcbd22", "#e377c2")
MAX_LEGEND = 8  # groups named below a plot of traces
WIDTH = 13  # inches
GAP = 3  # pixels between the pictures of a cell


@dataclass
class Cell:
    """One episode of a contact sheet.

    Attributes:
        caption: a line or two.
        pictures: per camera its frames, uint8 (H, W, 3) in any size, None where a frame is missing.
        flagged: draw the caption in red.
    """

    caption: str
    pictures: list[list[np.ndarray | None]]
    flagged: bool = False


@dataclass
class Trace:
    """One episode's values, float (T, D), the group that its colour stands for, and (step, dimension) to mark."""

    group: str
    values: np.ndarray
    marks: list[tuple[int, int]] = field(default_factory=list)


def contact_sheet(path: str | Path, cells: Sequence[Cell], title: str, columns: int = 2) -> None:
    """Write cells side by side as one PNG; within a cell one line of pictures per camera."""
    mosaics = [_mosaic(cell.pictures) for cell in cells]
    lines = -(-len(cells) // columns)
    cell_width = WIDTH / columns
    picture_height = (cell_width - 0.15) * max(mosaic.shape[0] / mosaic.shape[1] for mosaic in mosaics)
    caption_height = 0.05 + 0.16 * max(cell.caption.count("\n") + 1 for cell in cells)
    height = 0.35 + lines * (caption_height + picture_height)
    figure = Figure(figsize=(WIDTH, height))
    figure.text(0.5, 1 - 0.08 / height, drawable(title), ha="center", va="top", fontsize=11)
    for i, (cell, mosaic) in enumerate(zip(cells, mosaics, strict=True)):
        line, column = divmod(i, columns)
        top = height - 0.35 - line * (caption_height + picture_height)
        left = (column * cell_width + 0.08) / WIDTH
        colour = FLAGGED if cell.flagged else "black"
        figure.text(left, (top - 0.02) / height, drawable(cell.caption), va="top", fontsize=9, color=colour)
        bottom = (top - caption_height - picture_height + 0.05) / height
        axis = figure.add_axes((left, bottom, (cell_width - 0.15) / WIDTH, (picture_height - 0.05) / height))
        axis.imshow(mosaic, interpolation="bilinear")
        axis.set_anchor("NW")
        axis.axis("off")
    _save(figure, path)


def image_grid(path: str | Path, pictures: np.ndarray, row_labels: Sequence[str], column_labels: Sequence[str]) -> None:
    """Write a grid of equally large pictures as PNG.

    Args:
        pictures: uint8 (rows, columns, H, W, 3).
        row_labels, column_labels: texts beside and above.
    """
    lines, columns = pictures.shape[:2]
    side = max(1.6, min(2.6, 12 / columns))
    figure = Figure(figsize=(side * columns + 1.2, (side + 0.25) * lines + 0.3), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for i, line in enumerate(axes):
        for j, axis in enumerate(line):
            axis.imshow(pictures[i, j], interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if i == 0:
                axis.set_title(drawable(column_labels[j]), fontsize=9)
            if j == 0:
                axis.set_ylabel(drawable(row_labels[i]), fontsize=8)
    _save(figure, path)


def plot_vectors(
    path: str | Path, names: Sequence[str], traces: Sequence[Trace], populations: dict[str, np.ndarray], title: str
) -> None:
    """One line per dimension: traces over the steps of some episodes, and the distribution over all rows.

    Args:
        names: of the D dimensions.
        traces: some episodes; marks are drawn in red.
        populations: split -> float (N, D), all rows of it; values that are not finite are left out.
    """
    total = next(iter(populations.values())).shape[1]
    dims = min(total, MAX_DIMENSIONS)
    groups = list(dict.fromkeys(trace.group for trace in traces))
    colours = {group: TRACE_COLOURS[i % len(TRACE_COLOURS)] for i, group in enumerate(groups)}
    below = 0.55 + 0.18 * -(-min(len(groups), MAX_LEGEND) // 2)  # inches
    height = 1.45 * dims + 0.65 + below
    figure = Figure(figsize=(WIDTH, height))
    edges = {"left": 0.75 / WIDTH, "right": 1 - 0.15 / WIDTH, "top": 1 - 0.6 / height, "bottom": below / height}
    axes = figure.subplots(
        dims, 2, squeeze=False, width_ratios=[3, 1], gridspec_kw=edges | {"hspace": 0.3, "wspace": 0.1}
    )
    for d, (left, right) in enumerate(axes):
        _draw_traces(left, traces, colours, d)
        _draw_distribution(right, {split: values[:, d] for split, values in populations.items()})
        left.set_ylabel(axis_label(names[d]), fontsize=9)
        for axis in (left, right):
            axis.grid(alpha=0.25)
            axis.tick_params(labelsize=8)
    axes[0, 0].set_title(f"{len(traces)} episodes, one line each", fontsize=9)
    axes[0, 1].set_title("all rows, % (log scale)", fontsize=9)
    axes[-1, 0].set_xlabel("step of the episode", fontsize=9)
    axes[-1, 1].set_xlabel("value", fontsize=9)
    handles = [Line2D([], [], color=colours[group], label=drawable(group)) for group in groups[:MAX_LEGEND]]
    figure.legend(handles=handles, loc="lower left", fontsize=8, frameon=False, ncols=2)
    if len(populations) > 1:
        patches = [Patch(color=SPLIT_COLOURS[split], label=split) for split in populations]
        figure.legend(handles=patches, loc="lower right", fontsize=8, frameon=False, ncols=2)
    title += f" (the first {dims} of {total} dimensions)" if total > dims else ""
    figure.text(0.5, 1 - 0.1 / height, drawable(title), ha="center", va="top", fontsize=11)
    _save(figure, path)


def plot_episodes(path: str | Path, episodes: Sequence[dict[str, Any]], title: str) -> None:
    """Histograms of what `data.doctor.analysis.describe_episodes` measures of each episode, by split, as PNG."""
    measures = {
        "steps": "steps",
        "state_path": "length of the state's path",
        "action_mean_abs": "mean absolute action",
        "action_change": "mean change from action to action",
    }
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    splits = [split for split in SPLIT_COLOURS if any(episode["split"] == split for episode in episodes)]
    for axis, (key, label) in zip(figure.subplots(1, len(measures)), measures.items(), strict=True):
        values = [[episode[key] for episode in episodes if episode["split"] == split] for split in splits]
        axis.hist(values, bins=20, stacked=True, color=[SPLIT_COLOURS[split] for split in splits], label=splits)
        axis.set_xlabel(label, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.yaxis.get_major_locator().set_params(integer=True)
    axis.legend(frameon=False, fontsize=8)
    figure.supylabel("episodes", fontsize=9)
    figure.suptitle(drawable(title), fontsize=11)
    _save(figure, path)


def plot_split(path: str | Path, episodes: Sequence[dict[str, Any]], title: str) -> None:
    """Which episodes are where: one strip per file, its episodes in order and as long as they are, coloured by split;
    and below one bar per prompt, its episodes by split. Writes one PNG.

    Args:
        episodes: entries of `data.doctor.analysis.describe_episodes`, of one dataset.
    """
    splits = [split for split in SPLIT_COLOURS if any(episode["split"] == split for episode in episodes)]
    files, prompts = (_grouped(episodes, key) for key in ("file", "prompt"))
    strips, bars = list(files.items())[:MAX_STRIPS], list(prompts.items())[:MAX_BARS]
    heights = [0.5 + 0.42 * len(strips), 0.5 + 0.3 * len(bars)]
    figure = Figure(figsize=(WIDTH, 0.9 + sum(heights)), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=heights)
    _draw_strips(upper, [of_group for _, of_group in strips])
    folders = len({Path(name).name for name, _ in strips}) < len(strips)  # files of the same name
    _label_lines(upper, [str(Path(*Path(name).parts[-1 - folders :])) for name, _ in strips])
    upper.set_xlabel("rows of the file; white lines divide episodes, the numbers are theirs", fontsize=9)
    left = np.zeros(len(bars))
    for split in splits:
        counts = np.array([sum(episode["split"] == split for episode in of_group) for _, of_group in bars])
        lower.barh(range(len(bars)), counts, left=left, color=SPLIT_COLOURS[split], height=0.7)
        left += counts
    _label_lines(lower, [shortened(prompt, 60) for prompt, _ in bars])
    lower.set_xlabel("episodes", fontsize=9)
    lower.xaxis.get_major_locator().set_params(integer=True)
    total = {split: [e["steps"] for e in episodes if e["split"] == split] for split in splits}
    labels = [f"{split}: {len(steps)} episodes, {sum(steps)} steps" for split, steps in total.items()]
    patches = [Patch(color=SPLIT_COLOURS[split], label=label) for split, label in zip(splits, labels, strict=True)]
    figure.legend(handles=patches, loc="outside lower center", fontsize=9, frameon=False, ncols=len(splits))
    hidden = [
        f"{len(groups) - limit} more {name}"
        for name, groups, limit in (("files", files, MAX_STRIPS), ("prompts", prompts, MAX_BARS))
        if len(groups) > limit
    ]
    figure.suptitle(drawable(title + (f" ({' and '.join(hidden)} not drawn)" if hidden else "")), fontsize=11)
    _save(figure, path)


def _grouped(episodes: Sequence[dict[str, Any]], key: str) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for episode in episodes:
        groups.setdefault(episode[key], []).append(episode)
    return groups


def _draw_strips(axis: Axes, strips: Sequence[Sequence[dict[str, Any]]]) -> None:
    longest = max(episode["row"] + episode["steps"] for strip in strips for episode in strip)
    for line, strip in enumerate(strips):
        for episode in strip:
            colour, steps = SPLIT_COLOURS[episode["split"]], episode["steps"]
            axis.barh(line, steps, left=episode["row"], height=0.7, color=colour, edgecolor="white", linewidth=0.6)
            if steps * 150 > longest * len(str(episode["episode"])):  # where its number has room
                ink, middle = "black" if episode["split"] == "unused" else "white", episode["row"] + steps / 2
                axis.text(middle, line, episode["episode"], ha="center", va="center", fontsize=7, color=ink)
    axis.set_xlim(0, longest)


def _label_lines(axis: Axes, labels: Sequence[str]) -> None:
    axis.set_yticks(range(len(labels)), [drawable(label) for label in labels], fontsize=8)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.tick_params(axis="x", labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _mosaic(pictures: list[list[np.ndarray | None]]) -> np.ndarray:
    """Pictures of any size side by side, one line per camera, on white; a crossed box where one is missing."""
    known = [picture for line in pictures for picture in line if picture is not None]
    height = max((picture.shape[0] for picture in known), default=96)
    width = max((picture.shape[1] for picture in known), default=96)
    columns = max(len(line) for line in pictures)
    shape = (len(pictures) * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3)
    canvas = np.full(shape, 255, dtype=np.uint8)
    for i, line in enumerate(pictures):
        for j, picture in enumerate(line):
            top, left = i * (height + GAP), j * (width + GAP)
            if picture is None:
                box = canvas[top : top + height, left : left + width]
                box[:] = 225
                diagonal = np.arange(width)
                box[(diagonal * height) // width, diagonal] = 150
                box[(diagonal * height) // width, width - 1 - diagonal] = 150
            else:
                canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return canvas


def _draw_traces(axis: Axes, traces: Sequence[Trace], colours: dict[str, str], d: int) -> None:
    for trace in traces:
        axis.plot(trace.values[:, d], color=colours[trace.group], linewidth=0.9, alpha=0.8)
    for trace in traces:
        steps = [step for step, dim in trace.marks if dim == d]
        axis.plot(steps, trace.values[steps, d], "o", color=FLAGGED, markersize=5, zorder=3)


def _draw_distribution(axis: Axes, columns: dict[str, np.ndarray]) -> None:
    columns = {split: column[np.isfinite(column)] for split, column in columns.items()}
    everything = np.concatenate(list(columns.values()))
    low, high = (float(everything.min()), float(everything.max())) if len(everything) else (0.0, 1.0)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    for split, column in columns.items():
        weights = np.full(len(column), 100 / max(len(column), 1))
        style = (
            {"histtype": "stepfilled", "alpha": 0.45} if split == "train" else {"histtype": "step", "linewidth": 1.2}
        )
        axis.hist(column, bins=50, range=(low, high), weights=weights, color=SPLIT_COLOURS[split], label=split, **style)
    axis.set_yscale("log")
    axis.set_ylim(max(50 / max(len(everything), 1), 1e-4), 150)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def _save(figure: Figure, path: str | Path) -> None:
    save_figure(figure, path, dpi=100)
