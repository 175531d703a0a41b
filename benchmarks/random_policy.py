"""Whole policies with random weights, for timings: of the quickstart's size, or of PaliGemma-3B's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from data.processing import PromptTokenizer, VLAImageProcessor
from model.paligemma_vlm import PaliGemmaVLM
from model.tiny.paligemma import make_tiny_paligemma
from model.vla_model import VLAModel
from utils.config_utils import Config, load_config
from utils.statistics import STATISTICS

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {"quickstart": ROOT / "configs/quickstart.yaml", "paligemma-3b": ROOT / "configs/vla_config.yaml"}
PALIGEMMA_3B = ROOT / "configs/paligemma-3b-pt-224"  # the config.json of google/paligemma-3b-pt-224
PROMPT = "press the button from the top"
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bfloat16


def random_policy(
    size: str, views: int, device: torch.device, folder: Path, overrides: dict[str, Any] | None = None
) -> tuple[VLAModel, Config, VLAImageProcessor, PromptTokenizer]:
    """What VLAPredictor takes. The same arguments give the same weights.

    Args:
        size: a key of CONFIGS. `quickstart` is made by make_tiny_paligemma.py; `paligemma-3b` has the shape of
            google/paligemma-3b-pt-224 and its weights drawn on `device`.
        views: cameras, 1 or 2.
        device: where the backbone is made.
        folder: an empty one, for the small directory; its tokenizer serves both sizes.
        overrides: other values of the size's configuration, as `{"model.vlm_config.dtype": "float32"}`.
    """
    make_tiny_paligemma(folder, prompts=(PROMPT,))
    paths = {"model_name_or_path": str(folder), "use_aux_camera": views == 2}
    paths = {f"model.vlm_config.{key}": value for key, value in paths.items()}
    config = load_config(CONFIGS[size], paths | (overrides or {}))
    vlm, resampler = config.model.vlm_config, config.model.vision_resampler_config
    torch.manual_seed(0)
    if size == "quickstart":
        image_processor = VLAImageProcessor.from_pretrained(str(folder))
        backbone = PaliGemmaVLM.from_pretrained(
            vlm, resampler, config.cameras, image_processor.mean, image_processor.std
        )
    else:
        image_processor = VLAImageProcessor(224, 224, (0.5,) * 3, (0.5,) * 3, Image.Resampling.BICUBIC)
        plain = dataclasses.replace(vlm, lora=None, quantization="none")
        shape = PaliGemmaVLM.read_config(dataclasses.replace(vlm, model_name_or_path=str(PALIGEMMA_3B)))
        with device:
            backbone = PaliGemmaVLM.from_config(shape, plain, resampler, config.cameras, (0.5,) * 3, (0.5,) * 3)
            _draw_weights(backbone)
            backbone.adapt(vlm)
    entry = config.datasets[0]
    model = VLAModel(config, backbone, [_statistics(entry.state_dim, entry.per_action_dim)])
    with torch.no_grad():
        for parameter in model.action_head.parameters():  # gates and outputs start at zero: nothing would be computed
            parameter += 0.02 * torch.randn_like(parameter)
    tokenizer = PromptTokenizer.from_pretrained(str(folder), config.data.prompt_max_len)
    return model, config, image_processor, tokenizer


@torch.no_grad()
def _draw_weights(backbone: nn.Module) -> None:
    for module in backbone.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:  # Gemma's norms multiply by 1 + weight
                parameter.fill_(float(isinstance(module, nn.LayerNorm) and name == "weight"))


def _statistics(state_dim: int, per_action_dim: int) -> dict[str, Any]:
    """Of data spread evenly over [-1, 1]."""
    values = {"min": -1.0, "max": 1.0, "mean": 0.0, "std": 0.5, "q01": -0.98, "q99": 0.98}
    return {
        part: {name: [values[name]] * width for name in STATISTICS}
        for part, width in (("state", state_dim), ("action", per_action_dim))
    }
