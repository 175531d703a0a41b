"""Objects of a few pixels: small backbones from scratch begin with image tokens that tell of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.backbone import Backbone, backbone_class
from model.tiny.paligemma import make_tiny_paligemma
from model.tiny.siglip_llm import make_tiny_siglip_llm
from utils.config_utils import VisionResamplerConfig, VLMConfig

PROMPTS = ["open the window"]


@pytest.fixture(params=["paligemma", "siglip_llm"])
def weights(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The part of `model.vlm_config` that names small weights."""
    if request.param == "paligemma":
        make_tiny_paligemma(tmp_path, PROMPTS)
        return {"type": request.param, "model_name_or_path": str(tmp_path)}
    make_tiny_siglip_llm(tmp_path, PROMPTS)
    parts = {"vision_model_name_or_path": tmp_path / "siglip", "language_model_name_or_path": tmp_path / "qwen2"}
    return {"type": request.param} | {key: str(path) for key, path in parts.items()}


def load(weights: dict[str, str]) -> Backbone:
    config = VLMConfig(**weights, dtype="float32")
    images = ("image_1",), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    return backbone_class(config.type).from_pretrained(config, VisionResamplerConfig(), *images)


def test_a_few_pixels_change_an_image_token_by_a_third_and_more(weights):
    """With patch filters drawn at random it is a seventh: brightness is the rest, and objects are found much later."""
    model = load(weights)
    dark = torch.full((1, 3, model.image_size, model.image_size), -0.7)
    seen = dark.clone()
    seen[:, :, 5:8, 5:8] = torch.tensor([1.0, -1.0, -1.0])[:, None, None]
    with torch.no_grad():
        without, with_object = model.image_features(torch.cat([dark, seen]))
    assert ((with_object - without).norm(dim=-1) / without.norm(dim=-1)).max() > 1 / 3


def test_patch_filters_tell_colours_from_brightness(weights):
    """A uniform grey of any brightness gives nothing, a uniform red something: the colours have constant filters."""
    (filters,) = (
        weight for name, weight in load(weights).named_parameters() if name.endswith("patch_embedding.weight")
    )
    grey, red = torch.full((3,), 0.8), torch.tensor([1.0, -1.0, -1.0])
    answers = {
        name: torch.einsum("dcpq,c->d", filters, colour).norm() for name, colour in (("grey", grey), ("red", red))
    }
    assert answers["grey"] < 1e-4 * answers["red"]


def test_patch_filters_are_smooth(weights):
    """Neighbouring weights resemble each other, which independent ones don't (their correlation is 0)."""
    (filters,) = (
        weight for name, weight in load(weights).named_parameters() if name.endswith("patch_embedding.weight")
    )
    left, right = filters[..., :-1].flatten(), filters[..., 1:].flatten()
    assert torch.corrcoef(torch.stack([left, right]))[0, 1] > 0.4


def test_residual_outputs_begin_smaller(weights):
    """By sqrt(2 * 2 layers), of the standard deviation 0.08 of all weights."""
    found = {
        name.split(".")[-2]: weight.std().item()
        for name, weight in load(weights).components()["language model"].named_parameters()
        if name.endswith(("o_proj.weight", "down_proj.weight", "up_proj.weight"))
    }
    assert found == {
        "o_proj": pytest.approx(0.04, rel=0.05),
        "down_proj": pytest.approx(0.04, rel=0.05),
        "up_proj": pytest.approx(0.08, rel=0.05),
    }
