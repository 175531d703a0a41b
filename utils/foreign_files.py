"""Files that others wrote: which names are taken, what may not stand in them, and how they are parsed.

Tokenizer and processor files may name Python code that a library would fetch and run (`auto_map` and its like). Such
entries are refused by name before any library sees the files.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from utils.text import printable

# What the tokenizers of transformers write with save_pretrained, and nothing that is Python.
TOKENIZER_FILES = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "merges.txt",
        "normalizer.json",
        "sentencepiece.bpe.model",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)
CUSTOM_CODE = ("auto_map", "custom_pipelines", "custom_code", "trust_remote_code")  # keys that name code
PROCESSOR_CONFIGS = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json", "config.json")
MAX_DEPTH = 64  # of dicts and lists within each other
MAX_VALUES = 1_000_000  # of one file, a part that an alias repeats counted every time
MAX_BYTES = 256_000_000  # of one JSON or YAML file


class ForeignFileError(ValueError):
    """A file that others wrote holds what is not taken from anybody; the message names it."""


def parse_json(text: str | bytes) -> Any:
    """JSON of bounded size and depth.

    Raises:
        ForeignFileError: not JSON, or nested too deeply.
    """
    try:
        return _checked(json.loads(text))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ForeignFileError):
            raise
        raise ForeignFileError(f"not valid JSON ({printable(error) if str(error) else 'nested too deeply'})") from None


class _Loader(yaml.SafeLoader):
    """Plain YAML in which no key is given twice: all but the last would be ignored without a word."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        known = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in known and key.value != "<<":
                raise yaml.composer.ComposerError(None, None, f"{key.value} is given twice", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                known.add(key.value)
        return node


def parse_yaml(text: str) -> Any:
    """YAML of plain values, of bounded size and depth however often its aliases repeat a part.

    Raises:
        ForeignFileError: not YAML, a key that is given twice, a tag that makes objects, aliases that multiply or
            contain themselves.
    """
    try:
        return _checked(yaml.load(text, _Loader))
    except yaml.YAMLError as error:
        raise ForeignFileError(f"not valid YAML: {' '.join(str(error).split())}") from None
    except (RecursionError, ValueError, TypeError) as error:
        if isinstance(error, ForeignFileError):
            raise
        raise ForeignFileError(f"not valid YAML ({printable(error)})") from None


def read_json(path: Path) -> Any:
    """`parse_json` of a file; the error names it, and what the system said where it can't be read."""
    return _read(path, parse_json)


def read_yaml(path: Path) -> Any:
    """`parse_yaml` of a file; the error names it, and what the system said where it can't be read."""
    return _read(path, parse_yaml)


def is_plain_name(name: str) -> bool:
    """Whether a name is that of a file or folder itself: no path, not hidden, printable, not too long for a disk."""
    return (
        bool(name)
        and name.isprintable()
        and len(name.encode()) <= 255
        and not (set(name) & {"/", "\\"})
        and name[0] != "."
        and name == name.strip()
    )


def inside(folder: Path, name: str | Path) -> Path | None:
    """The file `name` of a folder, links followed; None where that lies elsewhere."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return None
    path = (folder / name).resolve()
    return path if path.is_relative_to(folder.resolve()) else None


def refuse_custom_code(settings: Any, place: str) -> None:
    """Raise a ForeignFileError where settings name code that a library would load."""
    left = [settings]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            named = [key for key in CUSTOM_CODE if item.get(key)]
            if named:
                raise ForeignFileError(f"{place} has an entry {named[0]!r}, which names code that a library would run")
            left += item.values()
        elif isinstance(item, list):
            left += item


def check_tokenizer_files(files: dict[str, Any]) -> None:
    """Check the tokenizer files of a checkpoint (name -> uint8 tensor, or bytes).

    Raises:
        ForeignFileError: a name that no tokenizer of ours writes, or an entry that names code.
    """
    for name, content in files.items():
        if name not in TOKENIZER_FILES:
            raise ForeignFileError(
                f"tokenizer file {printable(name)!r} is none that a tokenizer needs; only "
                f"{', '.join(sorted(TOKENIZER_FILES))} are taken"
            )
        if not isinstance(content, bytes):
            if str(getattr(content, "dtype", "")) != "torch.uint8" or content.ndim != 1:
                raise ForeignFileError(f"tokenizer file {name} is no sequence of bytes")
            content = content.contiguous().numpy().tobytes() if name in PROCESSOR_CONFIGS else b""
        if name in PROCESSOR_CONFIGS:
            try:
                refuse_custom_code(parse_json(content), f"tokenizer file {name}")
            except ForeignFileError as error:
                raise ForeignFileError(
                    str(error) if name in str(error) else f"tokenizer file {name}: {error}"
                ) from None


def check_processor_folder(folder: Path) -> None:
    """Refuse a folder of tokenizer or processor files with entries that name code; hub ids are not looked at."""
    for name in PROCESSOR_CONFIGS:
        if (folder / name).is_file():
            refuse_custom_code(read_json(folder / name), str(folder / name))


def _read(path: Path, parse: Any) -> Any:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ForeignFileError(f"{path}: {path.stat().st_size:,} bytes; at most {MAX_BYTES:,} are read")
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ForeignFileError(f"{path}: can't be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ForeignFileError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except ForeignFileError as error:
        raise ForeignFileError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None


def _checked(value: Any) -> Any:
    """`value`, after its parts were counted as often as they occur and found to be few enough and not too deep."""
    left, count = [(value, 0)], 0
    while left:
        item, depth = left.pop()
        if isinstance(item, dict | list):
            count += len(item)
            if depth == MAX_DEPTH:
                raise ForeignFileError(f"values within each other more than {MAX_DEPTH} deep")
            if count > MAX_VALUES:
                raise ForeignFileError(f"more than {MAX_VALUES:,} values, those that aliases repeat among them")
            left += [(below, depth + 1) for below in (item.values() if isinstance(item, dict) else item)]
    return value
