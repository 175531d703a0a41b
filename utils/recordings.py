"""What a data path names: Parquet files, or a LeRobot dataset (`lerobot:/path`, `lerobot:owner/name`) read in place.

Metadata and frames of a LeRobot dataset are read in `data/lerobot_table.py`; here is only where it lies, which settings
it is read with, and what tells it from a changed one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from utils.config_data import LEROBOT, LeRobotConfig, is_lerobot
from utils.config_reader import ConfigError, build
from utils.parquet_utils import DataError, Source, one_line, resolve_parquet_files
from utils.parquet_utils import fingerprint as file_fingerprint
from utils.text import printable

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PARTS = ("meta", "data", "videos")  # the folders of a LeRobot dataset, all that is read or downloaded of it


@dataclass(frozen=True)
class LeRobotFolder:
    """A LeRobot dataset on this machine, and how its columns are read."""

    root: Path
    mapping: LeRobotConfig

    def __str__(self) -> str:
        return f"{LEROBOT}{self.root}"


Recording = Source | LeRobotFolder


def resolve_recordings(
    specs: Sequence[Recording] | Recording, key: str, mapping: LeRobotConfig | None = None
) -> list[Recording]:
    """The Parquet files of all entries (see `resolve_parquet_files`), then the LeRobot datasets, in order.

    `lerobot:` stands before a folder or, where there is no such folder, before the id of a dataset on the Hugging Face
    hub, which is downloaded; `lerobot:owner/name@revision` takes another branch, tag or commit than `main`. Settings of
    `LeRobotConfig` may follow a question mark: `lerobot:/path?cameras=observation.images.front=image_1&prompt=stack`.

    Args:
        specs: one entry or several; a recording that is resolved already stays as it is.
        key: the config key or flag that they come from, for messages.
        mapping: how LeRobot datasets are read; None: by the defaults.

    Raises:
        DataError: see `resolve_parquet_files`; no such folder, a LeRobot dataset without `lerobot:`, a download that
            fails, a folder named twice, settings that are none.
    """
    entries = [specs] if isinstance(specs, (str, Path, LeRobotFolder)) else list(specs)
    datasets = [entry for entry in entries if is_lerobot(entry)]
    plain = [entry for entry in entries if not is_lerobot(entry)]
    for entry in plain:
        if Path(entry).expanduser().joinpath("meta/info.json").is_file():
            raise DataError(
                f"{key}: {entry} is a LeRobot dataset (it has meta/info.json); write {LEROBOT}{entry} to read it as it "
                "is, or convert it (scripts/convert_lerobot.py)"
            )
    recordings: list[Recording] = [*resolve_parquet_files(plain, key)] if plain or not datasets else []
    for entry in datasets:
        folder = entry
        if not isinstance(entry, LeRobotFolder):
            folder = _lerobot_folder(str(entry), key, mapping or LeRobotConfig())
        if any(isinstance(other, LeRobotFolder) and _same(other.root, folder.root) for other in recordings):
            raise DataError(f"{key} names {folder} more than once; every episode would count twice")
        recordings.append(folder)
    return recordings


def fingerprint(recording: Recording) -> list[str | int]:
    """What tells a recording from a changed one: its full name, its size in bytes, and its state.

    The state of a file is its modification time in ns, that of a LeRobot dataset a digest of the sizes and
    modification times of all its files, and of its mapping.

    Raises:
        DataError: it is gone.
    """
    if not isinstance(recording, LeRobotFolder):
        return file_fingerprint(recording)
    digest, total = hashlib.sha256(json.dumps(dataclasses.asdict(recording.mapping)).encode()), 0
    for part in PARTS:
        for path in sorted((recording.root / part).rglob("*")):
            if path.name.startswith(".") or path.is_dir():
                continue
            name, size, changed = path.relative_to(recording.root).as_posix(), *file_fingerprint(path)[1:]
            digest.update(json.dumps([name, size, changed]).encode())
            total += size
    if not total:
        raise DataError(f"{recording}: no such dataset any more; fetch it again")
    return [f"{LEROBOT}{recording.root.resolve()}", total, digest.hexdigest()]


def _lerobot_folder(entry: str, key: str, mapping: LeRobotConfig) -> LeRobotFolder:
    """The dataset that an entry names, downloaded where it is on the hub, with the settings that follow `?`."""
    name, question, settings = entry.removeprefix(LEROBOT).partition("?")
    if question:
        mapping = _with_settings(mapping, settings, f"{key}: {printable(entry)}")
    root = Path(name).expanduser()
    if root.is_dir():
        return LeRobotFolder(root, mapping)
    repository, _, revision = name.partition("@")
    if not HUB_ID.fullmatch(repository):
        raise DataError(f"{key}: {LEROBOT}{printable(name)}: no such folder; give a LeRobot dataset's, or owner/name")
    # Its own links lead from the snapshot to the files of the same download.
    return LeRobotFolder(_download(repository, revision or None, key), dataclasses.replace(mapping, follow_links=True))


def _with_settings(mapping: LeRobotConfig, settings: str, place: str) -> LeRobotConfig:
    """A mapping with what `cameras=a=image_1,b=image_2&prompt=open%20it` says."""
    fields = {field.name: field.type for field in dataclasses.fields(LeRobotConfig)}
    tree = dataclasses.asdict(mapping)
    for part in settings.split("&"):
        name, _, value = part.partition("=")
        value = unquote(value)
        if fields.get(name, "").startswith("tuple"):
            tree[name] = value.split(",")
        else:
            tree[name] = {"true": True, "false": False}.get(value, value)
    try:
        return build(LeRobotConfig, tree, "lerobot")
    except ConfigError as error:
        raise DataError(f"{place}: {error}") from None


def _download(repository: str, revision: str | None, key: str) -> Path:
    """The newest snapshot of a dataset on the hub, or where that is not reached the one of an earlier download."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = [f"{part}/**" for part in PARTS]
        folder = snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=patterns)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(
            f"{key}: {LEROBOT}{repository}: no such folder, nor could it be downloaded from the Hugging Face hub "
            f"({one_line(error).split('. ')[0][:200]}); give a folder, or correct owner/name or the network"
        ) from None
    logger.info("%s: %s is at %s", key, repository, folder)
    return Path(folder)


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()
