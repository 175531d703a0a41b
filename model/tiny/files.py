"""What the writers of small pretrained directories share."""

from __future__ import annotations

import json
import pathlib


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
