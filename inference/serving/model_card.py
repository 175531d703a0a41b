"""The model card of an exported policy: what it was trained on, what it measures, how to load it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.config_utils import config_from_dict
from utils.foreign_files import ForeignFileError, read_json
from utils.statistics import state_widths
from utils.text import markdown_text
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
    widths = state_widths(checkpoint["statistics"][0], data.state_columns, data.state_dim)
    joined = f" ({', '.join(f'{name} {width}' for name, width in widths.items())})" if len(widths) > 1 else ""
    rows = [
        ("backbone", f"{config.model.vlm_config.type}, {Path(config.model.vlm_config.pretrained_names).name}"),
        ("action head", head.type),
        ("values in the weights", f"{weights:,}"),
        ("trained for", f"{checkpoint['step']:,} steps of {data.batch_size} samples"),
        ("datasets", ", ".join(entry.name for entry in config.datasets)),
        ("cameras", ", ".join(checkpoint["cameras"])),
        ("observation frames", data.max_seq_len),
        ("state", f"{data.state_dim} values{joined}, physical units"),
        ("actions", f"{head.horizon} steps of {head.per_action_dim} values, physical units ({data.action_mode})"),
    ]
    named = ", ".join(f'"{camera}": "{i}.png"' for i, camera in enumerate(checkpoint["cameras"]))
    frames = f"images={{{named}}}" if len(checkpoint["cameras"]) > 1 else '"frame.png"'
    sections = [
        "---\nlibrary_name: paligemma-vla\npipeline_tag: robotics\ntags:\n- robotics\n- vision-language-action\n---",
        f"# {markdown_text(config.training.experiment_name)}",
        "A robot policy trained with PaliGemma-VLA: images, an instruction and the robot's state in, a chunk of "
        "actions out.",
        _table(("", ""), rows),
        *(_metrics_section(Path(path)) for path in metrics),
        "## Use",
        "```python\n"
        "from inference.predictor import VLAPredictor\n\n"
        'policy = VLAPredictor.from_pretrained("this/folder")\n'
        f'actions = policy.predict({frames}, prompt="...", state=[...])  # (horizon, per_action_dim)\n'
        "```\n\n"
        "or `python scripts/serve_policy.py --checkpoint_path this/folder`.",
        "The weights inherit the license of the backbone that they were trained from.",
    ]
    return "\n\n".join(sections) + "\n"


def _metrics_section(path: Path) -> str:
    try:
        found = read_json(path)
    except ForeignFileError as error:
        raise ValueError(
            f"{path}: can't be read ({error}); give metrics.json or rollouts.json of main_eval.py"
        ) from None
    sections = {"tasks": _closed_loop, "predictors": _offline}
    for key, section in sections.items():
        if isinstance(found, dict) and key in found:
            try:
                return section(found)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}: {key} are not as main_eval.py writes them ({error!r}); evaluate again"
                ) from None
    raise ValueError(
        f"{path}: holds neither 'tasks' nor 'predictors'; give metrics.json or rollouts.json of main_eval.py"
    )


def _closed_loop(found: dict[str, Any]) -> str:
    rows = [
        (name, f"{task['successes']}/{task['episodes']}", "{:.0%} to {:.0%}".format(*task["wilson_95"]))
        for name, task in found["tasks"].items()
    ]
    settings = {key: markdown_text(value) for key, value in found["settings"].items()}
    heading = f"## Closed loop: {settings['env']}, {settings['control']}, seeds from {settings['seed']}"
    return f"{heading}\n\n{_table(('task', 'success', '95 % interval'), rows)}"


def _offline(found: dict[str, Any]) -> str:
    rows = [
        (name, *(f"{result['overall'][key]:.4g}" for key in ("mse", "mae")))
        for name, result in found["predictors"].items()
    ]
    return f"## Recorded data, physical units\n\n{_table(('predictor', 'MSE', 'MAE'), rows)}"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table whose cells are shown as written."""
    return markdown_table(header, [[markdown_text(cell) for cell in row] for row in rows])
