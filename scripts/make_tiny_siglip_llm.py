"""Write a small real SigLIP directory and a small real Qwen2 directory: config, random weights, and their processors.

Both have the layout of the published checkpoints (google/siglip-base-patch16-224, Qwen/Qwen2.5-0.5B), so that
`model.vlm_config.vision_model_name_or_path` and `language_model_name_or_path` may name either. They are for
quickstarts and tests: weights are random, and everything trains from scratch.

    python scripts/make_tiny_siglip_llm.py --output_dir weight/tiny-siglip-llm      # .../siglip and .../qwen2

The defaults are of the quickstart's size: SigLIP 96 wide x 3 layers at 96 px, Qwen2 96 wide x 2 layers, a tokenizer
trained on the instructions of Meta-World's 50 tasks.
"""

from __future__ import annotations

if not __package__:
    import _repository  # noqa: F401

from model.tiny.siglip_llm import make_tiny_qwen2, make_tiny_siglip, make_tiny_siglip_llm
from scripts._tiny import add_tiny_flags, take_prompts
from utils.arguments import CommandParser, run_command


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--output_dir", required=True, help="gets the folders siglip and qwen2")
    add_tiny_flags(parser, make_tiny_siglip, make_tiny_qwen2)
    args = vars(parser.parse_args())
    prompts = take_prompts(args)
    parameters = make_tiny_siglip_llm(prompts=prompts, **args)
    output_dir = args["output_dir"]
    print(f"{output_dir}: siglip and qwen2, {parameters:,} parameters, tokenizer from {len(prompts)} prompts")
    print(
        "next: python main_train.py --config_path configs/quickstart.yaml --set model.vlm_config.type=siglip_llm "
        f"model.vlm_config.vision_model_name_or_path={output_dir}/siglip "
        f"model.vlm_config.language_model_name_or_path={output_dir}/qwen2 "
        "model.vlm_config.fusion.hidden_dim=96 model.vlm_config.fusion.num_heads=4"
    )


if __name__ == "__main__":
    run_command(main)
