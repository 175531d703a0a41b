"""The command line of main_eval.py: three modes, chosen by which flags are given."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import yaml

from inference.closed_loop.execution import EXECUTION_STRATEGIES
from utils.config_reader import choices
from utils.config_utils import InferenceConfig

MODE_FLAGS = {  # the flag that chooses a mode, and those that only that mode reads
    "eval_data_path": ("batch_size", "num_workers", "num_plots", "num_samples"),
    "image1_paths": ("image2_paths", "prompt", "state_vector"),
    "env": (
        "tasks",
        "episodes",
        "blind",
        "control",
        "demos_path",
        "n_action_steps",
        "execution",
        "latency_steps",
        "image_size",
        "num_videos",
        "prompt_override",
        "swap_prompts",
        "env_options",
        "num_envs",
        "restart",
    ),
}
POSITIVE_FLAGS = (
    "num_threads",
    "num_inference_steps",
    "batch_size",
    "num_samples",
    "episodes",
    "n_action_steps",
    "image_size",
    "num_envs",
)
POLICY_FLAGS = (
    "checkpoint_path",
    "blind",
    "prompt_override",
    "swap_prompts",
    "n_action_steps",
    "num_inference_steps",
    "compile",
    "quantization",
    "execution",
    "latency_steps",
)


def parse_args(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    """Read the command line; combinations that contradict or lack something end the program with a usage error.

    Returns:
        The flags, `mode` (the key of MODE_FLAGS that was given) and, in closed loop, `options`: the
        environment's keyword arguments from --env_options.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint_path", help="*.pth.tar written by training; not needed with --control")
    add("--output_dir", default="eval_results")
    add("--save_predictions", action="store_true", help="write predictions.csv, or actions.json and actions.csv")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--use_amp", action=argparse.BooleanOptionalAction, help="bfloat16 autocast; default: as trained")
    add("--num_inference_steps", type=int, help="sampling steps; default: the checkpoint's")
    add("--compile", choices=choices(InferenceConfig, "compile"), help="how predictions run; default: the checkpoint's")
    add("--quantization", choices=choices(InferenceConfig, "quantization"), help="storage of the backbone's matrices")
    add("--seed", type=int, help="of the noise (default 0), or of the first episode (default 10000)")
    add("--dataset", help="for a policy trained on a mixture: the dataset whose statistics and widths apply")
    add("--num_threads", type=int, help="CPU threads of torch; default: the checkpoint's training.num_threads")
    batch = parser.add_argument_group("over recorded data").add_argument
    batch("--eval_data_path", nargs="+", metavar="P", help="Parquet files, folders or globs; one dataset each")
    batch("--batch_size", type=int, help="default 16")
    batch("--num_workers", type=int, help="loader processes; default: the checkpoint's data.num_workers")
    batch("--num_samples", type=int, help="draws per observation, for spread and best-of-k; default 1: neither")
    batch("--num_plots", type=int, help="episodes per dataset to plot; default 3")
    single = parser.add_argument_group("a single observation").add_argument
    single("--image1_paths", nargs="+", metavar="IMAGE", help="frames of camera 1, oldest first")
    single("--image2_paths", nargs="+", metavar="IMAGE", help="frames of camera 2")
    single("--prompt", help="the instruction")
    single("--state_vector", nargs="+", metavar="X", help='physical units; "0.1 0.2 ..." or several arguments')
    loop = parser.add_argument_group("closed loop").add_argument
    loop("--env", help="simulator, e.g. metaworld")
    loop("--tasks", nargs="+", metavar="TASK", help="names, a tier (easy, medium, hard, very_hard), or all")
    loop("--num_envs", type=int, help="simulator processes, with one policy for all; default 1; try two a core")
    loop("--restart", action="store_true", default=None, help="discard the episodes that --output_dir holds")
    loop("--episodes", type=int, help="per task; default 20")
    loop("--blind", action="store_true", default=None, help="feed grey images: what the policy does without looking")
    loop(
        "--control",
        choices=("replay", "expert"),
        help="no policy: replay a demonstration, or the expert",
    )
    loop("--demos_path", nargs="+", metavar="P", help="training demonstrations for --control replay")
    loop("--n_action_steps", type=int, help="actions executed per prediction; default: the checkpoint's")
    loop("--execution", choices=tuple(EXECUTION_STRATEGIES), help="how chunks are executed; default: the checkpoint's")
    loop("--latency_steps", type=int, help="control steps that every prediction takes; default: the checkpoint's")
    loop("--image_size", type=int, help="pixels; default: what the policy was trained on")
    loop("--num_videos", type=int, help="episodes per task to film; default 3")
    loop("--prompt_override", metavar="TEXT", help="give every task this instruction")
    loop("--swap_prompts", action="store_true", default=None, help="give each task the next task's instruction")
    loop("--env_options", nargs="+", metavar="KEY=VALUE", help="e.g. camera=corner2 hide_goal=true")
    args = parser.parse_args(argv)

    given = [flag for flag in MODE_FLAGS if getattr(args, flag)]
    if len(given) != 1:
        found = " and ".join(f"--{flag}" for flag in given) or "none of them"
        parser.error(f"give one of --eval_data_path, --image1_paths, --env; found {found}")
    args.mode = given[0]
    for mode, flags in MODE_FLAGS.items():
        for flag in flags:
            if mode != args.mode and getattr(args, flag) is not None:
                parser.error(f"--{flag} belongs to --{mode}, not to --{args.mode}")
    if args.checkpoint_path is None and args.control is None:
        parser.error("--checkpoint_path is missing; give a *.pth.tar file (only --control runs without a policy)")
    if len(set(args.eval_data_path or [])) < len(args.eval_data_path or []):
        parser.error("--eval_data_path names a path twice; every sample would count twice")
    for flag in POSITIVE_FLAGS:
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag} is {getattr(args, flag)}; give 1 or more")
    if args.latency_steps is not None and args.latency_steps < 0:
        parser.error(f"--latency_steps is {args.latency_steps}; give 0 or more control steps")
    if args.mode == "image1_paths" and args.prompt is None:
        parser.error("--prompt is missing; a policy needs an instruction")
    if args.mode == "env":
        _check_closed_loop(args, parser)
    return args


def _check_closed_loop(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if not args.tasks:
        parser.error("--tasks is missing; name at least one task of the simulator")
    if args.control is not None:
        for flag in POLICY_FLAGS:
            if getattr(args, flag) is not None:
                parser.error(f"--{flag} has no meaning with --control {args.control}, which runs no policy")
    if (args.control == "replay") != bool(args.demos_path):
        parser.error("--control replay and --demos_path go together: the demonstrations to play back")
    if args.swap_prompts and args.prompt_override is not None:
        parser.error("--swap_prompts and --prompt_override contradict each other")
    if args.swap_prompts and len(args.tasks) < 2:
        parser.error("--swap_prompts needs at least two --tasks")
    args.options = {}
    for item in args.env_options or []:
        key, equals, text = item.partition("=")
        if not equals:
            parser.error(f"--env_options {item}: no '='; write key=value")
        args.options[key] = yaml.safe_load(text)
