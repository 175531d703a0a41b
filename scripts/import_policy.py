"""Turn a published pi0 or pi0.5 policy into a checkpoint to train from (--init_checkpoint) and to evaluate.

    python scripts/import_policy.py --policy_dir pi0_base --output pi0_base.pth.tar

The folder is one of LeRobot (config.json, model.safetensors, processors, statistics) or of openpi's PyTorch layout
(assets/*/norm_stats.json), or the hub id of one. Tensors keep their number type in the file; whatever trains becomes
float32.
"""

from __future__ import annotations

if not __package__:
    import _repository  # noqa: F401

from inference.policy_files import local_folder
from inference.published import published_checkpoint
from utils.arguments import CommandParser, at_least, run_command
from utils.checkpoint import save_checkpoint


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--policy_dir", required=True, help="a folder or a hub id")
    parser.add_argument("--output", required=True, help="a new *.pth.tar file")
    parser.add_argument("--norm_stats", help="norm_stats.json to take instead of the folder's statistics")
    parser.add_argument("--variant", choices=("pi0", "pi05"), help="what the folder must hold; default: what it says")
    parser.add_argument("--tokenizer_name_or_path", help="default: the folder's own, else google/paligemma-3b-pt-224")
    parser.add_argument(
        "--vision_num_attention_heads", type=at_least(1), default=16, help="of SigLIP, which no file says"
    )
    args = parser.parse_args()
    checkpoint = published_checkpoint(
        local_folder(args.policy_dir),
        tokenizer_name_or_path=args.tokenizer_name_or_path,
        vision_num_attention_heads=args.vision_num_attention_heads,
        norm_stats=args.norm_stats,
        variant=args.variant,
    )
    save_checkpoint(checkpoint, args.output)
    data, head = checkpoint["config"]["data"], checkpoint["config"]["model"]["action_head_config"]
    print(
        f"wrote {args.output}: {sum(value.numel() for value in checkpoint['model'].values()):,} values; cameras "
        f"{', '.join(checkpoint['cameras'])}; state {data['state_dim']}, action {head['per_action_dim']} x "
        f"{head['horizon']} steps; {data['normalization_type']} normalization of {data['normalization_arithmetic']}; "
        f"prompts of {data['prompt_format']}"
    )


if __name__ == "__main__":
    run_command(main)
