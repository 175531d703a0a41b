"""Upload an exported policy to the Hugging Face hub, after checking that it is whole.

    python scripts/push_to_hub.py --folder my-policy --repo_id owner/name --dry_run
    python scripts/push_to_hub.py --folder my-policy --repo_id owner/name --private

--dry_run checks the folder and lists what would be sent; it needs no network and no account.
"""

from __future__ import annotations

import pathlib
import sys

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

if not __package__:
    import _repository  # noqa: F401

from inference.policy_files import MANIFEST, read_manifest
from utils.arguments import CommandParser


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="written by scripts/export_policy.py")
    parser.add_argument("--repo_id", required=True, help="owner/name")
    parser.add_argument("--private", action="store_true", help="only for those whom the owner lets in")
    parser.add_argument("--message", default="A policy trained with PaliGemma-VLA", help="of the commit")
    parser.add_argument("--dry_run", action="store_true", help="send nothing")
    args = parser.parse_args()
    validate_repo_id(args.repo_id)
    files = [*sorted(read_manifest(args.folder)["sha256"]), MANIFEST]
    for name in files:
        print(f"{(args.folder / name).stat().st_size:>14,} bytes  {name}")
    total = sum((args.folder / name).stat().st_size for name in files)
    if args.dry_run:
        print(f"would send {len(files)} files, {total:,} bytes, to {args.repo_id}")
        return
    api = HfApi()
    api.create_repo(args.repo_id, private=args.private, exist_ok=True)
    api.upload_folder(repo_id=args.repo_id, folder_path=args.folder, allow_patterns=files, commit_message=args.message)
    print(f"sent {len(files)} files, {total:,} bytes, to {args.repo_id}")


if __name__ == "__main__":
    try:
        main()
    except (HFValidationError, HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        sys.exit(f"error: the hub refused ({str(error).strip()}); log in with `hf auth login`, and check --repo_id")
    except ValueError as error:
        sys.exit(f"error: {error}")
