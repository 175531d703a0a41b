"""Twenty training steps with the data, noise and time of a run of LeRobot's own training step: the same losses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data.processing import collate_fn
from inference.predictor import VLAPredictor
from inference.published import published_checkpoint
from model.vla_model import VLAModel
from tests.pi_fixtures import CAMERAS, KINDS, arrays, folder, plain
from tests.policies import merged
from training.trainer import VLATrainer
from utils.batch import Batch
from utils.config_utils import Config, config_from_dict

STEPS = 20
WARMUP, DECAY = 150, 1000  # of the schedule; LeRobot's and ours shorten both to the run


def configured(kind: str, tree: dict[str, Any], place: Path) -> Config:
    """What configs/pi0_finetune.yaml says of the optimizer, by the numbers of the stored run."""
    preset = json.loads((folder(kind) / "policy" / "config.json").read_text())
    changes = {
        "data": {"batch_size": 2},
        "training": {
            "max_steps": STEPS,
            "epochs": 1000,
            "grad_clip_norm": preset["optimizer_grad_clip_norm"],
            "checkpoint_dir": str(place),
            "experiment_name": "steps",
        },
        "optimizer": {
            "lr": 5e-4,
            "betas": preset["optimizer_betas"],
            "eps": preset["optimizer_eps"],
            "weight_decay": preset["optimizer_weight_decay"],
            "decay_all": True,
        },
        "lr_scheduler": {"type": "lerobot_cosine", "warmup_steps": WARMUP, "T_max": DECAY, "eta_min": 5e-5},
    }
    return config_from_dict(merged(tree, changes))


def batch_of(predictor: VLAPredictor, kind: str, step: int) -> Batch:
    """The two samples of a step, from raw images, state and text."""
    steps, raw, tasks = arrays(kind, "steps"), arrays(kind, "processors"), plain(kind, "prompts.json")["tasks"]
    samples = []
    for sample, row in enumerate(steps["rows"][step].tolist()):
        frames = {
            camera: raw[f"raw_image_{i}"][row].permute(1, 2, 0).numpy()
            for i, camera in enumerate(CAMERAS)
            if i != steps["absent"][step]
        }
        seen = predictor.observation(images=frames, prompt=tasks[row], state=steps["state"][step, sample].numpy())
        samples.append(
            seen | {"action": steps["action"][step, sample], "action_is_pad": torch.zeros(10, dtype=torch.bool)}
        )
    return collate_fn(samples)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_lerobots(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"tokenizer_name_or_path": str(folder(kind) / "tokenizer"), "vision_num_attention_heads": 2}
    checkpoint = published_checkpoint(folder(kind) / "policy", **settings)
    predictor = VLAPredictor.from_pretrained(folder(kind) / "policy", device="cpu", **settings)
    config, stored = configured(kind, checkpoint["config"], tmp_path), arrays(kind, "steps")
    model = VLAModel.from_checkpoint(checkpoint, config)
    loader = SimpleNamespace(batch_sampler=SimpleNamespace(num_samples=2))
    trainer = VLATrainer(config, model, loader, None, torch.device("cpu"), {})
    found = []
    for step in range(STEPS):
        chance = stored["noise"][step], 1 - stored["time"][step].double()
        monkeypatch.setattr(model.action_head, "_noise", lambda *_, noise=chance[0]: noise)
        monkeypatch.setattr(model.action_head, "_time", lambda *_, time=chance[1]: time)
        found.append(trainer.train_step([batch_of(predictor, kind, step)]))
    for name, wanted, relative in (("lr", "lrs", 1e-9), ("grad_norm", "grad_norms", 1e-4)):
        assert [one[name] for one in found] == pytest.approx(stored[wanted].tolist(), rel=relative)
    assert [one["loss"] for one in found] == pytest.approx(stored["losses"].tolist(), abs=1e-4, rel=0)
    assert max(stored["losses"]) > 1.3 * min(stored["losses"])
