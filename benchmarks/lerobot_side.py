"""LeRobot's side of compare_lerobot.py: runs where lerobot is installed, and imports nothing of this repository.

    lerobot_python benchmarks/lerobot_side.py FOLDER

FOLDER holds `policy/`, as LeRobot writes it, `tokenizer/`, `sizes.json`, and `inputs.npz`. LeRobot knows policies of
the published sizes alone; `of_size` lets it build others, and changes nothing of what it computes.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sides import processor_seconds, serve

CLASSES = {"pi0": "PI0Policy", "pi05": "PI05Policy"}


def of_size(modeling: Any, sizes: dict[str, Any]) -> None:
    """Let LeRobot's constructors take other sizes than the two that it has names for."""
    pi_gemma = importlib.import_module("lerobot.policies.pi_gemma")
    stock, vision = modeling.get_gemma_config, sizes["vision"]

    def gemma(variant: str) -> Any:
        own = sizes[{"gemma_2b": "language", "gemma_300m": "expert"}[variant]]
        return type(stock(variant))(num_kv_heads=1, **own)

    def paligemma(config: Any) -> Any:
        config.text_config.vocab_size = sizes["vocab_size"]
        for name, value in vision.items():
            setattr(config.vision_config, name, value)
        return pi_gemma.PaliGemmaForConditionalGenerationWithPiGemma(config=config)

    def expert(config: Any) -> Any:
        config.vocab_size = sizes["vocab_size"]
        return pi_gemma.PiGemmaForCausalLM(config=config)

    modeling.get_gemma_config = gemma
    modeling.PaliGemmaForConditionalGenerationWithPiGemma = paligemma
    modeling.PiGemmaForCausalLM = expert


class Side:
    """One policy at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inputs = dict(np.load(folder / "inputs.npz"))
        self.text = json.loads((folder / "prompts.json").read_text())

    def load(self, kind: str, compiled: bool = False) -> dict[str, Any]:
        """The policy that both read, whole or not at all."""
        torch.compiler.reset()
        modeling = importlib.import_module(f"lerobot.policies.{kind}.modeling_{kind}")
        of_size(modeling, json.loads((self.folder / "sizes.json").read_text()))
        factory = importlib.import_module("lerobot.policies.factory")
        policy_class, place = getattr(modeling, CLASSES[kind]), str(self.folder / kind)
        from lerobot.configs.policies import PreTrainedConfig

        config = PreTrainedConfig.from_pretrained(place)
        config.compile_model, config.compile_mode = compiled, "default"
        self.policy = policy_class.from_pretrained(place, config=config, strict=True)
        tokenizer = {"tokenizer_processor": {"tokenizer_name": str(self.folder / "tokenizer")}}
        processors = factory.make_pre_post_processors(
            self.policy.config, pretrained_path=place, preprocessor_overrides=tokenizer
        )
        self.before, self.after = processors
        self.optimizer = None
        return {"parameters": sum(parameter.numel() for parameter in self.policy.parameters())}

    def batch(self, cameras: list[str], samples: int, actions: bool = False) -> dict[str, Any]:
        """What the policy's own pre-processor makes of the first samples."""
        raw = {
            f"observation.images.{name}": torch.from_numpy(self.inputs[f"image_{name}"][:samples]).float() / 255
            for name in cameras
        }
        raw |= {"observation.state": torch.from_numpy(self.inputs["state"][:samples]), "task": self.text[:samples]}
        if actions:
            raw["action"] = torch.from_numpy(self.inputs["action"][:samples])
        return self.before(raw)

    @torch.no_grad()
    def latency(self, cameras: list[str], repeats: int) -> dict[str, Any]:
        """Processor seconds from a processed observation to a chunk, and the chunk."""
        self.policy.eval()
        batch, noise = self.batch(cameras, 1), torch.from_numpy(self.inputs["noise"][:1])
        seconds = [
            processor_seconds(lambda: self.policy.predict_action_chunk(batch, noise=noise)) for _ in range(repeats)
        ]
        chunk = self.after(self.policy.predict_action_chunk(batch, noise=noise))
        return {"seconds": seconds, "value": chunk.flatten().tolist()}

    def train(self, cameras: list[str], samples: int, repeats: int, draws: int = 1) -> dict[str, Any]:
        """Processor seconds of training steps by LeRobot's presets; the loss before the first of this policy."""
        assert draws == 1, "LeRobot has one noise draw per sample"
        policy, preset = self.policy.train(), self.policy.config
        batch = self.batch(cameras, samples, actions=True)
        noise, time = (torch.from_numpy(self.inputs[name][:samples]) for name in ("noise", "time"))
        policy.model.sample_noise, policy.model.sample_time = (lambda *_: noise), (lambda *_: time)
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(
                policy.get_optim_params(),
                lr=preset.optimizer_lr,
                betas=preset.optimizer_betas,
                eps=preset.optimizer_eps,
                weight_decay=preset.optimizer_weight_decay,
            )
        losses: list[float] = []

        def step() -> None:
            loss, _ = policy.forward(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), preset.optimizer_grad_clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())

        return {"seconds": [processor_seconds(step) for _ in range(repeats)], "value": losses[:1]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    side = Side(Path(sys.argv[1]))
    serve({"load": side.load, "latency": side.latency, "train": side.train})
