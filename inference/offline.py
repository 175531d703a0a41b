"""What main_eval.py does without a simulator: a policy over recorded data or one observation, and its report."""

from __future__ import annotations

import argparse
import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from inference.evaluate import evaluate_offline, quantization_error
from inference.occlusion import FOLDER, draw_occlusion_maps
from inference.page import Recorded, offline_page
from inference.policy_files import policy_stamp, write_json
from inference.predictor import VLAPredictor
from inference.report import (
    action_table,
    finish,
    keep_earlier,
    metrics_table,
    sensitivity_table,
    write_actions,
    write_evaluation,
)
from inference.sensitivity import measure_sensitivity
from utils.batch import Batch
from utils.page.build import write_page

logger = logging.getLogger(__name__)

WHOLE = {"quantization": "none", "expert_quantization": "none"}  # settings of a policy that nothing rounds
Load = Callable[..., VLAPredictor]


def evaluate_recorded(
    args: argparse.Namespace,
    predictor: VLAPredictor,
    data: dict[str, tuple[Dataset, Iterable[Batch]]],
    load: Load,
    recorded: Callable[[Any], Recorded],
) -> None:
    """metrics.json, inference_log.txt, plots; when asked for also predictions.csv, sensitivity.json and a page.

    Args:
        args: the flags of main_eval.py, see `inference.eval_args`.
        predictor: the policy.
        data: per name a VLADataset and one pass over it.
        load: loads the policy with other settings.
        recorded: shows a dataset's episodes on the page.
    """
    about = {"checkpoint": args.checkpoint_path, "checkpoint_stamp": policy_stamp(args.checkpoint_path)}
    result, predictions = evaluate_offline(predictor, data, seed=args.seed or 0, num_samples=args.num_samples)
    few = (batch for _, batches in data.values() for batch in islice(batches, 4))
    error = quantization_error(predictor, functools.partial(load, args, **WHOLE), few, args.seed or 0)
    result = {**about, **result, **error}
    folder = Path(args.output_dir)
    paths = write_evaluation(folder, result, predictions, args.save_predictions, args.num_plots)
    logger.info("%.1f ms per sample", 1000 * result["seconds_per_sample"])
    text = metrics_table(result)
    if args.sensitivity:
        datasets = {name: dataset for name, (dataset, _) in data.items()}
        found = evaluate_sensitivity(args, predictor, datasets, about)
        text += "\n\n" + sensitivity_table(found)
        paths += [folder / "sensitivity.json", *(folder / entry["image"] for entry in found["maps"])]
    if args.html:
        shown = {name: recorded(dataset) for name, (dataset, _) in data.items()}
        write_page(args.html, offline_page(result, predictions, shown, predictor, folder))
        paths.insert(0, args.html)
    finish(text, paths, args.log_file)


def evaluate_sensitivity(
    args: argparse.Namespace, predictor: VLAPredictor, datasets: Mapping[str, Any], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Write sensitivity.json and its occlusion maps; returns its content.

    Args:
        args, predictor: as `evaluate_recorded` takes them.
        datasets: per name a VLADataset.
        about: what the file says of the policy.
    """
    common = {"seed": args.seed or 0, "batch_size": args.batch_size}
    result = {**about, "data": list(datasets), "seed": common["seed"]}
    result |= measure_sensitivity(predictor, datasets, args.sensitivity, **common)
    paths = [Path(args.output_dir) / "sensitivity.json", Path(args.output_dir) / FOLDER]
    keep_earlier(paths, result, ("checkpoint", "checkpoint_stamp", "data", "seed", "samples"))
    frames = 3 if args.num_maps is None else args.num_maps
    result["maps"] = draw_occlusion_maps(paths[0].parent, predictor, datasets, frames, result["spread"], **common)
    write_json(paths[0], result)
    return result


def evaluate_single(args: argparse.Namespace, predictor: VLAPredictor, load: Load) -> None:
    """One chunk of actions, printed, and written when asked for; arguments as `evaluate_recorded` takes them."""
    images = args.image1_paths, args.image2_paths
    seen = {"prompt": args.prompt, "state": args.state, "images": args.images}
    action_TA = predictor.predict(*images, **seen, seed=args.seed or 0)
    whole = functools.partial(load, args, **WHOLE)
    quantization_error(predictor, whole, [predictor.observe(*images, **seen)], args.seed or 0)
    inputs = {name: getattr(args, name) for name in ("checkpoint_path", "image1_paths", "image2_paths")}
    inputs |= {**seen, "seed": args.seed or 0, "num_inference_steps": predictor.num_inference_steps}
    paths = write_actions(Path(args.output_dir), action_TA, inputs) if args.save_predictions else []
    finish(action_table(action_TA), paths, args.log_file)
