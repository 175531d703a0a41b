"""Write a checkpoint's policy as a folder to share: safetensors weights, readable files, a model card.

    python scripts/export_policy.py --checkpoint_path C --output_dir my-policy \\
        --metrics results/metrics.json results/rollouts.json

The folder loads with `VLAPredictor.from_pretrained`, and everywhere a --checkpoint_path is taken. --format lerobot or
openpi writes a pi0 or pi0.5 that those libraries load instead.
"""

from __future__ import annotations

from pathlib import Path

if not __package__:
    import _repository  # noqa: F401

from inference.policy_files import read_alarm
from inference.serving.export import export_policy
from inference.serving.export_published import export_published
from utils.arguments import CommandParser, run_command
from utils.checkpoint import load_checkpoint


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--checkpoint_path", required=True, help="*.pth.tar written by training")
    parser.add_argument("--output_dir", required=True, help="a new folder")
    parser.add_argument(
        "--format",
        choices=("policy", "lerobot", "openpi"),
        default="policy",
        help="policy: this program's; lerobot, openpi: a pi0 or pi0.5 for those libraries",
    )
    parser.add_argument("--metrics", nargs="+", default=[], help="metrics.json, rollouts.json of main_eval.py")
    args = parser.parse_args()
    checkpoint = load_checkpoint(args.checkpoint_path, for_inference=True)
    checkpoint["alarm"] = read_alarm(Path(args.checkpoint_path), checkpoint)
    if args.format == "policy":
        folder = export_policy(checkpoint, args.output_dir, args.metrics)
    elif args.metrics:
        parser.error(f"--metrics go into the model card of --format policy; {args.format} has none")
    else:
        folder = export_published(checkpoint, args.output_dir, args.format)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size:>14,} bytes  {path.relative_to(folder)}")
    print(f"wrote {folder}")


if __name__ == "__main__":
    run_command(main)
