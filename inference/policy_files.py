"""Reading a policy: a `*.pth.tar` file, a folder that scripts/export_policy.py wrote, a published pi0 or pi0.5
(`inference.published`), or the hub id of such a folder.

The exported folder, written by `inference.serving.export`; its files are checked by their digests before any is used:

    model.safetensors         weights, those that evaluation uses
    config.yaml               the resolved configuration
    statistics.json           normalization statistics per dataset
    training_data.json        what the training data look like (data/profile.py); absent in older exports
    alarm.json                when its uncertainty means that it will fail (`inference.alarm`); where it was calibrated
    backbone_config.json      architecture of the backbone
    preprocessor_config.json  image processor
    tokenizer/                tokenizer files
    README.md                 model card, with the metrics that were given
    policy.json               format, cameras, training step, and the SHA-256 digest of every other file

The alarm of a checkpoint file lies beside it, as `<checkpoint>.alarm.json`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file

from inference.alarm import Calibration, CalibrationError
from inference.published import published_checkpoint
from utils.checkpoint import FORMAT, CheckpointError, check_content, load_checkpoint
from utils.foreign_files import TOKENIZER_FILES, ForeignFileError, inside, read_json, read_yaml
from utils.hub import hub_options, is_local
from utils.misc import atomic_path
from utils.policy_folder import is_policy_folder
from utils.text import printable

logger = logging.getLogger(__name__)

MANIFEST, WEIGHTS, PROFILES = "policy.json", "model.safetensors", "training_data.json"
EARLIER_STAMP = "earlier_stamp"  # in policy.json: its own stamp before it listed another alarm; see `is_stamp_of`
BEST = "model_best"  # in the name of a run's best checkpoint
ALARM, ALARM_FORMAT = "alarm.json", "paligemma-vla-alarm/1"
SAME_WEIGHTS = ("step", "saved_at")  # of a checkpoint: an alarm is of the weights that say the same
PICKLES = {".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth", ".tar"}
DESCRIPTIONS = ("statistics.json", "backbone_config.json", "preprocessor_config.json")
NEEDED = frozenset({WEIGHTS, "config.yaml", *DESCRIPTIONS})
WRITTEN = NEEDED | {MANIFEST, PROFILES, ALARM, "README.md"} | {f"tokenizer/{name}" for name in TOKENIZER_FILES}
LEFT_ALONE = (".cache", ".git", ".gitattributes", "LICENSE", "LICENSE.md")  # beside a policy on the hub; never read
CARRIED = ("format", "step", "cameras", "base")  # plain values of a checkpoint that policy.json holds


def read_policy(name_or_path: str | Path, **published: Any) -> dict[str, Any]:
    """The checkpoint dict of a policy, and as `alarm` its calibrations (`read_alarm`); errors as the loaders.

    Args:
        name_or_path: a `*.pth.tar` file, an exported folder, the folder of a pi0 or pi0.5 policy of LeRobot or openpi,
            or the hub id of a folder.
        published: what such a pi0 or pi0.5 folder does not say; see `published_checkpoint`.

    Raises:
        ValueError: `published` for a policy of this program, which says all of it.
    """
    folder = local_folder(name_or_path)
    kept = sorted(folder.glob("*.pth.tar")) or sorted(folder.glob("checkpoints/*.pth.tar"))
    if kept and not (folder / MANIFEST).is_file():
        names = sorted((str(path.relative_to(folder)) for path in kept), key=lambda name: BEST not in name)
        raise CheckpointError(f"{folder} holds checkpoints; give one of them: {', '.join(names[:5])}")
    if is_policy_folder(folder):
        checkpoint = published_checkpoint(folder, **published)
    elif published:
        raise ValueError(
            f"{name_or_path}: {', '.join(published)} is for folders of LeRobot's and openpi's pi0 and pi0.5 "
            "policies, and this is none"
        )
    else:
        checkpoint = load_export(folder) if folder.is_dir() else load_checkpoint(folder, for_inference=True)
    return {**checkpoint, "alarm": read_alarm(folder, checkpoint)}


def read_alarm(policy: Path, checkpoint: Mapping[str, Any]) -> list[Calibration]:
    """The calibrations of a policy's alarm, each for other settings; none where nobody calibrated these weights.

    Args:
        policy: checkpoint file or folder.
        checkpoint: what it holds.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = _alarm_file(policy)
    if not path.is_file():
        return []
    try:
        content = read_json(path)
        if content["format"] != ALARM_FORMAT:
            raise CalibrationError(f"format is {printable(str(content['format']))}, wanted {ALARM_FORMAT}")
        made_with, calibrations = content["weights"], [Calibration(**entry) for entry in content["calibrations"]]
    except (ForeignFileError, KeyError, TypeError, CalibrationError) as error:
        raise CheckpointError(
            f"{path}: not of this program, or damaged ({printable(error)}); remove it, and calibrate again "
            "(scripts/calibrate_alarm.py)"
        ) from None
    if made_with != _weights_of(checkpoint):
        logger.warning("%s was calibrated with other weights than %s has now: it is not used", path, policy.name)
        return []
    return calibrations


def write_alarm(policy: Path, checkpoint: Mapping[str, Any], calibrations: Sequence[Calibration]) -> Path:
    """Keep calibrations with a policy, in place of its earlier ones; returns the file. Arguments as of `read_alarm`."""
    path, manifest = _alarm_file(policy), policy / MANIFEST
    entries = [asdict(calibration) for calibration in calibrations]
    content = {"format": ALARM_FORMAT, "weights": _weights_of(checkpoint), "calibrations": entries}
    listed = read_json(manifest) if policy.is_dir() and manifest.is_file() else None
    write_json(path, content)
    if listed is not None:
        listed["sha256"][ALARM] = digest(path)
        listed.setdefault(EARLIER_STAMP, _file_stamp(manifest))
        write_json(manifest, listed)
    return path


def _alarm_file(policy: Path) -> Path:
    return policy / ALARM if policy.is_dir() else policy.with_name(f"{policy.name}.{ALARM}")


def _weights_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    return {key: checkpoint.get(key) for key in SAME_WEIGHTS}


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON, whole or not at all; NaN is refused."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def local_folder(name_or_path: str | Path) -> Path:
    """The path itself, or where the hub repository of that id was downloaded to; CheckpointError where it can't be."""
    text = str(name_or_path)
    is_hub_id = not is_local(text) and "/" in text and not text.endswith(".tar")
    return _download(text) if is_hub_id else Path(text)


def policy_stamp(name_or_path: str | Path | None) -> list[float] | None:
    """[bytes, modification time] of a policy's weights, which tell whether it was replaced.

    None for a hub id, and for a folder that is no export.
    """
    path = Path(name_or_path) if name_or_path is not None else None
    if path is not None and path.is_dir():
        path = path / WEIGHTS if (path / MANIFEST).is_file() else None
    return None if path is None else _file_stamp(path)


def is_stamp_of(stamp: object, name_or_path: str | Path | None) -> bool:
    """Whether a result with this stamp is of the policy as it is now.

    Earlier versions stamped an exported folder by its policy.json, as it was before `write_alarm` changed it.
    """
    if stamp == policy_stamp(name_or_path):
        return True
    manifest = None if name_or_path is None else Path(name_or_path) / MANIFEST
    if stamp is None or manifest is None or not manifest.is_file():
        return False
    try:
        content = read_json(manifest)
    except ForeignFileError:
        return False
    return stamp in (_file_stamp(manifest), content.get(EARLIER_STAMP) if isinstance(content, dict) else None)


def restamped(result: Mapping[str, Any]) -> dict[str, Any]:
    """What an evaluation says of itself, with the stamp that its `checkpoint` has now, if that is the same policy."""
    stamp, policy = result.get("checkpoint_stamp"), result.get("checkpoint")
    known = stamp is not None and is_stamp_of(stamp, policy)
    return {**result, "checkpoint_stamp": policy_stamp(policy)} if known else dict(result)


def _file_stamp(path: Path) -> list[float] | None:
    return [path.stat().st_size, path.stat().st_mtime] if path.is_file() else None


def fingerprint(weights: Mapping[str, torch.Tensor]) -> str:
    """A short text that tells a policy's weights from others': a digest of the names, shapes and first values."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name]
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().reshape(-1)[:8].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_export(name_or_path: str | Path) -> dict[str, Any]:
    """The checkpoint dict of an exported folder, for `VLAModel.from_checkpoint`.

    Args:
        name_or_path: a folder, or the id of a Hugging Face hub repository, which is downloaded.

    Raises:
        CheckpointError: nothing there, a file that was changed, is missing or can't be read, or any pickled file.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        folder = _download(str(name_or_path))
    manifest = read_manifest(folder)
    try:
        weights = load_file(folder / WEIGHTS)
        config = read_yaml(folder / "config.yaml")
        statistics, backbone_config, image_processor = (read_json(folder / name) for name in DESCRIPTIONS)
        profiles = read_json(folder / PROFILES) if PROFILES in manifest["sha256"] else None
        tokenizer_files = {
            path.name: torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
            for path in sorted((folder / "tokenizer").iterdir())
            if path.stat().st_size
        }
    except (OSError, ForeignFileError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: can't be read ({printable(error)}); export it again") from None
    checkpoint = {
        **{key: manifest[key] for key in CARRIED},
        "model": weights,
        "config": config,
        "statistics": statistics,
        "backbone_config": backbone_config,
        "image_processor": image_processor,
        "tokenizer_files": tokenizer_files,
    }
    if profiles is not None:
        checkpoint["training_data"] = profiles
    check_content(checkpoint, folder)
    return checkpoint


def read_manifest(folder: Path) -> dict[str, Any]:
    """policy.json, after every file that it lists was found unchanged.

    Raises:
        CheckpointError: see `load_export`.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: no {MANIFEST} in it; give a folder that scripts/export_policy.py wrote, or a *.pth.tar file"
        )
    try:
        manifest = read_json(path)
    except ForeignFileError as error:
        raise CheckpointError(f"{path}: not readable ({error}); export it again") from None
    digests = manifest.get("sha256") if isinstance(manifest, dict) else None
    missing = [key for key in (*CARRIED, "sha256") if digests is None or key not in manifest]
    if missing or manifest["format"] != FORMAT or not isinstance(digests, dict):
        raise CheckpointError(f"{path}: not of this program; wanted format {FORMAT!r} and {', '.join(CARRIED)}, sha256")
    _check_names(folder, set(digests))
    for name in sorted(NEEDED | digests.keys()):
        if digest(folder / name) != digests.get(name):
            raise CheckpointError(
                f"{folder / name}: changed since it was exported (SHA-256 differs from {MANIFEST}); don't use it: "
                "export it again, or download it again"
            )
    _refuse_others(folder, set(digests))
    return manifest


def _check_names(folder: Path, listed: set[str]) -> None:
    """Check that what is needed and what is listed are files that `export_policy` writes, in the folder itself.

    Raises:
        CheckpointError: naming the file that is missing, lies elsewhere or is of no use to a policy.
    """
    pickled = [path.name for path in _files(folder) if path.suffix.lower() in PICKLES]
    if pickled:
        raise CheckpointError(f"{folder}: holds {pickled[0]}, a kind of file that may run code; nothing was loaded")
    # The hub's cache keeps a snapshot's files as links to the blobs beside it.
    root = folder.parent.parent if folder.parent.name == "snapshots" else folder
    for name in sorted(NEEDED | listed):
        path = inside(root, (folder / name).relative_to(root)) if name in WRITTEN else None
        if path is None or not path.is_file():
            raise CheckpointError(
                f"{folder}: {printable(name)} is missing, lies elsewhere, or is no file of a policy; export "
                "it again, or download it again"
            )
    if not (folder / "tokenizer").is_dir():
        raise CheckpointError(f"{folder}: tokenizer/ is missing; export it again, or download it again")


def _refuse_others(folder: Path, listed: set[str]) -> None:
    for path in _files(folder):
        name = path.relative_to(folder)
        if name.parts[0] not in LEFT_ALONE and str(name) not in listed | {MANIFEST, "README.md"}:
            raise CheckpointError(f"{folder}: {printable(name)} is not listed in {MANIFEST}; remove it")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())


def digest(path: Path) -> str:
    """The SHA-256 digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(repository: str) -> Path:
    try:
        ignored = [f"*{suffix}" for suffix in sorted(PICKLES)]
        return Path(snapshot_download(repository, ignore_patterns=ignored, **hub_options(repository)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{repository}: no such folder, nor such a policy on the hub ({reason}); give a *.pth.tar file, a folder "
            "that scripts/export_policy.py wrote, or owner/name"
        ) from None
