"""Will a config fit? Parameters and expected memory of training, without weights, data or a GPU.

    python scripts/estimate_memory.py --config_path configs/vla_lora.yaml \\
        --model_name_or_path configs/paligemma-3b-pt-224

Only the backbone's config.json is read; configs/paligemma-3b-pt-224 holds that of google/paligemma-3b-pt-224. With
weights and data at hand, `main_train.py --dry_run` also runs one step and measures it.
"""

from __future__ import annotations

if not __package__:
    import _repository  # noqa: F401

from training.fit_estimate import estimate_report, meta_policy
from utils.arguments import CommandParser, at_least, run_command
from utils.config_utils import load_config


def main(arguments: list[str] | None = None) -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--config_path", required=True)
    parser.add_argument("--model_name_or_path", help="backbone: directory or hub id; its config.json is enough")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="section.key=value", dest="set_args")
    parser.add_argument("--world_size", type=at_least(1), default=1, help="processes that share a batch (default 1)")
    args = parser.parse_args(arguments)
    overrides = {"model.vlm_config.model_name_or_path": args.model_name_or_path}
    config = load_config(args.config_path, overrides, args.set_args)
    print(estimate_report(meta_policy(config), config, args.world_size))


if __name__ == "__main__":
    run_command(main)
