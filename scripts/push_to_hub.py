"""Upload an exported policy or a dataset to the Hugging Face hub, after checking that it is whole.

    python scripts/push_to_hub.py --folder my-policy --repo_id owner/name --dry_run
    python scripts/push_to_hub.py --folder my-policy --repo_id owner/name --private
    python scripts/push_to_hub.py --dataset demos/train --repo_id owner/name --license cc-by-4.0 --dry_run

--dry_run checks the folder and lists what would be sent; it needs no network and no account. A dataset is examined as
inspect_parquet.py does, and errors keep it from being sent. Its card has the numbers that were found, and where the
files' metadata say they come from; a README.md in the folder is sent in its place.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

if not __package__:
    import _repository  # noqa: F401

from data.dataset_card import dataset_card
from data.doctor.examine import examine
from inference.policy_files import MANIFEST, read_manifest
from utils.arguments import CommandParser
from utils.hub import unreachable
from utils.parquet_utils import files_below, one_line

CARD = "README.md"


class UnreachableError(ValueError):
    """The hub does not answer, or stopped answering."""


def main(argv: list[str] | None = None) -> None:
    parser = CommandParser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--folder", type=pathlib.Path, help="a policy, written by scripts/export_policy.py")
    what.add_argument("--dataset", type=pathlib.Path, help="a folder of Parquet files")
    parser.add_argument("--repo_id", required=True, help="owner/name")
    parser.add_argument("--private", action="store_true", help="only for those whom the owner lets in")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--license", help="of a dataset, as the hub calls it, for its card")
    parser.add_argument(
        "--num_workers", type=int, help="processes that check a dataset's frames; default: one per core"
    )
    parser.add_argument("--dry_run", action="store_true", help="send nothing")
    args = parser.parse_args(argv)
    validate_repo_id(args.repo_id)
    if args.folder is not None and (args.license or args.num_workers is not None):
        parser.error("--license and --num_workers are about a --dataset")
    if not args.dry_run and (problem := unreachable()) is not None:
        raise UnreachableError(f"{problem}; connect to it, or see with --dry_run what would be sent")
    contents = _policy(args.folder) if args.folder is not None else _dataset(args)
    sizes = {name: len(part) if isinstance(part, bytes) else part.stat().st_size for name, part in contents.items()}
    for name, size in sizes.items():
        print(f"{size:>14,} bytes  {name}")
    total = f"{len(sizes)} files, {sum(sizes.values()):,} bytes, to {args.repo_id}"
    if args.dry_run:
        print(f"would send {total}")
        return
    _send(contents, args)
    print(f"sent {total}")


def _send(contents: dict[str, pathlib.Path | bytes], args: argparse.Namespace) -> None:
    """
    Raises:
        UnreachableError: the connection broke off.
    """
    kind = "model" if args.folder is not None else "dataset"
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=part if isinstance(part, bytes) else str(part))
        for name, part in contents.items()
    ]
    default = "A policy trained with PaliGemma-VLA" if kind == "model" else "Episodes for PaliGemma-VLA"
    try:
        api = HfApi()
        api.create_repo(args.repo_id, private=args.private, exist_ok=True, repo_type=kind)
        api.create_commit(args.repo_id, operations, commit_message=args.message or default, repo_type=kind)
    except (OSError, ValueError, RuntimeError):
        raise  # those of the hub's client itself
    except Exception as error:  # of whichever library it takes its sessions from
        raise UnreachableError(
            f"the connection to the hub broke off ({one_line(error)}); run the command again"
        ) from None


def _policy(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Name on the hub -> file, of an exported policy."""
    return {name: folder / name for name in [*sorted(read_manifest(folder)["sha256"]), MANIFEST]}


def _dataset(args: argparse.Namespace) -> dict[str, pathlib.Path | bytes]:
    """Name on the hub -> file, or the card's text.

    Raises:
        ValueError: the folder holds no Parquet file, or the examination found an error.
    """
    files = files_below(args.dataset, (".parquet",), "--dataset")
    if not files:
        raise ValueError(f"--dataset {args.dataset}: holds no Parquet file")
    seen = examine(files, num_workers=args.num_workers, sources={"train": [str(args.dataset)]})
    if not seen.may_train:
        first = seen.findings.ordered()[0]
        raise ValueError(
            f"{first.file}: {first.kind}: {first.message}; {first.command or first.remedy} (python inspect_parquet.py "
            f"--data_path {args.dataset} lists all {seen.findings.count('error')} errors)"
        )
    contents: dict[str, pathlib.Path | bytes] = {path.relative_to(args.dataset).as_posix(): path for path in files}
    card = args.dataset / CARD
    if card.is_file() and args.license:
        raise ValueError(f"--license goes into the card, but {card} is sent in its place; write the license there")
    name = args.repo_id.rpartition("/")[2]
    contents[CARD] = card if card.is_file() else dataset_card(name, files, seen, args.license).encode()
    return contents


if __name__ == "__main__":
    try:
        main()
    except (HFValidationError, HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        sys.exit(f"error: the hub refused ({str(error).strip()}); log in with `hf auth login`, and check --repo_id")
    except ValueError as error:
        sys.exit(f"error: {error}")
