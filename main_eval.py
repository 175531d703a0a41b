"""Evaluate a trained policy: over recorded data, on a single observation, or in closed loop in a simulator.

python main_eval.py --checkpoint_path C --eval_data_path demos/val --output_dir results --save_predictions
python main_eval.py --checkpoint_path C --split val                        # the episodes that its own config held out
python main_eval.py --checkpoint_path C --split val --sensitivity          # does it look, and at what?
python main_eval.py --checkpoint_path C --image1_paths frame.png --prompt "open the window" --state_vector "0 0.6 0.2 1"
python main_eval.py --checkpoint_path C --env metaworld --tasks window-open-v3 --episodes 20 --seed 10000 [--blind]
python main_eval.py --checkpoint_path C --env metaworld --tasks window-open-v3 --record rollouts  # to train on later
python main_eval.py --env metaworld --tasks window-open-v3 --control replay --demos_path demos/train
python main_eval.py --checkpoint_path C --split val --html report.html     # one page; in closed loop too
"""

from __future__ import annotations

import argparse
import functools
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from data.convert.rollouts import RolloutRecorder
from data.episode_store import recorded_actions
from data.loader import make_loader, open_for_evaluation
from data.viewer import DatasetEpisodes, rollout_episodes
from envs import FIRST_EVALUATION_SEED, SIMULATORS, env_maker, expand_tasks
from inference.closed_loop.evaluation import evaluate_closed_loop
from inference.closed_loop.page import read_evaluation, rollout_page
from inference.eval_args import parse_args
from inference.offline import evaluate_recorded, evaluate_single
from inference.predictor import VLAPredictor
from inference.report import finish, rollout_table
from utils.misc import errors_in_one_line, set_up_logging
from utils.page.build import write_page

logger = logging.getLogger(__name__)


def evaluate_data(args: argparse.Namespace, predictor: VLAPredictor) -> None:
    """Batch mode: metrics.json, inference_log.txt, plots; predictions.csv and sensitivity.json when asked for."""
    config, processors = predictor.config, (predictor.image_processor, predictor.prompt_tokenizer)
    workers, data = config.data.num_workers if args.num_workers is None else args.num_workers, {}
    datasets = open_for_evaluation(config, *processors, args.eval_data_path, predictor.dataset_index)
    for name, dataset in datasets.items():
        logger.info("%s: %d episodes, %d samples", name, len(dataset.episodes), len(dataset))
        data[name] = dataset, make_loader(dataset, num_workers=workers, batch_size=args.batch_size)
    evaluate_recorded(args, predictor, data, load_predictor, DatasetEpisodes)


def predict_single(args: argparse.Namespace, predictor: VLAPredictor) -> None:
    """Single-item mode: one chunk of actions, printed, and written when asked for."""
    evaluate_single(args, predictor, load_predictor)


def roll_out(args: argparse.Namespace, predictor: VLAPredictor | None) -> None:
    """Closed-loop mode: episodes.jsonl, rollouts.json and videos."""
    tasks, simulator = expand_tasks(args.env, args.tasks), SIMULATORS[args.env]
    beside = [read_evaluation(Path(folder), tasks) for folder in args.beside or []]
    if args.image_size is not None:
        args.options["image_size"] = args.image_size
    wanted = (predictor.image_processor.height, predictor.cameras) if predictor else ()
    make = env_maker(args.env, args.options, *wanted)
    args.options = make.keywords
    tiers = {task: simulator.group_of(task) for task in tasks}
    first = FIRST_EVALUATION_SEED if args.seed is None else args.seed
    seeds = range(first, first + args.episodes)
    demonstrations = functools.partial(recorded_actions, args.demos_path, "--demos_path")
    recorder = RolloutRecorder(Path(args.record)) if args.record else None
    result = evaluate_closed_loop(args, predictor, tiers, seeds, make, demonstrations, recorder)
    paths = [Path(args.output_dir) / "rollouts.json"]
    if args.html:
        main = read_evaluation(Path(args.output_dir))
        shown = rollout_episodes(recorder.path, main.lines) if recorder else []
        write_page(args.html, rollout_page(main, beside, shown))
        paths.insert(0, args.html)
    videos = [video for task in result["tasks"].values() for video in task["videos"]]
    finish(rollout_table(result), [*paths, *videos], args.log_file)


def load_predictor(args: argparse.Namespace, **settings: str) -> VLAPredictor:
    """The policy that the flags describe; `settings` overrule theirs."""
    where = args.checkpoint_path, args.device, args.dataset
    return VLAPredictor.from_checkpoint(*where, use_amp=args.use_amp, **{**args.settings, **settings})


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv, __doc__)
    set_up_logging(args.log_file)
    predictor, num_threads = None, args.num_threads
    if args.checkpoint_path is not None:
        predictor = load_predictor(args)
        num_threads = num_threads or predictor.config.training.num_threads
        logger.info("%s on %s, computing in %s", args.checkpoint_path, predictor.device, predictor.model.compute_dtype)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    modes = {"eval_data_path": evaluate_data, "image1_paths": predict_single, "env": roll_out}
    modes[args.mode](args, predictor)


if __name__ == "__main__":
    again = "stopped; in closed loop the same command goes on after the episodes that it finished"
    with errors_in_one_line(ValueError, ImportError, RuntimeError, OSError, interrupted=again):
        main()
