"""Evaluate a trained policy: over recorded data, on a single observation, or in closed loop in a simulator.

python main_eval.py --checkpoint_path C --eval_data_path demos/val --output_dir results --save_predictions
python main_eval.py --checkpoint_path C --image1_paths frame.png --prompt "open the window" --state_vector "0 0.6 0.2 1"
python main_eval.py --checkpoint_path C --env metaworld --tasks window-open-v3 --episodes 20 --seed 10000 [--blind]
python main_eval.py --env metaworld --tasks window-open-v3 --control replay --demos_path demos/train
"""

from __future__ import annotations

import argparse
import functools
import logging
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from data.episode_store import EpisodeStore
from data.loader import VLADataset, make_loader
from data.processing import Batch, ObservationError
from envs import FIRST_EVALUATION_SEED, SIMULATORS, expand_tasks, make_env
from inference.closed_loop.parallel import Finished, run_jobs
from inference.closed_loop.policies import Control, ExpertPolicy, ReplayPolicy
from inference.closed_loop.record import RolloutRecord
from inference.closed_loop.rollout import ModelPolicy, summarize_tasks
from inference.closed_loop.simulator import Job
from inference.closed_loop.video import VIDEO_FPS, write_grid
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
from inference.serving.export import policy_stamp
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
        entry=predictor.dataset,
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
    """Closed-loop mode: episodes.jsonl, rollouts.json and videos."""
    started = time.perf_counter()
    tasks = expand_tasks(args.env, args.tasks)
    first = FIRST_EVALUATION_SEED if args.seed is None else args.seed
    seeds = range(first, first + (20 if args.episodes is None else args.episodes))
    options = {"image_size": args.image_size or (predictor.image_processor.height if predictor else 96), **args.options}
    make = functools.partial(make_env, args.env, **options)
    prompts, policy = _prompts(args, tasks, make), _policy(args, predictor, tasks, make)
    execution = (policy[tasks[0]] if isinstance(policy, dict) else policy).execution
    settings = {
        "checkpoint": args.checkpoint_path,
        "checkpoint_stamp": policy_stamp(args.checkpoint_path),
        "control": args.control or ("blind" if args.blind else "policy"),
        "prompts": "swapped" if args.swap_prompts else "own" if args.prompt_override is None else args.prompt_override,
        "env": args.env,
        "env_options": options,
        "execution": vars(execution),
        **_policy_settings(predictor),
        "demos_path": args.demos_path,
    }
    output = Path(args.output_dir)
    record = RolloutRecord(output, settings, restart=bool(args.restart))
    filmed = set(seeds[: 3 if args.num_videos is None else args.num_videos])
    jobs = [
        Job(task, seed, prompts.get(task), str(_video(output, task, seed)) if seed in filmed else None)
        for task in tasks
        for seed in seeds
        if (task, seed) not in record.done
    ]
    progress = tqdm(total=len(jobs), unit="episode", disable=None)

    def on_finished(episode: Finished) -> None:
        job, result = episode.job, episode.result
        record.add(episode)
        outcome = "success" if result.success else "failure"
        logger.info("%s seed %d: %s, %d steps, %.1f s", job.task, job.seed, outcome, result.steps, result.seconds)
        progress.update()

    with logging_redirect_tqdm(), progress:
        run_jobs(jobs, make, policy, on_finished, num_envs=args.num_envs or 1)
    results = {task: record.task(task, seeds) for task in tasks}
    _tile_videos(output, results)
    result = {
        "settings": {**settings, "env_settings": record.env_settings, "seed": first},
        "tasks": results,
        "summary": summarize_tasks(results, {task: SIMULATORS[args.env].tiers[task] for task in tasks}),
        "seconds": time.perf_counter() - started,
    }
    write_json(output / "rollouts.json", result)
    videos = [video for task in results.values() for video in task["videos"]]
    _finish(rollout_table(result), [output / "rollouts.json", *videos], output / LOG_NAME)


def _policy_settings(predictor: VLAPredictor | None) -> dict[str, Any]:
    """What decides a policy's plans beside its checkpoint; nothing where no policy runs."""
    if predictor is None:
        return {}
    return {
        "dataset": predictor.dataset.name,
        "num_inference_steps": predictor.num_inference_steps,
        "quantization": predictor.quantization,
        "compute_dtype": str(predictor.model.compute_dtype).removeprefix("torch."),
        "weight_dtype": str(predictor.weight_dtype).removeprefix("torch."),
    }


def _video(output: Path, task: str, seed: int) -> Path:
    return output / "videos" / f"{file_stem(task)}_seed{seed}.mp4"


def _tile_videos(output: Path, results: dict[str, dict[str, Any]]) -> None:
    """The filmed episodes of each task side by side, and the first of every task in one grid."""
    firsts = [result["videos"][0] for result in results.values() if result["videos"]]
    for task, result in results.items():
        if len(result["videos"]) > 1:
            path = output / "videos" / f"{file_stem(task)}.mp4"
            write_grid(path, result["videos"], VIDEO_FPS)
            result["videos"].append(str(path))
    if len(firsts) > 1:
        write_grid(output / "videos" / "grid.mp4", firsts, VIDEO_FPS)


def _prompts(args: argparse.Namespace, tasks: Sequence[str], make: Callable[[str], Any]) -> dict[str, str]:
    """The instruction of each task where it is not the task's own."""
    if args.prompt_override is not None:
        return dict.fromkeys(tasks, args.prompt_override)
    if not args.swap_prompts:
        return {}
    instructions = [_facts(make, task)[0] for task in tasks]
    return dict(zip(tasks, instructions[1:] + instructions[:1], strict=True))


def _policy(
    args: argparse.Namespace, predictor: VLAPredictor | None, tasks: Sequence[str], make: Callable[[str], Any]
) -> ModelPolicy | dict[str, Control]:
    """The trained policy, or per task what is run in its place."""
    if args.control == "expert":
        return {task: ExpertPolicy() for task in tasks}
    if args.control == "replay":
        return {task: ReplayPolicy(_demonstrations(args.demos_path, *_facts(make, task))) for task in tasks}
    execution = predictor.execution_settings(args.execution, args.latency_steps, args.n_action_steps)
    return ModelPolicy(predictor, execution, blind=bool(args.blind))


def _facts(make: Callable[[str], Any], task: str) -> tuple[str, int, int]:
    """(instruction, state_dim, per_action_dim) of a task."""
    env = make(task)
    env.close()
    return env.instruction, env.state_dim, env.per_action_dim


def _demonstrations(specs: Sequence[str], instruction: str, state_dim: int, per_action_dim: int) -> list[np.ndarray]:
    """The actions of every recorded episode that has this instruction."""
    files = resolve_parquet_files(specs, "--demos_path")
    store = EpisodeStore(files, state_dim=state_dim, per_action_dim=per_action_dim, cameras=("image_1",))
    bounds = zip(store.episode_starts[:-1], store.episode_starts[1:], strict=True)
    found = [np.array(store.action[a:b]) for a, b in bounds if store.prompt(a) == instruction]
    if not found:
        raise DataError(
            f"--demos_path: no episode with the instruction {instruction!r} (found: {', '.join(store.prompts)})"
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
    except (ValueError, ImportError, RuntimeError) as error:
        sys.exit(f"error: {user_message(error)}")
