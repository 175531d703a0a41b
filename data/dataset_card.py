"""The card of a shared dataset: what is in it, in numbers, and where it comes from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from data.convert.episode_writer import RECORD
from data.convert.rollouts import ROLLOUT
from data.doctor.examine import Examination, describe_split
from data.schema import INTERVENTION, SUCCESS
from utils.text import markdown_text
from utils.text_table import markdown_table

SHOWN_PROMPTS, SHOWN_VALUES = 50, 12
ORIGIN_KEYS = ("env", "task", "source", "source_format", "robot_type", "fps", "control_hz", "policy", "command")
SIZES = ((1000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def dataset_card(name: str, files: Sequence[Path], seen: Examination, license_name: str | None = None) -> str:
    """README.md of a dataset, with the YAML header that the Hugging Face hub reads.

    Args:
        name: title.
        files: the Parquet files, whose metadata say where they come from.
        seen: their examination, as the training split.
        license_name: as the hub calls it; None: none is named.
    """
    about = describe_split(seen, "train")
    size = next((text for limit, text in SIZES if about["steps"] < limit), "n>1M")
    header = ["---", "task_categories:", "- robotics", "tags:", "- robotics", "- vision-language-action"]
    header += ["size_categories:", f"- {size}", "configs:", "- config_name: default", '  data_files: "**/*.parquet"']
    header += [f"license: {license_name}"] if license_name else []
    prompts = [[markdown_text(p["prompt"]), p["episodes"], p["steps"]] for p in about["prompts"][:SHOWN_PROMPTS]]
    more = len(about["prompts"]) - SHOWN_PROMPTS
    sections = [
        "\n".join([*header, "---"]),
        f"# {markdown_text(name)}",
        "Robot episodes in the Parquet schema of PaliGemma-VLA (docs/data_format.md there): one row per time step.",
        markdown_table(["", ""], _numbers(seen, about)),
        "## Instructions",
        markdown_table(["instruction", "episodes", "steps"], prompts) + (f"\n\nand {more} more" if more > 0 else ""),
        "## Values",
        markdown_table(["", "min", "q01", "mean", "q99", "max", "std"], _values(seen, about)),
        "## Where it comes from",
        _origin(files),
        "## Checks",
        _checks(seen),
    ]
    return "\n\n".join(sections) + "\n"


def _numbers(seen: Examination, about: dict[str, Any]) -> list[list[Any]]:
    length = about["length"]
    rows = [["episodes", about["episodes"]], ["steps", f"{about['steps']:,}"]]
    rows.append(["steps of an episode", f"{length['min']} to {length['max']}, median {length['median']:g}"])
    if about["rate_hz"]:
        rows.append(["rows a second", f"{about['rate_hz']:.4g}"])
    for camera, facts in about["cameras"].items():
        rows.append([camera, ", ".join(facts.get("sizes", {})) or "encoded frames"])
    first = seen.rows.episode_starts[:-1]
    success, intervention = (seen.rows.labels[name] for name in (SUCCESS, INTERVENTION))
    if (success >= 0).any():
        told = success[first][success[first] >= 0]
        rows.append(["episodes that succeeded", f"{int((told == 1).sum())} of {len(told)}"])
    if (intervention >= 0).any():
        touched = np.add.reduceat((intervention == 1).astype(np.int64), first)
        steps = f"{int((intervention == 1).sum()):,} steps in {int((touched > 0).sum())} episodes"
        rows.append(["corrections of a policy", steps])
    return rows


def _values(seen: Examination, about: dict[str, Any]) -> list[list[str]]:
    keys = ("min", "q01", "mean", "q99", "max", "std")
    rows = []
    for name in seen.rows.vectors:
        for d in range(min(len(about[name]["min"]), SHOWN_VALUES)):
            rows.append([f"{name}[{d}]", *(f"{about[name][key][d]:.4g}" for key in keys)])
        if len(about[name]["min"]) > SHOWN_VALUES:
            rows.append([f"{name}, {len(about[name]['min']) - SHOWN_VALUES} more", *[""] * len(keys)])
    return rows


def _origin(files: Sequence[Path]) -> str:
    """What the files' metadata say, each fact once with the number of files that say so."""
    facts: Counter[tuple[str, str]] = Counter()
    for path in files:
        metadata = {k.decode(): v.decode(errors="replace") for k, v in (pq.read_schema(path).metadata or {}).items()}
        found = {key: metadata[key] for key in ORIGIN_KEYS if metadata.get(key) not in (None, "null")}
        edits = json.loads(metadata.get(RECORD, "{}")).get("settings", {}).get("edits")
        if ROLLOUT in metadata:
            about = json.loads(metadata[ROLLOUT])
            policy = str(about.get("checkpoint") or about.get("control"))
            found |= {"env": str(about.get("env")), "rollouts of": "/".join(Path(policy).parts[-3:])}
        if edits:
            found["edits"] = json.dumps(edits)
        facts.update(found.items())
    if not facts:
        return "The files do not say."
    rows = [[key, markdown_text(value), count] for (key, value), count in facts.most_common(SHOWN_PROMPTS)]
    return markdown_table(["", "", "files"], sorted(rows, key=lambda row: row[0]))


def _checks(seen: Examination) -> str:
    counts = seen.findings.counts
    if not counts:
        return "`inspect_parquet.py` finds nothing to remark."
    listed = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return f"`inspect_parquet.py` finds no error, and warns of: {listed}."
