"""This repository's side of compare_lerobot.py; lerobot_side.py says what it is given and asked."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

if not __package__:
    import _repository  # noqa: F401

import numpy as np
import torch

from benchmarks.sides import processor_seconds, serve
from data.processing import collate_fn
from inference.predictor import VLAPredictor
from inference.published import published_checkpoint
from model.vla_model import VLAModel
from training.optimizer import build_optimizer
from utils.batch import Batch
from utils.config_utils import config_from_dict, override_config

PRESET = (
    "optimizer.lr=2.5e-5",
    "optimizer.betas=[0.9, 0.95]",
    "optimizer.weight_decay=0.01",
    "optimizer.decay_all=true",
)


class Side:
    """One policy at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inputs = dict(np.load(folder / "inputs.npz"))
        self.text = json.loads((folder / "prompts.json").read_text())
        heads = json.loads((folder / "sizes.json").read_text())["vision"]["num_attention_heads"]
        self.settings = {"tokenizer_name_or_path": str(folder / "tokenizer"), "vision_num_attention_heads": heads}

    def load(self, kind: str, compiled: bool = False) -> dict[str, Any]:
        """The policy that both read."""
        torch.compiler.reset()
        self.compiled, place = compiled, self.folder / kind
        how = {"compile": "default" if compiled else "none"}
        self.predictor = VLAPredictor.from_pretrained(place, device="cpu", **self.settings, **how)
        self.checkpoint = published_checkpoint(place, **self.settings)
        self.model = self.optimizer = None
        return {"parameters": sum(parameter.numel() for parameter in self.predictor.model.parameters())}

    def batch(self, cameras: list[str], samples: int) -> Batch:
        """The first samples, as the predictor would see them."""
        seen = []
        for i in range(samples):
            frames = {name: self.inputs[f"image_{name}"][i].transpose(1, 2, 0) for name in cameras}
            one = self.predictor.observation(images=frames, prompt=self.text[i], state=self.inputs["state"][i])
            action = torch.from_numpy(self.inputs["action"][i])
            seen.append(one | {"action": action, "action_is_pad": torch.zeros(len(action), dtype=torch.bool)})
        return collate_fn(seen)

    def latency(self, cameras: list[str], repeats: int) -> dict[str, Any]:
        """Processor seconds from a processed observation to a chunk, and the chunk."""
        batch = {**self.batch(cameras, 1), "noise": torch.from_numpy(self.inputs["noise"][:1])[None]}
        steps = self.predictor.num_inference_steps
        seconds = [processor_seconds(lambda: self.predictor.engine(batch, steps)) for _ in range(repeats)]
        return {"seconds": seconds, "value": self.predictor.engine(batch, steps)[0].flatten().tolist()}

    def train(self, cameras: list[str], samples: int, repeats: int, draws: int = 1) -> dict[str, Any]:
        """Processor seconds of training steps by the original's presets; the loss before the first of this policy."""
        if self.model is None:
            config = override_config(config_from_dict(self.checkpoint["config"]), list(PRESET))
            self.model = VLAModel.from_checkpoint(self.checkpoint, config).train()
            if self.compiled:
                self.model.compile_layers("default")
            self.optimizer = build_optimizer(self.model, config.optimizer)
        model, head = self.model, self.model.action_head
        head.config = dataclasses.replace(head.config, noise_draws_per_sample=draws)
        noise, time = (
            torch.from_numpy(self.inputs[name][:samples]).repeat_interleave(draws, dim=0) for name in ("noise", "time")
        )
        head._noise, head._time = (lambda *_: noise), (lambda *_: 1 - time.double())
        batch, losses = self.batch(cameras, samples), []

        def step() -> None:
            loss = model(batch).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())

        return {"seconds": [processor_seconds(step) for _ in range(repeats)], "value": losses[:1]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    side = Side(Path(sys.argv[1]))
    serve({"load": side.load, "latency": side.latency, "train": side.train})
