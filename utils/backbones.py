"""The backbones that there are, each described once, in plain values.

Data, configuration and scripts need to know what a backbone is made of without building one, and must not import the
model; so the description stands here and names the class that keeps it. Adding a backbone: docs/adding_a_backbone.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PretrainedPart:
    """One pretrained model that a backbone is made of.

    Attributes:
        key: the setting of `model.vlm_config` that names its directory or hub id.
        hub_id: a published one.
        tiny: where the backbone's `tiny_maker` writes a small one, below its --output_dir.
        terms: what must be done before the published one can be downloaded.
    """

    key: str
    hub_id: str
    tiny: str = ""
    terms: str = ""


@dataclass(frozen=True)
class BackboneSpec:
    """What there is to know about a backbone without building it.

    Attributes:
        model_class: the class that keeps this description, as `module.Class`.
        parts: what it loads. The first one sees: its image processor prepares frames. The last one reads: its
            tokenizer prepares prompts. A backbone of one part has both from there.
        tiny_maker: the script that writes small untrained parts; its argument is --output_dir.
        prompt_start: what stands before the instruction: the `<bos>` token, or what the tokenizer itself puts there.
    """

    model_class: str
    parts: tuple[PretrainedPart, ...]
    tiny_maker: str
    prompt_start: Literal["bos", "tokenizer"] = "tokenizer"

    def remedy(self, key: str, folder: str | None = None) -> str:
        """What to do where a part is missing: how to download it, and how to write a small untrained one.

        Args:
            key: of the part.
            folder: where it is wanted; None: below `weight`.
        """
        part = next(part for part in self.parts if part.key == key)
        folder = folder or f"weight/{part.hub_id.split('/')[1]}"
        small = f"DIR/{part.tiny}" if part.tiny else "DIR"
        return (
            f"download one ({part.terms}hf download {part.hub_id} --local-dir {folder}), or make a small untrained one "
            f"(python {self.tiny_maker} --output_dir DIR) and give {small}"
        )


SIGLIP_AND_LLM = (
    PretrainedPart("vision_model_name_or_path", "google/siglip-base-patch16-224", tiny="siglip"),
    PretrainedPart("language_model_name_or_path", "Qwen/Qwen2.5-0.5B", tiny="qwen2"),
)

# One entry a backbone; the key is `model.vlm_config.type`.
BACKBONE_SPECS: dict[str, BackboneSpec] = {
    "paligemma": BackboneSpec(
        "model.paligemma_vlm.PaliGemmaVLM",
        (PretrainedPart("model_name_or_path", "google/paligemma-3b-pt-224", terms="accept its license, then: "),),
        "scripts/make_tiny_paligemma.py",
        prompt_start="bos",
    ),
    "siglip_llm": BackboneSpec("model.siglip_llm.SiglipLLM", SIGLIP_AND_LLM, "scripts/make_tiny_siglip_llm.py"),
}

BackboneType = Literal[tuple(BACKBONE_SPECS)]  # type: ignore[valid-type]
