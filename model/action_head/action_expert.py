"""The action expert of pi0 (Black et al. 2024) and pi0.5 (Physical Intelligence 2025): flow matching whose velocity a
second, narrower Gemma predicts, attending to the backbone layer by layer.

The flow is `flow_matching`'s: t = 0 is noise, t = 1 the action. The originals count the other way round, so what this
network embeds of time is the noise level 1 - t, and `model.pi_weights` turns the sign of the last layer where their
weights come in and go out. Names of weights are those of the published files.

Shape letters: B batch, K noise draws per sample, N = B K rows, L context tokens, T horizon, A per_action_dim,
D max_action_dim, S state_dim, E the expert's width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.action_head.base import existing_dims
from model.action_head.flow_matching import FlowMatching
from model.action_head.gemma_expert import GemmaExpert, Memory, Modulation
from model.action_head.layers import required_state, zero_init
from model.adapters import adapt_expert
from model.context import Context, ContextSpec
from model.normalizer import ActionRange
from utils.config_utils import ActionHeadConfig, ConfigError


class Moments(NamedTuple):
    """What time does to the expert, a function of time and weights alone; one row per moment.

    Attributes:
        mixed: what is added to every action token, (N, 1 or T, E); None where time goes to the norms.
        modulations: from `GemmaExpert.modulations`.
    """

    mixed: Tensor | None
    modulations: list[Modulation | None]

    def row(self, index: int) -> Moments:
        """One row alone."""
        rows = slice(index, index + 1)
        modulations = [one and tuple(part[rows] for part in one) for one in self.modulations]
        return Moments(None if self.mixed is None else self.mixed[rows], modulations)


class ActionExpertHead(FlowMatching):
    """Velocities by a Gemma of its own width, jointly attending with the backbone; see the module's text.

    Actions narrower than `max_action_dim` are padded with zeros; the padding is noised and denoised like the rest and
    has no loss, as in the originals. So are dimensions that a dataset lacks.
    """

    wants_keys_values = True
    wants_tokens = False
    time_dtype = torch.float64  # the shortest period turns 1570 radians

    def __init__(self, config: ActionHeadConfig, spec: ContextSpec, state_dim: int, action_range: ActionRange) -> None:
        """
        Raises:
            ConfigError: the backbone hands over no keys and values, or the state or the actions are too wide.
        """
        super().__init__()
        _check(config, spec, state_dim)
        self.config = config
        sizes, width = config.expert, config.expert.width
        self.expert = GemmaExpert(sizes, spec)
        self.action_in_proj = nn.Linear(sizes.max_action_dim, width)
        self.action_out_proj = zero_init(nn.Linear(width, sizes.max_action_dim))
        if self.sees_state:
            self.state_proj = nn.Linear(sizes.max_state_dim, width)
        if sizes.time == "token":
            self.action_time_mlp_in, self.action_time_mlp_out = nn.Linear(2 * width, width), nn.Linear(width, width)
        else:
            self.time_mlp_in, self.time_mlp_out = nn.Linear(width, width), nn.Linear(width, width)

    def adapt(self, config: ActionHeadConfig, dtype: torch.dtype) -> None:
        """See `ActionHeadBase.adapt`; the projections around the expert stay as they are and train."""
        self.config = config
        if config.expert.lora is not None:
            adapt_expert(self.expert, self.expert.matrices(), config.expert.lora, config.expert.quantization, dtype)

    def exact_parts(self) -> list[nn.Module]:
        """See `ActionHeadBase.exact_parts`: the projections around the expert, and its norms."""
        return [*(part for name, part in self.named_children() if name != "expert"), *self.expert.norms()]

    @property
    def sees_state(self) -> bool:
        """Whether the state is a token here, rather than text in the prompt or nowhere."""
        return self.config.use_state_input and self.config.expert.state_token

    @property
    def flow_dim(self) -> int:
        """D, values per noised action step."""
        return self.config.expert.max_action_dim

    def flow_dims(self, context: Context) -> Tensor:
        """All of them: float32 (B, 1, D) of ones."""
        return torch.ones(len(context.mask_BL), 1, self.flow_dim, device=context.mask_BL.device)

    def action_targets(self, context: Context, action_BTA: Tensor, action_is_pad_BT: Tensor) -> tuple[Tensor, Tensor]:
        """See `FlowMatching`; actions are padded to the width of the noise."""
        action_BTA, action_is_pad_BT = super().action_targets(context, action_BTA, action_is_pad_BT)
        action_BTA = action_BTA * existing_dims(context, self.per_action_dim)
        return F.pad(action_BTA, (0, self.flow_dim - self.per_action_dim)), action_is_pad_BT

    def encode_context(self, context: Context) -> Memory:
        """What the action tokens attend to: the backbone's keys and values and, after them, the state's."""
        assert context.keys_values is not None, "the action expert needs the backbone's keys and values"
        # Autocast leaves keys, which rotary position has turned in float32, wider than values.
        layers = tuple((keys.to(values.dtype), values) for keys, values in context.keys_values)
        if self.config.detach_context:
            layers = tuple((keys.detach(), values.detach()) for keys, values in layers)
        memory = Memory(layers, context.mask_BL, context.mask_BL.sum(dim=1) + context.first_position)
        if not self.sees_state:
            return memory
        state_BE = self.embed_state(required_state(context))
        # The state sees no action and no time, so that it is computed once for all draws and steps. Norms that adapt
        # to time get none of it: their biases alone.
        timeless = self.expert.modulations(state_BE.new_zeros(1, 1, self.config.expert.width))
        return self.expert.remember(state_BE[:, None], timeless, memory)

    def sampling_context(self, context: Context, draws: int = 1) -> Memory:
        """`encode_context` with places that the action tokens of every step write to."""
        return self.encode_context(context).with_room(self.horizon * draws)

    def conditions(self, time: Tensor) -> Moments:
        """What `velocity` needs of time, (N,), or (N, T): one per action token; float64 keeps its last digits."""
        level = time_embedding(1 - time.double(), self.config.expert.width, self.config.expert.time_periods)
        embedded = level.reshape(len(time), -1, level.shape[-1])
        if self.config.expert.time == "token":
            into = self.action_time_mlp_in
            mixed = _exactly_linear(embedded, into.weight[:, self.config.expert.width :], into.bias)
            return Moments(mixed, self.expert.modulations(embedded))
        return Moments(None, self.expert.modulations(self.time_condition(embedded)))

    def time_condition(self, embedded: Tensor) -> Tensor:
        """What adaptive norms are conditioned on, of the embedded time."""
        return F.silu(_exactly(self.time_mlp_out, F.silu(_exactly(self.time_mlp_in, embedded))))

    def embed_actions(self, x_NTA: Tensor, moments: Moments) -> Tensor:
        """The action tokens that enter the expert, float32 (N, T, E)."""
        tokens_NTE = _exactly(self.action_in_proj, x_NTA)
        if moments.mixed is None:
            return tokens_NTE
        weight = self.action_time_mlp_in.weight[:, : self.config.expert.width]
        return _exactly(self.action_time_mlp_out, F.silu(_exactly_linear(tokens_NTE, weight) + moments.mixed))

    def embed_state(self, state_BS: Tensor) -> Tensor:
        """The state's token, float32 (B, E)."""
        return _exactly(
            self.state_proj, F.pad(state_BS.float(), (0, self.config.expert.max_state_dim - state_BS.shape[1]))
        )

    def velocity(
        self,
        x_NTA: Tensor,
        time: Tensor | Moments,
        context: Memory,
        action_is_pad_NT: Tensor | None = None,
    ) -> Tensor:
        """The velocity field at x_t, float32 (N, T, D).

        Args:
            x_NTA: float32 (N, T, D); N is the context's batch or a multiple of it.
            time: as `conditions` takes it, or what that made of it.
            context: from `encode_context`.
            action_is_pad_NT: bool, tokens that others must not attend to; None: all exist.
        """
        moments = time if isinstance(time, Moments) else self.conditions(time)
        tokens_NTE = self.embed_actions(x_NTA, moments)
        mask_NT = None if action_is_pad_NT is None else ~action_is_pad_NT
        return _exactly(self.action_out_proj, self.expert(tokens_NTE, moments.modulations, context, mask_NT))


def time_embedding(time: Tensor, width: int, periods: tuple[float, float]) -> Tensor:
    """Sines, then cosines, of a time in [0, 1], float32 (..., width); computed in float64.

    Args:
        time: rounded to float32 first, as the originals hold it.
        width: even.
        periods: shortest and longest; those between are spaced geometrically.
    """
    fraction = torch.linspace(0, 1, width // 2, dtype=torch.float64, device=time.device)
    period = periods[0] * (periods[1] / periods[0]) ** fraction
    angles = time.float().double()[..., None] * (1.0 / period * 2 * math.pi)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def _exactly(linear: nn.Linear, x: Tensor) -> Tensor:
    return _exactly_linear(x, linear.weight, linear.bias)


def _exactly_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer in float32, autocast or not: the few that make tokens of numbers and numbers of tokens."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float())


def _check(config: ActionHeadConfig, spec: ContextSpec, state_dim: int) -> None:
    if spec.num_layers == 0:
        raise ConfigError(
            "model.action_head_config.type is action_expert, but this backbone hands over no keys and values; take "
            "model.vlm_config.type paligemma, or another head"
        )
    sizes, place = config.expert, "model.action_head_config.expert"
    if sizes.num_heads % spec.num_kv_heads:
        raise ConfigError(
            f"{place}.num_heads is {sizes.num_heads}, but the backbone has {spec.num_kv_heads} heads of keys and "
            "values; give a multiple"
        )
    for name, found in (("max_action_dim", config.per_action_dim), ("max_state_dim", state_dim)):
        limit = getattr(sizes, name)
        if found > limit and (name == "max_action_dim" or sizes.state_token):
            raise ConfigError(f"{place}.{name} is {limit}, but there are {found} values; give at least that many")
