"""Evaluate a trained policy: over recorded data, on a single observation, or in closed loop in a simulator.

python main_eval.py --checkpoint_path C --eval_data_path demos/val --output_dir results --save_predictions
python main_eval.py --checkpoint_path C --image1_paths frame.png --prompt "open the window" --state_vector "0 0.6 0.2 1"
python main_eval.py --checkpoint_path C --env metaworld --tasks window-open-v3 --episodes 20 --seed 10000 [--blind]
python main_eval.py --env metaworld --tasks window-open-v3 --control replay --demos_path demos/train
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.episode_store import EpisodeStore
from data.loader import VLADataset, make_loader
from data.processing import Batch, ObservationError
from envs import FIRST_EVALUATION_SEED, make_env
from inference.eval_args import parse_args
from inference.evaluate import difference_between, evaluate_offline
from inference.predictor import VLAPredictor
from inference.report import (
    action_table,
    file_stem,
    metrics_table,
    plot_trajectories,
    rollout_table,
    write_actions,
    write_json,
    write_predictions,
)
from inference.rollout import ExpertPolicy, ModelPolicy, Policy, ReplayPolicy, evaluate_task, summarize_tasks
from utils.misc import set_up_logging, user_message
from utils.parquet_utils import DataError, resolve_parquet_files

logger = logging.getLogger(__name__)
LOG_NAME = "inference_log.txt"


def evaluate_data(args: argparse.Namespace, predictor: VLAPredictor) -> None:
    """Batch mode: metrics.json, inference_log.txt, plots, and predictions.csv when asked for."""
    output = Path(args.output_dir)
    data = {}
    workers = predictor.config.data.num_workers if args.num_workers is None else args.num_workers
    for spec in args.eval_data_path:
        dataset = open_dataset(predictor, spec, "--eval_data_path")
        logger.info("%s: %d episodes, %d samples", spec, dataset.store.num_episodes, len(dataset))
        data[spec] = dataset, make_loader(dataset, num_workers=workers, batch_size=args.batch_size or 16)
    result, predictions = evaluate_offline(predictor, data, seed=args.seed or 0, num_samples=args.num_samples or 1)
    result = {"checkpoint": args.checkpoint_path, **result}
    if predictor.quantization != "none":
        few = (batch for _, batches in data.values() for batch in islice(batches, 4))
        result["quantization_error"] = quantization_error(args, predictor, few)
    paths = [output / "metrics.json"]
    write_json(paths[0], result)
    if args.save_predictions:
        paths.append(output / "predictions.csv")
        write_predictions(paths[-1], predictions)
    paths += plot_trajectories(output / "plots", predictions, 3 if args.num_plots is None else args.num_plots)
    logger.info("%.1f ms per sample", 1000 * result["seconds_per_sample"])
    _finish(metrics_table(result), paths, output / LOG_NAME)


def quantization_error(args: argparse.Namespace, predictor: VLAPredictor, batches: Iterable[Batch]) -> dict[str, Any]:
    """The actions' distance from those of the same policy with whole matrices, logged and returned."""
    error = difference_between(predictor, load_predictor(args, quantization="none"), batches, args.seed or 0)
    text = "%s moves normalized actions by %.4f on average, at most %.4f (%d predictions)"
    logger.info(text, predictor.quantization, error["mean"], error["max"], error["samples"])
    return {"quantization": predictor.quantization, **error}


def open_dataset(predictor: VLAPredictor, spec: str, flag: str) -> VLADataset:
    """Recorded data as the policy was trained to read it; `flag` names the source in errors."""
    return VLADataset(
        resolve_parquet_files(spec, flag),
        predictor.config.data,
        horizon=predictor.config.model.action_head_config.horizon,
        per_action_dim=predictor.config.model.action_head_config.per_action_dim,
        cameras=predictor.cameras,
        image_processor=predictor.image_processor,
        prompt_tokenizer=predictor.prompt_tokenizer,
        own=predictor.dataset,
        dataset_index=predictor.dataset_index,
    )


def predict_single(args: argparse.Namespace, predictor: VLAPredictor) -> None:
    """Single-item mode: one chunk of actions, printed, and written when asked for."""
    state = None
    if args.state_vector is not None:
        try:
            state = [float(text) for text in " ".join(args.state_vector).replace(",", " ").split()]
        except ValueError as error:
            raise ObservationError(f"--state_vector: {error}; give numbers separated by spaces") from None
    action_TA = predictor.predict(
        args.image1_paths, args.image2_paths, prompt=args.prompt, state=state, seed=args.seed or 0
    )
    if predictor.quantization != "none":
        observation = predictor.observe(args.image1_paths, args.image2_paths, prompt=args.prompt, state=state)
        quantization_error(args, predictor, [observation])
    inputs = {name: getattr(args, name) for name in ("checkpoint_path", "image1_paths", "image2_paths", "prompt")}
    inputs |= {"state": state, "seed": args.seed or 0, "num_inference_steps": predictor.num_inference_steps}
    paths = write_actions(Path(args.output_dir), action_TA, inputs) if args.save_predictions else []
    _finish(action_table(action_TA), paths)


def evaluate_closed_loop(args: argparse.Namespace, predictor: VLAPredictor | None) -> None:
    """Closed-loop mode: rollouts.json and videos."""
    started = time.perf_counter()
    first = FIRST_EVALUATION_SEED if args.seed is None else args.seed
    seeds = range(first, first + (20 if args.episodes is None else args.episodes))
    options = {"image_size": args.image_size or (predictor.image_processor.height if predictor else 96), **args.options}
    prompts = _prompts(args, options)
    output, tasks, settings = Path(args.output_dir), {}, {}
    for task in args.tasks:
        env = make_env(args.env, task, **options)
        settings = env.settings()
        policy = _policy(args, predictor, env)
        tasks[task] = evaluate_task(
            env,
            policy,
            seeds,
            prompt=prompts.get(task),
            video_dir=output / "videos",
            name=file_stem(task),
            num_videos=3 if args.num_videos is None else args.num_videos,
        )
        env.close()
    result = {
        "settings": {
            "checkpoint": args.checkpoint_path,
            "control": args.control or ("blind" if args.blind else "policy"),
            "prompts": "swapped" if args.swap_prompts else "own" if args.prompt_override is None else "override",
            "env": args.env,
            "env_settings": settings,
            "seed": first,
            "execution": vars(policy.execution),
            "num_inference_steps": predictor.num_inference_steps if predictor else None,
            "quantization": predictor.quantization if predictor else None,
            "demos_path": args.demos_path,
        },
        "tasks": tasks,
        "summary": summarize_tasks(tasks),
        "seconds": time.perf_counter() - started,
    }
    write_json(output / "rollouts.json", result)
    videos = [video for task in tasks.values() for video in task["videos"]]
    _finish(rollout_table(result), [output / "rollouts.json", *videos], output / LOG_NAME)


def _prompts(args: argparse.Namespace, options: dict[str, Any]) -> dict[str, str]:
    """The instruction of each task where it is not the task's own."""
    if args.prompt_override is not None:
        return dict.fromkeys(args.tasks, args.prompt_override)
    if not args.swap_prompts:
        return {}
    instructions = []
    for task in args.tasks:
        env = make_env(args.env, task, **options)
        instructions.append(env.instruction)
        env.close()
    return dict(zip(args.tasks, instructions[1:] + instructions[:1], strict=True))


def _policy(args: argparse.Namespace, predictor: VLAPredictor | None, env: Any) -> Policy:
    if args.control == "expert":
        return ExpertPolicy()
    if args.control == "replay":
        return ReplayPolicy(_demonstrations(args.demos_path, env))
    execution = predictor.execution_settings(args.execution, args.latency_steps, args.n_action_steps)
    return ModelPolicy(predictor, execution, blind=bool(args.blind))


def _demonstrations(specs: Sequence[str], env: Any) -> list[np.ndarray]:
    """The actions of every recorded episode whose instruction is the environment's."""
    files = resolve_parquet_files(specs, "--demos_path")
    store = EpisodeStore(files, state_dim=env.state_dim, per_action_dim=env.per_action_dim, cameras=("image_1",))
    bounds = zip(store.episode_starts[:-1], store.episode_starts[1:], strict=True)
    found = [np.array(store.action[a:b]) for a, b in bounds if store.prompt(a) == env.instruction]
    if not found:
        raise DataError(
            f"--demos_path: no episode with the instruction {env.instruction!r} (found: {', '.join(store.prompts)})"
        )
    return found


def _finish(text: str, paths: Sequence[str | Path], log_file: Path | None = None) -> None:
    print("\n" + text)
    if log_file is not None:
        with log_file.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        paths = [*paths, log_file]
    for path in paths:
        print(f"wrote {path}")


def load_predictor(args: argparse.Namespace, quantization: str | None = None) -> VLAPredictor:
    """The policy that the flags describe; `quantization` overrules its flag."""
    return VLAPredictor.from_checkpoint(
        args.checkpoint_path,
        args.device,
        args.use_amp,
        num_inference_steps=args.num_inference_steps,
        dataset=args.dataset,
        compile=args.compile,
        quantization=quantization or args.quantization,
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv, __doc__)
    set_up_logging(Path(args.output_dir) / LOG_NAME if args.mode != "image1_paths" else None)
    predictor, num_threads = None, args.num_threads
    if args.checkpoint_path is not None:
        predictor = load_predictor(args)
        num_threads = num_threads or predictor.config.training.num_threads
        logger.info("%s on %s, computing in %s", args.checkpoint_path, predictor.device, predictor.model.compute_dtype)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    {"eval_data_path": evaluate_data, "image1_paths": predict_single, "env": evaluate_closed_loop}[args.mode](
        args, predictor
    )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ModuleNotFoundError) as error:
        sys.exit(f"error: {user_message(error)}")
