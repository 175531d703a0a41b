"""Pictures of predicted beside true actions: the mean over draws as a line, their spread as a band.

Shape letters: K draws, N samples, T steps, A per_action_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from utils.figure_text import axis_label, drawable, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_DIMENSIONS = 24  # per figure
BAND = (10, 90)  # percentiles over the draws
TRUE_COLOUR, PREDICTED_COLOUR = "black", "tab:orange"


def draw_trajectory(axis: Axes, steps_T: np.ndarray, drawn_KT: np.ndarray, true_T: np.ndarray) -> None:
    """One dimension's prediction and truth on an axis; with one draw there is a line and no band.

    Args:
        steps_T: positions on the horizontal axis.
        drawn_KT: draws of the prediction.
        true_T: what was done; NaN where there is no truth.
    """
    marker = "." if len(steps_T) < 40 else None
    if len(drawn_KT) > 1:
        low_T, high_T = np.percentile(drawn_KT, BAND, axis=0)
        label = f"{BAND[0]} to {BAND[1]} % of {len(drawn_KT)} draws"
        axis.fill_between(steps_T, low_T, high_T, color=PREDICTED_COLOUR, alpha=0.25, linewidth=0, label=label)
    label = "predicted, mean" if len(drawn_KT) > 1 else "predicted"
    style = {"linewidth": 1.2, "marker": marker, "markersize": 4}
    axis.plot(steps_T, drawn_KT.mean(0), color=PREDICTED_COLOUR, label=label, **style)
    axis.plot(steps_T, true_T, color=TRUE_COLOUR, label="true", **style)
    axis.grid(alpha=0.3)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.tick_params(labelsize=8)


def plot_chunks(
    path: str | Path,
    drawn_KNTA: np.ndarray,
    true_NTA: np.ndarray,
    is_pad_NT: np.ndarray,
    captions: Sequence[str],
    names: Sequence[str],
    title: str,
) -> None:
    """Write predicted and true action chunks as a PNG: one column per sample, one line per action dimension.

    Args:
        drawn_KNTA: draws in physical units.
        true_NTA: physical units; nothing is drawn where `is_pad_NT`.
        captions: one per sample, above its column.
        names: of the A action dimensions.
        title: of the whole figure.
    """
    samples, horizon, total = true_NTA.shape
    dims = min(total, MAX_DIMENSIONS)
    true_NTA = np.where(is_pad_NT[..., None], np.nan, true_NTA)
    figure = Figure(figsize=(2.8 * samples + 0.6, 1.3 * dims + 1.1), layout="constrained")
    axes = figure.subplots(dims, samples, sharex=True, sharey="row", squeeze=False)
    for n, caption in enumerate(captions):
        axes[0, n].set_title(drawable(caption), fontsize=8)
        axes[-1, n].set_xlabel("step of the chunk", fontsize=8)
        for a in range(dims):
            draw_trajectory(axes[a, n], np.arange(horizon), drawn_KNTA[:, n, :, a], true_NTA[n, :, a])
    for a in range(dims):
        axes[a, 0].set_ylabel(axis_label(names[a]), fontsize=8)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )
    more = f" (the first {dims} of {total} dimensions)" if total > dims else ""
    figure.suptitle(drawable(f"{title}{more}"), fontsize=10)
    save_figure(figure, path)
