"""The tensors of published pi0 and pi0.5 files, by their names and by ours: what a file must hold, and both directions.

Published names are LeRobot's without the leading `model.`, which openpi's files lack; `canonical` makes one spelling of
all that are in use. Values stay as they are but for two things: the vocabulary tables that nothing reads are left out,
and the last layer's sign is turned, because the originals' velocity points from action to noise and ours the other way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from utils.policy_folder import PolicyFolderError

Variant = Literal["pi0", "pi05"]

LANGUAGE = "paligemma_with_expert.paligemma.model.language_model."
VISION = "paligemma_with_expert.paligemma.model.vision_tower."
PROJECTOR = "paligemma_with_expert.paligemma.model.multi_modal_projector.linear."
EXPERT = "paligemma_with_expert.gemma_expert.model."
TABLE = f"{LANGUAGE}embed_tokens.weight"
TABLE_OF_OUTPUT = "paligemma_with_expert.paligemma.lm_head.weight"
# Vocabulary tables of a decoder that these policies don't have.
UNREAD = ("paligemma_with_expert.gemma_expert.lm_head.weight", f"{EXPERT}embed_tokens.weight")
OURS = {
    LANGUAGE: "backbone.backbone.language_model.",
    VISION: "backbone.backbone.vision_tower.",
    PROJECTOR: "backbone.backbone.multi_modal_projector.linear.",
    f"{EXPERT}layers.": "action_head.expert.blocks.",
    f"{EXPERT}norm.": "action_head.expert.norm.",
    "": "action_head.",
}
TURNED = ("action_out_proj.weight", "action_out_proj.bias")


@dataclass(frozen=True)
class GemmaSizes:
    """Of a language model or an expert."""

    width: int
    mlp_dim: int
    num_heads: int
    head_dim: int


@dataclass(frozen=True)
class PiSizes:
    """What the tensors' shapes say of a policy.

    Attributes:
        variant: `pi05` where time goes to the norms.
        num_layers: of the language model and of the expert.
        image_size: pixels, from SigLIP's positions and patch.
        max_state_dim: 0 for pi0.5, whose state is text.
    """

    variant: Variant
    language: GemmaSizes
    expert: GemmaSizes
    num_layers: int
    vocab_size: int
    vision_width: int
    vision_layers: int
    vision_mlp_dim: int
    patch_size: int
    image_size: int
    max_state_dim: int
    max_action_dim: int

    def backbone_config(self, vision_num_attention_heads: int) -> dict[str, Any]:
        """The values of a PaliGemma configuration.

        Args:
            vision_num_attention_heads: SigLIP's, which no shape tells; 16 in the published files.

        Raises:
            PolicyFolderError: they do not divide SigLIP's width.
        """
        from transformers import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig

        if self.vision_width % vision_num_attention_heads:
            raise PolicyFolderError(
                f"vision_num_attention_heads is {vision_num_attention_heads}, which does not divide the vision tower's "
                f"width {self.vision_width}; give the number that the policy was trained with"
            )
        text = GemmaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.language.width,
            intermediate_size=self.language.mlp_dim,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.language.num_heads,
            num_key_value_heads=1,
            head_dim=self.language.head_dim,
        )
        vision = SiglipVisionConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            hidden_size=self.vision_width,
            intermediate_size=self.vision_mlp_dim,
            num_hidden_layers=self.vision_layers,
            num_attention_heads=vision_num_attention_heads,
            vision_use_head=False,
        )
        config = PaliGemmaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=self.vocab_size,  # images never pass as tokens
            vocab_size=self.vocab_size,
            projection_dim=self.language.width,
            hidden_size=self.language.width,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=2,
        )
        return config.to_dict()


def canonical(key: str) -> str:
    """A tensor's published name in one spelling, whatever wrote the file."""
    key = key.removeprefix("model.")
    head, of, rest = key.partition("paligemma_with_expert.paligemma.")
    if not of or head:
        return key
    rest = re.sub(r"^(model\.)?language_model\.model\.", "language_model.", rest)
    rest = re.sub(r"^(model\.)?language_model\.lm_head\.", "lm_head.", rest)
    rest = rest.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower.", 1)
    return of + (rest if rest.startswith("lm_head.") else f"model.{rest}")


def read_tensors(tensors: Mapping[str, Tensor], place: str, declared: str | None = None) -> tuple[PiSizes, dict]:
    """A file's tensors by canonical names, complete and of the shapes that belong together.

    Args:
        tensors: as read.
        place: the file, for errors.
        declared: `pi0` or `pi05`, where something beside the tensors says so.

    Returns:
        The sizes, and name -> tensor without the unread tables.

    Raises:
        PolicyFolderError: naming the first tensors that are missing, left over, there twice or of another shape; or a
            policy of the other kind.
    """
    named: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = canonical(key)
        if name in named:
            raise PolicyFolderError(f"{place}: {name} is there twice, under two spellings ({key} is one); remove one")
        named[name] = tensor
    output_table = named.pop(TABLE_OF_OUTPUT, None)
    if output_table is not None:
        named.setdefault(TABLE, output_table)
    for name in UNREAD:
        named.pop(name, None)
    variant = _variant(named, place, declared)
    sizes = _sizes({name: tuple(tensor.shape) for name, tensor in named.items()}, variant, place)
    wanted = published_shapes(sizes)
    faults = [f"{name} is missing" for name in wanted if name not in named]
    faults += [f"{name} is not part of {variant}" for name in named if name not in wanted]
    faults += [
        f"{name} is {tuple(named[name].shape)}, wanted {shape}"
        for name, shape in wanted.items()
        if name in named and tuple(named[name].shape) != shape
    ]
    if faults:
        more = f"; and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise PolicyFolderError(f"{place}: {'; '.join(faults[:4])}{more}; download or convert it again")
    return sizes, named


def to_ours(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names and signs of a `VLAModel`, from canonical names; values in their own number type."""
    return {our_name(name): -value if name in TURNED else value for name, value in published.items()}


def to_published(weights: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The inverse of `to_ours`: the tensors of a `VLAModel` by the canonical `names` (`published_shapes` of it)."""
    return {name: -weights[our_name(name)] if name in TURNED else weights[our_name(name)] for name in names}


def our_name(name: str) -> str:
    """A `VLAModel`'s name of a canonical one."""
    start = next(start for start in OURS if name.startswith(start))
    return OURS[start] + name.removeprefix(start)


def published_shapes(sizes: PiSizes) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor that the policy reads."""
    width, vision, expert = sizes.language.width, sizes.vision_width, sizes.expert.width
    shapes: dict[str, tuple[int, ...]] = {TABLE: (sizes.vocab_size, width), f"{LANGUAGE}norm.weight": (width,)}
    positions = (sizes.image_size // sizes.patch_size) ** 2
    shapes |= {
        f"{VISION}embeddings.patch_embedding.weight": (vision, 3, sizes.patch_size, sizes.patch_size),
        f"{VISION}embeddings.patch_embedding.bias": (vision,),
        f"{VISION}embeddings.position_embedding.weight": (positions, vision),
        **_linear(f"{VISION}post_layernorm", (vision,)),
        **_linear(PROJECTOR[:-1], (width, vision)),
    }
    for i in range(sizes.vision_layers):
        layer = f"{VISION}encoder.layers.{i}."
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= _linear(layer + norm, (vision,))
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}self_attn.{projection}", (vision, vision))
        shapes |= _linear(f"{layer}mlp.fc1", (sizes.vision_mlp_dim, vision))
        shapes |= _linear(f"{layer}mlp.fc2", (vision, sizes.vision_mlp_dim))
    adaptive = sizes.variant == "pi05"
    for i in range(sizes.num_layers):
        shapes |= _gemma_layer(f"{LANGUAGE}layers.{i}.", sizes.language, adaptive=False)
        shapes |= _gemma_layer(f"{EXPERT}layers.{i}.", sizes.expert, adaptive=adaptive)
    shapes |= _gemma_norm(f"{EXPERT}norm", expert, adaptive)
    shapes |= _linear("action_in_proj", (expert, sizes.max_action_dim))
    shapes |= _linear("action_out_proj", (sizes.max_action_dim, expert))
    if adaptive:
        return shapes | _linear("time_mlp_in", (expert, expert)) | _linear("time_mlp_out", (expert, expert))
    shapes |= _linear("state_proj", (expert, sizes.max_state_dim))
    return shapes | _linear("action_time_mlp_in", (expert, 2 * expert)) | _linear("action_time_mlp_out", (expert,) * 2)


def _linear(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _gemma_norm(name: str, width: int, adaptive: bool) -> dict[str, tuple[int, ...]]:
    return _linear(f"{name}.dense", (3 * width, width)) if adaptive else {f"{name}.weight": (width,)}


def _gemma_layer(layer: str, sizes: GemmaSizes, *, adaptive: bool) -> dict[str, tuple[int, ...]]:
    heads = sizes.num_heads * sizes.head_dim
    return {
        f"{layer}self_attn.q_proj.weight": (heads, sizes.width),
        f"{layer}self_attn.k_proj.weight": (sizes.head_dim, sizes.width),
        f"{layer}self_attn.v_proj.weight": (sizes.head_dim, sizes.width),
        f"{layer}self_attn.o_proj.weight": (sizes.width, heads),
        f"{layer}mlp.gate_proj.weight": (sizes.mlp_dim, sizes.width),
        f"{layer}mlp.up_proj.weight": (sizes.mlp_dim, sizes.width),
        f"{layer}mlp.down_proj.weight": (sizes.width, sizes.mlp_dim),
        **_gemma_norm(f"{layer}input_layernorm", sizes.width, adaptive),
        **_gemma_norm(f"{layer}post_attention_layernorm", sizes.width, adaptive),
    }


def _variant(named: Mapping[str, Tensor], place: str, declared: str | None) -> Variant:
    """Which of the two the tensors are, whatever is declared."""
    tells = {"pi05": r"^time_mlp_in\.|layernorm\.dense\.", "pi0": r"^(action_time_mlp_in|state_proj)\."}
    found = [variant for variant, pattern in tells.items() if any(re.search(pattern, name) for name in named)]
    if len(found) != 1:
        what = "neither a pi0 nor a pi0.5: it has no time_mlp_in and no action_time_mlp_in"
        if found:
            what = "a mixture of pi0 and pi0.5: it has tensors of both (time_mlp_in, action_time_mlp_in)"
        raise PolicyFolderError(f"{place}: {what}; give the folder of a pi0 or pi0.5 policy")
    if declared is not None and declared != found[0]:
        example = next(name for name in named if re.search(tells[found[0]], name))
        raise PolicyFolderError(
            f"{place}: declared as {declared}, but its tensors are those of {found[0]} ({example}); correct the type "
            "in config.json, or give --variant the other value"
        )
    return found[0]


def _sizes(shapes: Mapping[str, tuple[int, ...]], variant: Variant, place: str) -> PiSizes:
    def shape(name: str, dims: int) -> tuple[int, ...]:
        if name not in shapes:
            raise PolicyFolderError(f"{place}: {name} is missing; download or convert it again")
        if len(shapes[name]) != dims:
            raise PolicyFolderError(f"{place}: {name} is {shapes[name]}, wanted {dims} dimensions; convert it again")
        return shapes[name]

    def layers(prefix: str) -> int:
        numbers = {int(name.removeprefix(prefix).split(".")[0]) for name in shapes if name.startswith(prefix)}
        return max(numbers, default=-1) + 1

    def gemma(prefix: str) -> GemmaSizes:
        head_dim = shape(f"{prefix}layers.0.self_attn.k_proj.weight", 2)[0]  # one head of keys and values
        rows, width = shape(f"{prefix}layers.0.self_attn.q_proj.weight", 2)
        mlp_dim = shape(f"{prefix}layers.0.mlp.gate_proj.weight", 2)[0]
        return GemmaSizes(width, mlp_dim, rows // head_dim, head_dim)

    vision_width, _, patch_size, _ = shape(f"{VISION}embeddings.patch_embedding.weight", 4)
    positions = shape(f"{VISION}embeddings.position_embedding.weight", 2)[0]
    return PiSizes(
        variant=variant,
        language=gemma(LANGUAGE),
        expert=gemma(EXPERT),
        num_layers=max(layers(f"{LANGUAGE}layers."), layers(f"{EXPERT}layers.")),
        vocab_size=shape(TABLE, 2)[0],
        vision_width=vision_width,
        vision_layers=layers(f"{VISION}encoder.layers."),
        vision_mlp_dim=shape(f"{VISION}encoder.layers.0.mlp.fc1.weight", 2)[0],
        patch_size=patch_size,
        image_size=math.isqrt(positions) * patch_size,
        max_state_dim=shape("state_proj.weight", 2)[1] if variant == "pi0" else 0,
        max_action_dim=shape("action_in_proj.weight", 2)[1],
    )


def float32_masters(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same in float32, in which whatever trains is kept; nothing is copied that is float32 already."""
    return {name: value.to(torch.float32) for name, value in weights.items()}
