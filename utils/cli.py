"""Command lines: flags made from settings, the flags of training, and how they reach the configuration."""

from __future__ import annotations

import argparse
import ast
import datetime
import inspect
import io
import logging
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

import yaml

from utils.arguments import CommandParser
from utils.checkpoint import SUFFIX, newest_checkpoint
from utils.config_utils import Config, ConfigError, load_config

logger = logging.getLogger(__name__)

# flag -> the config key that it overrides
OVERRIDES = {
    "epochs": "training.epochs",
    "batch_size": "data.batch_size",
    "lr": "optimizer.lr",
    "experiment_name": "training.experiment_name",
    "model_name_or_path": "model.vlm_config.model_name_or_path",
    "model_path_override": "model.vlm_config.model_name_or_path",
    "train_data_override": "data.train_parquet_files",
    "val_data_override": "data.val_parquet_files",
    "wandb_project_name": "wandb.project",
    "wandb_entity": "wandb.entity",
}


def add_setting_flags(parser: Any, section_class: type, names: Iterable[str]) -> None:
    """Add a flag `--name` for each of these settings; a flag that is not given is None, and changes nothing.

    The type, the choices of a Literal and the help (the comment beside the field) come from the field itself. A
    tuple takes several values, a bool has a `--no-` form.

    Args:
        parser: an ArgumentParser or a group of one.
        section_class: a dataclass of the config, such as InferenceConfig, defined in a file.
        names: its fields, in the order of the help; not those that are sections themselves.

    Raises:
        KeyError: the section has no such field.
    """
    hints, comments = typing.get_type_hints(section_class), field_comments(section_class)
    for name in names:
        help_text = comments.get(name, "").replace("%", "%%")
        parser.add_argument(f"--{name}", help=help_text, default=None, **_flag_options(hints[name]))


def field_comments(section_class: type) -> dict[str, str]:
    """The comment beside each field of a dataclass, read from its source; fields without one are left out."""
    source = textwrap.dedent(inspect.getsource(section_class))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    fields = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
    found = {field.target.id: by_line.get(field.end_lineno, "").lstrip("# ") for field in fields}
    return {name: comment for name, comment in found.items() if comment}


def _flag_options(hint: Any) -> dict[str, Any]:
    """What argparse is told about a field of this type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _flag_options(next(arg for arg in args if arg is not type(None)))
    if origin is Literal:
        return {"choices": args}
    if origin is tuple:
        return {**_flag_options(args[0]), "nargs": "+" if args[-1] is Ellipsis else len(args)}
    return {"action": argparse.BooleanOptionalAction} if hint is bool else {"type": hint}


def key_values(items: Iterable[str], flag: str) -> dict[str, Any]:
    """KEY=VALUE arguments as a dict; values are read as YAML: 96, true, null, [a, b], or text. A date stays text.

    Raises:
        ConfigError: an argument has no "=", a value is no YAML or would lose what looks like a comment, or a key comes
            twice; names the flag and the argument.
    """
    values: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"{flag} {item}: no '='; write key=value")
        if key in values:
            raise ConfigError(f"{flag} {item}: {key} is given twice; give it once")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"{flag} {item}: the value is no YAML; put it in quotes within the argument") from None
        if " #" in text and isinstance(value, str) and value != text.strip() and text.strip()[0] not in "\"'":
            raise ConfigError(f"{flag} {item}: YAML takes what follows ' #' for a comment; put the value in quotes")
        values[key] = text if isinstance(value, datetime.date) else value
    return values


def train_parser(description: str | None) -> argparse.ArgumentParser:
    """The command line of training; a flag that is not given leaves the config as it is."""
    parser = CommandParser(description)
    parser.add_argument("--config_path", required=True, help="YAML file of differences from the defaults")
    parser.add_argument("--epochs", type=int, help="instead of training.epochs")
    parser.add_argument("--batch_size", type=int, help="samples per optimizer step, over all ranks")
    parser.add_argument("--lr", type=float, help="instead of optimizer.lr")
    parser.add_argument("--experiment_name", help="output folder under training.checkpoint_dir")
    parser.add_argument(
        "--resume_checkpoint",
        help="continue this run exactly; with another --experiment_name, fine-tune from its weights and optimizer; "
        "auto: the newest readable checkpoint of this experiment, or a new run where there is none",
    )
    parser.add_argument("--init_checkpoint", help="start a new run from this checkpoint's weights alone")
    parser.add_argument(
        "--init_parts",
        choices=("all", "backbone", "auto"),
        default="all",
        help="with --init_checkpoint, for another robot or head: the backbone alone, or all that fits (auto); the log "
        "lists what was taken, widened and made new",
    )
    parser.add_argument(
        "--statistics",
        choices=("own", "pretrained"),
        help="with --init_checkpoint: normalize by the statistics of the new data (own, as without this flag) or by "
        "the checkpoint's (pretrained)",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print parameters and expected memory, run two steps, write nothing to the experiment's folder",
    )
    parser.add_argument("--model_name_or_path", help="backbone: Hugging Face directory or hub id")
    parser.add_argument("--model_path_override", help="older spelling of --model_name_or_path")
    parser.add_argument("--train_data_override", nargs="+", help="instead of data.train_parquet_files")
    parser.add_argument("--val_data_override", nargs="+", help="instead of data.val_parquet_files")
    parser.add_argument("--no_cache", action="store_true", help="remove the episode cache when the run ends")
    parser.add_argument("--use_wandb", action="store_true", help="log to Weights & Biases")
    parser.add_argument("--wandb_project_name", help="instead of wandb.project")
    parser.add_argument("--wandb_entity", help="instead of wandb.entity")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="section.key=value", dest="set_args")
    return parser


def config_from_args(args: argparse.Namespace) -> Config:
    """The configuration: flags over `--set` over the YAML file over the defaults.

    Raises:
        ConfigError: see `load_config`; also two flags that contradict each other.
    """
    if args.resume_checkpoint and args.init_checkpoint:
        raise ConfigError("--resume_checkpoint and --init_checkpoint exclude each other; give one of them")
    if args.init_parts != "all" and not args.init_checkpoint:
        raise ConfigError("--init_parts says what to take from an --init_checkpoint; give both or neither")
    if args.statistics and not args.init_checkpoint:
        raise ConfigError("--statistics says what a run from an --init_checkpoint normalizes by; give both or neither")
    if args.model_name_or_path and args.model_path_override not in (None, args.model_name_or_path):
        raise ConfigError("--model_name_or_path and --model_path_override name two backbones; give one of them")
    overrides = {}
    for flag, key in OVERRIDES.items():
        value = getattr(args, flag)
        if value is not None:
            overrides[key] = value
    if args.no_cache:
        overrides["data.cache"] = False
    if args.use_wandb:
        overrides["wandb.enabled"] = True
    return load_config(args.config_path, overrides, args.set_args)


def resume_path(args: argparse.Namespace, config: Config) -> str | None:
    """The checkpoint that `--resume_checkpoint` means, `auto` looked up; None for a new run.

    Raises:
        CheckpointError: `auto`, and the experiment has checkpoints of which none is readable.
    """
    if args.resume_checkpoint != "auto":
        return args.resume_checkpoint
    newest = newest_checkpoint(config.experiment_dir / "checkpoints", config.training.experiment_name)
    if newest is None:
        logger.info("%s has no checkpoint yet: a new run", config.experiment_dir)
    return None if newest is None else str(newest)


def refuse_to_overwrite(config: Config) -> None:
    """Raise a ConfigError when a new run would write into the folder of an earlier one."""
    if any((config.experiment_dir / "checkpoints").glob(f"*{SUFFIX}")):  # not what a killed save left behind
        raise ConfigError(
            f"{config.experiment_dir} already holds a run; continue it with --resume_checkpoint auto, or choose "
            "another --experiment_name"
        )
