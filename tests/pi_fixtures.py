"""The reference fixtures of pi0 and pi0.5 (tests/fixtures/README.md), as tensors."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.action_head import build_action_head
from model.action_head.action_expert import ActionExpertHead
from model.context import Context, ContextSpec
from model.paligemma_vlm import PaliGemmaVLM
from model.pi_weights import float32_masters, read_tensors, to_ours
from utils.batch import Batch
from utils.config_model import ActionHeadConfig, ExpertConfig, VisionResamplerConfig, VLMConfig
from utils.policy_folder import read_weights

FOLDER = Path(__file__).parent / "fixtures" / "pi"
KINDS = ("pi0", "pi05")
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


def folder(kind: str) -> Path:
    """Of one policy: `policy/`, `tokenizer/`, `openpi/`, `relative/`, arrays."""
    return FOLDER / f"{kind}_tiny"


@functools.cache
def arrays(kind: str, name: str) -> dict[str, Tensor]:
    """The arrays of `name`.npz; not to be changed."""
    with np.load(folder(kind) / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file}


def plain(kind: str, name: str) -> dict:
    """A JSON file of a fixture."""
    return json.loads((folder(kind) / name).read_text(encoding="utf-8"))


def make_backbone(kind: str, part: str = "policy", **vlm: Any) -> PaliGemmaVLM:
    """The fixture's PaliGemma with its weights, float32, in evaluation mode."""
    sizes, named = read_tensors(read_weights(folder(kind) / part), kind)
    settings = VLMConfig(**{"dtype": "float32", **vlm}), VisionResamplerConfig(), CAMERAS, (0.5,) * 3, (0.5,) * 3
    backbone = PaliGemmaVLM.from_config(sizes.backbone_config(2), *settings)
    weights = float32_masters(to_ours(named))
    own = {key.removeprefix("backbone."): value for key, value in weights.items() if key.startswith("backbone.")}
    backbone.load_state_dict(backbone.state_dict() | own)
    return backbone.eval()


def make_expert(kind: str, part: str = "policy", **settings: Any) -> ActionExpertHead:
    """The fixture's action expert with its weights, float32, in evaluation mode; `settings` of its section."""
    sizes, named = read_tensors(read_weights(folder(kind) / part), kind)
    expert = ExpertConfig(
        width=sizes.expert.width,
        mlp_dim=sizes.expert.mlp_dim,
        num_heads=sizes.expert.num_heads,
        time={"pi0": "token", "pi05": "adaptive_norm"}[kind],
        state_token=kind == "pi0",
        **settings.pop("expert", {}),
    )
    config = ActionHeadConfig(type="action_expert", horizon=10, per_action_dim=7, expert=expert, **settings)
    spec = ContextSpec(sizes.language.width, sizes.num_layers, 1, sizes.language.head_dim, 10000.0)
    head = build_action_head(config, spec, 8)
    weights = float32_masters(to_ours(named))
    own = {key.removeprefix("action_head."): value for key, value in weights.items() if key.startswith("action_head.")}
    head.load_state_dict(own)
    return head.eval()


def model_batch(kind: str) -> Batch:
    """The inputs of model.npz as a batch; its images are floats between 0 and 1."""
    found = arrays(kind, "model")
    return {
        **{camera: (found[f"image_{i}"] + 1)[:, None] / 2 for i, camera in enumerate(CAMERAS)},
        "image_mask": found["image_mask"],
        "vlm_attention_mask": torch.ones(3, 1, dtype=torch.bool),
        "input_ids": found["tokens"],
        "prompt_mask": found["token_mask"],
    }


def make_context(backbone: PaliGemmaVLM, kind: str) -> Context:
    """What the head gets for those inputs."""
    context = backbone(model_batch(kind), keys_values=True, tokens=False)
    return dataclasses.replace(context, state_BS=arrays(kind, "model")["state"][:, :8])
