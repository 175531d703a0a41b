"""A small real SigLIP directory and a small real Qwen2 directory: config, random weights, and their processors."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import torch
from tokenizers import pre_tokenizers, trainers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, SiglipConfig, SiglipModel

from model.tiny.files import check_divides, shrink_residual_outputs, write_image_processor, write_patch_filters

END_OF_TEXT = "<|endoftext|>"
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]


def make_tiny_siglip(
    output_dir: str | pathlib.Path,
    image_size: int = 96,
    patch_size: int = 16,
    vision_width: int = 96,
    vision_layers: int = 3,
    vision_heads: int = 4,
    seed: int = 0,
) -> int:
    """Write a SigLIP directory and return the number of its vision tower's parameters.

    Like the published ones it holds a text tower and a pooling head, which no policy reads; here they are tiny.

    Args:
        output_dir: folder to write to, created when absent; files of the same names are replaced.
        image_size, patch_size: pixels; an image becomes (image_size / patch_size)^2 tokens.
        vision_width, vision_layers, vision_heads: the vision tower; its MLP is 4 times as wide.
        seed: of the weights. The same arguments always write the same weights.

    Raises:
        ValueError: sizes that don't divide.
    """
    check_divides("image_size by patch_size", image_size, patch_size)
    check_divides("vision_width by vision_heads", vision_width, vision_heads)
    output_dir = pathlib.Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    vision = {
        "image_size": image_size,
        "patch_size": patch_size,
        "hidden_size": vision_width,
        "intermediate_size": 4 * vision_width,
        "num_hidden_layers": vision_layers,
        "num_attention_heads": vision_heads,
    }
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 16,
        "projection_size": vision_width,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
        write_patch_filters(model.vision_model, seed)
    model.save_pretrained(output_dir)
    write_image_processor(output_dir, image_size, processor_class="SiglipProcessor")
    return sum(p.numel() for name, p in model.vision_model.named_parameters() if not name.startswith("head."))


def make_tiny_qwen2(
    output_dir: str | pathlib.Path,
    prompts: Sequence[str],
    text_width: int = 96,
    text_layers: int = 2,
    text_heads: int = 4,
    text_kv_heads: int = 1,
    vocab_size: int = 1024,
    initializer_range: float = 0.08,
    seed: int = 0,
) -> int:
    """Write a Qwen2 directory and return the number of its parameters.

    Args:
        output_dir: folder to write to, created when absent; files of the same names are replaced.
        prompts: the texts that the tokenizer is trained on; any other text still encodes, into more tokens.
        text_width, text_layers, text_heads, text_kv_heads: the model; its MLP is 4 times as wide.
        vocab_size: rows of the embedding table; the tokenizer uses at most so many ids.
        initializer_range: standard deviation of the weights. The usual 0.02 is meant for widths in the thousands.
        seed: of the weights. The same arguments always write the same weights.

    Raises:
        ValueError: no prompts, sizes that don't divide, a vocabulary too small.
    """
    if not prompts:
        raise ValueError("no prompts to train the tokenizer on; give at least one instruction")
    check_divides("text_width by text_heads", text_width, text_heads)
    check_divides("text_heads by text_kv_heads", text_heads, text_kv_heads)
    output_dir = pathlib.Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer(prompts, vocab_size)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=text_width,
        intermediate_size=4 * text_width,
        num_hidden_layers=text_layers,
        num_attention_heads=text_heads,
        num_key_value_heads=text_kv_heads,
        initializer_range=initializer_range,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
        shrink_residual_outputs(model, text_layers)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return model.num_parameters()


def make_tiny_siglip_llm(output_dir: str | pathlib.Path, prompts: Sequence[str], seed: int = 0, **sizes: int) -> int:
    """Write both, to `output_dir/siglip` and `output_dir/qwen2`, and return the number of parameters a policy uses.

    Args:
        output_dir: folder to write to.
        prompts: as for `make_tiny_qwen2`.
        seed: of the weights.
        sizes: of either function; names that begin with `text` and `vocab_size` are the language model's.

    Raises:
        ValueError: as of the two functions.
    """
    language = {name: size for name, size in sizes.items() if name.startswith("text") or name == "vocab_size"}
    vision = {name: size for name, size in sizes.items() if name not in language}
    output_dir = pathlib.Path(output_dir)
    return make_tiny_siglip(output_dir / "siglip", seed=seed, **vision) + make_tiny_qwen2(
        output_dir / "qwen2", prompts, seed=seed, **language
    )


def _train_tokenizer(prompts: Sequence[str], vocab_size: int) -> Qwen2Tokenizer:
    """A Qwen2 tokenizer: byte-level byte-pair merges within words, special tokens last, none of them `<bos>`."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [END_OF_TEXT, *CHAT_TOKENS]
    if vocab_size < len(alphabet) + len(special):
        raise ValueError(
            f"vocab_size is {vocab_size}; special tokens and bytes alone need {len(alphabet) + len(special)}"
        )
    untrained = Qwen2Tokenizer(vocab={}, merges=[])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special), initial_alphabet=sorted(alphabet), show_progress=False
    )
    untrained.backend_tokenizer.train_from_iterator(sorted(set(prompts)), trainer)
    bpe = json.loads(untrained.backend_tokenizer.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=bpe["vocab"], merges=[tuple(pair) for pair in bpe["merges"]])
    tokenizer.add_special_tokens({"additional_special_tokens": CHAT_TOKENS})
    assert len(tokenizer) <= vocab_size, f"tokenizer has {len(tokenizer)} tokens"
    return tokenizer
