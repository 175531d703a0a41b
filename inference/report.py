"""The output of an evaluation: printed tables, JSON and CSV files, plots."""

from __future__ import annotations

import csv
import itertools
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from inference.evaluate import Predictions
from inference.policy_files import restamped, write_json
from utils.figure_text import axis_label, drawable, save_figure
from utils.metrics import METRICS
from utils.misc import atomic_path
from utils.text import csv_text, file_stem
from utils.text_table import text_table
from utils.trajectory_plot import draw_trajectory

logger = logging.getLogger(__name__)


def keep_earlier(paths: Sequence[Path], report: dict[str, Any], keys: Iterable[str]) -> None:
    """Before a report is written: move one of something else aside, from `metrics.json` to `metrics_1.json` and so on.

    Args:
        paths: files and folders of the report; the first is its JSON file.
        report: the content that the JSON file is to have.
        keys: entries of it that say what was evaluated; where they are as before, the earlier report is replaced.
    """
    if not paths[0].is_file():
        return
    try:
        earlier = json.loads(paths[0].read_text(encoding="utf-8"))
    except ValueError:
        earlier = {}
    earlier = restamped(earlier) if isinstance(earlier, dict) else earlier
    differing = [key for key in keys if earlier.get(key) != report[key]] if isinstance(earlier, dict) else list(keys)
    if not differing:
        return
    number = next(n for n in itertools.count(1) if not any(_numbered(path, n).exists() for path in paths))
    for path in paths:
        if path.exists():
            path.rename(_numbered(path, number))
    reason = f"another evaluation ({', '.join(differing)} differ{'s' if len(differing) == 1 else ''})"
    logger.info("%s was of %s: kept as %s", paths[0], reason, _numbered(paths[0], number).name)


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}_{number}{path.suffix}")


def metrics_table(result: dict[str, Any]) -> str:
    """The result of `evaluate_offline` as tables: one line per metric, one column per predictor.

    The first table is over all data. Where there are several datasets, one table for each follows.
    """
    predictors = result["predictors"]
    datasets = list(next(iter(predictors.values()))["per_dataset"])
    tables = [_metrics_table("all data", predictors)]
    if len(datasets) > 1:
        for dataset in datasets:
            parts = {name: summary["per_dataset"][dataset] for name, summary in predictors.items()}
            tables.append(_metrics_table(dataset, parts))
    return "\n\n".join([*tables, verdict(result)])


def verdict(result: dict[str, Any]) -> str:
    """The result of `evaluate_offline` in a sentence: is the policy better than the two trivial predictors?"""
    errors = {name: summary["overall"]["mse_normalized"] for name, summary in result["predictors"].items()}
    policy, sentences = errors["policy"], []
    for name, words in (("mean_action", "the mean action"), ("repeat_last_action", "repeating the last action")):
        comparison = "better" if policy < errors[name] else "worse" if policy > errors[name] else "no better"
        sentences.append(f"{comparison} than {words} ({policy:.4g} against {errors[name]:.4g})")
    advice = (
        "" if policy < errors["mean_action"] else ": it has learned nothing of use yet, or the data are of another kind"
    )
    return f"The policy is {' and '.join(sentences)} in mse_normalized{advice}."


def _metrics_table(title: str, parts: dict[str, dict[str, Any]]) -> str:
    rows = [[metric, *(part["overall"][metric] for part in parts.values())] for metric in METRICS]
    return text_table([title, *parts], [row for row in rows if any(value is not None for value in row[1:])])


def rollout_table(result: dict[str, Any]) -> str:
    """The content of rollouts.json as a table: one line per task, one per tier if there are several, one for all."""
    rows, tiers = [], result["summary"].get("tiers", {})
    parts = [*result["tasks"].items(), *(tiers.items() if len(tiers) > 1 else ()), ("all", result["summary"])]
    for name, task in parts:
        low, high = task["wilson_95"]
        rate = task["successes"] / task["episodes"]
        interval = f"{100 * low:.0f} to {100 * high:.0f} %"
        rows.append([name, f"{task['successes']}/{task['episodes']}", f"{100 * rate:.0f} %", interval])
    text = text_table(["task", "success", "rate", "Wilson 95 %"], rows)
    if len(tiers) > 1:
        means = [f"{100 * result['summary'][key]:.1f} %" for key in ("mean_success_rate", "tier_mean_success_rate")]
        text += f"\nmean over tasks {means[0]}, over tiers {means[1]}"
    text += f"\n{conditions(result)}"
    return f"{text}\n{alarms(result)}" if "alarm" in result["settings"] else text


def conditions(result: dict[str, Any]) -> str:
    """What else a rate depends on, in a line: seeds, step limits, the version of MuJoCo."""
    tasks, shared = result["tasks"].values(), result["settings"].get("env_settings", {})
    seeds = [seed for task in tasks for seed in task["seeds"]]
    facts = [f"seeds {min(seeds)} to {max(seeds)}"]
    limits = {{**shared, **task.get("env_settings", {})}.get("max_episode_steps") for task in tasks} - {None}
    if limits:
        facts.append(f"{' or '.join(map(str, sorted(limits)))} steps at most")
    if "mujoco" in shared:
        facts.append(f"MuJoCo {shared['mujoco']}")
    return ", ".join(facts)


def alarms(result: dict[str, Any]) -> str:
    """The alarms of a closed-loop evaluation in a sentence."""
    counts = {True: [0, 0], False: [0, 0]}  # success -> alarms, episodes
    for task in result["tasks"].values():
        for success, step in zip(task["success"], task["alarm_step"], strict=True):
            counts[success][0] += step is not None
            counts[success][1] += 1
    (right, failures), (false, successes) = counts[False], counts[True]
    rate = 100 * result["settings"]["alarm"]["false_alarm_rate"]
    return f"alarm in {right} of {failures} failures and {false} of {successes} successes (calibrated to {rate:g} %)"


def sensitivity_table(result: dict[str, Any]) -> str:
    """The result of `measure_sensitivity` as a table: a line a change, in both units, and per horizon step."""
    horizon = len(result["rows"][0]["per_step_in_spread"])
    steps = sorted({0, horizon // 2, horizon - 1})
    unit = "spread" if result["spread"] is not None else "variation"
    rows = []
    for row in result["rows"]:
        found = [row["in_spread"], row["in_variation"], *(row[f"per_step_in_{unit}"][step] for step in steps)]
        rows.append([row["change"], *("-" if value is None else f"{value:.2f}" for value in found)])
    header = [f"{result['samples']} observations", "in spreads", "in variations", *(f"step {step}" for step in steps)]
    return text_table(header, rows) + f"\n(the steps in {unit}s)"


def action_table(action_TA: np.ndarray) -> str:
    """One line per step of an action chunk (T, A)."""
    header = ["step", *(f"action_{a}" for a in range(action_TA.shape[1]))]
    return text_table(header, [[t, *(f"{value:.5f}" for value in row)] for t, row in enumerate(action_TA)])


def write_evaluation(
    folder: Path,
    result: dict[str, Any],
    predictions: dict[str, Predictions],
    save_predictions: bool,
    num_plots: int,
) -> list[Path]:
    """Write the result of `evaluate_offline`: metrics.json, plots/, and predictions.csv if asked for.

    Args:
        folder: of the output.
        result, predictions: from `evaluate_offline`; the result may hold more.
        save_predictions: write predictions.csv, see `write_predictions`.
        num_plots: episodes per dataset to plot.
    """
    report, table, plots = folder / "metrics.json", folder / "predictions.csv", folder / "plots"
    result = result | {"data": list(predictions)}
    keep_earlier([report, table, plots], result, ("checkpoint", "checkpoint_stamp", "data", "settings"))
    write_json(report, result)
    if save_predictions:
        write_predictions(table, predictions)
    return [report, *([table] if save_predictions else []), *plot_trajectories(plots, predictions, num_plots)]


def write_actions(output_dir: Path, action_TA: np.ndarray, inputs: dict[str, Any]) -> list[Path]:
    """Write one prediction as actions.json (with the inputs that led to it) and actions.csv; returns the paths."""
    paths = [output_dir / "actions.json", output_dir / "actions.csv"]
    report = {**json.loads(json.dumps(inputs)), "actions": action_TA.tolist()}
    keep_earlier(paths, report, inputs)
    write_json(paths[0], report)
    with atomic_path(paths[1]) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *(f"action_{a}" for a in range(action_TA.shape[1]))])
        writer.writerows([t, *map(_digits, row)] for t, row in enumerate(action_TA))
    return paths


def write_predictions(path: str | Path, predictions: dict[str, Predictions]) -> None:
    """One CSV row per sample and horizon step, physical units; the first draw where there are several.

    Columns: dataset, file, episode (within the dataset), frame (within the episode), step, pred_0 .., true_0 ..,
    is_pad. Where is_pad is 1 there is no truth, and its columns are empty.
    """
    dims = range(next(iter(predictions.values())).true_NTA.shape[2])
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = [f"pred_{a}" for a in dims] + [f"true_{a}" for a in dims]
        writer.writerow(["dataset", "file", "episode", "frame", "step", *names, "is_pad"])
        for name, part in predictions.items():
            for n, (predicted_TA, true_TA) in enumerate(zip(part.predicted_KNTA[0], part.true_NTA, strict=True)):
                place = [csv_text(name), csv_text(str(part.file_N[n])), part.episode_N[n], part.frame_N[n]]
                for t, is_pad in enumerate(part.is_pad_NT[n]):
                    truth = [""] * len(dims) if is_pad else map(_digits, true_TA[t])
                    writer.writerow([*place, t, *map(_digits, predicted_TA[t]), *truth, int(is_pad)])


def plot_trajectories(output_dir: str | Path, predictions: dict[str, Predictions], episodes: int = 3) -> list[Path]:
    """Predicted against true actions over an episode, one panel per dimension, as PNG; returns the paths.

    At every step of the episode the first action of the prediction made there is drawn, with a band where there
    are several draws. The episodes are spread evenly over each dataset.
    """
    paths = []
    for name, part in predictions.items():
        found = np.unique(part.episode_N)
        for episode in found[np.unique(np.linspace(0, len(found) - 1, episodes).round().astype(int))]:
            path = Path(output_dir) / f"trajectory_{file_stem(name)}_episode_{episode:06d}.png"
            rows = np.flatnonzero(part.episode_N == episode)
            _plot_episode(path, part, rows, f"{name}, episode {episode}")
            paths.append(path)
    return paths


def finish(text: str, paths: Sequence[str | Path], log_file: Path | None) -> None:
    """Print the results of an evaluation and the files that it wrote. The results are added to the log file, too."""
    print("\n" + text)
    if log_file is not None:
        with log_file.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        paths = [*paths, log_file]
    for path in paths:
        print(f"wrote {path}")


def _plot_episode(path: Path, part: Predictions, rows: np.ndarray, title: str) -> None:
    dims = part.true_NTA.shape[2]
    columns = 1 if dims < 5 else 2
    lines = -(-dims // columns)
    figure = Figure(figsize=(7 * columns, 1.6 * lines + 0.9), layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, squeeze=False)
    steps = part.frame_N[rows]
    for a, axis in enumerate(axes.T.flat):
        if a >= dims:
            axis.axis("off")
            continue
        draw_trajectory(axis, steps, part.predicted_KNTA[:, rows, 0, a], part.true_NTA[rows, 0, a])
        axis.set_ylabel(axis_label(part.action_names[a]), fontsize=9)
    lowest = [axes[min(lines, dims - column * lines) - 1, column] for column in range(columns)]
    for axis in lowest:  # of a column that ends earlier than the first, too
        axis.set_xlabel("step")
        axis.tick_params(labelbottom=True)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower right", ncols=3, frameon=False)
    figure.suptitle(drawable(f"First action of each prediction: {title}"), fontsize=10)
    save_figure(figure, path)


def _digits(value: float) -> str:
    return f"{value:.7g}"
