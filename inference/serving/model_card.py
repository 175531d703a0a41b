"""The model card of an exported policy: what it was trained on, what it measures, how to load it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.config_utils import config_from_dict
from utils.text_table import markdown_table


def model_card(checkpoint: dict[str, Any], metrics: Sequence[str | Path] = ()) -> str:
    """README.md of a shared policy, with the YAML header that the Hugging Face hub reads.

    Args:
        checkpoint: as loaded.
        metrics: `metrics.json` (offline) and `rollouts.json` (closed loop) of main_eval.py.

    Raises:
        ValueError: a file is neither.
    """
    config = config_from_dict(checkpoint["config"], source="checkpoint")
    head, data = config.model.action_head_config, config.data
    weights = sum(tensor.numel() for tensor in checkpoint["model"].values())
    rows = [
        ("backbone", f"{config.model.vlm_config.type}, {Path(config.model.vlm_config.pretrained_names).name}"),
        ("action head", head.type),
        ("values in the weights", f"{weights:,}"),
        ("trained for", f"{checkpoint['step']:,} steps of {data.batch_size} samples"),
        ("datasets", ", ".join(entry.name for entry in config.datasets)),
        ("cameras", ", ".join(checkpoint["cameras"])),
        ("observation frames", data.max_seq_len),
        ("state", f"{data.state_dim} values, physical units"),
        ("actions", f"{head.horizon} steps of {head.per_action_dim} values, physical units ({data.action_mode})"),
    ]
    sections = [
        "---\nlibrary_name: paligemma-vla\npipeline_tag: robotics\ntags:\n- robotics\n- vision-language-action\n---",
        f"# {config.training.experiment_name}",
        "A robot policy trained with PaliGemma-VLA: images, an instruction and the robot's state in, a chunk of "
        "actions out.",
        markdown_table(("", ""), rows),
        *(_metrics_section(Path(path)) for path in metrics),
        "## Use",
        "```python\n"
        "from inference.predictor import VLAPredictor\n\n"
        'policy = VLAPredictor.from_pretrained("this/folder")\n'
        'actions = policy.predict("frame.png", prompt="...", state=[...])  # (horizon, per_action_dim)\n'
        "```\n\n"
        "or `python scripts/serve_policy.py --checkpoint_path this/folder`.",
        "The weights inherit the license of the backbone that they were trained from.",
    ]
    return "\n\n".join(sections) + "\n"


def _metrics_section(path: Path) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: can't be read ({error}); give metrics.json or rollouts.json of main_eval.py"
        ) from None
    if "tasks" in found:
        return _closed_loop(found)
    if "predictors" in found:
        return _offline(found)
    raise ValueError(
        f"{path}: holds neither 'tasks' nor 'predictors'; give metrics.json or rollouts.json of main_eval.py"
    )


def _closed_loop(found: dict[str, Any]) -> str:
    rows = [
        (name, f"{task['successes']}/{task['episodes']}", "{:.0%} to {:.0%}".format(*task["wilson_95"]))
        for name, task in found["tasks"].items()
    ]
    settings = found["settings"]
    heading = f"## Closed loop: {settings['env']}, {settings['control']}, seeds from {settings['seed']}"
    return f"{heading}\n\n{markdown_table(('task', 'success', '95 % interval'), rows)}"


def _offline(found: dict[str, Any]) -> str:
    rows = [
        (name, *(f"{result['overall'][key]:.4g}" for key in ("mse", "mae")))
        for name, result in found["predictors"].items()
    ]
    return f"## Recorded data, physical units\n\n{markdown_table(('predictor', 'MSE', 'MAE'), rows)}"
