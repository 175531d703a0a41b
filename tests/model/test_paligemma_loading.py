"""PaliGemma is built and loaded whole, or refused with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.utils import logging

from model.paligemma_vlm import PaliGemmaVLM
from tests.model.test_paligemma_vlm import TOKENS, VOCAB, WIDTH, copy_with, load, names, observation, valid
from utils.config_utils import ConfigError, VisionResamplerConfig, VLMConfig


@pytest.mark.parametrize("frozen", [False, True])
def test_from_config_and_state_dict_equal_from_pretrained(directory: Path, frozen: bool) -> None:
    settings = {"freeze_vision_tower": frozen, "freeze_language_model": frozen}
    resampler = VisionResamplerConfig(type="perceiver", num_latents=5, num_heads=4)
    model = load(directory, resampler, cameras=2, **settings)
    backbone_config = json.loads(json.dumps(model.backbone_config_dict()))
    assert str(directory) not in json.dumps(backbone_config)
    vlm_config = VLMConfig(model_name_or_path="not/there/any/more", **settings)
    rebuilt = PaliGemmaVLM.from_config(backbone_config, vlm_config, resampler, names(2), (0, 0, 0), (1, 1, 1))
    rebuilt.load_state_dict(model.state_dict(), strict=True)

    assert torch.equal(valid(model, observation(cameras=2)), valid(rebuilt, observation(cameras=2)))
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(model, kind)()), dict(getattr(rebuilt, kind)())
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    assert model.training and all(module.training for module in rebuilt.modules())


def _as_on_the_hub(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in tensors.items()}


def _with_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    embedding = tensors["language_model.model.embed_tokens.weight"]
    return _as_on_the_hub(tensors) | {"language_model.lm_head.weight": embedding.clone()}


@pytest.mark.parametrize("layout", [_as_on_the_hub, _with_head])
def test_layouts_of_published_weights(
    directory: Path, tmp_path: Path, layout: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    published = copy_with(directory, tmp_path / "published", layout, "model.safetensors")
    for ours, theirs in zip(load(directory).parameters(), load(published).parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_pooling_head_is_left_out(tmp_path: Path, tiny_paligemma_dir: Path) -> None:
    def with_head(config: dict) -> dict:
        del config["vision_config"]["vision_use_head"]  # SigLIP's default: True
        return config

    model = load(copy_with(tiny_paligemma_dir, tmp_path / "head", with_head))
    assert not any(".head." in name for name, _ in model.named_parameters())


def _lacking(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if "layers.1.mlp.up_proj" not in name}


def _unknown(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"language_model.model.layers.7.mlp.up_proj.weight": torch.zeros(2)}


def _resized(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"language_model.model.embed_tokens.weight": torch.zeros(VOCAB + 1, WIDTH)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_lacking, r"weights lack language_model\.layers\.1\.mlp\.up_proj\.weight \(1 such"),
        (_unknown, r"weights have the unknown .*layers\.7\.mlp\.up_proj\.weight"),
        (_resized, r"weights have another size for .*embed_tokens\.weight"),
    ],
)
def test_never_trains_on_from_random_weights(
    tiny_paligemma_dir: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    broken = copy_with(tiny_paligemma_dir, tmp_path / "broken", change, "model.safetensors")
    with pytest.raises(ConfigError, match=r"model_name_or_path is '.*broken'.*" + message):
        load(broken)


def test_missing_and_truncated_weights_files(tiny_paligemma_dir: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_paligemma_dir, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"broken'.*cannot be read.*download it again"):
        load(broken)
    weights.unlink()
    with pytest.raises(ConfigError, match=r"broken'.*cannot be read.*model\.safetensors"):
        load(broken)


def test_loading_a_folder_draws_no_progress_bar(tiny_paligemma_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(tiny_paligemma_dir)
    assert "%" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled()  # what is written or downloaded later shows its own


def test_wrong_directories(tiny_paligemma_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model_name_or_path is '.*/nowhere': no such directory.*hf download"):
        load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no config\.json with a model_type in it.*make_tiny_paligemma\.py"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"model_type 'llama', wanted 'paligemma'"):
        load(tmp_path)


def test_num_image_tokens_is_checked_before_weights_load(tiny_paligemma_dir: Path, tmp_path: Path) -> None:
    assert load(tiny_paligemma_dir, num_image_tokens=TOKENS).tokens_per_image == TOKENS
    without_weights = tmp_path / "config_only"
    without_weights.mkdir()
    shutil.copy(tiny_paligemma_dir / "config.json", without_weights)
    with pytest.raises(ConfigError, match=r"num_image_tokens is 256, but the backbone makes 16 tokens"):
        load(without_weights, num_image_tokens=256)
    with pytest.raises(ConfigError, match=r"output_dim is 64"):
        load(without_weights, VisionResamplerConfig(output_dim=64))


def test_images_of_another_size(tiny_paligemma_dir: Path) -> None:
    inputs = observation(cameras=2)
    inputs["image_2"] = torch.zeros(2, 1, 3, 48, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"image_2 is 48 x 32 pixels, but the backbone takes 32 x 32.*resize"):
        load(tiny_paligemma_dir, cameras=2)(inputs)
