"""The backbone against stock transformers, and the invariances that the rest of the repository builds on."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PaliGemmaForConditionalGeneration, PaliGemmaModel

from model.context import Context
from model.keys_values import collecting
from model.paligemma_vlm import PaliGemmaVLM
from model.tiny.paligemma import make_tiny_paligemma
from utils.config_utils import ConfigError, VisionResamplerConfig, VLMConfig

MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.25, 0.4)
SIZE, TOKENS, WIDTH, VOCAB = 32, 16, 32, 512  # of the tiny fixtures


def load(
    directory: Path, resampler: VisionResamplerConfig | None = None, cameras: int = 1, **settings: object
) -> PaliGemmaVLM:
    vlm_config = VLMConfig(model_name_or_path=str(directory), **settings)
    return PaliGemmaVLM.from_pretrained(vlm_config, resampler or VisionResamplerConfig(), names(cameras), MEAN, STD)


def names(cameras: int) -> tuple[str, ...]:
    return tuple(f"image_{camera}" for camera in range(1, cameras + 1))


def images_of(inputs: dict) -> list[Tensor]:
    return [value for name, value in inputs.items() if re.fullmatch(r"image_\d", name)]


def pair(context: Context) -> tuple[Tensor, Tensor]:
    return context.tokens_BLE, context.mask_BL


def observation(
    batch: int = 2, frames: int = 1, cameras: int = 1, text: int = 7, padded: bool = True, size: int = SIZE
) -> dict:
    """A batch of the data contract; with `padded`, all prompts but the first are shorter than the longest."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, frames, 3, size, size)
    images = [torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) for _ in range(cameras)]
    input_ids_BL = torch.randint(5, VOCAB - 1, (batch, text), generator=generator)
    input_ids_BL[:, 0] = 2
    prompt_mask_BL = torch.ones(batch, text, dtype=torch.bool)
    if padded:
        prompt_mask_BL[1:, text - 3 :] = False
        input_ids_BL[~prompt_mask_BL] = 0
    return {
        **{f"image_{camera}": image for camera, image in enumerate(images, start=1)},
        "image_mask": torch.ones(batch, cameras, dtype=torch.bool),
        "vlm_attention_mask": torch.ones(batch, frames, dtype=torch.bool),
        "input_ids": input_ids_BL,
        "prompt_mask": prompt_mask_BL,
    }


def stock_inputs(model: torch.nn.Module, inputs: dict) -> dict:
    """The same observation as stock PaliGemma takes it: normalized pixels, and placeholders among the text ids."""
    pixels = torch.stack(images_of(inputs), dim=2).flatten(0, 2).float() / 255
    pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    vision = model.config.vision_config
    count = len(pixels) // len(inputs["input_ids"]) * (vision.image_size // vision.patch_size) ** 2
    placeholders = torch.full((len(inputs["input_ids"]), count), model.config.image_token_id)
    input_ids = torch.cat([placeholders, inputs["input_ids"]], dim=1)
    mask = torch.cat([torch.ones_like(placeholders), inputs["prompt_mask"].long()], dim=1)
    return {
        "pixel_values": pixels,
        "input_ids": input_ids,
        "attention_mask": mask,
        "token_type_ids": torch.zeros_like(input_ids),
    }


def valid(model: PaliGemmaVLM, inputs: dict) -> Tensor:
    """Fused tokens that exist, (tokens of the whole batch, E)."""
    with torch.no_grad():
        tokens_BLE, mask_BL = pair(model(inputs))
    return tokens_BLE[mask_BL]


def copy_with(directory: Path, target: Path, change: Callable[[dict], dict], file: str = "config.json") -> Path:
    """A copy of a checkpoint with its configuration or its tensors changed."""
    shutil.copytree(directory, target)
    if file == "config.json":
        (target / file).write_text(json.dumps(change(json.loads((target / file).read_text()))))
    else:
        save_file(change(load_file(target / file)), target / file, metadata={"format": "pt"})
    return target


# --- parity with stock transformers


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("cameras", "frames"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("attention", ["auto", "eager"])
def test_parity_with_paligemma_model(directory: Path, attention: str, cameras: int, frames: int, padded: bool) -> None:
    model = load(directory, cameras=cameras, attn_implementation=attention)
    inputs = observation(frames=frames, cameras=cameras, padded=padded)
    stock = PaliGemmaModel.from_pretrained(directory, attn_implementation="eager")
    assert getattr(stock.config.text_config, "sliding_window", 0) < TOKENS  # the sequence is longer than the window
    with torch.no_grad():
        tokens_BLE, mask_BL = pair(model(inputs))
        expected_BLE = stock(**stock_inputs(stock, inputs)).last_hidden_state
    assert tokens_BLE.shape == (2, cameras * frames * TOKENS + 7, WIDTH) == (*mask_BL.shape, model.spec.width)
    assert mask_BL.sum() == mask_BL.numel() - (3 if padded else 0)
    torch.testing.assert_close(tokens_BLE[mask_BL], expected_BLE[mask_BL], atol=2e-5, rtol=0)


def test_parity_with_the_generating_model(directory: Path) -> None:
    inputs = observation(cameras=2)
    stock = PaliGemmaForConditionalGeneration.from_pretrained(directory, attn_implementation="eager")
    with torch.no_grad():
        hidden_BLE = stock(**stock_inputs(stock, inputs), output_hidden_states=True).hidden_states[-1]
        tokens_BLE, mask_BL = pair(load(directory, cameras=2)(inputs))
    torch.testing.assert_close(tokens_BLE[mask_BL], hidden_BLE[mask_BL], atol=2e-5, rtol=0)


def test_soft_cap_is_honoured(tiny_paligemma2_dir: Path, tmp_path: Path) -> None:
    def tighten(config: dict) -> dict:
        config["text_config"]["attn_logit_softcapping"] = 0.5
        return config

    inputs = observation()
    directory = copy_with(tiny_paligemma2_dir, tmp_path / "capped", tighten)
    stock = PaliGemmaModel.from_pretrained(directory, attn_implementation="eager")
    with torch.no_grad():
        expected_BLE = stock(**stock_inputs(stock, inputs)).last_hidden_state
        tokens_BLE, mask_BL = pair(load(directory)(inputs))
    torch.testing.assert_close(tokens_BLE[mask_BL], expected_BLE[mask_BL], atol=2e-5, rtol=0)
    assert (tokens_BLE[mask_BL] - valid(load(tiny_paligemma2_dir), inputs)).abs().max() > 1e-2


def test_sdpa_is_refused_where_logits_are_capped(tiny_paligemma2_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"attn_implementation is sdpa.*at 50\.0.*auto or eager"):
        load(tiny_paligemma2_dir, attn_implementation="sdpa")


def test_auto_attention(tiny_paligemma_dir: Path, tiny_paligemma2_dir: Path) -> None:
    for directory, text in ((tiny_paligemma_dir, "sdpa"), (tiny_paligemma2_dir, "eager")):
        backbone = load(directory).backbone
        assert backbone.language_model.config._attn_implementation == collecting(text)
        assert backbone.vision_tower.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("image_size", "tokens"), [(224, 256), (448, 1024)])
@pytest.mark.parametrize("version", [1, 2])
def test_published_image_sizes(tmp_path: Path, version: int, image_size: int, tokens: int) -> None:
    make_tiny_paligemma(
        tmp_path,
        prompts=["open the window"],
        version=version,
        image_size=image_size,
        patch_size=14,
        vision_width=16,
        vision_layers=1,
        vision_heads=2,
        text_width=16,
        text_heads=2,
        vocab_size=VOCAB,
    )
    inputs = observation(size=image_size)
    model = load(tmp_path, num_image_tokens=tokens)
    stock = PaliGemmaModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert (model.tokens_per_image, model.image_size) == (tokens, image_size)
    with torch.no_grad():
        tokens_BLE, mask_BL = pair(model(inputs))
        expected_BLE = stock(**stock_inputs(stock, inputs)).last_hidden_state
    assert mask_BL.shape[1] == tokens + 7
    torch.testing.assert_close(tokens_BLE[mask_BL], expected_BLE[mask_BL], atol=2e-5, rtol=0)


# --- what is masked changes nothing


@pytest.mark.parametrize("kind", ["identity", "mlp", "perceiver"])
def test_absent_cameras_are_as_if_never_there(directory: Path, kind: str) -> None:
    torch.manual_seed(0)
    model = load(directory, VisionResamplerConfig(type=kind, num_latents=5, num_heads=4), cameras=2).eval()
    both = observation(batch=3, cameras=2)
    both["image_mask"] = torch.tensor([[True, True], [True, False], [False, True]])
    with torch.no_grad():
        tokens_BLE, mask_BL = pair(model(both))
    for sample, cameras in enumerate([(1, 2), (1,), (2,)]):
        alone = {name: value[sample : sample + 1] for name, value in both.items()}
        model.cameras = tuple(f"image_{camera}" for camera in cameras)
        alone["image_mask"] = torch.ones(1, len(cameras), dtype=torch.bool)
        torch.testing.assert_close(tokens_BLE[sample][mask_BL[sample]], valid(model, alone), atol=2e-5, rtol=0)


def test_padded_frames_are_as_if_never_there(directory: Path) -> None:
    model = load(directory, cameras=2)
    two = observation(frames=2, cameras=2)
    two["vlm_attention_mask"] = torch.tensor([[False, True], [True, True]])
    with torch.no_grad():
        tokens_BLE, mask_BL = pair(model(two))
    one = {name: value[:1, 1:] if name in model.cameras else value[:1] for name, value in two.items()}
    one["vlm_attention_mask"] = torch.ones(1, 1, dtype=torch.bool)
    assert not mask_BL[0, : 2 * TOKENS].any()
    torch.testing.assert_close(tokens_BLE[0][mask_BL[0]], valid(model, one), atol=2e-5, rtol=0)


def test_order_is_frames_outer_cameras_inner(tiny_paligemma_dir: Path) -> None:
    model = load(tiny_paligemma_dir, cameras=2)
    inputs = observation(batch=1, frames=2, cameras=2)
    inputs["image_mask"] = torch.tensor([[True, False]])
    inputs["vlm_attention_mask"] = torch.tensor([[False, True]])
    with torch.no_grad():
        _, mask_BL = pair(model(inputs))
    # slots: frame 0 camera 0, frame 0 camera 1, frame 1 camera 0, frame 1 camera 1
    assert mask_BL[0, : 4 * TOKENS].view(4, TOKENS).all(dim=1).tolist() == [False, False, True, False]


def test_masked_pixels_cost_no_vision_pass_and_are_never_read(tiny_paligemma_dir: Path) -> None:
    model = load(tiny_paligemma_dir, cameras=2)
    seen = []
    model.backbone.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    inputs = observation(batch=3, frames=2, cameras=2)
    valid(model, inputs)
    inputs["image_mask"][1, 1] = False
    inputs["vlm_attention_mask"][2, 0] = False
    before = valid(model, inputs)
    inputs["image_2"][1] = 255
    inputs["image_1"][2, 0] = 255
    assert torch.equal(before, valid(model, inputs))
    assert seen == [12, 8, 8]  # one pass each: 3 samples x 2 frames x 2 cameras, less 2 and 2


@pytest.mark.parametrize("attention", ["auto", "eager"])
def test_right_padding_changes_nothing(directory: Path, attention: str) -> None:
    model = load(directory, cameras=2, attn_implementation=attention)
    short = observation(batch=1, cameras=2, padded=False)
    long = dict(short)
    long["input_ids"] = torch.nn.functional.pad(short["input_ids"], (0, 5))
    long["prompt_mask"] = torch.nn.functional.pad(short["prompt_mask"], (0, 5))
    torch.testing.assert_close(valid(model, short), valid(model, long), atol=1e-5, rtol=0)


def test_the_prompt_changes_what_image_tokens_become(directory: Path) -> None:
    model = load(directory)
    inputs = observation(batch=1, padded=False)
    other = dict(inputs, input_ids=inputs["input_ids"].clone())
    other["input_ids"][0, 3] += 1
    change_LE = valid(model, inputs) - valid(model, other)
    assert change_LE[:TOKENS].abs().amax(dim=1).min() > 1e-3  # every one of them: attention is bidirectional


# --- what trains, and in which precision


@pytest.mark.parametrize("vision", [False, True])
@pytest.mark.parametrize("language", [False, True])
@pytest.mark.parametrize("kind", ["identity", "mlp", "perceiver"])
def test_frozen_parts_and_gradients(directory: Path, kind: str, vision: bool, language: bool) -> None:
    resampler = VisionResamplerConfig(type=kind, num_latents=5, num_heads=4)
    frozen = {"freeze_vision_tower": vision, "freeze_language_model": language}
    model = load(directory, resampler, cameras=2, **frozen, dtype="bfloat16")
    tokens_BLE, mask_BL = pair(model(observation(cameras=2)))
    (tokens_BLE.float() * torch.randn(WIDTH))[mask_BL].sum().backward()
    for name, parameter in model.named_parameters():
        frozen = (vision and "vision_tower" in name) or (language and "language_model" in name)
        assert parameter.requires_grad is not frozen, name
        assert parameter.dtype == (torch.bfloat16 if frozen else torch.float32), name
        assert (parameter.grad is None) is frozen, name  # DDP waits for every parameter that requires a gradient
    for name, buffer in model.named_buffers():
        assert buffer.dtype in (torch.float32, torch.int64), name  # rotary frequencies keep their precision


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("vision", "language"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("kind", ["identity", "perceiver"])
def test_bfloat16_has_no_nan(directory: Path, kind: str, autocast: bool, vision: bool, language: bool) -> None:
    resampler = VisionResamplerConfig(type=kind, num_latents=5, num_heads=4)
    inputs = observation(batch=3, frames=2, cameras=2)
    torch.manual_seed(0)
    exact = valid(load(directory, resampler, cameras=2), inputs)
    torch.manual_seed(0)
    frozen = {"freeze_vision_tower": vision, "freeze_language_model": language}
    model = load(directory, resampler, cameras=2, **frozen, dtype="bfloat16")
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        close = valid(model, inputs)
    assert (close.float() - exact).abs().mean() < 0.05

    inputs["image_mask"][1, 1] = False
    inputs["vlm_attention_mask"][1, 0] = False
    inputs["image_mask"][2] = False  # a sample of which nothing is left
    inputs["prompt_mask"][2] = False
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        tokens_BLE, mask_BL = pair(model(inputs))
    tokens_BLE[mask_BL].float().square().sum().backward()
    assert tokens_BLE.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_batch_without_any_image_still_reaches_every_parameter(tiny_paligemma_dir: Path) -> None:
    model = load(tiny_paligemma_dir)
    inputs = observation()
    inputs["image_mask"][:] = False
    tokens_BLE, mask_BL = pair(model(inputs))
    tokens_BLE[mask_BL].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_checkpointing_changes_nothing(directory: Path, autocast: bool) -> None:
    results = []
    for checkpointing in (False, True):
        model = load(directory, cameras=2, gradient_checkpointing=checkpointing)
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            tokens_BLE, mask_BL = pair(model(observation(frames=2, cameras=2)))
        runs = []
        for layers in (model.backbone.vision_tower.encoder.layers, model.backbone.language_model.layers):
            layers[0].mlp.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        tokens_BLE[mask_BL].float().square().sum().backward()
        assert len(runs) == (2 if checkpointing else 0)  # recomputed once, in the tower and in the language model
        results.append((tokens_BLE, [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=0, rtol=0)


def test_gradient_checkpointing_sends_no_gradients_through_frozen_parts(tiny_paligemma_dir: Path) -> None:
    model = load(tiny_paligemma_dir, freeze_vision_tower=True, freeze_language_model=True, gradient_checkpointing=True)
    needs_gradient = []
    model.backbone.vision_tower.register_forward_hook(lambda _, args, out: needs_gradient.append(out[0].requires_grad))
    tokens_BLE, _ = pair(model(observation()))
    assert needs_gradient == [False]
    assert tokens_BLE.requires_grad  # through the projector


# --- what a predictor knows beforehand


def test_embedded_prompts_and_known_slots_change_nothing(directory: Path) -> None:
    model = load(directory, cameras=2)
    inputs = observation(frames=2, cameras=2)
    inputs["image_mask"][1, 1] = inputs["vlm_attention_mask"][0, 0] = False
    slots_N = (
        (inputs["vlm_attention_mask"][:, :, None] & inputs["image_mask"][:, None, :]).flatten().nonzero().squeeze(1)
    )
    text_BLE = model.embed_prompt(inputs["input_ids"])
    given = {**inputs, "input_ids": None, "prompt_embeds": text_BLE, "image_slots": slots_N}
    assert torch.equal(valid(model, given), valid(model, inputs))
    given["image_slots"] = slots_N[:-1]  # and it is the slots given that are looked at
    assert not torch.allclose(valid(model, given), valid(model, inputs))
