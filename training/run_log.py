"""What a run writes besides checkpoints: metrics and pictures, here and to the trackers that it has."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from training.trackers import Trackers
from training.validation import Validation
from utils.config_utils import Config, save_config
from utils.misc import atomic_path, disk_full_named, read_json_lines
from utils.trajectory_plot import plot_chunks

logger = logging.getLogger(__name__)

PICTURE_BYTES = 200_000  # about the size of a picture, for the message about a full disk


class RunLog:
    """Metrics and pictures of one run; ranks other than the first write only which samples they took."""

    def __init__(self, config: Config, *, is_main: bool, rank: int = 0) -> None:
        self.directory = config.experiment_dir
        self.metrics_path = self.directory / "logs" / "metrics.jsonl"
        self.validation_path = self.directory / "logs" / "validation.jsonl"
        self.samples_path = self.directory / "logs" / f"samples_rank_{rank}.jsonl"
        self.log_samples = config.training.log_samples
        self.is_main = is_main
        if not is_main:
            return
        self.metrics_path.parent.mkdir(parents=True, exist_ok=True)
        save_config(config, self.directory / "config.yaml")
        self.trackers = Trackers(config)

    def rewind(self, step: int) -> None:
        """Drop lines of steps after `step`, which are trained again after a crash."""
        paths = [self.metrics_path, self.validation_path] if self.is_main else []
        for path in [*paths, self.samples_path]:
            if path.is_file():
                kept = "".join(json.dumps(line) + "\n" for line in read_json_lines(path) if line["step"] <= step)
                with disk_full_named(path, len(kept)), atomic_path(path) as temporary:
                    temporary.write_text(kept, encoding="utf-8")
        if self.is_main:
            self.trackers.rewind(step)

    def write(self, values: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl and show it, without the many `val/` metrics; `values` holds `step`."""
        if not self.is_main:
            return
        _append(self.metrics_path, values)
        shown = {name: value for name, value in values.items() if not name.startswith("val/")}
        logger.info(" ".join(f"{name} {_short(value)}" for name, value in shown.items()))
        self.trackers.scalars(values["step"], {name: value for name, value in values.items() if name != "step"})

    def samples(self, step: int, micro_batches: list[dict[str, Any]]) -> None:
        """With `training.log_samples`, append which samples this rank's step took: [dataset, episode, frame] each."""
        if self.log_samples:
            keys = ("dataset_index", "episode_index", "frame_index")
            columns = [torch.cat([batch[key] for batch in micro_batches]) for key in keys]
            self.samples_path.parent.mkdir(parents=True, exist_ok=True)
            _append(self.samples_path, {"step": step, "samples": torch.stack(columns, dim=1).tolist()})

    def checkpoint(self, path: Path, step: int) -> None:
        """Tell the trackers of a checkpoint; W&B keeps it as an artifact with `wandb.log_checkpoints`."""
        self.trackers.checkpoint(step, path)

    def write_validation(self, step: int, validation: Validation, action_names: Sequence[str]) -> None:
        """Append metrics per horizon step, dimension and dataset to validation.jsonl; draw `validation.plotted`.

        The picture goes to plots/validation_step_{step}.png and to the trackers; `action_names` are its labels.
        """
        if not self.is_main:
            return
        _append(self.validation_path, {"step": step, **validation.details})
        if validation.plotted is None:
            return
        path = self.directory / "plots" / f"validation_step_{step:06d}.png"
        chunks = validation.plotted
        title = f"Action chunks of held-out samples after {step} steps, physical units"
        with disk_full_named(path, PICTURE_BYTES):
            drawn = chunks.drawn_KNTA, chunks.true_NTA, chunks.is_pad_NT
            plot_chunks(path, *drawn, chunks.captions, action_names, title)
        self.trackers.picture(step, "val/trajectories", path)

    def videos(self, step: int, paths: Mapping[str, Path]) -> None:
        """Send videos of this step to the trackers, by name."""
        if self.is_main:
            for name, path in paths.items():
                self.trackers.video(step, name, path)

    def plot(self) -> None:
        """Draw the loss curves of metrics.jsonl to plots/loss_curve.png."""
        if self.is_main and self.metrics_path.is_file():  # a run that stopped before its first log line has no file
            path = self.directory / "plots" / "loss_curve.png"
            with disk_full_named(path, PICTURE_BYTES):
                plot_metrics(self.metrics_path, path)

    def finish(self) -> None:
        """Draw the curves a last time and close the trackers."""
        self.plot()
        if self.is_main:
            self.trackers.finish()


class LogWindow:
    """Averages since the last log line, and where the time went."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.timed = 0  # steps that this process took; after a resume `losses` has earlier ones too
        self.last: dict[str, float] = {}
        self.busy = self.waiting = 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Do not count the time since the last call, which went into validation or checkpoints."""
        self.mark = time.perf_counter()

    def waited(self) -> None:
        """Count the time since the last call as waiting for data."""
        now = time.perf_counter()
        self.waiting += now - self.mark
        self.busy += now - self.mark
        self.mark = now

    def add(self, result: dict[str, float]) -> None:
        """Take in the result of a step; the time since the last call was its work."""
        self.losses.append(result["loss"])
        self.timed += 1
        self.last = result
        now = time.perf_counter()
        self.busy += now - self.mark
        self.mark = now

    def summary(self, batch_size: int) -> dict[str, float]:
        """Mean loss over the window, the last step's other values, samples/s, share of time spent on data."""
        values = {
            "loss": sum(self.losses) / len(self.losses),
            "lr": self.last["lr"],
            "grad_norm": self.last["grad_norm"],
            "samples_per_second": self.timed * batch_size / self.busy,
            "data_wait": self.waiting / self.busy,
        }
        self.losses, self.timed, self.busy, self.waiting = [], 0, 0.0, 0.0
        return values


def plot_metrics(metrics_path: Path, image_path: Path) -> None:
    """Loss, validation loss and sampled action error over steps, as a PNG."""
    from matplotlib.figure import Figure

    lines = read_json_lines(metrics_path)
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    panels = ((left, ("loss", "val_loss"), "loss"), (right, ("val_action_mse",), "sampled action MSE (normalized)"))
    for axes, names, title in panels:
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                axes.plot(
                    *zip(*points, strict=True), label=name, marker="o" if len(points) < 30 else None, markersize=3
                )
        if axes.lines:
            axes.set_yscale("log")
            axes.legend()
        else:
            axes.text(0.5, 0.5, "no validation", ha="center", transform=axes.transAxes)
        axes.set(title=title, xlabel="optimizer step")
        axes.grid(alpha=0.3)
    with atomic_path(image_path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _append(path: Path, values: dict[str, Any]) -> None:
    line = json.dumps(values) + "\n"
    with disk_full_named(path, len(line)), open(path, "a", encoding="utf-8") as file:
        file.write(line)
