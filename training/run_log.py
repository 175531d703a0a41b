"""What a run writes besides checkpoints: metrics, pictures, and W&B when asked for."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import urllib.parse
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import torch

from training.validation import Validation
from utils.checkpoint import shards_of
from utils.config_utils import Config, ConfigError, config_to_dict, save_config
from utils.misc import atomic_path, disk_full_named
from utils.trajectory_plot import plot_chunks

logger = logging.getLogger(__name__)

WANDB_TIMEOUT_S, CONNECT_TIMEOUT_S = 30.0, 5.0  # for W&B at the start of a run
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
        self._wandb, self._upload = None, config.wandb.log_checkpoints
        if not is_main:
            return
        self.metrics_path.parent.mkdir(parents=True, exist_ok=True)
        save_config(config, self.directory / "config.yaml")
        if config.wandb.enabled:
            self._wandb = _start_wandb(config)

    def rewind(self, step: int) -> None:
        """Drop lines of steps after `step`, which are trained again after a crash."""
        paths = [self.metrics_path, self.validation_path] if self.is_main else []
        for path in [*paths, self.samples_path]:
            if path.is_file():
                kept = "".join(json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step)
                with disk_full_named(path, len(kept)), atomic_path(path) as temporary:
                    temporary.write_text(kept, encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl and show it, without the many `val/` metrics; `values` holds `step`."""
        if not self.is_main:
            return
        _append(self.metrics_path, values)
        shown = {name: value for name, value in values.items() if not name.startswith("val/")}
        logger.info(" ".join(f"{name} {_short(value)}" for name, value in shown.items()))
        if self._wandb is not None:
            self._wandb.log(values)

    def samples(self, step: int, micro_batches: list[dict[str, Any]]) -> None:
        """With `training.log_samples`, append which samples this rank's step took: [dataset, episode, frame] each."""
        if self.log_samples:
            keys = ("dataset_index", "episode_index", "frame_index")
            columns = [torch.cat([batch[key] for batch in micro_batches]) for key in keys]
            self.samples_path.parent.mkdir(parents=True, exist_ok=True)
            _append(self.samples_path, {"step": step, "samples": torch.stack(columns, dim=1).tolist()})

    def checkpoint(self, path: Path, step: int) -> None:
        """With `wandb.log_checkpoints`, upload a checkpoint as a version of the run's model artifact."""
        if self._wandb is None or not self._upload:
            return
        import wandb

        artifact = wandb.Artifact(f"checkpoint-{self._wandb.id}", type="model", metadata={"step": step})
        artifact.add_file(str(path))
        shards = shards_of(path)
        if shards is not None:
            artifact.add_dir(str(shards), name=shards.name)
        self._wandb.log_artifact(artifact, aliases=["latest", f"step-{step}", path.name.removesuffix(".pth.tar")])

    def write_validation(self, step: int, validation: Validation) -> None:
        """Append metrics per horizon step, dimension and dataset to validation.jsonl; draw `validation.plotted`.

        The picture goes to plots/validation_step_{step}.png and to W&B.
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
            plot_chunks(path, chunks.drawn_KNTA, chunks.true_NTA, chunks.is_pad_NT, chunks.captions, title)
        if self._wandb is not None:
            import wandb

            self._wandb.log({"step": step, "val/trajectories": wandb.Image(str(path))})

    def plot(self) -> None:
        """Draw the loss curves of metrics.jsonl to plots/loss_curve.png."""
        if self.is_main and self.metrics_path.is_file():  # a run that stopped before its first log line has no file
            path = self.directory / "plots" / "loss_curve.png"
            with disk_full_named(path, PICTURE_BYTES):
                plot_metrics(self.metrics_path, path)

    def finish(self) -> None:
        """Draw the curves a last time and close W&B."""
        self.plot()
        if self._wandb is not None:
            self._wandb.finish()


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


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _append(path: Path, values: dict[str, Any]) -> None:
    line = json.dumps(values) + "\n"
    with disk_full_named(path, len(line)), open(path, "a", encoding="utf-8") as file:
        file.write(line)


def _start_wandb(config: Config) -> Any:
    """The W&B run of this experiment; a resumed run continues under the id in its folder.

    Where W&B does not answer, the run is written to the experiment's folder, to be uploaded later: training waits for
    nobody.

    Raises:
        ConfigError: nobody is logged in to W&B, or it refuses the run.
    """
    try:
        import wandb
    except ImportError:
        raise ImportError("wandb.enabled (--use_wandb) needs the wandb package: pip install wandb") from None
    id_path = config.experiment_dir / "wandb_run_id.txt"
    if not id_path.is_file():
        with atomic_path(id_path) as temporary:
            temporary.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    settings = {
        "project": config.wandb.project,
        "entity": config.wandb.entity,
        "name": config.training.experiment_name,
        "id": id_path.read_text(encoding="utf-8"),
        "resume": "allow",
        "dir": str(config.experiment_dir),
        "config": config_to_dict(config),
    }
    address = wandb.setup().settings.base_url
    online = os.environ.get("WANDB_MODE", "online") == "online"
    try:
        if online and not _answers(address):
            raise wandb.errors.CommError("no connection")
        run = wandb.init(**settings, settings=wandb.Settings(init_timeout=WANDB_TIMEOUT_S))
    except wandb.errors.CommError as error:
        reason = str(error).splitlines()[0]
        logger.warning(
            "W&B at %s does not answer (%s): the run is kept in %s, upload it with wandb sync",
            address,
            reason,
            config.experiment_dir / "wandb",
        )
        run = wandb.init(**settings, mode="offline")
    except wandb.errors.Error as error:
        raise ConfigError(
            f"wandb.enabled (--use_wandb): W&B refuses ({str(error).splitlines()[0]}); run wandb login, or set "
            "WANDB_MODE=offline and upload the run later with wandb sync"
        ) from None
    # Curves over our own step. W&B's may only grow, but steps after a checkpoint are logged again after a crash.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _answers(address: str) -> bool:
    """Whether a server takes connections; behind a proxy, which can't be asked so simply, it is taken to do."""
    parts = urllib.parse.urlsplit(address)
    if urllib.request.getproxies().get(parts.scheme):
        return True
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True
