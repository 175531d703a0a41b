"""A training run as a page: its curves, what the last validation says, pictures, settings."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.config_utils import Config, ConfigError, load_config
from utils.misc import read_json_lines
from utils.page.content import (
    Block,
    Chart,
    Charts,
    Code,
    Line,
    Page,
    Picture,
    Pictures,
    Section,
    Table,
    Tone,
    Video,
    Videos,
)
from utils.page.pictures import VIDEO_BYTES, picture_file, video_file

# Title -> what is drawn in one chart, and whether its axis is logarithmic.
CURVES: dict[str, tuple[tuple[str, ...], bool]] = {
    "loss": (("loss", "val_loss"), True),
    "error of sampled actions, normalized": (("val_action_mse",), True),
    "success in closed loop": (("success",), False),
    "gradient norm": (("grad_norm",), True),
    "learning rate": (("lr",), False),
    "samples a second": (("samples_per_second",), False),
    "share of time spent waiting for data": (("data_wait",), False),
}
PICTURE_STEP = re.compile(r"_step_(\d+)")
SHOWN_VALIDATIONS = 2  # pictures: of the first and of the last
Rows = list[dict[str, Any]]


def run_page(
    folder: Path, more: Sequence[Section] = (), left_out: Sequence[str] = (), result: tuple[str, Tone] | None = None
) -> Page:
    """The page of a run, from its folder.

    Args:
        folder: `experiments/<name>`.
        more: further sections, such as evaluations of the run's policy.
        left_out: what they leave out.
        result: how well the policy does, in a sentence.

    Raises:
        ConfigError: the folder holds no run.
    """
    logs = folder / "logs"
    if not (folder / "config.yaml").is_file() or not (logs / "metrics.jsonl").is_file():
        raise ConfigError(f"{folder} is no folder of a run: it lacks config.yaml or logs/metrics.jsonl")
    config, lines = load_config(folder / "config.yaml"), read_json_lines(logs / "metrics.jsonl")
    if not lines:
        raise ConfigError(f"{logs / 'metrics.jsonl'} has no line yet: the run has to reach its first log interval")
    validations = read_json_lines(logs / "validation.jsonl") if (logs / "validation.jsonl").is_file() else []
    sections = [Section("Curves", _curves(lines))]
    if validations:
        sections.append(Section("Validation", _validation(validations)))
    pictures = _pictures(folder)
    if pictures:
        intro = "The same held-out samples each time: what the policy predicts, beside what was done."
        sections.append(Section("Predictions of held-out samples", [Pictures(pictures, wide=True)], intro))
    videos, hidden = _videos(folder)
    if videos:
        sections.append(Section("Rollouts while it trained", [Videos(videos)]))
    settings = (folder / "config.yaml").read_text(encoding="utf-8")
    sections += [*more, Section("Settings", [Code(settings, "every setting of the run, defaults included")])]
    verdict, tone = run_verdict(lines)
    if result is not None and tone != "error":
        verdict, tone = f"{verdict} {result[0]}", result[1]
    missing = [f"{hidden} videos, which are in {folder / 'videos'}."] if hidden else []
    drawn = len(list((folder / "plots").glob("validation_step_*.png")))
    if drawn > len(pictures):
        missing.append(f"Pictures of {drawn - len(pictures)} more validations, which are in {folder / 'plots'}.")
    facts = _facts(config, lines)
    return Page("a training run", folder.name, verdict, tone, facts, sections, [*missing, *left_out])


def run_verdict(lines: Rows) -> tuple[str, Tone]:
    """How the run went, in a sentence: where its validation is best, and whether it still improves."""
    last = lines[-1]["step"]
    losses = _points(lines, "loss")
    if any(not math.isfinite(value) for _, value in losses):
        step = next(step for step, value in losses if not math.isfinite(value))
        return f"The loss is not finite from step {step:,} on.", "error"
    points, name = _points(lines, "val_loss"), "validation loss"
    if not points and not losses:
        return f"After {last:,} steps no loss was logged yet.", "plain"
    if not points:
        begin, end = losses[0][1], losses[-1][1]
        text = f"After {last:,} steps the training loss is {end:.4g}, at the first log line it was {begin:.4g}; "
        return text + "nothing held out says how well it generalizes.", "warning"
    best_step, best = min(points, key=lambda point: point[1])
    text = f"After {last:,} steps the {name} is {points[-1][1]:.4g}"
    successes = _points(lines, "success")
    also = f" It succeeds in {100 * successes[-1][1]:.0f} % of its closed-loop episodes." if successes else ""
    if len(points) == 1:
        return f"{text}; there is no earlier one to compare with.{also}", "plain"
    if best_step == points[-1][0]:
        return f"{text}, its lowest so far.{also}", "good"
    worse = points[-1][1] / best - 1
    text += f"; it was lowest at step {best_step:,} with {best:.4g}, and has risen by {100 * worse:.0f} % since.{also}"
    return text, "warning" if worse > 0.1 else "good"


def _points(lines: Rows, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def _facts(config: Config, lines: Rows) -> list[tuple[str, object]]:
    rates = [value for _, value in _points(lines, "samples_per_second")]
    model = config.model
    return [
        ("steps", f"{lines[-1]['step']:,}"),
        ("epochs", round(lines[-1]["epoch"], 2) if "epoch" in lines[-1] else None),
        ("backbone", model.vlm_config.type),
        ("action head", model.action_head_config.type),
        ("horizon", model.action_head_config.horizon),
        ("cameras", ", ".join(config.cameras)),
        ("normalization", config.data.normalization_type),
        ("samples a second", f"{sum(rates) / len(rates):.0f}" if rates else None),
    ]


def _curves(lines: Rows) -> list[Block]:
    charts = []
    for title, (names, log) in CURVES.items():
        drawn = []
        for name in names:
            points = _points(lines, name)
            if not points:
                continue
            band = [_points(lines, f"{name}_{end}") for end in ("low", "high")]
            low, high = ([value for _, value in part] if len(part) == len(points) else None for part in band)
            steps, values = zip(*points, strict=True)
            label = {"loss": "training", "val_loss": "validation"}.get(name, name)
            drawn.append(Line(label, steps, values, low, high))
        if drawn:
            charts.append(Chart(title, "optimizer step", drawn, log))
    return [Charts(charts)]


def _validation(validations: Rows) -> list[Block]:
    chosen = [validations[i] for i in sorted({0, (len(validations) - 1) // 2, len(validations) - 1})]
    lines = [
        Line(f"step {line['step']:,}", list(range(len(values))), values)
        for line in chosen
        if (values := line["per_step"]["mse_normalized"])
    ]
    names = [name for name, value in validations[-1]["overall"].items() if value is not None]
    best = min(validations, key=lambda line: line["overall"]["mse_normalized"])
    columns = {"first": validations[0], "best": best, "last": validations[-1]}
    header = ["metric", *(f"{name} (step {line['step']:,})" for name, line in columns.items())]
    rows = [[name, *(line["overall"].get(name) for line in columns.values())] for name in names]
    caption = "Errors over the held-out samples; the best is the one of the lowest normalized squared error"
    return [
        Charts([Chart("squared error over the horizon, normalized", "step of the prediction", lines)]),
        Table(header, rows, caption),
    ]


def _pictures(folder: Path) -> list[Picture]:
    """Those of the first and of the last validation."""
    paths = sorted((folder / "plots").glob("validation_step_*.png"))
    chosen = paths[:1] + paths[1:][1 - SHOWN_VALIDATIONS :]
    return [Picture(picture_file(path), f"after {_step(path):,} steps") for path in chosen]


def _videos(folder: Path) -> tuple[list[Video], int]:
    """Videos of closed-loop episodes while it trained, the latest first, as far as they fit, and how many do not."""
    videos, size, hidden = [], 0, 0
    for path in sorted((folder / "videos").rglob("*_step_*.mp4"), key=_step, reverse=True):
        size += path.stat().st_size
        if size > VIDEO_BYTES:
            hidden += 1
            continue
        videos.append(Video(video_file(path), f"{path.stem.partition('_step_')[0]}, after {_step(path):,} steps"))
    return videos, hidden


def _step(path: Path) -> int:
    found = PICTURE_STEP.search(path.stem)
    return int(found[1]) if found else 0
