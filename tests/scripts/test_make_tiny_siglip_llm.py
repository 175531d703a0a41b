"""The small SigLIP and Qwen2 directories load as the published ones do."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2ForCausalLM, SiglipModel

from model.tiny.siglip_llm import make_tiny_siglip_llm

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "vision_width": 32,
    "vision_layers": 1,
    "vision_heads": 2,
    "text_width": 32,
    "text_layers": 1,
    "vocab_size": 512,
}
PROMPTS = ["press the button", "open the window"]


def _digest(directory: Path) -> dict[str, str]:
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_command_line_is_deterministic_across_processes(tmp_path: Path) -> None:
    flags = [text for name, size in SIZES.items() for text in (f"--{name}", str(size))]
    command = [sys.executable, "scripts/make_tiny_siglip_llm.py", "--output_dir", str(tmp_path / "by_command"), *flags]
    result = subprocess.run(
        [*command, "--prompts", *PROMPTS, "--seed", "3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    parameters = make_tiny_siglip_llm(tmp_path / "by_function", PROMPTS, **SIZES, seed=3)
    assert _digest(tmp_path / "by_command") == _digest(tmp_path / "by_function")
    summary, next_step = result.stdout.strip().splitlines()[-2:]
    assert f"{parameters:,} parameters" in summary
    assert next_step.startswith("next: ") and str(tmp_path / "by_command" / "qwen2") in next_step

    make_tiny_siglip_llm(tmp_path / "other_seed", PROMPTS, **SIZES, seed=4)
    other = _digest(tmp_path / "other_seed")
    changed = {name for name, digest in _digest(tmp_path / "by_function").items() if digest != other[name]}
    assert changed == {"siglip/model.safetensors", "qwen2/model.safetensors"}


def test_weights_are_whole_models(tiny_siglip_llm_dir: Path) -> None:
    for model_class, part in ((SiglipModel, "siglip"), (Qwen2ForCausalLM, "qwen2")):
        _, report = model_class.from_pretrained(tiny_siglip_llm_dir / part, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]


@pytest.mark.parametrize("prompt", ["zig ZAG 7%", "打开窗户", "two  spaces\tand\na line", "🤖"])
def test_any_prompt_encodes_and_comes_back(tiny_siglip_llm_dir: Path, prompt: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_siglip_llm_dir / "qwen2")
    ids = tokenizer(prompt).input_ids
    assert tokenizer.decode(ids) == prompt and max(ids) < 512
    assert tokenizer("<|im_start|>").input_ids == [tokenizer.convert_tokens_to_ids("<|im_start|>")]


def test_image_processor_loads(tiny_siglip_llm_dir: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8))
    try:
        image_processor = AutoImageProcessor.from_pretrained(tiny_siglip_llm_dir / "siglip")
    except ImportError as error:
        pytest.skip(f"older transformers load no image processor without torchvision: {error}")
    pixels = image_processor(image, return_tensors="np")["pixel_values"][0]
    expected = (np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(pixels, expected.transpose(2, 0, 1), atol=1.5 / 127)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompts": []}, "no prompts"),
        ({"image_size": 90}, "90 is no multiple of 8"),
        ({"text_heads": 3}, "32 is no multiple of 3"),
        ({"vocab_size": 100}, "vocab_size is 100.*need 259"),
    ],
)
def test_errors(tmp_path: Path, wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_tiny_siglip_llm(tmp_path, **{"prompts": PROMPTS, **SIZES, **wrong})
