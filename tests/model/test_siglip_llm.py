"""SigLIP and a causal language model behind the context contract of every backbone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, ElectraConfig, ElectraModel, LlamaConfig, LlamaForCausalLM, SiglipVisionModel

from data.processing import processors_from_config
from model.backbone import backbone_class
from model.context import ContextSpec
from model.siglip_llm import SiglipLLM
from model.vla_model import VLAModel
from tests.helpers import write_episodes
from tests.inference.checkpoints import train_tiny
from utils.checkpoint import load_checkpoint
from utils.config_utils import ConfigError, FusionConfig, VisionResamplerConfig, VLMConfig, config_from_dict

MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.25, 0.4)
CAMERAS = ("image_1", "image_2")
SIZE, TOKENS, LATENTS, WIDTH, VOCAB = 32, 16, 9, 24, 512


def load(directory: Path, **settings: object) -> SiglipLLM:
    """The model of `directory/siglip` and `directory/qwen2`; the fusion always starts alike."""
    torch.manual_seed(0)
    return SiglipLLM.from_pretrained(settings_of(directory, **settings), VisionResamplerConfig(), CAMERAS, MEAN, STD)


def settings_of(directory: Path, **settings: object) -> VLMConfig:
    values = {
        "type": "siglip_llm",
        "vision_model_name_or_path": str(directory / "siglip"),
        "language_model_name_or_path": str(directory / "qwen2"),
        "use_aux_camera": True,
        "fusion": FusionConfig(hidden_dim=WIDTH, num_latents=LATENTS, num_layers=2, num_heads=2),
    }
    return VLMConfig(**{**values, **settings})


def observation(batch: int = 2, frames: int = 1, cameras: int = 2, text: int = 7, padded: bool = True) -> dict:
    """A batch of the data contract; with `padded`, all prompts but the first are shorter than the longest."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, frames, 3, SIZE, SIZE)
    input_ids_BL = torch.randint(0, VOCAB, (batch, text), generator=generator)
    prompt_mask_BL = torch.ones(batch, text, dtype=torch.bool)
    if padded:
        prompt_mask_BL[1:, text - 3 :] = False
        input_ids_BL[~prompt_mask_BL] = 0
    return {
        **{
            camera: torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) for camera in CAMERAS[:cameras]
        },
        "image_mask": torch.ones(batch, cameras, dtype=torch.bool),
        "vlm_attention_mask": torch.ones(batch, frames, dtype=torch.bool),
        "input_ids": input_ids_BL,
        "prompt_mask": prompt_mask_BL,
    }


@torch.no_grad()
def tokens(model: SiglipLLM, inputs: dict) -> Tensor:
    return model(inputs).tokens_BLE


def copy_with(directory: Path, target: Path, part: str, change: Callable[[dict[str, Tensor]], dict]) -> Path:
    """A copy of both directories with the tensors of one changed."""
    shutil.copytree(directory, target)
    weights = target / part / "model.safetensors"
    save_file(change(load_file(weights)), weights, metadata={"format": "pt"})
    return target


def test_contract(tiny_siglip_llm_dir: Path) -> None:
    model = load(tiny_siglip_llm_dir)
    context = model(observation(frames=2))
    tokens_BqD, mask_Bq = context.tokens_BLE, context.mask_BL
    assert tokens_BqD.shape == (2, LATENTS, WIDTH) == (*mask_Bq.shape, model.spec.width) and mask_Bq.all()
    assert (model.image_size, model.tokens_per_image) == (SIZE, TOKENS) and mask_Bq.dtype == torch.bool
    assert backbone_class("siglip_llm") is SiglipLLM
    assert model.spec == ContextSpec(WIDTH) and model.num_context_tokens(4, 7) == LATENTS
    with pytest.raises(ValueError, match="hands over no keys and values: its language model sees no images"):
        model(observation(), keys_values=True)
    parts = [parameter for part in model.components().values() for parameter in part.parameters()]
    assert len(parts) == len(set(parts)) == len(list(model.parameters()))


def test_the_encoders_are_stock_transformers(tiny_siglip_llm_dir: Path) -> None:
    """What the fusion gets: SigLIP's patch features, and the language model's hidden states prompt by prompt."""
    model, inputs = load(tiny_siglip_llm_dir), observation(batch=3)
    seen = {}
    model.fusion.image_proj.register_forward_pre_hook(lambda _, args: seen.update(image=args[0]))
    model.fusion.text_proj.register_forward_pre_hook(lambda _, args: seen.update(text=args[0]))
    tokens(model, inputs)
    pixels = torch.stack([inputs[camera] for camera in CAMERAS], dim=2).flatten(0, 2).float() / 255
    pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    tower = SiglipVisionModel.from_pretrained(tiny_siglip_llm_dir / "siglip")
    language = AutoModel.from_pretrained(tiny_siglip_llm_dir / "qwen2", attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(seen["image"], tower(pixels).last_hidden_state, atol=1e-5, rtol=0)
        for ids_L, mask_L in zip(inputs["input_ids"], inputs["prompt_mask"], strict=True):
            alone_LE = language(ids_L[mask_L][None]).last_hidden_state[0]
            found = [(text_LE[: len(alone_LE)] - alone_LE).abs().max() for text_LE in seen["text"]]
            assert min(found) < 1e-5


def test_each_different_prompt_is_read_once(tiny_siglip_llm_dir: Path) -> None:
    model, inputs = load(tiny_siglip_llm_dir), observation(batch=5)
    inputs["input_ids"] = inputs["input_ids"][[0, 1, 0, 0, 1]]
    inputs["prompt_mask"] = inputs["prompt_mask"][[0, 1, 0, 0, 1]]
    read = []
    model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    together = tokens(model, inputs)
    assert read == [2]
    for i in range(5):
        one = {key: value[i : i + 1] for key, value in inputs.items()}
        torch.testing.assert_close(tokens(model, one), together[i : i + 1], atol=1e-5, rtol=0)


# --- what is masked changes nothing


def test_right_padding_changes_nothing(tiny_siglip_llm_dir: Path) -> None:
    model, short = load(tiny_siglip_llm_dir), observation(padded=False)
    padding = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(5))
    long = dict(short, input_ids=torch.cat([short["input_ids"], padding], dim=1))
    long["prompt_mask"] = torch.nn.functional.pad(short["prompt_mask"], (0, 5))
    torch.testing.assert_close(tokens(model, short), tokens(model, long), atol=1e-5, rtol=0)
    text_BLD = model.embed_prompt(short["input_ids"])
    torch.testing.assert_close(text_BLD, model.embed_prompt(long["input_ids"])[:, :7], atol=1e-5, rtol=0)


def test_masked_images_cost_no_vision_pass_and_are_never_read(tiny_siglip_llm_dir: Path) -> None:
    model, inputs = load(tiny_siglip_llm_dir), observation(batch=3, frames=2)
    seen = []
    model.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    tokens(model, inputs)
    inputs["image_mask"][1, 1] = False
    inputs["vlm_attention_mask"][2, 0] = False
    before = tokens(model, inputs)
    inputs["image_2"][1] = 255
    inputs["image_1"][2, 0] = 255
    assert torch.equal(before, tokens(model, inputs))
    assert seen == [12, 8, 8]  # one pass each: 3 samples x 2 frames x 2 cameras, less 2 and 2


def test_prompt_image_and_camera_matter(tiny_siglip_llm_dir: Path) -> None:
    model, inputs = load(tiny_siglip_llm_dir), observation(batch=1, padded=False)
    before = tokens(model, inputs)
    other = dict(inputs, input_ids=inputs["input_ids"].roll(1))
    swapped = dict(inputs, image_1=inputs["image_2"], image_2=inputs["image_1"])
    turned = dict(inputs, **{camera: inputs[camera].flip(-1) for camera in CAMERAS})
    for changed in (other, swapped, turned):
        assert (tokens(model, changed) - before).abs().amax(dim=-1).min() > 1e-3  # every latent


# --- what trains, and in which precision


@pytest.mark.parametrize("vision", [False, True])
@pytest.mark.parametrize("language", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_frozen_parts_and_gradients(tiny_siglip_llm_dir: Path, vision: bool, language: bool, autocast: bool) -> None:
    model = load(tiny_siglip_llm_dir, freeze_vision_tower=vision, freeze_language_model=language, dtype="bfloat16")
    inputs = observation(batch=3)
    inputs["image_mask"][2] = False  # a sample without any image
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        tokens_BqD = model(inputs).tokens_BLE
    (tokens_BqD.float() * torch.randn(WIDTH)).sum().backward()
    for name, parameter in model.named_parameters():
        frozen = (vision and "vision_tower" in name) or (language and "language_model" in name)
        assert parameter.requires_grad is not frozen, name
        assert parameter.dtype == (torch.bfloat16 if frozen else torch.float32), name
        assert (parameter.grad is None) is frozen, name  # DDP waits for every parameter that requires a gradient
        assert frozen or parameter.grad.isfinite().all(), name
    exact = tokens(load(tiny_siglip_llm_dir), inputs)
    assert (tokens_BqD.float() - exact).abs().mean() < 0.05


def test_a_batch_without_any_image_still_reaches_every_parameter(tiny_siglip_llm_dir: Path) -> None:
    model, inputs = load(tiny_siglip_llm_dir), observation()
    inputs["image_mask"][:] = False
    (model(inputs).tokens_BLE * torch.randn(WIDTH)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_gradient_checkpointing_changes_nothing(tiny_siglip_llm_dir: Path) -> None:
    results = []
    for checkpointing in (False, True):
        model = load(tiny_siglip_llm_dir, gradient_checkpointing=checkpointing)
        tokens_BqD = model(observation()).tokens_BLE
        runs = []
        for layers in (model.vision_tower.encoder.layers, model.language_model.layers):
            layers[0].mlp.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        tokens_BqD.square().sum().backward()
        assert len(runs) == (2 if checkpointing else 0)  # recomputed once, in the tower and in the language model
        results.append((tokens_BqD, [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=0, rtol=0)


# --- building and loading


def test_from_config_and_state_dict_equal_from_pretrained(tiny_siglip_llm_dir: Path) -> None:
    model = load(tiny_siglip_llm_dir, freeze_language_model=True)
    backbone_config = json.loads(json.dumps(model.backbone_config_dict()))
    assert str(tiny_siglip_llm_dir) not in json.dumps(backbone_config)
    gone = settings_of(Path("not/there/any/more"), freeze_language_model=True)
    rebuilt = SiglipLLM.from_config(backbone_config, gone, VisionResamplerConfig(), CAMERAS, (0, 0, 0), (1, 1, 1))
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(tokens(model, observation()), tokens(rebuilt, observation()))
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(model, kind)()), dict(getattr(rebuilt, kind)())
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    assert model.training and all(module.training for module in rebuilt.modules())


def test_a_llama_will_do(tiny_siglip_llm_dir: Path, tmp_path: Path) -> None:
    """Another architecture, with an lm_head of its own among the weights."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes)).save_pretrained(tmp_path)
    model = load(tiny_siglip_llm_dir, language_model_name_or_path=str(tmp_path))
    assert tokens(model, observation()).shape == (2, LATENTS, WIDTH)
    assert model.components()["language model"].config.model_type == "llama"


def _lacking(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if "layers.1.mlp" not in name}


def _unknown(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"surplus.weight": torch.zeros(2)}


@pytest.mark.parametrize(("part", "key"), [("siglip", "vision"), ("qwen2", "language")])
@pytest.mark.parametrize(("change", "message"), [(_lacking, "weights lack .*layers.1.mlp"), (_unknown, "the unknown")])
def test_never_trains_on_from_random_weights(
    tiny_siglip_llm_dir: Path, tmp_path: Path, part: str, key: str, change: Callable, message: str
) -> None:
    broken = copy_with(tiny_siglip_llm_dir, tmp_path / "broken", part, change)
    with pytest.raises(ConfigError, match=rf"{key}_model_name_or_path is '.*{part}'.*{message}"):
        load(broken)


def test_wrong_directories(tiny_siglip_llm_dir: Path, tiny_paligemma_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vision_model_name_or_path is '.*no such directory.*make_tiny_siglip_llm"):
        load(tmp_path)
    with pytest.raises(ConfigError, match=r"language_model_name_or_path is .*no such directory.*Qwen/Qwen2.5-0.5B"):
        load(tiny_siglip_llm_dir, language_model_name_or_path=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"model_type 'paligemma', wanted 'siglip' or 'siglip_vision_model'"):
        load(tiny_siglip_llm_dir, vision_model_name_or_path=str(tiny_paligemma_dir))
    with pytest.raises(ConfigError, match=r"model_type 'siglip', wanted a causal language model of text alone"):
        load(tiny_siglip_llm_dir, language_model_name_or_path=str(tiny_siglip_llm_dir / "siglip"))


def test_a_bidirectional_language_model_is_refused(tiny_siglip_llm_dir: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "embedding_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ElectraModel(ElectraConfig(vocab_size=VOCAB, is_decoder=False, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="features change with the tokens after it, wanted a causal"):
        load(tiny_siglip_llm_dir, language_model_name_or_path=str(tmp_path))


def test_settings_that_contradict(tiny_siglip_llm_dir: Path) -> None:
    with pytest.raises(ConfigError, match="num_image_tokens is 9, but the backbone makes 16"):
        load(tiny_siglip_llm_dir, num_image_tokens=9)
    with pytest.raises(ConfigError, match="vision_resampler_config.type is mlp, but a siglip_llm backbone resamples"):
        SiglipLLM.from_pretrained(
            settings_of(tiny_siglip_llm_dir), VisionResamplerConfig(type="mlp"), CAMERAS, MEAN, STD
        )
    inputs = observation()
    inputs["image_2"] = torch.zeros(2, 1, 3, 48, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match="image_2 is 48 x 32 pixels, but the backbone takes 32 x 32"):
        load(tiny_siglip_llm_dir)(inputs)


# --- behind VLAModel


def vlm_section(directory: Path) -> dict:
    return {
        "type": "siglip_llm",
        "vision_model_name_or_path": str(directory / "siglip"),
        "language_model_name_or_path": str(directory / "qwen2"),
        "fusion": {"hidden_dim": 32, "num_latents": 9, "num_heads": 2},
    }


@pytest.mark.parametrize("state_dim", [1, 4, 33])
def test_checkpoint_round_trip_with_any_state_width(tmp_path: Path, tiny_siglip_llm_dir: Path, state_dim: int) -> None:
    files = [write_episodes(tmp_path / "a.parquet", [5, 6], state_dim=state_dim)]
    path = train_tiny(
        tmp_path, tiny_siglip_llm_dir, files, vlm=vlm_section(tiny_siglip_llm_dir), data={"state_dim": state_dim}
    )
    checkpoint = load_checkpoint(path)
    assert {"tokenizer.json", "tokenizer_config.json"} <= checkpoint["tokenizer_files"].keys()
    model = VLAModel.from_checkpoint(checkpoint)
    assert all(torch.equal(value, checkpoint["model"][name]) for name, value in model.state_dict().items())


def test_processors_are_those_of_the_two_directories(tiny_siglip_llm_dir: Path) -> None:
    config = config_from_dict({"model": {"vlm_config": vlm_section(tiny_siglip_llm_dir)}})
    image_processor, tokenizer = processors_from_config(config)
    assert (image_processor.height, image_processor.mean, image_processor.std) == (SIZE, (0.5,) * 3, (0.5,) * 3)
    assert tokenizer.tokenizer.convert_ids_to_tokens(tokenizer("open the window")) == [
        "open",
        "Ġthe",
        "Ġwindow",
        "Ċ",
    ]
