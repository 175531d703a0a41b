"""What lerobot computed with a policy, and this repository's side of it: for `pi0_parity.py`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference.predictor import VLAPredictor
from model.context import Context
from utils.batch import Batch

LOSS, VALUE = 1e-4, 2e-5  # largest differences allowed
Row = tuple[str, str, float, float]  # part, array, difference, allowed


class Reference:
    """A folder of arrays beside the policy that they belong to."""

    def __init__(self, folder: Path, policy_dir: Path, predictor: VLAPredictor) -> None:
        self.folder, self.policy_dir = folder, policy_dir
        self.predictor, self.model = predictor, predictor.model
        self.head, self.backbone = predictor.model.action_head, predictor.model.backbone
        self.width, self.cameras = predictor.per_action_dim, predictor.cameras
        # Slots of cameras that no data has (`empty_cameras`) come last; openpi's three may be more than there are.
        count = sum(key.startswith("image_") and key != "image_mask" for key in self.arrays("model"))
        self.slots = (*self.cameras, *(f"empty_{i}" for i in range(len(self.cameras), count)))[:count]
        self.prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))

    def arrays(self, name: str) -> dict[str, Tensor]:
        """Of `name`.npz; none where there is no such file."""
        path = self.folder / f"{name}.npz"
        if not path.is_file():
            return {}
        with np.load(path) as file:
            return {key: torch.from_numpy(np.asarray(file[key])) for key in file}

    def observation(self, row: int, cameras: tuple[str, ...]) -> dict[str, Any]:
        """Raw images, prompt and state of one row."""
        raw = self.arrays("processors")
        frames = {name: raw[f"raw_image_{i}"][row].permute(1, 2, 0).numpy() for i, name in enumerate(self.cameras)}
        return {
            "images": {camera: frames[camera] for camera in cameras},
            "prompt": self.prompts["tasks"][row],
            "state": raw["raw_state"][row].numpy(),
        }

    def batch(self) -> Batch:
        """The model's inputs as a batch, its images between 0 and 1."""
        found = self.arrays("model")
        frames = {name: (found[f"image_{i}"] + 1)[:, None] / 2 for i, name in enumerate(self.slots)}
        return {
            **frames,
            "image_mask": found["image_mask"],
            "vlm_attention_mask": torch.ones(len(found["state"]), 1, dtype=torch.bool),
            "input_ids": found["tokens"],
            "prompt_mask": found["token_mask"],
            "state": found["state"][:, : self.predictor.state_dim],
            "dataset_index": torch.zeros(len(found["state"]), dtype=torch.int64),
        }

    def encoded(self, **options: bool) -> Context:
        """What the backbone makes of them."""
        cameras, self.backbone.cameras = self.backbone.cameras, self.slots
        context = self.backbone(self.batch(), **options)
        self.backbone.cameras = cameras
        return context

    def context(self) -> Context:
        """What the head gets for them; the state is normalized already."""
        context = self.encoded(keys_values=True, tokens=False)
        state = self.arrays("model")["state"][:, : self.predictor.state_dim]
        return dataclasses.replace(context, state_BS=state)


def loss_arguments(reference: Reference) -> tuple[Tensor, ...]:
    """Of `loss_at`: the stored actions, noise and time."""
    found = reference.arrays("model")
    is_pad = torch.zeros(found["actions"].shape[:2], dtype=torch.bool)
    return found["actions"][..., : reference.width], is_pad, found["noise"], 1 - found["time"].double()


def prefix_embeddings(reference: Reference) -> Tensor:
    """Tokens of every slot and of the whole padded prompt, as they enter the language model."""
    found, backbone = reference.arrays("model"), reference.backbone
    with torch.autocast("cpu", enabled=False) if backbone.vision_dtype else contextlib.nullcontext():
        images = [backbone.image_features(found[f"image_{i}"]) for i in range(len(reference.slots))]
    text = backbone.embed_prompt(found["tokens"])
    return torch.cat([*(image.to(text.dtype) for image in images), text], dim=1)


def largest(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference; infinite where shapes differ or one is not finite."""
    if ours.numel() != theirs.numel():
        return float("inf")
    difference = (ours.double().reshape(theirs.shape) - theirs.double()).abs().max().item()
    return difference if np.isfinite(difference) else float("inf")
