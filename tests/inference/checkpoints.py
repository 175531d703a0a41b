"""Small policies, trained for a few steps and saved by the trainer itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from data.loader import StepBatchSampler, VLADataset, make_loader
from data.processing import processors_from_config
from model.vla_model import VLAModel
from tests.policies import model_section
from training.trainer import VLATrainer
from utils.calculate_normalization_stats import calculate_statistics
from utils.config_utils import config_from_dict


def train_tiny(folder: Path, backbone_dir: Path, files: list[Path], *, steps: int = 2, **sections: Any) -> Path:
    """Train on `files` and return the checkpoint.

    Args:
        folder: where the run goes.
        backbone_dir: a small PaliGemma directory.
        steps: optimizer steps.
        sections: differences from a small config, as in `data={"max_seq_len": 2}`; `head` and `vlm` name the
            parts of the `model` section.
    """
    config = config_from_dict(
        {
            "data": {"state_dim": 4, "num_workers": 0, "cache_dir": str(folder / "cache"), **sections.get("data", {})},
            "model": model_section(backbone_dir, sections.get("vlm"), **{"num_heads": 2, **sections.get("head", {})}),
            "training": {
                "checkpoint_dir": str(folder),
                "experiment_name": "tiny",
                "max_steps": steps,
                "epochs": 1000,
                **sections.get("training", {}),
            },
            "optimizer": {"lr": 1e-3},
            "inference": {"num_inference_steps": 3, "n_action_steps": 2},
        }
    )
    head, data = config.model.action_head_config, config.data
    image_processor, tokenizer = processors_from_config(config)
    dataset = VLADataset(
        files,
        data,
        horizon=head.horizon,
        per_action_dim=head.per_action_dim,
        cameras=config.cameras,
        reads_state=config.reads_state,
        image_processor=image_processor,
        prompt_tokenizer=tokenizer,
    )
    loader = make_loader(dataset, num_workers=0, batch_sampler=StepBatchSampler(len(dataset), data.batch_size, seed=0))
    torch.manual_seed(0)
    relative = {"action_mode": data.action_mode, "absolute_action_dims": data.absolute_action_dims}
    columns = {"state_columns": data.state_columns, "needs_state": config.reads_state}
    relative |= {"horizon": head.horizon, **columns}
    statistics = calculate_statistics(files, data.state_dim, head.per_action_dim, **relative)
    tokenizer.read_states(config, [statistics])
    model = VLAModel.from_pretrained(config, [statistics], image_processor.mean, image_processor.std)
    processors = {"image_processor": image_processor.to_settings(), "tokenizer_files": tokenizer.to_files()}
    trainer = VLATrainer(config, model, loader, None, torch.device("cpu"), processors)
    trainer.fit()
    return trainer.save("tiny.pth.tar")
