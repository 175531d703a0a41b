"""What the writers of small pretrained directories share."""

from __future__ import annotations

import json
import math
import pathlib

import torch
from torch import nn


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


def check_divides(name: str, whole: int, part: int) -> None:
    """Raise a ValueError, naming the two sizes, unless `part` divides `whole`."""
    if whole % part:
        raise ValueError(f"cannot divide {name}: {whole} is no multiple of {part}")


def shrink_residual_outputs(language_model: nn.Module, num_layers: int) -> None:
    """Divide what each layer adds to the residual stream by sqrt(2 * layers), as GPT-2 does (Radford et al. 2019).

    Without that, two layers from scratch at a learning rate of 1e-3 did not tell in 1,500 steps where a cube of 3
    pixels lay in 100 pictures; with it they did within 300.
    """
    with torch.no_grad():
        for name, weight in language_model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_((2 * num_layers) ** -0.5)


def write_patch_filters(vision_model: nn.Module, seed: int) -> None:
    """Give the patch embedding filters of the kind that trained towers end with: smooth, and apart for colours.

    Half of them are cosines (the discrete cosine transform's, lowest frequencies first) over brightness, a quarter
    each over red against green and over blue against the mean of both. Brightness has no constant filter: its answer
    would be far larger than an object's of a few pixels. Amplitudes grow with the frequency and are larger for
    colours, as both are weaker in pictures of things (Field 1987; Ruderman et al. 1998); a random rotation mixes all
    filters, so that no channel of the tower is special. After 1,200 steps on pictures where a cube of 3 pixels shows
    the way, 0.42 of the way's variance was explained with them and 0.21 with filters of independent random weights.
    """
    (weight,) = (weight for name, weight in vision_model.named_parameters() if name.endswith("patch_embedding.weight"))
    width, _, size, _ = weight.shape
    colours = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [-0.5, -0.5, 1.0]])
    colours /= colours.norm(dim=1, keepdim=True)
    quarter = width // 4
    filters = torch.cat(
        [
            torch.einsum("npq,c->ncpq", _cosines(number, size, first) * contrast, colour)
            for number, first, contrast, colour in zip(
                (width - 2 * quarter, quarter, quarter), (1, 0, 0), (0.3, 0.9, 0.9), colours, strict=True
            )
        ]
    )
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(width, len(filters), generator=generator))
    with torch.no_grad():
        weight.copy_(torch.einsum("dn,ncpq->dcpq", rotation, filters))


def _cosines(number: int, size: int, first: int) -> torch.Tensor:
    """`number` plane cosines of `size` x `size` pixels by rising frequency, from the `first` on (0: the constant)."""
    steps = torch.arange(size)
    waves = torch.cos(math.pi * steps[:, None] * (steps + 0.5) / size)  # one a frequency
    waves /= waves.norm(dim=1, keepdim=True)
    frequencies = sorted((math.hypot(u, v), u, v) for u in range(size) for v in range(size))[first : first + number]
    return torch.stack([torch.outer(waves[u], waves[v]) * max(f, 1.0) for f, u, v in frequencies])
