"""A small real PaliGemma directory: config, random weights, tokenizer, image processor."""

from __future__ import annotations

import json
import pathlib
import string
from collections.abc import Sequence

import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    GemmaConfig,
    GemmaTokenizer,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

from model.tiny.files import check_divides, shrink_residual_outputs, write_image_processor, write_patch_filters

SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]  # ids 0 to 4, as in Gemma
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
IMAGE_TOKEN = "<image>"


def make_tiny_paligemma(
    output_dir: str | pathlib.Path,
    prompts: Sequence[str],
    version: int = 1,
    image_size: int = 96,
    patch_size: int = 16,
    vision_width: int = 96,
    vision_layers: int = 3,
    vision_heads: int = 4,
    text_width: int = 96,
    text_layers: int = 2,
    text_heads: int = 4,
    text_kv_heads: int = 1,
    vocab_size: int = 1024,
    sliding_window: int = 4096,
    initializer_range: float = 0.08,
    seed: int = 0,
) -> int:
    """Write the directory and return the number of its parameters.

    Args:
        output_dir: folder to write to, created when absent; files of the same names are replaced.
        prompts: the texts that the tokenizer is trained on; any other text still encodes, into more tokens.
        version: 1 (Gemma text model) or 2 (Gemma 2: soft-capped attention, alternating sliding windows).
        image_size, patch_size: pixels; an image becomes (image_size / patch_size)^2 tokens.
        vision_width, vision_layers, vision_heads: the SigLIP tower; its MLP is 4 times as wide.
        text_width, text_layers, text_heads, text_kv_heads: the Gemma model; its MLP is 4 times as wide.
        vocab_size: rows of the embedding table; the tokenizer uses at most so many ids.
        sliding_window: tokens, version 2 only; the released models have 4096.
        initializer_range: standard deviation of the text model's weights. The usual 0.02 is meant for widths in
            the thousands; at width 96 it would leave each layer's output far below the residual stream.
        seed: of the weights. The same arguments always write the same weights.

    Raises:
        ValueError: no prompts, a version other than 1 and 2, sizes that don't divide, a vocabulary too small.
    """
    if not prompts:
        raise ValueError("no prompts to train the tokenizer on; give at least one instruction")
    for name, whole, part in (
        ("image_size by patch_size", image_size, patch_size),
        ("vision_width by vision_heads", vision_width, vision_heads),
        ("text_width by text_heads", text_width, text_heads),
        ("text_heads by text_kv_heads", text_heads, text_kv_heads),
    ):
        check_divides(name, whole, part)
    output_dir = pathlib.Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)

    tokenizer = _train_tokenizer(prompts, vocab_size)
    text_config = _text_config(
        version,
        vocab_size=vocab_size,
        hidden_size=text_width,
        intermediate_size=4 * text_width,
        num_hidden_layers=text_layers,
        num_attention_heads=text_heads,
        num_key_value_heads=text_kv_heads,
        head_dim=text_width // text_heads,
        initializer_range=initializer_range,
        sliding_window=sliding_window,
    )
    vision_config = SiglipVisionConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=vision_width,
        intermediate_size=4 * vision_width,
        num_hidden_layers=vision_layers,
        num_attention_heads=vision_heads,
        vision_use_head=False,
    )
    config = PaliGemmaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vocab_size=vocab_size,
        projection_dim=text_width,
        hidden_size=text_width,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PaliGemmaForConditionalGeneration(config)
        # SigLIP ends in a layer norm, so fan-in scale gives image tokens of unit variance, as large as text tokens.
        torch.nn.init.normal_(model.model.multi_modal_projector.linear.weight, std=vision_width**-0.5)
        write_patch_filters(model.model.vision_tower, seed)
        shrink_residual_outputs(model.model.language_model, text_layers)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    write_image_processor(
        output_dir, image_size, image_seq_length=(image_size // patch_size) ** 2, processor_class="PaliGemmaProcessor"
    )
    return model.num_parameters()


def _text_config(version: int, sliding_window: int, **sizes: object) -> GemmaConfig | Gemma2Config:
    if version == 1:
        return GemmaConfig(**sizes)
    if version == 2:
        # As in the released models, queries are scaled by their own width and logits capped at 50.
        return Gemma2Config(**sizes, sliding_window=sliding_window, query_pre_attn_scalar=sizes["head_dim"])
    raise ValueError(f"PaliGemma version is {version}; give 1 or 2")


def _train_tokenizer(prompts: Sequence[str], vocab_size: int) -> GemmaTokenizer:
    """A Gemma tokenizer: byte-pair merges within words, bytes for what it has never seen, `<image>` last."""
    budget = vocab_size - len(BYTE_TOKENS) - 1
    alphabet = ["▁", "\n", *string.ascii_letters, *string.digits, *string.punctuation]
    smallest = len(SPECIAL_TOKENS) + len(BYTE_TOKENS) + len(alphabet) + 1
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}; special tokens, bytes and letters alone need {smallest}")
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split("▁", "merged_with_next")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=budget, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(sorted(set(prompts)), trainer)
    bpe = json.loads(trained.to_str())["model"]
    pieces = sorted(bpe["vocab"], key=bpe["vocab"].get)[len(SPECIAL_TOKENS) :]
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *BYTE_TOKENS, *pieces])}
    tokenizer = GemmaTokenizer(vocab=vocab, merges=[tuple(pair) for pair in bpe["merges"]], add_bos_token=True)
    image_token = AddedToken(IMAGE_TOKEN, normalized=False, special=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [image_token]})
    assert len(tokenizer) <= vocab_size, f"tokenizer has {len(tokenizer)} tokens"
    return tokenizer
