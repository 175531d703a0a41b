"""Write a small real PaliGemma directory: config, random weights, tokenizer, image processor.

The directory has the layout of the published checkpoints, so `model.vlm_config.model_name_or_path` may name
either. It is for quickstarts and tests: weights are random, and everything trains from scratch.

    python scripts/make_tiny_paligemma.py --output_dir weight/tiny-paligemma

The defaults are the quickstart's: SigLIP 96 wide x 3 layers at 96 px, Gemma 96 wide x 2 layers, a tokenizer trained
on the instructions of Meta-World's 50 tasks.
"""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(
    0, str(pathlib.Path(__file__).resolve().parents[1])
)  # so that "python scripts/x.py" finds the repository

import argparse
import json
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

from envs import metaworld_tasks

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
        if whole % part:
            raise ValueError(f"cannot divide {name}: {whole} is no multiple of {part}")
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
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    write_image_processor(
        output_dir, image_size, image_seq_length=(image_size // patch_size) ** 2, processor_class="PaliGemmaProcessor"
    )
    return model.num_parameters()


def write_image_processor(output_dir: pathlib.Path, image_size: int, **more: object) -> None:
    """Write the `preprocessor_config.json` of published SigLIPs and PaliGemmas, for another image size."""
    # Not by save_pretrained: SiglipImageProcessor asks for torchvision, which nothing else here needs.
    settings = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
        "size": {"height": image_size, "width": image_size},
        **more,
    }
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (output_dir / "preprocessor_config.json").write_text(text, encoding="utf-8")


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


def read_prompts(paths: Sequence[str]) -> list[str]:
    """The distinct prompts of Parquet files, or of all Parquet files below a folder."""
    import pyarrow.parquet as pq

    prompts: set[str] = set()
    for path in map(pathlib.Path, paths):
        files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not files or not all(file.is_file() for file in files):
            raise ValueError(f"--prompts_from {path}: no Parquet file there; give a .parquet file or a folder of them")
        for file in files:
            if "prompt" not in pq.read_schema(file).names:
                raise ValueError(f"{file}: no column 'prompt'; give the demonstrations' own Parquet files")
            prompts.update(pq.read_table(file, columns=["prompt"])["prompt"].unique().to_pylist())
    return sorted(prompt for prompt in prompts if prompt)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--version", type=int, choices=(1, 2), default=1)
    parser.add_argument("--prompts", nargs="+", default=[], help="texts to train the tokenizer on")
    parser.add_argument("--prompts_from", nargs="+", default=[], help="Parquet files or folders with a prompt column")
    parser.add_argument("--image_size", type=int, default=96)
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument("--vision_width", type=int, default=96)
    parser.add_argument("--vision_layers", type=int, default=3)
    parser.add_argument("--vision_heads", type=int, default=4)
    parser.add_argument("--text_width", type=int, default=96)
    parser.add_argument("--text_layers", type=int, default=2)
    parser.add_argument("--text_heads", type=int, default=4)
    parser.add_argument("--text_kv_heads", type=int, default=1)
    parser.add_argument("--vocab_size", type=int, default=1024)
    parser.add_argument("--sliding_window", type=int, default=4096, help="version 2 only")
    parser.add_argument("--seed", type=int, default=0)
    args = vars(parser.parse_args())
    prompts = args.pop("prompts") + read_prompts(args.pop("prompts_from"))
    if not prompts:
        prompts = [task.instruction for task in metaworld_tasks.TASKS.values()]
    parameters = make_tiny_paligemma(prompts=prompts, **args)
    output_dir = args["output_dir"]
    print(
        f"{output_dir}: PaliGemma {args['version']}, {parameters:,} parameters, tokenizer from {len(prompts)} prompts"
    )
    print(f"next: python main_train.py --config_path configs/quickstart.yaml --model_name_or_path {output_dir}")


if __name__ == "__main__":
    main()
