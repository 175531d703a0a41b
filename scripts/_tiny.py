"""The flags that the makers of small backbones share, and the texts that their tokenizers are trained on."""

from __future__ import annotations

import argparse
import inspect
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from envs import metaworld_tasks
from utils.arguments import at_least


def add_tiny_flags(parser: argparse.ArgumentParser, *makers: Callable[..., Any], besides: Sequence[str] = ()) -> None:
    """Add where prompts come from, and a flag for every whole number that a maker takes, with the maker's default.

    Args:
        parser: of the script.
        makers: functions of `model.tiny`.
        besides: parameters whose flags the script adds itself.
    """
    parser.add_argument("--prompts", nargs="+", default=[], help="texts to train the tokenizer on")
    parser.add_argument("--prompts_from", nargs="+", default=[], help="Parquet files or folders with a prompt column")
    parameters = [parameter for maker in makers for parameter in inspect.signature(maker).parameters.values()]
    sizes = {parameter.name: parameter.default for parameter in parameters if isinstance(parameter.default, int)}
    for name in [name for name in sizes if name not in besides]:
        parser.add_argument(f"--{name}", type=at_least(1), default=sizes[name])


def take_prompts(args: dict[str, Any]) -> list[str]:
    """The prompts that the flags name, which are removed from `args`; none named: those of Meta-World.

    Raises:
        ValueError: as of `read_prompts`.
    """
    prompts = args.pop("prompts") + read_prompts(args.pop("prompts_from"))
    return prompts or [task.instruction for task in metaworld_tasks.TASKS.values()]


def read_prompts(paths: Sequence[str]) -> list[str]:
    """The distinct prompts of Parquet files, or of all Parquet files below a folder."""
    import pyarrow.parquet as pq

    prompts: set[str] = set()
    for path in map(pathlib.Path, paths):
        files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not files or not all(file.is_file() for file in files):
            raise ValueError(f"--prompts_from {path}: no Parquet file there; give a .parquet file or a folder of them")
        for file in files:
            if "prompt" not in pq.read_schema(file).names:
                raise ValueError(f"{file}: no column 'prompt'; give the demonstrations' own Parquet files")
            prompts.update(pq.read_table(file, columns=["prompt"])["prompt"].unique().to_pylist())
    return sorted(prompt for prompt in prompts if prompt)
