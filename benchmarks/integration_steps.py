"""How few integration steps will do: action error and closed-loop success of one trained policy, in one table.

    python benchmarks/integration_steps.py --checkpoint_path experiments/quickstart/checkpoints/model_best.pth.tar \
        --eval_data_path demos/quickstart/val [--quick] [--json steps.json]

Every cell sees the same held-out observations, the same initial states and the same noise; only the integrator and
the number of steps differ. The error is over held-out demonstrations, in normalized units: mean absolute and root
mean square. midpoint and heun evaluate the network twice a step, so cells are ordered by evaluations.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import pathlib
import statistics
import time
from typing import Any

if not __package__:
    import _repository  # noqa: F401

import torch

from data.loader import VLADataset, make_loader, open_dataset
from data.processing import processors_from_checkpoint
from envs import FIRST_EVALUATION_SEED, make_env
from inference.closed_loop.rollout import ModelPolicy, run_episode, summarize_tasks, task_summary
from inference.evaluate import evaluate_offline
from inference.predictor import VLAPredictor
from model.vla_model import VLAModel
from utils.arguments import CommandParser
from utils.checkpoint import load_checkpoint
from utils.config_utils import config_from_dict
from utils.text_table import markdown_table

CELLS = [("euler", steps) for steps in (1, 2, 5, 10, 50)]
CELLS += [(integrator, steps) for integrator in ("midpoint", "heun") for steps in (1, 2, 5)]


def evaluations(integrator: str, steps: int) -> int:
    """Velocities computed for one prediction."""
    return steps if integrator == "euler" else 2 * steps


def load(path: str, integrator: str, steps: int) -> VLAPredictor:
    """The policy of a checkpoint with another integrator."""
    checkpoint = load_checkpoint(path)
    config = config_from_dict(checkpoint["config"], source=path)
    head = dataclasses.replace(config.model.action_head_config, integrator=integrator)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, action_head_config=head))
    model = VLAModel.from_checkpoint(checkpoint, config)
    return VLAPredictor(model, config, *processors_from_checkpoint(checkpoint), num_inference_steps=steps)


def recorded(predictor: VLAPredictor, spec: str) -> VLADataset:
    """Held-out demonstrations as the policy reads them."""
    processors = predictor.image_processor, predictor.prompt_tokenizer
    return open_dataset(predictor.config, *processors, spec, "--eval_data_path", predictor.dataset_index)


def offline(predictor: VLAPredictor, spec: str) -> dict[str, float]:
    """Errors over held-out demonstrations, normalized units."""
    dataset = recorded(predictor, spec)
    loader = make_loader(dataset, num_workers=0, batch_size=64)
    result, _ = evaluate_offline(predictor, {spec: (dataset, loader)})
    overall = result["predictors"]["policy"]["overall"]
    return {"samples": len(dataset), "mae": overall["mae_normalized"], "rmse": math.sqrt(overall["mse_normalized"])}


def closed_loop(predictor: VLAPredictor, tasks: list[str], episodes: int) -> dict[str, Any]:
    """Successes on seeds that were never recorded."""
    seeds = range(FIRST_EVALUATION_SEED, FIRST_EVALUATION_SEED + episodes)
    results = {}
    for task in tasks:
        env = make_env("metaworld", task, image_size=predictor.image_processor.height)
        episodes_of_task = [run_episode(env, ModelPolicy(predictor), seed) for seed in seeds]
        results[task] = task_summary(episodes_of_task, env.instruction, env.instruction, videos=[])
        env.close()
    successes = {task: result["successes"] for task, result in results.items()}
    steps = statistics.mean(sum((result["steps"] for result in results.values()), []))
    return {"successes": successes, "summary": summarize_tasks(results), "mean_episode_steps": steps}


def latency_ms(predictor: VLAPredictor, spec: str, rounds: int = 20) -> float:
    """Median processor time of one prediction."""
    dataset = recorded(predictor, spec)
    batch = next(iter(make_loader(dataset, num_workers=0, batch_size=1)))
    times = []
    for _ in range(rounds):
        started = time.process_time()
        predictor.predict_batch(batch, [0])
        times.append(time.process_time() - started)
    return 1000 * statistics.median(times)


def table(cells: list[dict[str, Any]], tasks: list[str]) -> str:
    """Markdown."""
    header = ["integrator", "steps", "velocities", "MAE", "RMSE", *tasks, "together, 95 %", "CPU ms"]
    rows = []
    for cell in cells:
        loop, episodes = cell["closed_loop"], cell["episodes"]
        counts = [f"{loop['successes'][task]}/{episodes}" for task in tasks]
        summary = loop["summary"]
        low, high = (100 * bound for bound in summary["wilson_95"])
        together = f"{summary['successes']}/{summary['episodes']} ({low:.0f} to {high:.0f} %)"
        numbers = [f"{cell['offline']['mae']:.4f}", f"{cell['offline']['rmse']:.4f}", *counts, together]
        rows.append([cell["integrator"], cell["steps"], cell["velocities"], *numbers, f"{cell['cpu_ms']:.0f}"])
    return markdown_table(header, rows)


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--checkpoint_path", required=True)
    parser.add_argument("--eval_data_path", required=True, help="held-out demonstrations")
    parser.add_argument("--tasks", nargs="+", default=["button-press-topdown-v3", "window-open-v3"])
    parser.add_argument("--episodes", type=int, default=20, help="per task and cell")
    parser.add_argument("--quick", action="store_true", help="2 episodes per task, euler alone")
    parser.add_argument("--json", type=pathlib.Path, help="write the results here, anew after every cell")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    episodes = 2 if args.quick else args.episodes
    cells = []
    chosen = [cell for cell in CELLS if not args.quick or cell[0] == "euler"]
    for integrator, steps in sorted(chosen, key=lambda cell: evaluations(*cell)):
        predictor = load(args.checkpoint_path, integrator, steps)
        cell = {"integrator": integrator, "steps": steps, "velocities": evaluations(integrator, steps)}
        cell |= {"episodes": episodes, "seeds": [FIRST_EVALUATION_SEED, FIRST_EVALUATION_SEED + episodes - 1]}
        cell["cpu_ms"] = latency_ms(predictor, args.eval_data_path)
        cell["offline"] = offline(predictor, args.eval_data_path)
        cell["closed_loop"] = closed_loop(predictor, args.tasks, episodes)
        cells.append(cell)
        print(table(cells[-1:], args.tasks).splitlines()[-1], flush=True)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps({"checkpoint": args.checkpoint_path, "cells": cells}, indent=1) + "\n")
    print("\n" + table(cells, args.tasks))


if __name__ == "__main__":
    main()
