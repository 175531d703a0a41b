"""pi0 and pi0.5 policies with random weights, for timings: of the published size, a middle one, or tiny."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.processing import VLAImageProcessor
from inference.published import image_scale
from model.pi_weights import GemmaSizes, PiSizes, our_name, published_shapes
from model.published_normalizer import build_normalizer
from utils.config_utils import Config, config_from_dict, config_to_dict

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
STATE_DIM, ACTION_DIM, MAX_DIM = 8, 7, 32
# Language model, expert, vision tower (width, heads, MLP), layers of language model and vision tower, vocabulary,
# image, horizon.
SIZES = {
    "full": (
        GemmaSizes(2048, 16384, 8, 256),
        GemmaSizes(1024, 4096, 8, 256),
        (1152, 16, 4304),
        (18, 27),
        257152,
        224,
        50,
    ),
    "mid": (GemmaSizes(768, 3072, 8, 96), GemmaSizes(384, 1536, 8, 96), (384, 6, 1536), (10, 8), 1024, 224, 50),
    "tiny": (GemmaSizes(64, 128, 8, 16), GemmaSizes(32, 64, 8, 16), (48, 4, 64), (3, 2), 1024, 56, 10),
}


def pi_sizes(kind: str, size: str) -> PiSizes:
    """Of `pi0` or `pi05`; `size` is a key of SIZES."""
    language, expert, (width, _, mlp), (layers, vision_layers), vocabulary, image_size, _ = SIZES[size]
    state = MAX_DIM if kind == "pi0" else 0
    vision = width, vision_layers, mlp, 14
    return PiSizes(kind, language, expert, layers, vocabulary, *vision, image_size, state, MAX_DIM)


def lerobot_sizes(sizes: PiSizes, vision_heads: int) -> dict[str, Any]:
    """`sizes.json` of lerobot_side.py: what LeRobot's constructors must be told of a policy."""
    towers = {
        part: {"width": own.width, "depth": sizes.num_layers, "mlp_dim": own.mlp_dim, "num_heads": own.num_heads}
        | {"head_dim": own.head_dim}
        for part, own in (("language", sizes.language), ("expert", sizes.expert))
    }
    vision = {
        "hidden_size": sizes.vision_width,
        "num_hidden_layers": sizes.vision_layers,
        "num_attention_heads": vision_heads,
        "intermediate_size": sizes.vision_mlp_dim,
        "patch_size": sizes.patch_size,
        "projection_dim": sizes.language.width,
    }
    return {**towers, "vision": vision, "vocab_size": sizes.vocab_size}


def pi_config(kind: str, size: str, changes: dict[str, Any] | None = None) -> Config:
    """The settings of such a policy, float32; `changes` by dotted names."""
    expert, horizon = SIZES[size][1], SIZES[size][-1]
    tree: dict[str, Any] = {
        "data": {
            "cameras": list(CAMERAS),
            "image_fit": "pad",
            "prompt_format": kind,
            "prompt_max_len": {"pi0": 48, "pi05": 200}[kind],
            "state_dim": STATE_DIM,
            "normalization_arithmetic": "lerobot",
            "normalization_type": {"pi0": "mean_std", "pi05": "quantile"}[kind],
        },
        "model": {
            "vlm_config": {"dtype": "float32"},
            "action_head_config": {
                "type": "action_expert",
                "horizon": horizon,
                "per_action_dim": ACTION_DIM,
                "expert": {
                    "width": expert.width,
                    "mlp_dim": expert.mlp_dim,
                    "num_heads": expert.num_heads,
                    "time": "token" if kind == "pi0" else "adaptive_norm",
                    "state_token": kind == "pi0",
                },
            },
        },
    }
    for name, value in (changes or {}).items():
        *sections, last = name.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return config_from_dict(tree)


def random_weights(sizes: PiSizes, device: str | torch.device) -> dict[str, Tensor]:
    """By our names, drawn on `device`; the same arguments give the same weights."""
    generator, weights = torch.Generator(device).manual_seed(0), {}
    for name, shape in published_shapes(sizes).items():
        scale = float(np.prod(shape[1:])) ** -0.5 if len(shape) > 1 else 0.05
        shift = float("layer_norm" in name and name.endswith("weight"))  # SigLIP's multiply by the weight itself
        drawn = torch.randn(shape, generator=generator, device=device)
        weights[our_name(name)] = drawn.mul_(scale).add_(shift)
    return weights


def random_checkpoint(
    kind: str, size: str, device: str | torch.device = "cpu", changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What `VLAModel.from_checkpoint` and `export_published` take, normalizer included."""
    sizes, config, heads = pi_sizes(kind, size), pi_config(kind, size, changes), SIZES[size][2][1]
    spread = {"mean": 0.0, "std": 1.0, "min": -3.0, "max": 3.0, "q01": -2.3, "q99": 2.3}
    statistics = {
        part: {name: [value] * width for name, value in spread.items()}
        for part, width in (("state", STATE_DIM), ("action", ACTION_DIM))
    }
    processor = image_processor(size)
    normalizer = build_normalizer(config, [statistics]).state_dict()
    return {
        "config": config_to_dict(config),
        "statistics": [statistics],
        "backbone_config": sizes.backbone_config(heads),
        "image_processor": processor.to_settings(),
        "model": random_weights(sizes, device)
        | image_scale(processor)
        | {f"normalizer.{name}": value for name, value in normalizer.items()},
    }


def image_processor(size: str) -> VLAImageProcessor:
    """Letterboxes to the size's square."""
    pixels = SIZES[size][-2]
    return VLAImageProcessor(pixels, pixels, (0.5,) * 3, (0.5,) * 3, 3, "pad")
