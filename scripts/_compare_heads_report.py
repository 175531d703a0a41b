"""The table and the picture of scripts/compare_heads.py."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inference.metrics import wilson_interval
from utils.misc import atomic_path
from utils.text_table import markdown_table

OFFLINE = ("mse_normalized", "best_of_k_mse_normalized", "spread_normalized", "mae", "first_step_error")
SMOOTHNESS = ("smoothness", "smoothness_true")
POLICY_COLOUR, BLIND_COLOUR = "tab:blue", "tab:gray"


def summarize(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per backbone and head, over its seeds.

    Args:
        cells: results per cell: backbone, head, seed, training, offline, speed (of one seed), and closed_loop and
            blind where there were rollouts.

    Returns:
        Per row, ready for JSON: backbone, head, seeds; parameters, head_parameters, latency and samples_per_second of
        training; per offline metric its mean and the values of the seeds; per column of the closed loop successes,
        episodes and wilson_95 over all seeds, and the same per task.
    """
    rows = []
    for backbone, head in dict.fromkeys((cell["backbone"], cell["head"]) for cell in cells):
        part = [cell for cell in cells if (cell["backbone"], cell["head"]) == (backbone, head)]
        speed = next((cell["speed"] for cell in part if "speed" in cell), {})
        row = {
            "backbone": backbone,
            "head": head,
            "seeds": [cell["seed"] for cell in part],
            "parameters": speed.get("parameters"),
            "head_parameters": speed.get("head_parameters"),
            "latency": speed.get("latency"),
            "samples_per_second": speed.get("samples_per_second"),
            "offline": {},
        }
        for name in (*OFFLINE, *SMOOTHNESS):
            values = [cell["offline"]["predictors"]["policy"]["overall"][name] for cell in part]
            known = [value for value in values if value is not None]
            row["offline"][name] = {"mean": statistics.mean(known) if known else None, "seeds": values}
        for column in ("closed_loop", "blind"):
            if all(column in cell for cell in part):
                row[column] = _pooled([cell[column]["tasks"] for cell in part])
        rows.append(row)
    return rows


def _pooled(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts over seeds, in all and per task."""
    tasks = {name: _rate([run[name] for run in runs]) for name in runs[0]}
    return {**_rate([task for run in runs for task in run.values()]), "tasks": tasks}


def _rate(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    successes, episodes = (sum(part[key] for part in parts) for key in ("successes", "episodes"))
    return {"successes": successes, "episodes": episodes, "wilson_95": list(wilson_interval(successes, episodes))}


def markdown(result: dict[str, Any]) -> str:
    """The table of compare_heads.json and what one must know to read it."""
    settings, rows = result["settings"], result["rows"]
    k, seeds = settings["num_samples"], sorted({seed for row in rows for seed in row["seeds"]})
    header = ["backbone", "head", "parameters (head)", "samples/s"]
    header += ["MSE", f"best of {k}", "spread", "success", "blank images"]
    header += ["latency p50 / p95"]
    table = []
    for row in rows:
        offline = row["offline"]
        cells = [
            row["backbone"],
            row["head"],
            _parameters(row),
            f"{row['samples_per_second']:.0f}" if row["latency"] else "-",
        ]
        cells += [
            _number(offline[name]["mean"])
            for name in ("mse_normalized", "best_of_k_mse_normalized", "spread_normalized")
        ]
        cells += [_success(row.get("closed_loop")), _success(row.get("blind"))]
        times = row["latency"]
        cells.append(f"{times['median_ms']:.1f} / {times['p95_ms']:.1f} ms" if times else "-")
        table.append(cells)
    offline = f"MSE, best of {k} draws and spread: held-out episodes, normalized units, means over seeds."
    loop = (
        f"Success: {len(seeds)} training seed{'s' if len(seeds) > 1 else ''} x {len(settings['tasks'])} tasks "
        f"({', '.join(settings['tasks'])}) x {settings['episodes']} episodes on seeds that were never recorded, with "
        "Wilson 95 % intervals; blank images: the same policies on grey images."
    )
    speed = (
        f"Training: {settings['steps']} steps of {settings['batch_size']} samples. Latency: one observation to "
        f"actions. Samples/s of training and latency: one process, alone on {settings['cores']} cores."
    )
    return "\n".join(
        [markdown_table(header, table), "", offline, loop if settings["episodes"] else "No closed loop.", speed]
    )


def plot(path: str | Path, result: dict[str, Any]) -> None:
    """Success with its control, held-out error per seed, and latency, one line per backbone and head, as a PNG."""
    rows = result["rows"]
    figure = Figure(figsize=(12, 0.42 * len(rows) + 1.7), layout="constrained")
    success, error, speed = figure.subplots(1, 3, sharey=True, width_ratios=[1.5, 1, 1])
    places = range(len(rows))[::-1]
    success.set_yticks(list(places), [f"{row['head']}\n{row['backbone']}" for row in rows], fontsize=8)
    for place, row in zip(places, rows, strict=True):
        for column, colour, shift in (("closed_loop", POLICY_COLOUR, 0.14), ("blind", BLIND_COLOUR, -0.14)):
            if column in row:
                _interval(success, place + shift, row[column], colour)
        values = row["offline"]["mse_normalized"]["seeds"]
        error.plot(values, [place] * len(values), "o", color=POLICY_COLOUR, markersize=5, alpha=0.7)
        if row["latency"]:
            times = [row["latency"]["median_ms"], row["latency"]["p95_ms"]]
            speed.plot(times, [place, place], "-", color=POLICY_COLOUR, linewidth=1.5)
            speed.plot(times[:1], [place], "o", color=POLICY_COLOUR, markersize=5)
            speed.plot(times[1:], [place], "|", color=POLICY_COLOUR, markersize=9)
    for column, colour, label in (("closed_loop", POLICY_COLOUR, "policy"), ("blind", BLIND_COLOUR, "blank images")):
        if any(column in row for row in rows):
            success.plot([], [], "o", color=colour, label=label)
    success.set(xlim=(-2, 102), xlabel="closed-loop success, %, Wilson 95 %")
    if success.get_legend_handles_labels()[0]:
        figure.legend(
            *success.get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False, fontsize=8
        )
    error.set(xlabel="held-out MSE, normalized, per seed")
    error.set_xlim(0, 1.08 * max(value for row in rows for value in row["offline"]["mse_normalized"]["seeds"]))
    speed.set(xlabel="latency, ms: median and 95 %")
    speed.set_xlim(left=0)
    for axis in (success, error, speed):
        axis.grid(alpha=0.3)
        axis.set_ylim(-0.6, len(rows) - 0.4)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _interval(axis: Axes, place: float, rate: dict[str, Any], colour: str) -> None:
    low, high = (100 * bound for bound in rate["wilson_95"])
    axis.plot([low, high], [place, place], color=colour, linewidth=2)
    axis.plot([100 * rate["successes"] / rate["episodes"]], [place], "o", color=colour, markersize=6)


def _parameters(row: dict[str, Any]) -> str:
    if row["parameters"] is None:
        return "-"
    return f"{row['parameters'] / 1e6:.2f} M ({row['head_parameters'] / 1e6:.2f} M)"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _success(rate: dict[str, Any] | None) -> str:
    if rate is None:
        return "-"
    low, high = (100 * bound for bound in rate["wilson_95"])
    return f"{rate['successes']}/{rate['episodes']} ({low:.0f} to {high:.0f} %)"
