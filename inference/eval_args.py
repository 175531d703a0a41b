"""The command line of main_eval.py: three modes, chosen by which flags are given.

What there is to know about a flag is said where it is added: which mode reads it, whether it is about a policy, its
least value, what it is when nobody gives it. Flags that are settings of inference are made from their fields.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.arguments import CommandParser, output_file
from utils.cli import add_setting_flags, key_values
from utils.config_utils import ConfigError, InferenceConfig

MODES = {  # the flag that chooses a mode -> the heading of its flags
    "eval_data_path": "over recorded data",
    "image1_paths": "a single observation",
    "env": "closed loop",
}
NEGATIVE = re.compile(r"-[.\d]")  # no flag begins so
SEPARATORS = str.maketrans(",;[]()", "      ")  # of numbers, as Python, NumPy and JSON print them
# Settings of `inference` that are flags: in every mode, and in closed loop alone.
SETTINGS = ("num_inference_steps", "best_of", "compile", "quantization", "expert_quantization")
LOOP_SETTINGS = ("n_action_steps", "execution", "latency_steps")


class Rule(NamedTuple):
    """What argparse does not know about a flag.

    Attributes:
        mode: the only mode that reads it; None: every mode.
        policy: it says something about a policy, and has no meaning where none runs (--control).
        least: the least number that it takes.
        default: its value where it is not given.
    """

    mode: str | None = None
    policy: bool = False
    least: int | None = None
    default: Any = None


class _EvalParser:
    """The flags and their rules."""

    def __init__(self, description: str | None) -> None:
        self.parser = CommandParser(description)
        self.groups = {mode: self.parser.add_argument_group(title) for mode, title in MODES.items()}
        self.rules: dict[str, Rule] = {}

    def add(
        self,
        name: str,
        mode: str | None = None,
        *,
        policy: bool = False,
        least: int | None = None,
        default: Any = None,
        **options: Any,
    ) -> None:
        """Add --name; `options` are argparse's."""
        self.rules[name] = Rule(mode, policy, least, default)
        if least is not None:
            options["type"] = int
        self.groups.get(mode, self.parser).add_argument(f"--{name}", default=None, **options)

    def add_settings(self, names: Sequence[str], mode: str | None = None) -> None:
        """Add a flag for each of these settings of inference."""
        add_setting_flags(self.groups.get(mode, self.parser), InferenceConfig, names)
        self.rules |= dict.fromkeys(names, Rule(mode, policy=True))

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The flags, checked against their rules, defaults filled in, with `mode`."""
        args = self.parser.parse_args(_with_numbers_shielded(sys.argv[1:] if argv is None else argv))
        chosen = [mode for mode in MODES if getattr(args, mode)]
        chosen += ["split"] if args.split else []
        chosen += ["image1_paths"] if args.image_paths and not args.image1_paths else []
        if len(chosen) != 1:
            found = " and ".join(f"--{mode}" for mode in chosen) or "none of them"
            self.parser.error(
                f"give one of --eval_data_path, --split val, --image1_paths or --image_paths, --env; found {found}"
            )
        chosen = ["eval_data_path"] if args.split else chosen
        args.mode = chosen[0]
        for name, rule in self.rules.items():
            value = getattr(args, name)
            if value is None:
                setattr(args, name, rule.default)
            elif rule.mode not in (None, args.mode):
                self.parser.error(f"--{name} belongs to --{rule.mode}, not to --{args.mode}")
            elif rule.policy and args.control is not None:
                self.parser.error(f"--{name} has no meaning with --control {args.control}, which runs no policy")
            elif rule.least is not None and value < rule.least:
                self.parser.error(f"--{name} is {value}; give {rule.least} or more")
        return args


def parse_args(argv: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """Read the command line; combinations that contradict or lack something end the program with a usage error.

    Returns:
        The flags, and beside them `mode` (the key of MODES that was given), `settings` (of `inference`, those that were
        given), `options` (the environment's keyword arguments from --env_options), `state` (the numbers of
        --state_vector, or None), `images` (camera -> paths of --image_paths, or None) and `log_file` (None in a mode
        that keeps no log).

    Raises:
        ConfigError: --state_vector holds something else than numbers, --image_paths something else than cameras.
    """
    flags = _EvalParser(description)
    _add_flags(flags)
    args, parser = flags.parse(argv), flags.parser
    if args.checkpoint_path is None and args.control is None:
        parser.error("--checkpoint_path is missing; give a *.pth.tar file (only --control runs without a policy)")
    if len(set(args.eval_data_path or [])) < len(args.eval_data_path or []):
        parser.error("--eval_data_path names a path twice; every sample would count twice")
    if args.num_maps is not None and not args.sensitivity:
        parser.error("--num_maps draws the maps of --sensitivity; give that as well")
    if args.mode == "image1_paths" and args.prompt is None:
        parser.error("--prompt is missing; a policy needs an instruction")
    if args.html and args.mode == "image1_paths":
        parser.error("--html shows an evaluation; a single observation has none")
    args.blind = True if args.blind == [] else args.blind
    if args.mode == "env":
        _check_closed_loop(args, parser)
    args.state = _numbers(args.state_vector)
    args.images = _image_paths(args.image_paths)
    args.log_file = None if args.mode == "image1_paths" else Path(args.output_dir) / "inference_log.txt"
    given = {name: getattr(args, name) for name in (*SETTINGS, *LOOP_SETTINGS)}
    args.settings = {name: value for name, value in given.items() if value is not None}
    try:
        InferenceConfig(**args.settings)
    except ConfigError as error:
        parser.error(str(error).replace("inference.", "--"))
    try:
        args.options = key_values(args.env_options or [], "--env_options")
    except ConfigError as error:
        parser.error(str(error))
    if args.image_size is not None and "image_size" in args.options:
        parser.error("--image_size and --env_options image_size=... say the same; give one of them")
    return args


def _add_flags(flags: _EvalParser) -> None:
    add, switch = flags.add, {"action": "store_true"}
    add("checkpoint_path", policy=True, help="*.pth.tar written by training; not needed with --control")
    add("output_dir", default="eval_results", help="folder to write to (default eval_results)")
    add("save_predictions", default=False, **switch, help="write predictions.csv, or actions.json and actions.csv")
    add("html", type=output_file, help="page to write: results, episodes to scrub through, videos")
    add("device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("use_amp", action=argparse.BooleanOptionalAction, help="bfloat16 autocast; default: as trained")
    flags.add_settings(SETTINGS)
    add("seed", least=0, help="of the noise (default 0), or of the first episode (default 10000)")
    add("dataset", help="for a policy trained on a mixture: the dataset whose statistics and widths apply")
    add("num_threads", least=1, help="CPU threads of torch; default: the checkpoint's training.num_threads")

    data = "eval_data_path"
    add("eval_data_path", data, nargs="+", metavar="P", help="Parquet files, folders or globs; one dataset each")
    help_text = "instead of --eval_data_path: the validation data of the checkpoint's config, held-out episodes alone"
    add("split", data, choices=("val",), help=help_text)
    add("batch_size", data, least=1, default=16, help="default 16")
    add("num_workers", data, least=0, help="loader processes; default: the checkpoint's data.num_workers")
    help_text = "draws per observation, for spread and best-of-k; default 1: neither"
    add("num_samples", data, least=1, default=1, help=help_text)
    add("num_plots", data, least=0, default=3, help="episodes per dataset to plot; default 3")
    help_text = "how far actions move when cameras, state or instruction change, over N observations (default 256)"
    add("sensitivity", data, least=1, nargs="?", const=256, metavar="N", help=help_text)
    help_text = "frames of which --sensitivity draws occlusion maps, default 3"
    add("num_maps", data, least=0, help=help_text)

    single = "image1_paths"
    add("image1_paths", single, nargs="+", metavar="IMAGE", help="frames of camera 1, oldest first")
    add("image2_paths", single, nargs="+", metavar="IMAGE", help="frames of camera 2")
    help_text = "frames of any camera, oldest first; alone or beside the two"
    add("image_paths", single, nargs="+", metavar="CAMERA=IMAGE,...", help=help_text)
    add("prompt", single, help="the instruction")
    help_text = 'physical units; "0.1 0.2 ..." or several arguments'
    add("state_vector", single, nargs="+", metavar="X", help=help_text)

    loop = "env"
    add("env", loop, help="simulator: a key of envs.SIMULATORS, e.g. metaworld")
    add("tasks", loop, nargs="+", metavar="TASK", help="names, a group (a tier, a suite), or all")
    help_text = "simulator processes, with one policy for all; default 1; try two a core"
    add("num_envs", loop, least=1, default=1, help=help_text)
    add("restart", loop, default=False, **switch, help="discard the episodes that --output_dir holds")
    add("episodes", loop, least=1, default=20, help="per task; default 20")
    help_text = "feed grey images of all cameras, or of these, and the mean state: what does the policy do without?"
    add("blind", loop, policy=True, default=False, nargs="*", metavar="CAMERA|state", help=help_text)
    help_text = "no policy: replay a demonstration, or the expert"
    add("control", loop, choices=("replay", "expert"), help=help_text)
    add("demos_path", loop, nargs="+", metavar="P", help="training demonstrations for --control replay")
    flags.add_settings(LOOP_SETTINGS, loop)
    add("image_size", loop, least=1, help="pixels; default: what the policy was trained on")
    add("num_videos", loop, least=0, default=3, help="episodes per task to film; default 3")
    help_text = "with --html: other evaluations' --output_dir to show beside this one, such as controls"
    add("beside", loop, nargs="+", metavar="DIR", help=help_text)
    help_text = "keep what was seen, planned and done: one Parquet file an episode, to train on"
    add("record", loop, metavar="DIR", help=help_text)
    add("prompt_override", loop, policy=True, metavar="TEXT", help="give every task this instruction")
    help_text = "give each task its Nth paraphrase, of those that the simulator has"
    add("paraphrase", loop, policy=True, least=1, metavar="N", help=help_text)
    help_text = "give each task the instruction of the next one that has another"
    add("swap_prompts", loop, policy=True, default=False, **switch, help=help_text)
    add("env_options", loop, nargs="+", metavar="KEY=VALUE", help="e.g. camera=corner2 hide_goal=true")


def _with_numbers_shielded(argv: Sequence[str]) -> list[str]:
    """The command line with a space before negative numbers: argparse takes -2.5e-05 and -1,2 for flags."""
    return [f" {word}" if NEGATIVE.match(word) else word for word in argv]


def _numbers(texts: Sequence[str] | None) -> list[float] | None:
    """Numbers in one text or several, between spaces or commas, in brackets or not."""
    if texts is None:
        return None
    try:
        return [float(text) for text in " ".join(texts).translate(SEPARATORS).split()]
    except ValueError as error:
        raise ConfigError(f"--state_vector: {error}; give numbers separated by spaces or commas") from None


def _image_paths(texts: Sequence[str] | None) -> dict[str, list[str]] | None:
    """`["wrist=a.png,b.png"]` as {"wrist": ["a.png", "b.png"]}."""
    if texts is None:
        return None
    images: dict[str, list[str]] = {}
    for text in texts:
        camera, _, paths = text.partition("=")
        if not camera or not paths.strip(","):
            raise ConfigError(f"--image_paths {text!r}: wanted <camera>=<image>,<image>, as in wrist=a.png,b.png")
        if camera in images:
            raise ConfigError(f"--image_paths {text!r}: {camera} is given twice; list its frames with commas")
        images[camera] = [path for path in paths.split(",") if path]
    return images


def _check_closed_loop(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.beside and not args.html:
        parser.error("--beside belongs to --html, the page that shows them")
    folders = [Path(folder).resolve() for folder in (args.output_dir, *(args.beside or []))]
    if len(set(folders)) < len(folders):
        parser.error("--beside names a folder twice, or --output_dir; name each other evaluation once")
    if args.record and args.blind:
        parser.error("--record would keep pictures that the policy of --blind does not see; give one of them")
    if not args.tasks:
        parser.error("--tasks is missing; name at least one task of the simulator")
    if (args.control == "replay") != bool(args.demos_path):
        parser.error("--control replay and --demos_path go together: the demonstrations to play back")
    prompts = {name: getattr(args, name) for name in ("swap_prompts", "prompt_override", "paraphrase")}
    given = [f"--{name}" for name, value in prompts.items() if value not in (None, False)]
    if len(given) > 1:
        parser.error(f"{' and '.join(given)} contradict each other")
