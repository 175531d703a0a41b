"""The `model` section of the configuration: backbone, resampler and action head.

The fields marked `free` may change between a checkpoint and a run that goes on from it: they alter no weight's meaning.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from utils.backbones import BACKBONE_SPECS, BackboneType
from utils.config_fields import free, positive
from utils.config_reader import ConfigError


@dataclass(frozen=True)
class FusionConfig:
    """How a siglip_llm backbone fuses image and text features: learnable latents read both by cross-attention."""

    hidden_dim: int = 512  # width of features, latents and context
    num_latents: int = 64  # context tokens
    num_layers: int = 2
    num_heads: int = 8

    def __post_init__(self) -> None:
        place = "model.vlm_config.fusion"
        positive(self, place, "hidden_dim", "num_latents", "num_layers", "num_heads")
        if self.hidden_dim % self.num_heads or self.hidden_dim % 4:
            raise ConfigError(
                f"{place}: hidden_dim is {self.hidden_dim} and num_heads {self.num_heads}; give a width that is a "
                "multiple of the heads and of 4 (sines and cosines of two coordinates)"
            )


@dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adapters around the linear layers of the action expert, which is frozen."""

    PLACE = "model.action_head_config.expert.lora"

    rank: int = 16  # columns of the one and rows of the other matrix
    alpha: float = 16.0  # the adapter's output is scaled by alpha / rank
    dropout: float = free(0.0)  # of the adapter's input, in training
    targets: tuple[str, ...] = ()  # last part of the layers' names, as in [q_proj, v_proj]; empty: every linear layer

    def __post_init__(self) -> None:
        positive(self, self.PLACE, "rank", "alpha")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"{self.PLACE}.dropout is {self.dropout}; give a number in [0, 1)")


@dataclass(frozen=True)
class LoRAConfig(AdapterConfig):
    """Low-rank adapters around linear layers of frozen pretrained parts.

    The adapters train, and whatever is not frozen: action head, resampler, projector (unless `freeze_projector`), and
    a tower that is not adapted (unless `freeze_vision_tower` or `freeze_language_model`), whole.
    """

    PLACE = "model.vlm_config.lora"

    language: bool = True  # adapt (and freeze) the language model
    vision: bool = False  # adapt (and freeze) the vision tower; false: it trains whole, or see freeze_vision_tower

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.language or self.vision):
            raise ConfigError(
                f"{self.PLACE}: neither language nor vision; set one of them, or lora: null for no adapters"
            )


@dataclass(frozen=True)
class VLMConfig:
    """The pretrained backbone."""

    type: BackboneType = "paligemma"
    model_name_or_path: str = free("./weight/paligemma-3b-pt-224")  # paligemma: Hugging Face directory or hub id
    vision_model_name_or_path: str = free("./weight/siglip-base-patch16-224")  # siglip_llm: of a SigLIP
    language_model_name_or_path: str = free("./weight/Qwen2.5-0.5B")  # siglip_llm: of a causal language model
    fusion: FusionConfig = field(default_factory=FusionConfig)  # siglip_llm
    use_aux_camera: bool = False  # read image_2 as well
    freeze_vision_tower: bool = free(False)  # without the projector after it
    freeze_patch_embedding: bool = free(False)  # of the vision tower, with its positions: steadier from scratch
    freeze_language_model: bool = free(False)  # with its embeddings of tokens
    freeze_projector: bool = free(False)  # paligemma: of image tokens, after the vision tower
    train_expert_only: bool = free(False)  # action_expert: short for all three freeze_*
    dtype: str = free("bfloat16")  # of compute (autocast) and of frozen weights as stored; trained weights are fp32
    vision_dtype: Literal["float32"] | None = free(None)  # float32: the vision tower stays out of dtype; null: as dtype
    num_image_tokens: int | None = free(None)  # per image, before the resampler; derived, checked when given
    attn_implementation: Literal["auto", "sdpa", "eager"] = free("auto")  # auto: SDPA unless the model caps its logits
    gradient_checkpointing: bool = free(False)
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
            positive(self, "model.vlm_config", "num_language_layers")
        frozen = self.freeze_vision_tower or self.train_expert_only or (self.lora is not None and self.lora.vision)
        if self.freeze_patch_embedding and frozen:
            raise ConfigError(
                "model.vlm_config.freeze_patch_embedding adds nothing where the vision tower is frozen, by a freeze_* "
                "or by lora.vision; remove it"
            )
        if self.train_expert_only:
            if self.lora is not None:
                raise ConfigError(
                    "model.vlm_config.train_expert_only freezes the backbone, whose adapters model.vlm_config.lora "
                    "trains; remove one of them"
                )
            for name in ("freeze_vision_tower", "freeze_language_model", "freeze_projector"):
                object.__setattr__(self, name, True)

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
        positive(self, "model.vision_resampler_config", "num_latents", "num_layers", "num_heads")


@dataclass(frozen=True)
class ExpertConfig:
    """action_expert: a Gemma beside the backbone's language model, with as many layers. Defaults: pi0's sizes."""

    width: int = 1024
    mlp_dim: int = 4096
    num_heads: int = 8  # of queries; keys and values have the backbone's heads and their width
    max_state_dim: int = 32  # narrower states are padded with zeros
    max_action_dim: int = 32  # narrower actions too; the padding is noised like the rest and has no loss
    time: Literal["token", "adaptive_norm"] = "token"  # mixed into the action tokens (pi0), or into every norm (pi0.5)
    state_token: bool = True  # the state as a token of its own (pi0); false: it is in the prompt alone (pi0.5)
    time_periods: tuple[float, float] = (4e-3, 4.0)  # shortest and longest of the time embedding
    gradient_checkpointing: bool = free(False)
    lora: AdapterConfig | None = None  # a section (which may be empty: {}) freezes the expert and adds adapters to it
    quantization: Literal["none", "8bit", "4bit"] = "none"  # storage of its frozen linear layers, by bitsandbytes

    def __post_init__(self) -> None:
        place = "model.action_head_config.expert"
        positive(self, place, "width", "mlp_dim", "num_heads", "max_state_dim", "max_action_dim")
        if self.width % 2:
            raise ConfigError(f"{place}.width is {self.width}; give an even number (sines and cosines of the time)")
        if not 0 < self.time_periods[0] < self.time_periods[1]:
            raise ConfigError(f"{place}.time_periods is {list(self.time_periods)}; give [shortest, longest], positive")
        if self.quantization != "none" and self.lora is None:
            raise ConfigError(
                f"{place}.quantization is {self.quantization}, but the expert trains, and quantized weights cannot; "
                f"add {place}.lora"
            )


@dataclass(frozen=True)
class ActionHeadConfig:
    """The action head: what it predicts, and its size."""

    type: str = "flow_matching"  # a key of ACTION_HEADS (model/action_head): also regression, discrete, diffusion
    use_state_input: bool = True  # false: the head sees images and prompt alone
    horizon: int = 8  # T, action steps per prediction
    per_action_dim: int = 7  # A, values per action step
    action_dim: int | None = None  # horizon x per_action_dim; derived, checked when given
    num_action_dims: int | None = free(None)  # older spelling of per_action_dim
    num_action_bins: int = 256  # bins per dimension, of the discrete head and of binned accuracy
    mlp_hidden_dims: tuple[int, ...] = (1024, 512)  # discrete: hidden widths of the MLP
    decoding: Literal["argmax", "expectation", "sample"] = free("argmax")  # discrete: from bin probabilities to actions
    dropout_prob: float = free(0.0)  # in the head, while it trains
    hidden_dim: int = 1024  # width of the action-token transformer, and of the state encoder
    num_layers: int = 8
    num_heads: int = 8
    noise_draws_per_sample: int = free(1)  # (noise, time) draws per backbone pass in training
    noise_distribution: Literal["gaussian", "uniform"] = "gaussian"  # flow_matching: uniform is in [-1, 1]
    time_distribution: Literal["uniform", "beta"] = free("beta")  # flow_matching
    time_beta: tuple[float, float] = free((1.0, 1.5))  # flow_matching: Beta(a, b) of t in [0, 1], t = 0 is pure noise
    time_clamp: tuple[float, float] = free((0.0, 1.0))  # flow_matching: t is mapped linearly into this range
    integrator: Literal["euler", "midpoint", "heun"] = free("euler")  # flow_matching: the last two read 2 velocities
    denoiser: Literal["unet", "transformer"] = "unet"  # diffusion: 1-D U-Net over time, or the flow head's transformer
    unet_width: int = 256  # diffusion: channels of the U-Net's first level, doubled at each further one
    unet_levels: int = 3  # diffusion: levels of the U-Net, each half as long in time as the one before
    num_train_timesteps: int = 100  # diffusion: noise levels in training
    beta_schedule: Literal["squaredcos_cap_v2", "linear", "scaled_linear"] = "squaredcos_cap_v2"  # diffusion
    prediction_type: Literal["epsilon", "sample", "v", "v_prediction"] = "epsilon"  # diffusion; v: short for the last
    scheduler: Literal["ddim", "ddpm"] = free("ddim")  # diffusion: sampler; ddim's only noise is the start's
    inference_steps: int | None = free(None)  # older spelling of inference.num_inference_steps
    clip_sample_range: float | None = free(None)  # diffusion: limit of |denoised action|; None: from statistics
    max_clean_prefix: int = free(0)  # flow_matching: train with up to so many leading actions given, without loss
    expert: ExpertConfig = field(default_factory=ExpertConfig)  # action_expert
    detach_context: bool = free(False)  # action_expert: its loss does not train the backbone (knowledge insulation)
    # Steps past an episode's end repeat its last action and have a loss; null: where steps see each other's noise,
    # since a policy that trains without them learns from their absence that the end is near, and then never ends.
    loss_over_padding: bool | None = free(None)

    @property
    def trains_over_padding(self) -> bool:
        """Whether steps past an episode's end have a loss."""
        noisy = self.type in ("flow_matching", "diffusion", "action_expert")
        return noisy if self.loss_over_padding is None else self.loss_over_padding

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
        positive(self, place, "horizon", "per_action_dim", "num_action_bins", "hidden_dim", "num_layers", "num_heads")
        positive(self, place, "noise_draws_per_sample", "unet_width", "unet_levels", "num_train_timesteps")
        for name in ("inference_steps", "clip_sample_range"):
            if getattr(self, name) is not None:
                positive(self, place, name)
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

    def check_best_of(self, best_of: int) -> None:
        """Raise a ConfigError where several draws (`inference.best_of`) were all the same."""
        samples = self.decoding == "sample" if self.type == "discrete" else self.type != "regression"
        if best_of > 1 and not samples:
            remedy = ", or take decoding sample" if self.type == "discrete" else ""
            raise ConfigError(
                f"inference.best_of is {best_of}, but model.action_head_config.type {self.type} samples nothing, so "
                f"that all draws are one; give 1{remedy}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Backbone, resampler and head."""

    vlm_config: VLMConfig = field(default_factory=VLMConfig)
    vision_resampler_config: VisionResamplerConfig = field(default_factory=VisionResamplerConfig)
    action_head_config: ActionHeadConfig = field(default_factory=ActionHeadConfig)
