"""Experiment trackers beside the run's own files: Weights & Biases, TensorBoard and Trackio.

All get the same scalars, pictures and videos under the same names. The run's own `logs/` are complete without them: a
tracker that can't be reached costs a line in the log, never a step of training.
"""

from __future__ import annotations

import importlib
import io
import logging
import os
import socket
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from utils.checkpoint import shards_of
from utils.config_utils import Config, ConfigError, config_to_dict
from utils.misc import atomic_path

logger = logging.getLogger(__name__)

WANDB_TIMEOUT_S, CONNECT_TIMEOUT_S = 30.0, 5.0  # for a server at the start of a run


class Tracker:
    """What a run tells a tracker; `step` counts optimizer updates."""

    def rewind(self, step: int) -> None:
        """The run goes on from `step`: what was logged after it is logged again."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log numbers of one step under their names."""
        raise NotImplementedError

    def picture(self, step: int, name: str, path: Path) -> None:
        """Log a PNG file."""
        raise NotImplementedError

    def video(self, step: int, name: str, path: Path) -> None:
        """Log an MP4 file."""
        raise NotImplementedError

    def checkpoint(self, step: int, path: Path) -> None:
        """A checkpoint was written."""

    def finish(self) -> None:
        """Wait until everything is stored, and close."""
        raise NotImplementedError


class WandbTracker(Tracker):
    """Weights & Biases. A resumed run continues under the id in its folder.

    Where W&B does not answer, the run is written to the experiment's folder, for `wandb sync`.
    """

    def __init__(self, config: Config) -> None:
        """Raises ConfigError where nobody is logged in, or W&B refuses the run."""
        self._wandb = _package("wandb")
        self._upload = config.wandb.log_checkpoints
        self.run = _start_wandb(self._wandb, config)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def picture(self, step: int, name: str, path: Path) -> None:
        self.run.log({"step": step, name: self._wandb.Image(str(path))})

    def video(self, step: int, name: str, path: Path) -> None:
        self.run.log({"step": step, name: self._wandb.Video(str(path), format="mp4")})

    def checkpoint(self, step: int, path: Path) -> None:
        """With `wandb.log_checkpoints`, upload a checkpoint as a version of the run's model artifact."""
        if not self._upload:
            return
        artifact = self._wandb.Artifact(f"checkpoint-{self.run.id}", type="model", metadata={"step": step})
        artifact.add_file(str(path))
        shards = shards_of(path)
        if shards is not None:
            artifact.add_dir(str(shards), name=shards.name)
        self.run.log_artifact(artifact, aliases=["latest", f"step-{step}", path.name.removesuffix(".pth.tar")])

    def finish(self) -> None:
        self.run.finish()


class TensorBoardTracker(Tracker):
    """Event files in the experiment's `logs/tensorboard/`, for `tensorboard --logdir`; videos become animated GIFs."""

    def __init__(self, config: Config) -> None:
        _package("tensorboard")
        self._directory = config.experiment_dir / "logs" / "tensorboard"
        self._open(None)

    def _open(self, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._directory), purge_step=purge_step)

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._open(step + 1 if step else None)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def picture(self, step: int, name: str, path: Path) -> None:
        self._add(step, name, path.read_bytes())

    def video(self, step: int, name: str, path: Path) -> None:
        self._add(step, name, _animated_gif(path))

    def _add(self, step: int, name: str, encoded: bytes) -> None:
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        width, height = Image.open(io.BytesIO(encoded)).size
        image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=encoded)
        self._writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


class TrackioTracker(Tracker):
    """Trackio: stored on this machine, for `trackio show`; with `trackio.space_id` in a Hugging Face Space too.

    Where the Space can't be reached, the run stays on this machine, for `trackio sync`. A resumed run continues under
    the name in its folder.
    """

    def __init__(self, config: Config) -> None:
        self._trackio = _package("trackio")
        project, space = config.trackio.project, config.trackio.space_id
        name = f"{config.training.experiment_name}-{_kept_id(config.experiment_dir / 'trackio_run_id.txt')}"
        settings = {"name": name, "config": config_to_dict(config), "resume": "allow", "embed": False}
        try:
            self._trackio.init(project, space_id=space, **settings)
        except Exception as error:
            if space is None:
                raise
            logger.warning(
                "Trackio's Space %s can't be reached (%s): the run is kept on this machine, upload it with "
                "trackio sync --project %s --space-id %s",
                space,
                _first_line(error),
                project,
                space,
            )
            self._trackio.init(project, **settings)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._trackio.log(values, step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self._trackio.log({name: self._trackio.Image(str(path))}, step=step)

    def video(self, step: int, name: str, path: Path) -> None:
        self._trackio.log({name: self._trackio.Video(str(path), format="mp4")}, step=step)

    def finish(self) -> None:
        self._trackio.finish()


TRACKERS: dict[str, type[Tracker]] = {
    "wandb": WandbTracker,
    "tensorboard": TensorBoardTracker,
    "trackio": TrackioTracker,
}


class Trackers:
    """The trackers of one run. One that fails is dropped with a line in the log, and training goes on."""

    def __init__(self, config: Config) -> None:
        """Start them.

        Raises:
            ConfigError: a tracker's package is missing, or W&B refuses the run.
        """
        self._directory = config.experiment_dir
        self.running = {name: TRACKERS[name](config) for name in config.trackers}

    def rewind(self, step: int) -> None:
        """See `Tracker.rewind`."""
        self._each(lambda tracker: tracker.rewind(step))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """See `Tracker.scalars`."""
        self._each(lambda tracker: tracker.scalars(step, values))

    def picture(self, step: int, name: str, path: Path) -> None:
        """See `Tracker.picture`."""
        self._each(lambda tracker: tracker.picture(step, name, path))

    def video(self, step: int, name: str, path: Path) -> None:
        """See `Tracker.video`."""
        self._each(lambda tracker: tracker.video(step, name, path))

    def checkpoint(self, step: int, path: Path) -> None:
        """See `Tracker.checkpoint`."""
        self._each(lambda tracker: tracker.checkpoint(step, path))

    def finish(self) -> None:
        """See `Tracker.finish`."""
        self._each(lambda tracker: tracker.finish())

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.running.items()):
            try:
                tell(tracker)
            except Exception as error:  # whatever a tracker raises: none of it is worth a run
                del self.running[name]
                logger.warning(
                    "training.trackers: %s failed (%s) and gets nothing more of this start; the run goes on, and %s "
                    "has everything",
                    name,
                    _first_line(error),
                    self._directory / "logs",
                )


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(f"training.trackers: {name} is not installed; pip install {name}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _kept_id(path: Path) -> str:
    """The id in a file, made and written at a run's first start."""
    if not path.is_file():
        with atomic_path(path) as temporary:
            temporary.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    return path.read_text(encoding="utf-8")


def _start_wandb(wandb: ModuleType, config: Config) -> Any:
    settings = {
        "project": config.wandb.project,
        "entity": config.wandb.entity,
        "name": config.training.experiment_name,
        "id": _kept_id(config.experiment_dir / "wandb_run_id.txt"),
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
        logger.warning(
            "W&B at %s does not answer (%s): the run is kept in %s, upload it with wandb sync",
            address,
            _first_line(error),
            config.experiment_dir / "wandb",
        )
        run = wandb.init(**settings, mode="offline")
    except wandb.errors.Error as error:
        raise ConfigError(
            f"training.trackers: W&B refuses ({_first_line(error)}); run wandb login, or set WANDB_MODE=offline and "
            "upload the run later with wandb sync"
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


def _animated_gif(path: Path) -> bytes:
    """The frames of a video at its rate; a rate above 50 a second, which viewers do not show, becomes 50."""
    import av
    from PIL import Image

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frame_ms = max(20, round(1000 / float(stream.average_rate or 20)))
        frames = [Image.fromarray(frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
    encoded = io.BytesIO()
    frames[0].save(encoded, "GIF", save_all=True, append_images=frames[1:], duration=frame_ms, loop=0)
    return encoded.getvalue()
