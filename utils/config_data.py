"""The `data` section of the configuration."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from utils.config_fields import positive
from utils.config_reader import ConfigError
from utils.text import printable

LEROBOT = "lerobot:"  # before the path of a LeRobot dataset that is read as it is
COLUMN_NAME = re.compile(r"\w[\w .:/-]*")  # of cameras and states; nothing that marks up a page or steers a terminal
MAX_NAME_CHARS = 200  # of a dataset's name, which goes into logs, tables and file names
# Names that a sample, or a file's row, uses for something else than a camera; for something else than a state.
NOT_STATES = ("action", "prompt", "is_first", "is_last", "is_terminal")
NOT_CAMERAS = (
    *NOT_STATES,
    *("state", "image_mask", "vlm_attention_mask", "raw_prompt_text", "input_ids", "prompt_mask", "action_is_pad"),
    *("intervention", "success", "plan", "plan_step"),
    *("dataset_index", "episode_index", "frame_index", "timestamp", "seed"),
    *("prompt_embeds", "image_slots", "noise", "reset"),
)


def is_column_name(name: str) -> bool:
    """Whether a column of a file may be called so."""
    return COLUMN_NAME.fullmatch(name) is not None and len(name) <= MAX_NAME_CHARS and name == name.strip()


def is_camera_name(name: str) -> bool:
    """Whether a camera may be called so: not as a sample calls something else."""
    return is_column_name(name) and name not in NOT_CAMERAS and not name.endswith("_bytes")


def is_lerobot(path: object) -> bool:
    """Whether a data path names a LeRobot dataset."""
    return str(path).startswith(LEROBOT)


@dataclass(frozen=True)
class LeRobotConfig:
    """How a LeRobot dataset is read in place; what scripts/convert_lerobot.py takes as flags of the same names."""

    cameras: tuple[str, ...] = ()  # <feature>=<camera>; empty: by name, observation.images.front is front
    state_key: tuple[str, ...] = ("observation.state",)  # features that make up the state, one after the other
    action_key: tuple[str, ...] = ("action",)  # features that make up the action
    task_key: str | None = None  # column that says which task is the instruction; None: task_index
    prompt: str | None = None  # instruction of every step, instead of the dataset's tasks
    empty_prompt: str | None = None  # instruction of those steps alone whose task is empty
    episodes: tuple[str, ...] = ()  # numbers and ranges such as "3-7"; empty: all
    tolerance_s: float = 1e-4  # seconds between a row's time stamp and its video frame's
    follow_links: bool = False  # read linked files that lie outside of the folder

    def __post_init__(self) -> None:
        for name in ("prompt", "empty_prompt"):
            text = getattr(self, name)
            if text is not None and not text.strip():
                raise ConfigError(f"lerobot.{name} is {text!r}; give an instruction")
        if self.prompt is not None and (self.empty_prompt is not None or self.task_key is not None):
            other = "task_key" if self.task_key is not None else "empty_prompt"
            raise ConfigError(f"lerobot.prompt is every step's instruction, so lerobot.{other} does nothing; remove it")
        positive(self, "lerobot", "tolerance_s")


@dataclass(frozen=True)
class MixtureEntry:
    """One dataset of a mixture. Widths may be smaller than the model's: the rest is padding, masked everywhere."""

    path: tuple[str, ...] = ()  # files, folders, globs or lerobot:/path, as train_parquet_files
    name: str = ""  # names the dataset in statistics, logs, metrics and at inference
    weight: float = 1.0  # share of the samples, relative to the other weights
    state_dim: int | None = None  # width of its state column; None: data.state_dim
    per_action_dim: int | None = None  # width of its action column; None: the head's
    horizon: int | None = None  # actions that are true targets, for datasets of a lower rate; None: the head's
    lerobot: LeRobotConfig | None = None  # how its LeRobot datasets are read; None: data.lerobot

    def __post_init__(self) -> None:
        if not self.name.isprintable() or len(self.name) > MAX_NAME_CHARS:
            raise ConfigError(f"data.mixture: name is {printable(self.name)!r}; give at most {MAX_NAME_CHARS} letters")
        if self.weight < 0:
            raise ConfigError(f"data.mixture {self.name}: weight is {self.weight}; give 0 or more")
        for name in ("state_dim", "per_action_dim", "horizon"):
            if getattr(self, name) is not None:
                positive(self, f"data.mixture {self.name}", name)


@dataclass(frozen=True)
class AugmentationConfig:
    """Random changes to training images, drawn anew for every sample; all frames and cameras of it alike."""

    enabled: bool = False
    crop_scale: float = 0.9  # side of the random crop relative to the image; evaluation takes the centre crop
    scale_jitter: float = 0.05  # the crop's side varies by up to this much either way
    brightness: float = 0.2  # factor drawn from [1 - b, 1 + b]
    contrast: float = 0.2  # the same, about the image's mean
    saturation: float = 0.2  # the same, about the pixel's grey
    hue: float = 0.02  # rotation in turns, from [-h, h]

    def __post_init__(self) -> None:
        place = "data.augmentation"
        if not 0 < self.crop_scale <= 1:
            raise ConfigError(f"{place}.crop_scale is {self.crop_scale}; give a number in (0, 1]")
        if not 0 <= self.scale_jitter < self.crop_scale:
            raise ConfigError(f"{place}.scale_jitter is {self.scale_jitter}; give 0 or more, below crop_scale")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{place}.{name} is {getattr(self, name)}; give a number in [0, 1)")
        if not 0 <= self.hue <= 0.5:
            raise ConfigError(f"{place}.hue is {self.hue}; give turns in [0, 0.5]")


@dataclass(frozen=True)
class SampleWeightingConfig:
    """How often training draws which time step of a dataset. `sample_weighting: task` is short for `{by: task}`."""

    by: Literal["step", "episode", "task"] = "step"  # what is drawn uniformly within a dataset
    corrections: float = 1.0  # how many times as often as others a step is drawn whose `intervention` is true
    leave_out_failures: bool = False  # draw no step of an episode whose `success` is false
    leave_out_before: int = 0  # draw none of so many steps before an intervention begins: they led to it

    shorthand = "by"  # the key that a plain value stands for

    def __post_init__(self) -> None:
        place = "data.sample_weighting"
        positive(self, place, "corrections")
        if self.leave_out_before < 0:
            raise ConfigError(f"{place}.leave_out_before is {self.leave_out_before}; give a number of steps, or 0")


@dataclass(frozen=True)
class DataConfig:
    """Where the demonstrations are and how samples are cut from them."""

    train_parquet_files: tuple[str, ...] = ()  # each entry a file, a folder, a glob, or lerobot:/path
    val_parquet_files: tuple[str, ...] = ()  # held-out episodes; empty: none, or val_fraction of the training files
    val_fraction: float = 0.0  # share of the training files' episodes that is held out instead of trained on
    split_seed: int = 0  # which episodes val_fraction holds out, and which max_episodes leaves
    max_episodes: int | None = None  # per dataset, of the training files, those held out included; None: all
    mixture: tuple[MixtureEntry, ...] = ()  # several datasets at once, instead of train_parquet_files
    lerobot: LeRobotConfig = field(default_factory=LeRobotConfig)  # how LeRobot datasets (lerobot:/path) are read
    sample_weighting: SampleWeightingConfig = field(default_factory=SampleWeightingConfig)  # which steps are drawn
    tokenizer_name_or_path: str | None = None  # directory or hub id; None: the backbone's own
    image_processor_name_or_path: str | None = None  # directory or hub id; None: siglip_model_name, else backbone
    siglip_model_name: str | None = None  # SigLIP checkpoint whose image processor is used
    cameras: tuple[str, ...] = ()  # image columns that the model reads, in slot order; empty: image_1 (and image_2)
    state_columns: tuple[str, ...] = ("state",)  # numeric columns that are joined into the state, in this order
    image_fit: Literal["stretch", "pad", "pad_bytes"] = "stretch"  # to the model's size; pad: as LeRobot, or openpi
    prompt_format: Literal["paligemma", "pi0", "openpi_pi0", "pi05"] = "paligemma"  # see data/prompts.py
    max_seq_len: int = 1  # observation frames per sample, the current one included
    prompt_max_len: int = 48  # text tokens per prompt, <bos> and the closing newline included
    batch_size: int = 8  # samples per optimizer step, over all ranks and micro-batches
    num_workers: int = 2  # loader processes per rank
    normalization_stats_path: str | None = None  # JSON from utils/calculate_normalization_stats.py
    normalization_type: Literal["min_max", "quantile", "mean_std", "quantile10", "identity"] = "min_max"
    normalization_arithmetic: Literal["own", "lerobot", "openpi"] = "own"  # whose formulae; see utils/normalization.py
    state_normalization_type: str | None = None  # lerobot, openpi: of states, where it is another than that of actions
    normalization_eps: float | None = None  # lerobot, openpi: what keeps from dividing by 0; None: the library's own
    clip_normalized: float | None = None  # clip normalized states and predicted actions to [-c, c]
    action_mode: Literal["absolute", "delta"] = "absolute"  # delta: relative to the current state's same dimension
    absolute_action_dims: tuple[int, ...] = ()  # dimensions that stay absolute in delta mode, such as grippers
    absolute_joints: tuple[str, ...] = ()  # the same by name: every dimension whose action name contains such a word
    action_names: tuple[str, ...] = ()  # what the action's dimensions are called, in plots and for absolute_joints
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    state_dim: int = 7  # width of the state column (of the widest dataset in a mixture)
    action_bounds: tuple[float, float] = (-1.0, 1.0)  # normalized range that min_max and quantile map onto
    cache: bool = True  # keep the episode cache for later runs; false (--no_cache): remove it when the run ends
    cache_dir: str | None = None  # episode cache; None: $XDG_CACHE_HOME/paligemma_vla

    def __post_init__(self) -> None:
        positive(self, "data", "max_seq_len", "batch_size", "state_dim")
        if not 0 <= self.val_fraction < 1:
            raise ConfigError(f"data.val_fraction is {self.val_fraction}; give a number in [0, 1)")
        if self.val_fraction and self.val_parquet_files:
            raise ConfigError(
                "data.val_fraction and data.val_parquet_files both say what is held out; give one of them"
            )
        if self.mixture and self.train_parquet_files:
            raise ConfigError("data.mixture and data.train_parquet_files both name training data; give one of them")
        for name in ("clip_normalized", "max_episodes"):
            if getattr(self, name) is not None:
                positive(self, "data", name)
        self._check_mixture()
        self._check_lerobot()
        self._check_normalization()
        self._check_columns()
        if self.num_workers < 0:
            raise ConfigError(f"data.num_workers is {self.num_workers}; give 0 (load in this process) or more")
        if self.prompt_max_len < 3:
            raise ConfigError(
                f"data.prompt_max_len is {self.prompt_max_len}; <bos>, one word and the newline need at least 3"
            )
        if len(self.action_bounds) != 2 or self.action_bounds[0] >= self.action_bounds[1]:
            raise ConfigError(f"data.action_bounds is {list(self.action_bounds)}; give [low, high] with low < high")

    def _check_columns(self) -> None:
        for key, names in (("cameras", self.cameras), ("state_columns", self.state_columns)):
            place = f"data.{key} is {printable(list(names))}"
            if len(set(names)) < len(names):
                raise ConfigError(f"{place}; name each {'camera' if key == 'cameras' else 'column'} once")
            if not all(map(is_column_name, names)):
                raise ConfigError(f"{place}; wanted names of columns: letters, digits, spaces and any of _ . : / -")
        if not self.state_columns:
            raise ConfigError("data.state_columns is empty; name a column, as in [state]")
        for camera in self.cameras:
            if not is_camera_name(camera) or camera in self.state_columns:
                raise ConfigError(f"data.cameras: {camera!r} names something else in a sample; rename that column")
        for name in self.state_columns:
            if name in NOT_STATES:
                raise ConfigError(f"data.state_columns: {name!r} is no part of the state; name other columns")

    @property
    def state_mode(self) -> str:
        """How states are normalized."""
        return self.state_normalization_type or self.normalization_type

    def _check_normalization(self) -> None:
        modes, whose = ("min_max", "quantile", "mean_std"), self.normalization_arithmetic
        if whose != "own":
            modes = (*modes, "quantile10", "identity")
            if tuple(self.action_bounds) != (-1.0, 1.0):
                raise ConfigError(
                    f"data.action_bounds is {list(self.action_bounds)}, but data.normalization_arithmetic {whose} maps "
                    "onto [-1, 1]; remove it"
                )
        for name, value in (
            ("normalization_type", self.normalization_type),
            ("state_normalization_type", self.state_mode),
        ):
            if value not in modes:
                raise ConfigError(
                    f"data.{name} is {value!r}, but data.normalization_arithmetic {whose} knows {', '.join(modes)}"
                )
        if whose == "own":
            for name in ("state_normalization_type", "normalization_eps"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"data.{name} is {getattr(self, name)!r}, which only data.normalization_arithmetic lerobot or "
                        "openpi reads; set that, or remove it"
                    )

    def _check_lerobot(self) -> None:
        """A mapping of LeRobot datasets where there are none does nothing."""
        paths = (*self.train_parquet_files, *self.val_parquet_files)
        unmapped = any(map(is_lerobot, paths)) or any(
            entry.lerobot is None and any(map(is_lerobot, entry.path)) for entry in self.mixture
        )
        if self.lerobot != LeRobotConfig() and not unmapped:
            raise ConfigError("data.lerobot says how lerobot:/path is read, but no data path begins so; remove it")
        for entry in self.mixture:
            if entry.lerobot is not None and not any(map(is_lerobot, entry.path)):
                raise ConfigError(
                    f"data.mixture {entry.name}: lerobot says how lerobot:/path is read, but its path does not begin "
                    "so; remove it"
                )

    def _check_mixture(self) -> None:
        names = [entry.name for entry in self.mixture]
        if not all(entry.path and entry.name for entry in self.mixture):
            raise ConfigError(f"data.mixture: every entry needs both a path and a name (names: {names})")
        if len(set(names)) != len(names):
            raise ConfigError(f"data.mixture: names {names} are not distinct")
        if self.mixture and not any(entry.weight for entry in self.mixture):
            raise ConfigError("data.mixture: every weight is 0; give one dataset a positive weight")
        for entry in self.mixture:
            if entry.state_dim is not None and entry.state_dim > self.state_dim:
                raise ConfigError(
                    f"data.mixture {entry.name}: state_dim {entry.state_dim} exceeds data.state_dim {self.state_dim}; "
                    "set data.state_dim to the widest"
                )
