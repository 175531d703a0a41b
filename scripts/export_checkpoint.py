"""One file of a checkpoint that was saved in shards (training.checkpoint_format: shards), to carry elsewhere.

python scripts/export_checkpoint.py --checkpoint_path model_best.pth.tar --output_path policy.pth.tar
"""

from __future__ import annotations

from pathlib import Path

if not __package__:
    import _repository  # noqa: F401

from utils.arguments import CommandParser, run_command
from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint


def export_checkpoint(source: str | Path, output: str | Path) -> None:
    """Write the whole of a checkpoint into one file.

    Raises:
        CheckpointError: the source is missing or damaged, or the output exists or can't be written.
    """
    if Path(output).exists():
        raise CheckpointError(f"{output} exists; choose another --output_path, or remove it")
    checkpoint = load_checkpoint(source)
    save_checkpoint({key: value for key, value in checkpoint.items() if key not in ("format", "saved_at")}, output)


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--checkpoint_path", required=True)
    parser.add_argument("--output_path", required=True, help="*.pth.tar")
    args = parser.parse_args()
    export_checkpoint(args.checkpoint_path, args.output_path)
    print(args.output_path)


if __name__ == "__main__":
    run_command(main)
