"""A tiny real policy, batches for it, and datasets as it sees them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data.dataset import VLADataset
from data.processing import processors_from_config
from model.vla_model import VLAModel
from utils.config_utils import Config, config_from_dict

HORIZON, ACTION_DIM, STATE_DIM, IMAGE_SIZE = 4, 4, 4, 32


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts with some values changed."""
    return base | {
        key: merged(base.get(key) or {}, value) if isinstance(value, dict) else value for key, value in changes.items()
    }


def model_section(backbone_dir: Path, vlm: dict[str, Any] | None = None, **head: Any) -> dict[str, Any]:
    """`model` of a tiny policy: a backbone directory in float32 and a small head, with these differences."""
    size = {"horizon": HORIZON, "per_action_dim": ACTION_DIM, "hidden_dim": 32, "num_layers": 1, "num_heads": 4}
    return {
        "vlm_config": {"model_name_or_path": str(backbone_dir), "dtype": "float32", **(vlm or {})},
        "action_head_config": {**size, **head},
    }


def policy_config(backbone_dir: Path, folder: Path, **changes: Any) -> Config:
    """The configuration of a policy on the tiny backbone of `tests/conftest.py`, writing below `folder`."""
    base = {
        "data": {"state_dim": STATE_DIM, "batch_size": 4, "num_workers": 0},
        "model": model_section(backbone_dir),
        "training": {"checkpoint_dir": str(folder / "experiments"), "experiment_name": "run"},
        "optimizer": {"lr": 1e-3},
    }
    return config_from_dict(merged(base, changes))


def statistics() -> list[dict[str, Any]]:
    """Statistics of made-up data within [-2, 2]."""
    column = {
        name: [value] * STATE_DIM
        for name, value in {"min": -2.0, "max": 2.0, "mean": 0.0, "std": 1.0, "q01": -1.9, "q99": 1.9}.items()
    }
    return [{"state": column, "action": column}]


def make_policy(config: Config, seed: int = 0) -> VLAModel:
    """The policy that `config` describes, on its backbone directory."""
    torch.manual_seed(seed)
    return VLAModel.from_pretrained(config, statistics(), (0.5,) * 3, (0.5,) * 3)


def make_batch(size: int = 4, seed: int = 0) -> dict[str, Any]:
    """A random batch of the data contract."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "image_1": torch.randint(0, 256, (size, 1, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, generator=generator),
        "image_mask": torch.ones(size, 1, dtype=torch.bool),
        "vlm_attention_mask": torch.ones(size, 1, dtype=torch.bool),
        "input_ids": torch.randint(5, 300, (size, 6), generator=generator),
        "prompt_mask": torch.ones(size, 6, dtype=torch.bool),
        "state": torch.rand(size, STATE_DIM, generator=generator) * 2 - 1,
        "action": torch.rand(size, HORIZON, ACTION_DIM, generator=generator) * 2 - 1,
        "action_is_pad": torch.zeros(size, HORIZON, dtype=torch.bool),
        "dataset_index": torch.zeros(size, dtype=torch.int64),
        "episode_index": torch.zeros(size, dtype=torch.int64),
        "frame_index": torch.arange(size),
    }


def act(policy: VLAModel, batch: dict[str, Any], steps: int, seeds: Sequence[int] | None = None) -> torch.Tensor:
    """One draw of actions, (B, T, A), from a seed per sample; None: 0, 1, 2, ..."""
    noise = policy.draw_noise([range(len(batch["state"])) if seeds is None else seeds], steps)
    return policy.act(batch if noise is None else {**batch, "noise": noise}, steps)[0]


def checkpoint_of(policy: VLAModel, config: Config) -> dict[str, Any]:
    """What the trainer saves of a policy, without an optimizer."""
    from utils.config_utils import config_to_dict

    return {
        "step": 0,
        "config": config_to_dict(config),
        "statistics": policy.statistics,
        "cameras": list(policy.cameras),
        "backbone_config": policy.backbone.backbone_config_dict(),
        "model": policy.state_dict(),
        "image_processor": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        "tokenizer_files": {},
    }


def dataset_of(config: Config, files: Sequence[Path], reads_state: bool = True, **options: Any) -> VLADataset:
    """Files as a policy of this configuration sees them, without a cache; `options` are VLADataset's."""
    image_processor, tokenizer = processors_from_config(config)
    head = config.model.action_head_config
    return VLADataset(
        files,
        dataclasses.replace(config.data, cache=False),
        horizon=head.horizon,
        per_action_dim=head.per_action_dim,
        cameras=config.cameras,
        reads_state=reads_state,
        image_processor=image_processor,
        prompt_tokenizer=tokenizer,
        **options,
    )
