"""The configuration: one frozen dataclass tree whose defaults live here and nowhere else.

A YAML file states differences from these defaults, `--set section.key=value` states differences from the
file, and a named flag of an entry script (`--lr`, `--batch_size`, ...) has the last word. Keys that do not
exist fail with the nearest name that does; values are checked here, before any weights are loaded.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from utils.backbones import BACKBONE_SPECS, BackboneType
from utils.config_reader import ConfigError, build, read_tree, set_dotted

__all__ = ["Config", "ConfigError", "config_from_dict", "config_to_dict", "load_config", "save_config"]


@dataclass(frozen=True)
class MixtureEntry:
    """One dataset of a mixture. Widths may be smaller than the model's: the rest is padding, masked everywhere."""

    path: tuple[str, ...] = ()  # files, folders or globs, as train_parquet_files
    name: str = ""  # names the dataset in statistics, logs, metrics and at inference
    weight: float = 1.0  # share of the samples, relative to the other weights
    state_dim: int | None = None  # width of its state column; None: data.state_dim
    per_action_dim: int | None = None  # width of its action column; None: the head's
    horizon: int | None = None  # actions that are true targets, for datasets of a lower rate; None: the head's

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ConfigError(f"data.mixture {self.name}: weight is {self.weight}; give 0 or more")
        for name in ("state_dim", "per_action_dim", "horizon"):
            if getattr(self, name) is not None:
                _positive(self, f"data.mixture {self.name}", name)


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
class DataConfig:
    """Where the demonstrations are and how samples are cut from them."""

    train_parquet_files: tuple[str, ...] = ()  # each entry a file, a folder or a glob
    val_parquet_files: tuple[str, ...] = ()  # held-out episodes; empty: none, or val_fraction of the training files
    val_fraction: float = 0.0  # share of the training files' episodes that is held out instead of trained on
    split_seed: int = 0  # which episodes val_fraction holds out, and which max_episodes leaves
    max_episodes: int | None = None  # per dataset, of the training files, those held out included; None: all
    mixture: tuple[MixtureEntry, ...] = ()  # several datasets at once, instead of train_parquet_files
    sample_weighting: Literal["step", "episode", "task"] = "step"  # what is drawn uniformly within a dataset
    tokenizer_name_or_path: str | None = None  # directory or hub id; None: the backbone's own
    image_processor_name_or_path: str | None = None  # directory or hub id; None: siglip_model_name, else backbone
    siglip_model_name: str | None = None  # SigLIP checkpoint whose image processor is used
    max_seq_len: int = 1  # observation frames per sample, the current one included
    prompt_max_len: int = 48  # text tokens per prompt, <bos> and the closing newline included
    batch_size: int = 8  # samples per optimizer step, over all ranks and micro-batches
    num_workers: int = 2  # loader processes per rank
    normalization_stats_path: str | None = None  # JSON from utils/calculate_normalization_stats.py
    normalization_type: Literal["min_max", "quantile", "mean_std"] = "min_max"
    clip_normalized: float | None = None  # clip normalized states and predicted actions to [-c, c]
    action_mode: Literal["absolute", "delta"] = "absolute"  # delta: relative to the current state's same dimension
    absolute_action_dims: tuple[int, ...] = ()  # dimensions that stay absolute in delta mode, such as grippers
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    state_dim: int = 7  # width of the state column (of the widest dataset in a mixture)
    action_bounds: tuple[float, float] = (-1.0, 1.0)  # normalized range that min_max and quantile map onto
    cache: bool = True  # keep the episode cache for later runs; false (--no_cache): remove it when the run ends
    cache_dir: str | None = None  # episode cache; None: $XDG_CACHE_HOME/paligemma_vla

    def __post_init__(self) -> None:
        _positive(self, "data", "max_seq_len", "batch_size", "state_dim")
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
                _positive(self, "data", name)
        self._check_mixture()
        if self.num_workers < 0:
            raise ConfigError(f"data.num_workers is {self.num_workers}; give 0 (load in this process) or more")
        if self.prompt_max_len < 3:
            raise ConfigError(
                f"data.prompt_max_len is {self.prompt_max_len}; <bos>, one word and the newline need at least 3"
            )
        if len(self.action_bounds) != 2 or self.action_bounds[0] >= self.action_bounds[1]:
            raise ConfigError(f"data.action_bounds is {list(self.action_bounds)}; give [low, high] with low < high")

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


@dataclass(frozen=True)
class FusionConfig:
    """How a siglip_llm backbone fuses image and text features: learnable latents read both by cross-attention."""

    hidden_dim: int = 512  # width of features, latents and context
    num_latents: int = 64  # context tokens
    num_layers: int = 2
    num_heads: int = 8

    def __post_init__(self) -> None:
        place = "model.vlm_config.fusion"
        _positive(self, place, "hidden_dim", "num_latents", "num_layers", "num_heads")
        if self.hidden_dim % self.num_heads or self.hidden_dim % 4:
            raise ConfigError(
                f"{place}: hidden_dim is {self.hidden_dim} and num_heads {self.num_heads}; give a width that is a "
                "multiple of the heads and of 4 (sines and cosines of two coordinates)"
            )


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters around linear layers of frozen pretrained parts; the adapters train, and the head."""

    rank: int = 16  # columns of the one and rows of the other matrix
    alpha: float = 16.0  # the adapter's output is scaled by alpha / rank
    dropout: float = 0.0  # of the adapter's input, in training
    targets: tuple[str, ...] = ()  # last part of the layers' names, as in [q_proj, v_proj]; empty: every linear layer
    language: bool = True  # adapt (and freeze) the language model
    vision: bool = False  # adapt (and freeze) the vision tower

    def __post_init__(self) -> None:
        place = "model.vlm_config.lora"
        _positive(self, place, "rank", "alpha")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"{place}.dropout is {self.dropout}; give a number in [0, 1)")
        if not (self.language or self.vision):
            raise ConfigError(f"{place}: neither language nor vision; set one of them, or lora: null for no adapters")


@dataclass(frozen=True)
class VLMConfig:
    """The pretrained backbone."""

    type: BackboneType = "paligemma"
    model_name_or_path: str = "./weight/paligemma-3b-pt-224"  # paligemma: Hugging Face directory or hub id
    vision_model_name_or_path: str = "./weight/siglip-base-patch16-224"  # siglip_llm: directory or hub id of a SigLIP
    language_model_name_or_path: str = "./weight/Qwen2.5-0.5B"  # siglip_llm: of a causal language model
    fusion: FusionConfig = field(default_factory=FusionConfig)  # siglip_llm
    use_aux_camera: bool = False  # read image_2 as well
    freeze_vision_tower: bool = False
    freeze_language_model: bool = False
    dtype: str = "bfloat16"  # compute precision (autocast) and storage of frozen weights; trained weights are fp32
    num_image_tokens: int | None = None  # per image, before the resampler; derived, checked when given
    attn_implementation: Literal["auto", "sdpa", "eager"] = "auto"  # auto: SDPA unless the model caps its logits
    gradient_checkpointing: bool = False
    lora: LoRAConfig | None = None  # a section (which may be empty: {}) turns adapters on
    quantization: Literal["none", "8bit", "4bit"] = "none"  # storage of frozen linear layers, by bitsandbytes
    num_language_layers: int | None = None  # keep the first k layers of the language model; None: all

    def __post_init__(self) -> None:
        name = self.dtype.removeprefix("torch.")
        aliases = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
        name = aliases.get(name, name)
        if name not in ("bfloat16", "float16", "float32"):
            raise ConfigError(
                f"model.vlm_config.dtype is {self.dtype!r}; give bfloat16, float16 or float32 (torch.bfloat16, ... too)"
            )
        object.__setattr__(self, "dtype", name)
        if self.num_language_layers is not None:
            _positive(self, "model.vlm_config", "num_language_layers")

    @property
    def pretrained_paths(self) -> tuple[str, ...]:
        """Directories or hub ids that the weights come from, one per part of the backbone."""
        return tuple(getattr(self, part.key) for part in BACKBONE_SPECS[self.type].parts)

    @property
    def pretrained_names(self) -> str:
        """The same in words."""
        return " and ".join(self.pretrained_paths)


@dataclass(frozen=True)
class VisionResamplerConfig:
    """What happens to image tokens between the projector and the language model."""

    type: Literal["identity", "mlp", "perceiver"] = "identity"
    output_dim: int | None = None  # the language model's width; derived, checked when given
    num_latents: int = 64  # perceiver: tokens per image after resampling
    num_layers: int = 2  # perceiver: cross-attention blocks
    num_heads: int = 8  # perceiver: attention heads

    def __post_init__(self) -> None:
        _positive(self, "model.vision_resampler_config", "num_latents", "num_layers", "num_heads")


@dataclass(frozen=True)
class ActionHeadConfig:
    """The action head: what it predicts, and its size."""

    type: str = "flow_matching"  # a key of ACTION_HEADS (model/action_head): also regression, discrete, diffusion
    use_state_input: bool = True
    horizon: int = 8  # T, action steps per prediction
    per_action_dim: int = 7  # A, values per action step
    action_dim: int | None = None  # horizon x per_action_dim; derived, checked when given
    num_action_dims: int | None = None  # older spelling of per_action_dim
    num_action_bins: int = 256  # bins per dimension, of the discrete head and of binned accuracy
    mlp_hidden_dims: tuple[int, ...] = (1024, 512)  # discrete: hidden widths of the MLP
    decoding: Literal["argmax", "expectation", "sample"] = "argmax"  # discrete: from bin probabilities to actions
    dropout_prob: float = 0.0
    hidden_dim: int = 1024  # width of the action-token transformer, and of the state encoder
    num_layers: int = 8
    num_heads: int = 8
    noise_draws_per_sample: int = 1  # (noise, time) draws per backbone pass in training
    noise_distribution: Literal["gaussian", "uniform"] = "gaussian"  # flow_matching: uniform is in [-1, 1]
    time_distribution: Literal["uniform", "beta"] = "beta"  # flow_matching
    time_beta: tuple[float, float] = (1.0, 1.5)  # flow_matching: Beta(a, b) of t in [0, 1], t = 0 is pure noise
    time_clamp: tuple[float, float] = (0.0, 1.0)  # flow_matching: t is mapped linearly into this range
    integrator: Literal["euler", "midpoint", "heun"] = "euler"  # flow_matching: the last two take two velocities a step
    denoiser: Literal["unet", "transformer"] = "unet"  # diffusion: 1-D U-Net over time, or the flow head's transformer
    unet_width: int = 256  # diffusion: channels of the U-Net's first level, doubled at each further one
    unet_levels: int = 3  # diffusion: levels of the U-Net, each half as long in time as the one before
    num_train_timesteps: int = 100  # diffusion: noise levels in training
    beta_schedule: Literal["squaredcos_cap_v2", "linear", "scaled_linear"] = "squaredcos_cap_v2"  # diffusion
    prediction_type: Literal["epsilon", "sample", "v", "v_prediction"] = "epsilon"  # diffusion; v: short for the last
    scheduler: Literal["ddim", "ddpm"] = "ddim"  # diffusion: sampler; ddim's only noise is the start's
    inference_steps: int | None = None  # older spelling of inference.num_inference_steps
    clip_sample_range: float | None = None  # diffusion: |denoised action| at most; None: the largest of the statistics
    max_clean_prefix: int = 0  # flow_matching: train with up to so many leading actions given, without loss; 0: none

    def __post_init__(self) -> None:
        place = "model.action_head_config"
        if self.num_action_dims is not None:
            default = ActionHeadConfig.__dataclass_fields__["per_action_dim"].default
            if self.per_action_dim not in (default, self.num_action_dims):
                raise ConfigError(
                    f"{place}: num_action_dims is {self.num_action_dims} but per_action_dim is "
                    f"{self.per_action_dim}; they are the same number, so give one of them (per_action_dim)"
                )
            object.__setattr__(self, "per_action_dim", self.num_action_dims)
        _positive(self, place, "horizon", "per_action_dim", "num_action_bins", "hidden_dim", "num_layers", "num_heads")
        _positive(self, place, "noise_draws_per_sample", "unet_width", "unet_levels", "num_train_timesteps")
        for name in ("inference_steps", "clip_sample_range"):
            if getattr(self, name) is not None:
                _positive(self, place, name)
        object.__setattr__(self, "type", self.type.lower())
        if self.prediction_type == "v":
            object.__setattr__(self, "prediction_type", "v_prediction")
        if self.unet_width % 8:
            raise ConfigError(f"{place}: unet_width is {self.unet_width}; give a multiple of 8 (the norms' groups)")
        if self.num_action_bins < 2 or any(width < 1 for width in self.mlp_hidden_dims):
            raise ConfigError(
                f"{place}: num_action_bins is {self.num_action_bins} and mlp_hidden_dims {list(self.mlp_hidden_dims)}; "
                "give at least 2 bins and positive widths"
            )
        flat = self.horizon * self.per_action_dim
        if self.action_dim is not None and self.action_dim != flat:
            raise ConfigError(
                f"{place}: action_dim is {self.action_dim} but horizon {self.horizon} x per_action_dim "
                f"{self.per_action_dim} = {flat}; remove action_dim or correct one of the three"
            )
        object.__setattr__(self, "action_dim", flat)
        if self.hidden_dim % self.num_heads or (self.hidden_dim // self.num_heads) % 2:
            raise ConfigError(
                f"{place}: hidden_dim {self.hidden_dim} does not split into {self.num_heads} heads of even width"
            )
        if not 0 <= self.dropout_prob < 1:
            raise ConfigError(f"{place}: dropout_prob is {self.dropout_prob}; give a number in [0, 1)")
        if not 0 <= self.time_clamp[0] < self.time_clamp[1] <= 1:
            raise ConfigError(f"{place}: time_clamp is {list(self.time_clamp)}; give [low, high] within [0, 1]")
        if not 0 <= self.max_clean_prefix < self.horizon:
            raise ConfigError(
                f"{place}: max_clean_prefix is {self.max_clean_prefix}; give 0 to {self.horizon - 1}, so that at least "
                f"one of the {self.horizon} actions is left to predict"
            )
        if min(self.time_beta) <= 0:
            raise ConfigError(f"{place}: time_beta is {list(self.time_beta)}; both parameters must be positive")


@dataclass(frozen=True)
class ModelConfig:
    """Backbone, resampler and head."""

    vlm_config: VLMConfig = field(default_factory=VLMConfig)
    vision_resampler_config: VisionResamplerConfig = field(default_factory=VisionResamplerConfig)
    action_head_config: ActionHeadConfig = field(default_factory=ActionHeadConfig)


@dataclass(frozen=True)
class TrainingConfig:
    """How long to train, what to write and when."""

    epochs: int = 10
    max_steps: int | None = None  # optimizer steps; stops earlier than epochs when reached
    gradient_accumulation_steps: int = 1  # micro-batches per optimizer step; data.batch_size is their total
    log_interval: int = 10  # optimizer steps between log lines
    checkpoint_dir: str = "experiments"  # everything goes to {checkpoint_dir}/{experiment_name}/
    experiment_name: str = "default"
    grad_clip_norm: float | None = 1.0  # None: no clipping
    seed: int = 42
    max_hours: float | None = None  # wall-clock hours of one start; then it saves and exits, to be resumed
    save_every_n_epochs: int = 1
    save_every_n_steps: int | None = None  # optimizer steps between checkpoints within epochs; None: none
    keep_last_k: int | None = None  # keep this many checkpoint_* files, besides model_best; None: all
    val_every_n_epochs: int = 1
    val_max_batches: int | None = None  # None: the whole validation set
    val_num_samples: int = 1  # draws per held-out sample; 2 or more add spread and best-of-k of heads that sample
    val_num_plots: int = 4  # held-out samples whose predictions are drawn at every validation; 0: none
    save_adapters_only: bool = False  # leave frozen weights out of checkpoints: they are read from the backbone again
    best_metric: str = "val_loss"  # what model_best is best in: any validation metric, such as val_action_mse
    early_stopping_patience: int | None = None  # validations without a new best before training stops; None: never
    ema_decay: float | None = None  # average weights over updates, for evaluation; 0.999, say; None: no average
    log_samples: bool = False  # write which samples each step takes to logs/samples_rank_{r}.jsonl
    compile: bool = False  # torch.compile of the transformer layers: slow first steps, then faster ones on a GPU
    compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"  # the latter searches for faster kernels
    num_threads: int | None = None  # CPU threads of the training process; None: torch's choice
    strategy: Literal["ddp", "fsdp"] = "ddp"  # main_train_ddp.py: whole model on every rank, or sharded over them
    checkpoint_format: Literal["file", "shards"] = "file"  # shards: every fsdp rank writes its part beside the file
    distributed_timeout_s: float = 1800.0  # seconds that a rank waits for the others before it gives up

    def __post_init__(self) -> None:
        _positive(self, "training", "epochs", "gradient_accumulation_steps", "log_interval")
        _positive(self, "training", "save_every_n_epochs", "val_every_n_epochs", "val_num_samples")
        if self.val_num_plots < 0:
            raise ConfigError(f"training.val_num_plots is {self.val_num_plots}; give 0 (no plots) or more")
        _positive(self, "training", "distributed_timeout_s")
        if self.checkpoint_format == "shards" and self.strategy != "fsdp":
            raise ConfigError(
                "training.checkpoint_format is shards, but training.strategy ddp shards nothing; take file, or fsdp"
            )
        for name in (
            "max_steps",
            "max_hours",
            "save_every_n_steps",
            "keep_last_k",
            "val_max_batches",
            "early_stopping_patience",
            "num_threads",
            "grad_clip_norm",
        ):
            if getattr(self, name) is not None:
                _positive(self, "training", name)
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"training.ema_decay is {self.ema_decay}; give a number in (0, 1), or null for none")
        if not self.experiment_name or "/" in self.experiment_name:
            raise ConfigError(f"training.experiment_name is {self.experiment_name!r}; give a plain folder name")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer over every parameter that trains."""

    type: Literal["AdamW", "AdamW8bit", "SGD"] = "AdamW"  # AdamW8bit: bitsandbytes, a byte per moment
    lr: float = 5e-5  # peak; of every parameter without a rate of its own
    vision_lr: float | None = None  # peak of the vision tower and its projector; None: lr
    language_lr: float | None = None  # peak of the language model; None: lr
    head_lr: float | None = None  # peak of the action head and the vision resampler; None: lr
    weight_decay: float = 0.01  # not applied to norms and biases
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW
    eps: float = 1e-8  # AdamW
    momentum: float = 0.9  # SGD

    def __post_init__(self) -> None:
        _positive(self, "optimizer", "lr", "eps")
        for name in ("vision_lr", "language_lr", "head_lr"):
            if getattr(self, name) is not None:
                _positive(self, "optimizer", name)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas is {list(self.betas)}; give two numbers in [0, 1)")
        _not_negative(self, "optimizer", "weight_decay")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"optimizer.momentum is {self.momentum}; give a number in [0, 1)")


@dataclass(frozen=True)
class LRSchedulerConfig:
    """The learning rate as a function of the step; lengths count optimizer steps, or epochs if `interval` says so."""

    type: Literal["CosineAnnealingLR", "StepLR", "warmup_cosine", "constant"] = "warmup_cosine"
    interval: Literal["step", "epoch"] = "step"  # unit of warmup_steps, T_max and step_size
    warmup_steps: int = 0  # linear from 0, before any of the schedules
    T_max: int | None = None  # where the cosine reaches eta_min and stays; None: the end of training
    eta_min: float = 0.0  # final learning rate of the cosines
    step_size: int = 1000  # StepLR
    gamma: float = 0.1  # StepLR

    def __post_init__(self) -> None:
        _not_negative(self, "lr_scheduler", "warmup_steps", "eta_min")
        if self.T_max is not None:
            _positive(self, "lr_scheduler", "T_max")
        _positive(self, "lr_scheduler", "step_size", "gamma")


@dataclass(frozen=True)
class InferenceConfig:
    """How actions are sampled and executed."""

    num_inference_steps: int = 10  # steps from noise to action, of heads that iterate (flow_matching, diffusion)
    n_action_steps: int | None = None  # executed before replanning; None: the whole horizon
    execution: Literal["synchronous", "naive_async", "ensemble", "rtc", "clean_prefix"] = "synchronous"  # of chunks
    latency_steps: int = 0  # control steps from an observation to the arrival of its plan, as execution assumes
    ensemble_decay: float = 0.01  # ensemble: predictions for one step weigh exp(-decay i), i = 0 the oldest
    max_guidance_weight: float = 5.0  # rtc: clip of the guidance weight (beta)
    guidance_steps: int | None = None  # rtc: steps of a chunk that follow the one before; null: all that it covers
    compile: Literal["none", "default", "max-autotune", "cuda_graph"] = "none"  # torch.compile's modes, or a CUDA graph
    quantization: Literal["none", "int8", "int4"] = "none"  # storage of the backbone's matrices; the head stays whole
    weight_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: the compute precision on a GPU, else float32
    accuracy_threshold: float = 0.1  # threshold accuracy: |error| below this, in normalized units

    def __post_init__(self) -> None:
        _positive(self, "inference", "num_inference_steps", "accuracy_threshold")
        _positive(self, "inference", "max_guidance_weight")
        _not_negative(self, "inference", "ensemble_decay")
        if self.guidance_steps is not None:
            _positive(self, "inference", "guidance_steps")
        if self.n_action_steps is not None:
            _positive(self, "inference", "n_action_steps")
        if self.latency_steps < 0:
            raise ConfigError(f"inference.latency_steps is {self.latency_steps}; give 0 or more control steps")


@dataclass(frozen=True)
class ServingConfig:
    """What the policy server reads from a request, and its limits. Keys have openpi's names by default."""

    image_1_key: str = "observation/image"  # key of each camera's frames in a request; "image_1" is read as well
    image_2_key: str = "observation/wrist_image"
    state_key: str = "observation/state"
    prompt_key: str = "prompt"
    batch_window_ms: float = 2.0  # how long a request waits for others to be predicted with, once clients are several
    max_batch_size: int = 8  # requests predicted in one pass
    max_waiting: int = 64  # requests that wait for the model; further ones are refused
    max_clients: int = 64  # connections at once
    max_message_bytes: int = 32_000_000  # of one request
    max_image_pixels: int = 16_000_000  # height x width of one frame, also of an encoded one
    max_prompt_chars: int = 4096  # of an instruction, which is kept with its tokens
    timeout_s: float = 20.0  # for a handshake, a prediction, a client that answers no ping, and the end of a connection

    def __post_init__(self) -> None:
        _positive(self, "serving", "max_batch_size", "max_waiting", "max_clients", "max_message_bytes")
        _positive(self, "serving", "max_image_pixels", "max_prompt_chars", "timeout_s")
        if self.batch_window_ms < 0:
            raise ConfigError(f"serving.batch_window_ms is {self.batch_window_ms}; give 0 or more")
        if len(set(self.keys.values())) < len(self.keys) or "seed" in self.keys.values():
            raise ConfigError(f"serving: keys {list(self.keys.values())} are not distinct, or one is 'seed'")

    @property
    def keys(self) -> dict[str, str]:
        """The request's key for each part of an observation."""
        return {
            "image_1": self.image_1_key,
            "image_2": self.image_2_key,
            "state": self.state_key,
            "prompt": self.prompt_key,
        }


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases; used only with `enabled` (or --use_wandb)."""

    enabled: bool = False
    project: str = "paligemma-vla"
    entity: str | None = None
    log_checkpoints: bool = False  # upload every checkpoint as a version of the run's model artifact


@dataclass(frozen=True)
class Config:
    """The whole configuration."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_scheduler: LRSchedulerConfig = field(default_factory=LRSchedulerConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        self._take_older_inference_steps()
        horizon, executed = self.model.action_head_config.horizon, self.inference.n_action_steps
        if executed is not None and executed > horizon:
            raise ConfigError(
                f"inference.n_action_steps is {executed} but model.action_head_config.horizon is {horizon}; "
                "at most the whole horizon can be executed"
            )

        head, data = self.model.action_head_config, self.data
        for entry in data.mixture:
            for name, limit in (("per_action_dim", head.per_action_dim), ("horizon", head.horizon)):
                if (getattr(entry, name) or 0) > limit:
                    raise ConfigError(
                        f"data.mixture {entry.name}: {name} {getattr(entry, name)} exceeds "
                        f"model.action_head_config.{name} {limit}; set that to the largest"
                    )
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
            )
            for entry in entries
        )

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the image columns that the model reads, in slot order."""
        return ("image_1", "image_2") if self.model.vlm_config.use_aux_camera else ("image_1",)

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
    tree = read_tree(Path(path))
    _apply(tree, set_args or [])
    for key, value in (overrides or {}).items():
        if value is not None:
            set_dotted(tree, key, value, key)
    return config_from_dict(tree, source=str(path))


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
        set_dotted(tree, key.strip(), yaml.safe_load(text), f"--set {item}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _positive(section: Any, place: str, *names: str) -> None:
    for name in names:
        if getattr(section, name) <= 0:
            raise ConfigError(f"{place}.{name} is {getattr(section, name)}; it must be positive")


def _not_negative(section: Any, place: str, *names: str) -> None:
    for name in names:
        if getattr(section, name) < 0:
            raise ConfigError(f"{place}.{name} is {getattr(section, name)}; give 0 or more")
