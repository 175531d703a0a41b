"""The small checkpoint directory: what the script writes loads as a published PaliGemma does."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    PaliGemmaForConditionalGeneration,
)

from model.tiny.paligemma import make_tiny_paligemma

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
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.iterdir())}


def test_command_line_is_deterministic_across_processes(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": PROMPTS * 3}), tmp_path / "demos.parquet")
    flags = [text for name, size in SIZES.items() for text in (f"--{name}", str(size))]
    command = [sys.executable, "scripts/make_tiny_paligemma.py", "--output_dir", str(tmp_path / "by_command"), *flags]
    # a folder of demonstrations, in a process with another hash seed
    command += ["--prompts_from", str(tmp_path), "--seed", "3"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)

    parameters = make_tiny_paligemma(tmp_path / "by_function", prompts=PROMPTS, **SIZES, seed=3)
    assert _digest(tmp_path / "by_command") == _digest(tmp_path / "by_function")
    summary, next_step = result.stdout.strip().splitlines()[-2:]
    assert f"{parameters:,} parameters" in summary
    assert next_step.startswith("next: ") and str(tmp_path / "by_command") in next_step

    make_tiny_paligemma(tmp_path / "other_seed", prompts=PROMPTS, **SIZES, seed=4)
    changed = {
        name
        for name, digest in _digest(tmp_path / "other_seed").items()
        if digest != _digest(tmp_path / "by_function")[name]
    }
    assert changed == {"model.safetensors"}


def test_leaves_the_callers_random_numbers_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    make_tiny_paligemma(tmp_path, prompts=PROMPTS, **SIZES)
    assert torch.equal(torch.rand(3), expected)


def test_tokenizer_is_gemmas(tiny_paligemma_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_paligemma_dir)
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<bos>", "<unk>"]) == [0, 1, 2, 3]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    config = AutoConfig.from_pretrained(tiny_paligemma_dir)
    assert tokenizer.convert_tokens_to_ids("<image>") == config.image_token_id
    assert len(tokenizer) <= config.text_config.vocab_size

    ids = tokenizer("<image><bos>open the window\n", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<image>", "<bos>", "open", "▁the", "▁window", "\n"]
    assert tokenizer("open the window\n").input_ids == ids[1:]  # <bos> by itself, as the published tokenizer does


@pytest.mark.parametrize("prompt", ["zig ZAG 7%", "打开窗户", "ouvre la fenêtre", "two  spaces\tand\na line", "🤖"])
def test_any_prompt_encodes_and_comes_back(tiny_paligemma_dir: Path, prompt: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_paligemma_dir)
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == prompt


def test_weights_are_a_whole_paligemma(tiny_paligemma_dir: Path, tiny_paligemma2_dir: Path) -> None:
    for directory, text_type in ((tiny_paligemma_dir, "gemma"), (tiny_paligemma2_dir, "gemma2")):
        model, report = PaliGemmaForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
        assert model.config.text_config.model_type == text_type
        assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert model.config.text_config.attn_logit_softcapping == 50
    assert set(model.config.text_config.layer_types) == {"sliding_attention", "full_attention"}


def test_image_processor_and_processor_load(tiny_paligemma_dir: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8))
    try:
        image_processor = AutoImageProcessor.from_pretrained(tiny_paligemma_dir)
    except ImportError as error:
        pytest.skip(f"older transformers load no image processor without torchvision: {error}")
    pixels = image_processor(image, return_tensors="np")["pixel_values"][0]
    expected = (np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(pixels, expected.transpose(2, 0, 1), atol=1.5 / 127)

    processor = AutoProcessor.from_pretrained(tiny_paligemma_dir)
    ids = processor(images=image, text="<image>open the window", return_tensors="np")["input_ids"][0]
    tokens = processor.tokenizer.convert_ids_to_tokens(ids)
    assert tokens == ["<image>"] * 16 + ["<bos>", "open", "▁the", "▁window", "\n"]


def test_default_recipe(tmp_path: Path) -> None:
    parameters = make_tiny_paligemma(tmp_path, prompts=PROMPTS)
    config = json.loads((tmp_path / "config.json").read_text())
    vision, text = config["vision_config"], config["text_config"]
    assert (vision["hidden_size"], vision["num_hidden_layers"], vision["image_size"], vision["patch_size"]) == (
        96,
        3,
        96,
        16,
    )
    assert vision["vision_use_head"] is False
    assert (text["hidden_size"], text["num_hidden_layers"], text["head_dim"], text["initializer_range"]) == (
        96,
        2,
        24,
        0.08,
    )
    assert 600_000 < parameters < 1_200_000


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompts": []}, "no prompts"),
        ({"version": 3}, "version is 3; give 1 or 2"),
        ({"image_size": 90}, "90 is no multiple of 8"),
        ({"text_heads": 3}, "32 is no multiple of 3"),
        ({"vocab_size": 100}, "vocab_size is 100.*need 358"),
    ],
)
def test_errors(tmp_path: Path, wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_tiny_paligemma(tmp_path, **{"prompts": PROMPTS, **SIZES, **wrong})
