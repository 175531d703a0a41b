"""Draw the two pictures of the README: docs/images/architecture.svg and docs/images/timeline.svg.

    python docs/make_figures.py

The pictures of pages come from the quickstart's run, through pages that docs/evaluation.md says how to make:

    python scripts/page_picture.py --html offline.html --png docs/images/page.png --section 2 --step 30
    python scripts/page_picture.py --html run.html --png docs/images/page_phone.png --width 390 --section 5

The same program writes the same bytes: text becomes outlines of matplotlib's own font, and no date is stored.
"""

from __future__ import annotations

import argparse
import pathlib

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

INK, SOFT = "#1f2933", "#6b7785"
INPUT, PRETRAINED, OURS, RESULT = "#eef1f5", "#d6e6f7", "#fde6c8", "#d9efdc"
SEEN, EXECUTED, REPLACED, TARGET, PADDED = "#7ba7d0", "#f0a24b", "#fbe3c4", "#9ccfa5", "#ffffff"
Point = tuple[float, float]


def box(axes: Axes, at: Point, size: Point, title: str, detail: str = "", color: str = OURS) -> None:
    """A rounded box whose lower left corner is `at`, with a bold line and small ones below it."""
    shape = FancyBboxPatch(at, *size, boxstyle="round,pad=0,rounding_size=0.12", facecolor=color, edgecolor=INK)
    shape.set_linewidth(1.0)
    axes.add_patch(shape)
    x, y = at[0] + size[0] / 2, at[1] + size[1] / 2
    lines = detail.count("\n") + 1 if detail else 0
    axes.text(x, y + 0.14 * lines, title, ha="center", va="center", fontsize=10, weight="bold", color=INK)
    axes.text(x, y - 0.17, detail, ha="center", va="center", fontsize=8, color=INK, linespacing=1.35)


def arrow(axes: Axes, begin: Point, end: Point, label: str = "", shift: Point = (0.0, 0.14)) -> None:
    """An arrow with a small label at its middle, moved by `shift`."""
    axes.add_patch(FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=11, color=INK, linewidth=1.1))
    x, y = (begin[0] + end[0]) / 2 + shift[0], (begin[1] + end[1]) / 2 + shift[1]
    axes.text(x, y, label, ha="center", va="center", fontsize=8, color=SOFT, linespacing=1.3)


def canvas(width: float, height: float) -> tuple[plt.Figure, Axes]:
    """An empty picture whose units are about 0.8 inches, without axes."""
    figure, axes = plt.subplots(figsize=(0.8 * width, 0.8 * height))
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    return figure, axes


def architecture() -> plt.Figure:
    """From frames, prompt and state to a chunk of actions."""
    figure, axes = canvas(15.6, 6.6)
    box(axes, (0.2, 4.9), (2.5, 1.1), "camera frames", "uint8 (B, S, 3, H, W)\nimage_1, image_2", INPUT)
    box(axes, (0.2, 3.2), (2.5, 0.9), "instruction", "raw_prompt_text", INPUT)
    box(axes, (0.2, 0.6), (2.5, 0.9), "state", "(B, state_dim), physical", INPUT)

    frame = FancyBboxPatch((3.2, 2.8), 5.5, 3.6, boxstyle="round,pad=0,rounding_size=0.15", fill=False, linestyle="--")
    frame.set_edgecolor(SOFT)
    axes.add_patch(frame)
    axes.text(3.4, 6.18, "PaliGemmaVLM (backbone)", fontsize=8.5, color=SOFT, va="center")
    box(axes, (3.5, 4.9), (1.5, 1.1), "SigLIP", "every image\nthat exists", PRETRAINED)
    box(axes, (5.3, 4.9), (1.5, 1.1), "projector", "+ resampler", PRETRAINED)
    box(axes, (3.5, 3.2), (1.5, 0.9), "tokenizer", "prompt format", PRETRAINED)
    box(axes, (7.1, 3.2), (1.4, 2.8), "Gemma", "one pass,\nbidirectional\nover image and\ntext tokens", PRETRAINED)
    arrow(axes, (2.7, 5.45), (3.5, 5.45))
    arrow(axes, (5.0, 5.45), (5.3, 5.45))
    arrow(axes, (6.8, 5.45), (7.1, 5.45))
    arrow(axes, (2.7, 3.65), (3.5, 3.65))
    arrow(axes, (5.0, 3.65), (7.1, 3.65), "embeddings")

    box(axes, (3.5, 0.6), (2.4, 0.9), "Normalizer", "statistics are buffers")
    arrow(axes, (2.7, 1.05), (3.5, 1.05))

    box(axes, (9.8, 2.2), (2.7, 3.8), "")
    axes.text(11.15, 5.68, "ActionTransformer", ha="center", va="center", fontsize=10, weight="bold", color=INK)
    parts = ("self-attention over T", "cross-attention\nto the context", "MLP", "time t: adaptive norm,\nzero gates")
    for i, text in enumerate(parts):
        y = 5.08 - 0.8 * i
        axes.add_patch(Rectangle((10.0, y - 0.31), 2.3, 0.62, facecolor="white", edgecolor=SOFT, linewidth=0.8))
        axes.text(11.15, y, text, ha="center", va="center", fontsize=8, color=INK, linespacing=1.2)
    arrow(axes, (8.5, 4.6), (9.8, 4.6), "context\n(B, L, E)", shift=(0.02, 0.36))
    arrow(axes, (5.9, 1.05), (10.5, 2.2), "state token", shift=(-0.4, 0.22))
    box(axes, (7.2, 0.15), (2.2, 0.8), "noise", "(B, T, A), t = 0", INPUT)
    arrow(axes, (9.4, 0.55), (11.4, 2.2), "$x_t$", shift=(0.2, -0.12))

    box(axes, (13.2, 4.4), (2.2, 1.1), "velocity", "training: squared error\nto action − noise")
    box(axes, (13.2, 2.5), (2.2, 1.1), "N Euler steps", "$x_t + v\\,/N$,\nt from 0 to 1")
    box(axes, (13.2, 0.4), (2.2, 1.2), "actions", "denormalized\n(horizon, per_action_dim)", RESULT)
    arrow(axes, (12.5, 4.95), (13.2, 4.95))
    arrow(axes, (14.3, 4.4), (14.3, 3.6))
    arrow(axes, (13.2, 3.05), (12.5, 3.05), "again", shift=(0.0, 0.16))
    arrow(axes, (14.3, 2.5), (14.3, 1.6))

    axes.text(9.8, 6.3, "flow-matching head", fontsize=8.5, color=SOFT, va="center")
    for x, (color, text) in zip((0.2, 1.8), ((PRETRAINED, "pretrained"), (OURS, "new")), strict=True):
        axes.add_patch(Rectangle((x, 2.25), 0.28, 0.28, facecolor=color, edgecolor=INK, linewidth=0.8))
        axes.text(x + 0.4, 2.39, text, fontsize=8.5, color=INK, va="center")
    return figure


def steps_row(axes: Axes, y: float, first: int, colors: list[str], hatch: str | None = None) -> None:
    """Unit cells from time step `first` on, one per color."""
    for i, color in enumerate(colors):
        cell = Rectangle((x_of(first + i), y), 0.86, 0.5, facecolor=color, edgecolor=INK, linewidth=0.9)
        cell.set_hatch(hatch if color == PADDED else None)
        axes.add_patch(cell)


def x_of(step: int) -> float:
    """The left edge of a time step's cell."""
    return 3.6 + 0.95 * (step + 1)


def timeline() -> plt.Figure:
    """Observation frames, horizon and executed steps of two predictions, and a sample at the end of an episode."""
    figure, axes = canvas(16.2, 6.1)
    for step in range(-1, 12):
        name = "t" if step == 0 else f"t{step:+d}".replace("-", "−")
        axes.text(x_of(step) + 0.43, 5.55, name, ha="center", fontsize=9, color=INK)
    rows = (
        (4.75, "observation frames", "max_seq_len = 2"),
        (4.0, "predicted chunk", "horizon = 8"),
        (2.85, "next observation", "after n_action_steps = 4"),
        (2.1, "next chunk", "horizon = 8"),
        (0.95, "a training sample near", "the episode's last step t+4"),
    )
    for y, title, detail in rows:
        axes.text(0.2, y + 0.34, title, fontsize=9.5, weight="bold", color=INK, va="center")
        axes.text(0.2, y + 0.08, detail, fontsize=8, color=SOFT, va="center")
    steps_row(axes, 4.75, -1, [SEEN] * 2)
    steps_row(axes, 4.0, 0, [EXECUTED] * 4 + [REPLACED] * 4)
    steps_row(axes, 2.85, 3, [SEEN] * 2)
    steps_row(axes, 2.1, 4, [EXECUTED] * 4 + [REPLACED] * 4)
    steps_row(axes, 0.95, 0, [TARGET] * 5 + [PADDED] * 3, hatch="////")
    for step in (0, 4):
        x = x_of(step) - 0.045
        axes.plot([x, x], [1.75, 5.4], color=SOFT, linewidth=0.9, linestyle=":")
        axes.text(x + 0.06, 3.68 if step == 0 else 1.72, "predict", fontsize=8, color=SOFT)
    key = (
        (SEEN, "seen"),
        (EXECUTED, "executed"),
        (REPLACED, "predicted, replaced by the next chunk"),
        (TARGET, "target of the loss"),
        (PADDED, "action_is_pad: repeated, no metric"),
    )
    for (color, text), x in zip(key, (0.2, 1.9, 4.0, 8.6, 11.6), strict=True):
        cell = Rectangle((x, 0.15), 0.4, 0.28, facecolor=color, edgecolor=INK, linewidth=0.8)
        cell.set_hatch("////" if color == PADDED else None)
        axes.add_patch(cell)
        axes.text(x + 0.52, 0.29, text, fontsize=8.5, color=INK, va="center")
    return figure


FIGURES = {"architecture": architecture, "timeline": timeline}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=pathlib.Path, default=pathlib.Path(__file__).parent / "images")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"svg.hashsalt": "paligemma-vla", "svg.fonttype": "path", "hatch.linewidth": 0.6})
    for name, draw in FIGURES.items():
        path = args.output_dir / f"{name}.{args.format}"
        metadata = {"Date": None} if args.format == "svg" else {}
        draw().savefig(path, facecolor="white", dpi=110, metadata=metadata)
        print(path)


if __name__ == "__main__":
    main()
