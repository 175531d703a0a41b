"""What every backbone promises, whatever it is inside; parametrised over BACKBONE_SPECS, on its own small models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from model.backbone import Backbone, backbone_class
from utils.backbones import BACKBONE_SPECS
from utils.batch import Batch
from utils.config_utils import ConfigError, VisionResamplerConfig, VLMConfig

ROOT = Path(__file__).resolve().parents[2]
CAMERAS, TEXT, FRAMES = ("image_1", "image_2"), 6, 2
MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.25, 0.4)


@pytest.fixture(scope="module", params=sorted(BACKBONE_SPECS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """A backbone's type, and the settings that name the small parts which its maker wrote."""
    spec, folder = BACKBONE_SPECS[request.param], tmp_path_factory.mktemp("parts")
    command = [sys.executable, spec.tiny_maker, "--output_dir", str(folder), "--prompts", "open the window"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return request.param, {part.key: str(folder / part.tiny) for part in spec.parts}


def load(made: tuple[str, dict[str, str]], **settings: object) -> Backbone:
    torch.manual_seed(0)
    config = VLMConfig(type=made[0], **made[1], dtype="float32", **settings)
    return backbone_class(made[0]).from_pretrained(config, VisionResamplerConfig(), CAMERAS, MEAN, STD)


def batch_of(model: Backbone, size: int = 3) -> Batch:
    """Random images of every camera; the second prompt is shorter."""
    generator, side = torch.Generator().manual_seed(1), model.image_size
    shape = (size, FRAMES, 3, side, side)
    images = {camera: torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) for camera in CAMERAS}
    mask = torch.ones(size, TEXT, dtype=torch.bool)
    mask[1, 3:] = False
    return {
        **images,
        "image_mask": torch.ones(size, len(CAMERAS), dtype=torch.bool),
        "vlm_attention_mask": torch.ones(size, FRAMES, dtype=torch.bool),
        "input_ids": torch.randint(5, 200, (size, TEXT), generator=generator),
        "prompt_mask": mask,
    }


@torch.no_grad()
def tokens(model: Backbone, batch: Batch, row: int = 0) -> Tensor:
    """The tokens of one sample that exist."""
    context = model(batch)
    return context.tokens_BLE[row][context.mask_BL[row]]


def test_the_context_is_as_specified(made):
    model = load(made)
    context, spec = model(batch_of(model)), model.spec
    assert context.tokens_BLE.shape == (*context.mask_BL.shape, spec.width) and context.mask_BL.dtype == torch.bool
    assert context.mask_BL.shape == (3, model.num_context_tokens(len(CAMERAS) * FRAMES, TEXT))
    assert context.keys_values is None and context.state_BS is None
    assert model.language_sees_images == (spec.num_layers > 0) and model.cameras == CAMERAS
    if model.language_sees_images:
        shape = (3, spec.num_kv_heads, context.mask_BL.shape[1], spec.head_dim)
        layers = model(batch_of(model), keys_values=True).keys_values
        assert len(layers) == spec.num_layers and all(x.shape == shape for pair in layers for x in pair)
    else:
        with pytest.raises(ValueError, match=f"a {made[0]} backbone hands over no keys and values"):
            model(batch_of(model), keys_values=True)


def test_every_parameter_is_in_one_part_and_trains(made):
    model = load(made)
    parts = [parameter for part in model.components().values() for parameter in part.parameters()]
    assert len(parts) == len(set(parts)) == len(list(model.parameters()))
    assert {"vision tower", "language model"} <= model.components().keys()
    batch = batch_of(model)
    batch["image_mask"][:] = False  # also where a rank of several has a batch without images
    context = model(batch)
    context.tokens_BLE[context.mask_BL].square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_fixed_patch_filters_and_positions_are_all_that_the_setting_freezes(made):
    frozen = {
        name for name, weight in load(made, freeze_patch_embedding=True).named_parameters() if not weight.requires_grad
    }
    assert {name.rpartition("embeddings.")[2] for name in frozen} == {
        "patch_embedding.weight",
        "patch_embedding.bias",
        "position_embedding.weight",
    }


def test_what_does_not_exist_changes_nothing(made):
    model = load(made).eval()
    batch = batch_of(model)
    batch["image_mask"][0, 1] = batch["vlm_attention_mask"][0, 0] = False
    before = tokens(model, batch)
    batch["image_2"][0], batch["image_1"][0, 0] = 255, 255
    assert torch.equal(tokens(model, batch), before)
    longer = {**batch, "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 4), value=7)}
    longer["prompt_mask"] = torch.nn.functional.pad(batch["prompt_mask"], (0, 4))
    for row in range(3):
        torch.testing.assert_close(tokens(model, longer, row), tokens(model, batch, row), atol=2e-5, rtol=0)


def test_what_exists_matters(made):
    model = load(made).eval()
    batch = batch_of(model)
    before = tokens(model, batch)
    swapped = {**batch, "image_1": batch["image_2"], "image_2": batch["image_1"]}
    changes = [{**batch, "image_1": batch["image_1"].flip(-1)}, {**batch, "input_ids": batch["input_ids"].roll(1, 0)}]
    for changed in (swapped, *changes):
        assert (tokens(model, changed) - before).abs().max() > 1e-3


def test_what_a_caller_has_kept_is_used(made):
    model = load(made).eval()
    batch = batch_of(model)
    batch["image_mask"][0, 1] = False
    kept = {**batch, "image_slots": model.slot_mask(batch).flatten().nonzero().squeeze(1)}
    kept["prompt_embeds"] = model.embed_prompt(kept.pop("input_ids"))
    assert torch.equal(tokens(model, kept), tokens(model, batch))


def test_images_of_another_size_are_named(made):
    model = load(made)
    batch = {**batch_of(model), "image_2": torch.zeros(3, FRAMES, 3, 8, 8, dtype=torch.uint8)}
    with pytest.raises(ValueError, match=f"image_2 is 8 x 8 pixels, but the backbone takes {model.image_size} x"):
        model(batch)


def test_from_config_and_a_state_dict(made):
    model = load(made, num_language_layers=1, freeze_language_model=True)
    values = json.loads(json.dumps(model.backbone_config_dict()))
    gone = {part.key: "not/there" for part in BACKBONE_SPECS[made[0]].parts}
    config = VLMConfig(type=made[0], **gone, dtype="float32", num_language_layers=1, freeze_language_model=True)
    again = backbone_class(made[0]).from_config(values, config, VisionResamplerConfig(), CAMERAS, MEAN, STD)
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(tokens(again, batch_of(model)), tokens(model, batch_of(model)))
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("version", ["4.57.6", "5.5.4"])
def test_an_older_transformers_is_refused(monkeypatch, version):
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(ConfigError, match=rf"transformers {version} is installed, .* wanted 5.6 or newer: pip install"):
        backbone_class("paligemma")


@pytest.mark.parametrize("version", ["5.6.0", "5.24.0.dev0", "6.0.0"])
def test_a_newer_one_is_not(monkeypatch, version):
    monkeypatch.setattr(transformers, "__version__", version)
    assert backbone_class("paligemma").__name__ == "PaliGemmaVLM"
