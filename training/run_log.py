"""What a run writes besides checkpoints: metrics, pictures, and W&B when asked for."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from training.validation import Validation
from utils.config_utils import Config, config_to_dict, save_config
from utils.misc import atomic_path
from utils.trajectory_plot import plot_chunks

logger = logging.getLogger(__name__)


class RunLog:
    """Machine-readable metrics of one run; ranks other than the first write nothing."""

    def __init__(self, config: Config, *, is_main: bool) -> None:
        self.directory = config.experiment_dir
        self.metrics_path = self.directory / "logs" / "metrics.jsonl"
        self.validation_path = self.directory / "logs" / "validation.jsonl"
        self.is_main = is_main
        self._wandb = None
        if not is_main:
            return
        self.metrics_path.parent.mkdir(parents=True, exist_ok=True)
        save_config(config, self.directory / "config.yaml")
        if config.wandb.enabled:
            self._wandb = _start_wandb(config)

    def rewind(self, step: int) -> None:
        """Drop lines past `step`: the steps between a checkpoint and the crash after it are trained again."""
        if not self.is_main:
            return
        for path in (self.metrics_path, self.validation_path):
            if not path.is_file():
                continue
            kept = [line for line in read_metrics(path) if line["step"] <= step]
            with atomic_path(path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        """Append one line; `values` holds `step`."""
        if not self.is_main:
            return
        with open(self.metrics_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        if self._wandb is not None:
            self._wandb.log(values, step=values["step"])

    def write_validation(self, step: int, found: Validation) -> None:
        """Append the metrics per step, dimension and dataset to validation.jsonl, and draw the fixed samples to
        plots/validation_step_{step}.png and W&B.
        """
        if not self.is_main:
            return
        with open(self.validation_path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **found.details}) + "\n")
        if found.plotted is None:
            return
        path = self.directory / "plots" / f"validation_step_{step:06d}.png"
        part = found.plotted
        title = f"Action chunks of held-out samples after {step} steps, physical units"
        plot_chunks(path, part.drawn_KNTA, part.true_NTA, part.is_pad_NT, part.captions, title)
        if self._wandb is not None:
            import wandb

            self._wandb.log({"val/trajectories": wandb.Image(str(path))}, step=step)

    def plot(self) -> None:
        """Draw the loss curves of metrics.jsonl to plots/loss_curve.png."""
        if self.is_main:
            plot_metrics(self.metrics_path, self.directory / "plots" / "loss_curve.png")

    def finish(self) -> None:
        """Draw the curves a last time and close W&B."""
        self.plot()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line cut off by a crash is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            logger.warning("%s: a line cut off by a crash is left out: %r", path, text[:60])
    return lines


def plot_metrics(metrics_path: Path, image_path: Path) -> None:
    """Loss, validation loss and sampled action error over steps, as a PNG."""
    from matplotlib.figure import Figure

    lines = read_metrics(metrics_path)
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


def _start_wandb(config: Config) -> Any:
    try:
        import wandb
    except ImportError:
        raise ImportError("wandb.enabled (--use_wandb) needs the wandb package: pip install wandb") from None
    return wandb.init(
        project=config.wandb.project,
        entity=config.wandb.entity,
        name=config.training.experiment_name,
        dir=str(config.experiment_dir),
        config=config_to_dict(config),
    )
