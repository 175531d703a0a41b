"""Shared fixtures: small real PaliGemma, SigLIP and Qwen2 directories, written once per session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.tiny.paligemma import make_tiny_paligemma
from model.tiny.siglip_llm import make_tiny_siglip_llm

TINY = {
    "prompts": ("press the button from the top", "open the window"),
    "image_size": 32,
    "patch_size": 8,
    "vision_width": 32,
    "vision_layers": 2,
    "vision_heads": 2,
    "text_width": 32,
    "text_layers": 2,
    "text_heads": 4,
    "text_kv_heads": 2,
    "vocab_size": 512,
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Models this small gain nothing from a second thread and lose much on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_paligemma_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PaliGemma 1: 32 px images, 16 tokens each, width 32."""
    directory = tmp_path_factory.mktemp("tiny_paligemma")
    make_tiny_paligemma(directory, **TINY)
    return directory


@pytest.fixture(scope="session")
def tiny_paligemma2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PaliGemma 2: the same sizes, soft-capped logits, a sliding window shorter than one image's tokens."""
    directory = tmp_path_factory.mktemp("tiny_paligemma2")
    make_tiny_paligemma(directory, **TINY, version=2, sliding_window=8)
    return directory


@pytest.fixture(scope="session")
def tiny_siglip_llm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """siglip (32 px images, 16 tokens each, width 32) and qwen2 (width 32)."""
    directory = tmp_path_factory.mktemp("tiny_siglip_llm")
    make_tiny_siglip_llm(directory, **TINY)
    return directory
