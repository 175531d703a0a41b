"""Write a small real PaliGemma directory: config, random weights, tokenizer, image processor.

The directory has the layout of the published checkpoints, so `model.vlm_config.model_name_or_path` may name
either. It is for quickstarts and tests: weights are random, and everything trains from scratch.

    python scripts/make_tiny_paligemma.py --output_dir weight/tiny-paligemma

The defaults are the quickstart's: SigLIP 96 wide x 3 layers at 96 px, Gemma 96 wide x 2 layers, a tokenizer trained
on the instructions of Meta-World's 50 tasks.
"""

from __future__ import annotations

if not __package__:
    import _repository  # noqa: F401

from model.tiny.paligemma import make_tiny_paligemma
from scripts._tiny import add_tiny_flags, take_prompts
from utils.arguments import CommandParser, at_least, run_command


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--version", type=int, choices=(1, 2), default=1)
    parser.add_argument("--sliding_window", type=at_least(1), default=4096, help="version 2 only")
    add_tiny_flags(parser, make_tiny_paligemma, besides=("version", "sliding_window"))
    args = vars(parser.parse_args())
    prompts = take_prompts(args)
    parameters = make_tiny_paligemma(prompts=prompts, **args)
    output_dir = args["output_dir"]
    print(
        f"{output_dir}: PaliGemma {args['version']}, {parameters:,} parameters, tokenizer from {len(prompts)} prompts"
    )
    print(f"next: python main_train.py --config_path configs/quickstart.yaml --model_name_or_path {output_dir}")


if __name__ == "__main__":
    run_command(main)
