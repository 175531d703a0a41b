"""The configuration: one frozen dataclass tree that holds every default.

The sections of data, model and training are in config_data.py, config_model.py and config_training.py beside this
file; the others, and how a configuration is read and written, are here.

A YAML file states differences from these defaults, `--set section.key=value` states differences from the
file, and a named flag of an entry script (`--lr`, `--batch_size`, ...) has the last word. Keys that do not
exist fail with the nearest name that does; values are checked here, before any weights are loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from utils.config_data import AugmentationConfig, DataConfig, MixtureEntry, SampleWeightingConfig
from utils.config_fields import is_free, not_negative, positive
from utils.config_model import (
    ActionHeadConfig,
    ExpertConfig,
    FusionConfig,
    LoRAConfig,
    ModelConfig,
    VisionResamplerConfig,
    VLMConfig,
)
from utils.config_reader import ConfigError, build, read_tree, set_dotted
from utils.config_training import ClosedLoopConfig, LRSchedulerConfig, OptimizerConfig, TrainingConfig
from utils.foreign_files import ForeignFileError, parse_yaml
from utils.text import printable

__all__ = [
    "ActionHeadConfig",
    "AugmentationConfig",
    "ClosedLoopConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "ExpertConfig",
    "FusionConfig",
    "InferenceConfig",
    "LRSchedulerConfig",
    "LoRAConfig",
    "MixtureEntry",
    "ModelConfig",
    "OptimizerConfig",
    "SampleWeightingConfig",
    "ServingConfig",
    "TrackioConfig",
    "TrainingConfig",
    "VLMConfig",
    "VisionResamplerConfig",
    "WandbConfig",
    "config_from_dict",
    "config_to_dict",
    "is_free",
    "load_config",
    "override_config",
    "save_config",
]


@dataclass(frozen=True)
class InferenceConfig:
    """How actions are sampled and executed."""

    num_inference_steps: int = 10  # steps from noise to action, of heads that iterate (flow_matching, diffusion)
    n_action_steps: int | None = None  # executed before replanning; None: the whole horizon
    execution: Literal["synchronous", "naive_async", "ensemble", "rtc", "clean_prefix"] = "synchronous"  # of chunks
    best_of: int = 1  # draws of which the one nearest to the others is taken; of heads that sample
    latency_steps: int = 0  # control steps from an observation to the arrival of its plan, as execution assumes
    ensemble_decay: float = 0.01  # ensemble: predictions for one step weigh exp(-decay i), i = 0 the oldest
    max_guidance_weight: float = 5.0  # rtc: clip of the guidance weight (beta)
    guidance_schedule: Literal["exp", "linear", "ones", "zeros"] = "exp"  # rtc: how their weights fall after committed
    guidance_steps: int | None = None  # rtc: steps of a chunk that follow the one before; null: all that it covers
    compile: Literal["none", "default", "max-autotune", "cuda_graph"] = "none"  # torch.compile's modes, or a CUDA graph
    quantization: Literal["none", "int8", "int4"] = "none"  # storage of the backbone's matrices; heads stay whole
    expert_quantization: Literal["none", "int8", "int4"] = "none"  # action_expert: storage of its layers' matrices
    weight_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: the compute precision on a GPU, else float32
    accuracy_threshold: float = 0.1  # threshold accuracy: |error| below this, in normalized units

    def __post_init__(self) -> None:
        positive(self, "inference", "num_inference_steps", "accuracy_threshold", "best_of")
        positive(self, "inference", "max_guidance_weight")
        not_negative(self, "inference", "ensemble_decay")
        if self.guidance_steps is not None:
            positive(self, "inference", "guidance_steps")
        if self.n_action_steps is not None:
            positive(self, "inference", "n_action_steps")
        if self.latency_steps < 0:
            raise ConfigError(f"inference.latency_steps is {self.latency_steps}; give 0 or more control steps")


@dataclass(frozen=True)
class ServingConfig:
    """What the policy server reads from a request, and its limits. Keys have openpi's names by default."""

    image_1_key: str = "observation/image"  # key of the first camera's frames; its own name is read as well
    image_2_key: str = "observation/wrist_image"  # of the second camera's; of further ones: observation/<name>
    image_keys: dict[str, str] = field(default_factory=dict)  # camera -> key, instead of these
    state_key: str = "observation/state"
    prompt_key: str = "prompt"
    batch_window_ms: float = 2.0  # how long a request waits for others to be predicted with, once clients are several
    max_batch_size: int = 8  # requests predicted in one pass
    max_waiting: int = 64  # requests that wait for the model; further ones are refused
    max_clients: int = 64  # connections at once
    max_message_bytes: int = 32_000_000  # of one request
    max_buffered_bytes: int = 256_000_000  # of requests over all connections; beyond, who holds most is dropped
    max_image_pixels: int = 16_000_000  # height x width of one frame, also of an encoded one
    max_request_pixels: int = 32_000_000  # the same, of all frames of a request together
    max_prompt_chars: int = 4096  # of an instruction, which is kept with its tokens
    timeout_s: float = 20.0  # for a handshake, a message, an answer (decoding included), a ping; and see idle_timeout_s
    idle_timeout_s: float = 600.0  # a connection without a request for so long is closed
    allowed_origins: tuple[str, ...] = ()  # web pages that may connect, as in http://localhost:3000; robots are none
    allowed_hosts: tuple[str, ...] = ()  # dotted names of this server, for clients without a token that call it so

    def __post_init__(self) -> None:
        positive(self, "serving", "max_batch_size", "max_waiting", "max_clients", "max_message_bytes")
        positive(self, "serving", "max_image_pixels", "max_request_pixels", "max_prompt_chars", "timeout_s")
        positive(self, "serving", "max_buffered_bytes", "idle_timeout_s")
        if self.batch_window_ms < 0:
            raise ConfigError(f"serving.batch_window_ms is {self.batch_window_ms}; give 0 or more")
        if self.max_buffered_bytes < self.max_message_bytes:
            raise ConfigError(
                f"serving.max_buffered_bytes is {self.max_buffered_bytes}, less than one message may have "
                f"(serving.max_message_bytes {self.max_message_bytes}); raise it"
            )
        self.keys(tuple({"image_1": "", "image_2": ""} | self.image_keys))

    def keys(self, cameras: Sequence[str]) -> dict[str, str]:
        """The request's key of each part of an observation, by camera and for `state` and `prompt`.

        Raises:
            ConfigError: two of them are the same, or one means something else.
        """
        standard = (self.image_1_key, self.image_2_key, *(f"observation/{camera}" for camera in cameras[2:]))
        keys = {camera: self.image_keys.get(camera, key) for camera, key in zip(cameras, standard, strict=False)}
        keys |= {"state": self.state_key, "prompt": self.prompt_key}
        if len(set(keys.values())) < len(keys) or not {"seed", "reset", "images"}.isdisjoint(keys.values()):
            raise ConfigError(
                f"serving: keys {list(keys.values())} are not distinct, or one is 'seed', 'reset' or 'images'"
            )
        return keys


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases; used only with `wandb` among `training.trackers`."""

    enabled: bool = False  # older spelling of `wandb` among training.trackers, and what --use_wandb sets
    project: str = "paligemma-vla"
    entity: str | None = None
    log_checkpoints: bool = False  # upload every checkpoint as a version of the run's model artifact


@dataclass(frozen=True)
class TrackioConfig:
    """Trackio; used only with `trackio` among `training.trackers`."""

    project: str = "paligemma-vla"
    space_id: str | None = None  # user/space on the Hugging Face hub to log to as well; None: this machine alone


@dataclass(frozen=True)
class Config:
    """The whole configuration."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: LRSchedulerConfig = field(default_factory=LRSchedulerConfig)
    closed_loop: ClosedLoopConfig = field(default_factory=ClosedLoopConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    trackio: TrackioConfig = field(default_factory=TrackioConfig)

    def __post_init__(self) -> None:
        self._take_older_inference_steps()
        if (self.training.eval_every_n_epochs is None) != (not self.closed_loop.tasks):
            raise ConfigError(
                f"training.eval_every_n_epochs is {self.training.eval_every_n_epochs} but closed_loop.tasks is "
                f"{list(self.closed_loop.tasks)}; give both (how often, and what), or none of them"
            )
        head, data, executed = self.model.action_head_config, self.data, self.inference.n_action_steps
        if executed is not None and executed > head.horizon:
            raise ConfigError(
                f"inference.n_action_steps is {executed} but model.action_head_config.horizon is {head.horizon}; "
                "at most the whole horizon can be executed"
            )
        for entry in data.mixture:
            for name, limit in (("per_action_dim", head.per_action_dim), ("horizon", head.horizon)):
                if (getattr(entry, name) or 0) > limit:
                    raise ConfigError(
                        f"data.mixture {entry.name}: {name} {getattr(entry, name)} exceeds "
                        f"model.action_head_config.{name} {limit}; set that to the largest"
                    )
        self._refuse_settings_of_the_expert()
        head.check_best_of(self.inference.best_of)
        prompt_says_state = data.prompt_format == "pi05"
        if prompt_says_state and not head.use_state_input:
            raise ConfigError(
                "data.prompt_format is pi05, whose prompt says the state, but model.action_head_config.use_state_input "
                "is false; set it to true, or choose another format"
            )
        unseen = head.type == "action_expert" and head.use_state_input and not head.expert.state_token
        if unseen and not prompt_says_state:
            raise ConfigError(
                "model.action_head_config.expert.state_token is false and data.prompt_format "
                f"{data.prompt_format} does not say the state, so that nothing reads it; set state_token: true, "
                "prompt_format: pi05, or use_state_input: false"
            )
        data = self._name_actions()
        if data.action_mode == "delta":
            unmatched = [d for d in range(data.state_dim, head.per_action_dim) if d not in data.absolute_action_dims]
            if unmatched:
                raise ConfigError(
                    f"data.action_mode delta subtracts state[i] from action[i], but state_dim {data.state_dim} has no "
                    f"value for action dimensions {unmatched}; list them in data.absolute_action_dims"
                )
        if any(not 0 <= d < head.per_action_dim for d in data.absolute_action_dims):
            raise ConfigError(
                f"data.absolute_action_dims is {list(data.absolute_action_dims)}; actions have dimensions 0 to "
                f"{head.per_action_dim - 1}"
            )

    def _refuse_settings_of_the_expert(self) -> None:
        """Settings that only an action expert can honour, where there is none."""
        head, vlm = self.model.action_head_config, self.model.vlm_config
        resampler = self.model.vision_resampler_config.type
        asked = {
            "model.vlm_config.train_expert_only": vlm.train_expert_only,
            "model.action_head_config.detach_context": head.detach_context,
            "model.action_head_config.expert.lora": head.expert.lora is not None,
            "model.action_head_config.expert.gradient_checkpointing": head.expert.gradient_checkpointing,
            "inference.expert_quantization": self.inference.expert_quantization != "none",
        }
        found = next((setting for setting, given in asked.items() if given), None)
        if head.type != "action_expert" and found is not None:
            raise ConfigError(
                f"{found} is set, but model.action_head_config.type is {head.type}, which has no use for it; remove "
                "it, or take type action_expert"
            )
        if vlm.train_expert_only and resampler != "identity":
            raise ConfigError(
                f"model.vlm_config.train_expert_only is set, but model.vision_resampler_config.type {resampler} would "
                "train too; set the freeze_* keys of model.vlm_config instead"
            )

    def _name_actions(self) -> DataConfig:
        """The data section with `absolute_joints` among `absolute_action_dims`, as LeRobot finds them: a word anywhere
        in the name, whatever its case."""
        data, width = self.data, self.model.action_head_config.per_action_dim
        if data.action_names and len(data.action_names) != width:
            raise ConfigError(
                f"data.action_names has {len(data.action_names)} names, but model.action_head_config.per_action_dim is "
                f"{width}; name every dimension"
            )
        dims = set(data.absolute_action_dims)
        for word in data.absolute_joints:
            named = {d for d, name in enumerate(data.action_names) if word.lower() in name.lower()}
            if not named or not word:
                names = ", ".join(data.action_names) or "none: set data.action_names"
                raise ConfigError(f"data.absolute_joints: no action is called {printable(word)!r} (names: {names})")
            dims |= named
        if data.absolute_joints and dims != set(data.absolute_action_dims):
            data = dataclasses.replace(data, absolute_action_dims=tuple(sorted(dims)))
            object.__setattr__(self, "data", data)
        return data

    def _take_older_inference_steps(self) -> None:
        """`action_head_config.inference_steps` says the same as `inference.num_inference_steps`; the latter is read."""
        head, default = self.model.action_head_config, InferenceConfig().num_inference_steps
        if head.inference_steps is not None:
            if self.inference.num_inference_steps not in (default, head.inference_steps):
                raise ConfigError(
                    f"model.action_head_config.inference_steps is {head.inference_steps} but "
                    f"inference.num_inference_steps is {self.inference.num_inference_steps}; they are the same number, "
                    "so give one of them (inference.num_inference_steps)"
                )
            inference = dataclasses.replace(self.inference, num_inference_steps=head.inference_steps)
            object.__setattr__(self, "inference", inference)
        if head.type == "diffusion" and self.inference.num_inference_steps > head.num_train_timesteps:
            raise ConfigError(
                f"inference.num_inference_steps is {self.inference.num_inference_steps} but "
                f"model.action_head_config.num_train_timesteps is {head.num_train_timesteps}; "
                "diffusion can visit each noise level once, so give at most that many"
            )

    @property
    def datasets(self) -> tuple[MixtureEntry, ...]:
        """What to train on, one entry per dataset, widths filled in; a single dataset is a mixture of one."""
        head, data = self.model.action_head_config, self.data
        entries = data.mixture or (MixtureEntry(path=data.train_parquet_files, name="default"),)
        return tuple(
            dataclasses.replace(
                entry,
                state_dim=entry.state_dim or data.state_dim,
                per_action_dim=entry.per_action_dim or head.per_action_dim,
                horizon=entry.horizon or head.horizon,
                lerobot=entry.lerobot or data.lerobot,
            )
            for entry in entries
        )

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the image columns that the model reads, in slot order."""
        older_spelling = ("image_1", "image_2") if self.model.vlm_config.use_aux_camera else ("image_1",)
        return self.data.cameras or older_spelling

    @property
    def reads_state(self) -> bool:
        """Whether anything reads the state: the head, the prompt, or actions that are relative to it."""
        head, data = self.model.action_head_config, self.data
        return head.use_state_input or data.action_mode == "delta" or data.prompt_format == "pi05"

    @property
    def trackers(self) -> tuple[str, ...]:
        """Names of the experiment trackers, without repetition."""
        older_spelling = ("wandb",) if self.wandb.enabled else ()
        return tuple(dict.fromkeys((*self.training.trackers, *older_spelling)))

    @property
    def experiment_dir(self) -> Path:
        """Folder of this run's logs, plots and checkpoints."""
        return Path(self.training.checkpoint_dir) / self.training.experiment_name


def load_config(path: str | Path, overrides: dict[str, Any] | None = None, set_args: list[str] | None = None) -> Config:
    """Read a YAML file of differences from the defaults and apply overrides.

    Args:
        path: YAML file. An empty file gives the defaults. A top-level `base: other.yaml` (relative to the
            file) is read first, so that a file can state its differences from another one.
        overrides: `{"optimizer.lr": 1e-4}`; values of None are ignored (a flag that was not given).
        set_args: `["optimizer.lr=1e-4"]` as given to `--set`; values are read as YAML.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type, value out of range, contradiction.
    """
    tree, items = read_tree(Path(path).expanduser()), set_args or []
    _apply(tree, items)
    given = {item.partition("=")[0]: f"--set {item}" for item in items}
    for key, value in (overrides or {}).items():
        if value is not None:
            set_dotted(tree, key, value, key)
            given[key] = f"{key} {printable(value)}"
    try:
        return config_from_dict(tree, source=str(path))
    except ConfigError as error:
        if not given or str(error) == _fault_of(path):
            raise
        fault = str(error).removeprefix(f"{path}: ")
        named = [text for key, text in given.items() if key.rpartition(".")[2] in fault] or given.values()
        raise ConfigError(f"{path} with {', '.join(named)}: {fault}") from None


def _fault_of(path: str | Path) -> str:
    """What is wrong with a file alone; nothing where nothing is."""
    try:
        load_config(path)
    except ConfigError as error:
        return str(error)
    return ""


def config_from_dict(tree: dict[str, Any], source: str = "config") -> Config:
    """Build a checked Config from nested plain dicts (as YAML or `config_to_dict` give them).

    Raises:
        ConfigError: naming `source`, the dotted key, the value found and what is wanted.
    """
    try:
        return build(Config, tree, "")
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def override_config(config: Config, set_args: list[str]) -> Config:
    """The configuration with `--set section.key=value` applied; errors as `load_config`."""
    tree = config_to_dict(config)
    _apply(tree, set_args)
    return config_from_dict(tree, source="--set")


def config_to_dict(config: Any) -> dict[str, Any]:
    """The configuration as nested dicts, lists and plain values: what checkpoints and logs store."""
    return _plain(dataclasses.asdict(config))


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration as YAML."""
    Path(path).write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False), encoding="utf-8")


def _apply(tree: dict[str, Any], set_args: list[str]) -> None:
    for item in set_args:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item}: no '='; write --set section.key=value")
        try:
            value = parse_yaml(text)
        except ForeignFileError as error:
            raise ConfigError(f"--set {item}: {error}") from None
        set_dotted(tree, key.strip(), value, f"--set {item}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
