"""Writing a policy as a folder to share: safetensors weights and readable files; `inference.policy_files` reads it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file

from inference.policy_files import CARRIED, MANIFEST, PROFILES, WEIGHTS, digest, write_alarm
from inference.serving.model_card import model_card
from utils.checkpoint import CheckpointError, evaluation_weights
from utils.misc import atomic_path


def export_policy(checkpoint: dict[str, Any], folder: str | Path, metrics: Sequence[str | Path] = ()) -> Path:
    """Write a checkpoint's policy as a folder.

    Args:
        checkpoint: as `utils.checkpoint.load_checkpoint` gives it, and `alarm` of `policy_files.read_alarm`.
        folder: new, or empty.
        metrics: `metrics.json` and `rollouts.json` of main_eval.py, summarized in the model card.

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder holds something, the checkpoint lacks frozen weights, or the disk is full; then
            nothing is left behind.
        ValueError: a metrics file is not one.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists and is not an empty folder; name a new one")
    base = checkpoint.get("base")
    if base is not None and not base["included"]:
        raise CheckpointError(
            f"this checkpoint holds adapters without the weights of {base['name_or_path']}; merge them first: "
            "python scripts/merge_lora.py"
        )
    card = model_card(checkpoint, metrics)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        _write(checkpoint, card, temporary)
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: not written ({error}); nothing is left of it: make room, or name another folder, and try again"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write(checkpoint: dict[str, Any], card: str, folder: Path) -> None:
    (folder / "tokenizer").mkdir(parents=True)
    weights = {name: tensor.contiguous() for name, tensor in evaluation_weights(checkpoint).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.yaml").write_text(yaml.safe_dump(checkpoint["config"], sort_keys=False), encoding="utf-8")
    _write_json(folder / "statistics.json", checkpoint["statistics"])
    if checkpoint.get("training_data"):
        _write_json(folder / PROFILES, checkpoint["training_data"])
    if checkpoint.get("alarm"):
        write_alarm(folder, {"step": checkpoint["step"]}, checkpoint["alarm"])
    _write_json(folder / "backbone_config.json", checkpoint["backbone_config"])
    _write_json(folder / "preprocessor_config.json", checkpoint["image_processor"])
    for name, content in checkpoint["tokenizer_files"].items():
        (folder / "tokenizer" / name).write_bytes(content.numpy().tobytes())
    (folder / "README.md").write_text(card, encoding="utf-8")
    files = {str(path.relative_to(folder)): digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    _write_json(folder / MANIFEST, {**{key: checkpoint.get(key) for key in CARRIED}, "sha256": files})


def _write_json(path: Path, value: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
