"""A short check of a checkpoint: does it load, and does it do something sensible on recorded data?

    python test_vla_offline.py --checkpoint_path model_best.pth.tar
    python test_vla_offline.py --checkpoint_path model_best.pth.tar --test_data_dir data/samples --output_file out.json

Runs the policy over samples spread evenly over each Parquet file, measures latency, and checks that predictions
are finite, repeatable under a seed, within the range of the training actions, and closer to the demonstrations
than the training data's mean action. The exit code is 0 when every check passes, else 1.
"""

from __future__ import annotations

import argparse
import glob
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.loader import VLADataset, collate_fn, open_dataset
from inference.evaluate import Predictions, evaluate_offline, measure_latency
from inference.metrics import NonFiniteError
from inference.predictor import VLAPredictor
from inference.report import write_json
from utils.config_data import is_lerobot
from utils.config_utils import ConfigError
from utils.misc import atomic_path, set_up_logging
from utils.recordings import Recording, resolve_recordings
from utils.text_table import text_table

logger = logging.getLogger(__name__)

SAMPLES, SAMPLES_WIDTHS = Path(__file__).parent / "data/samples", (4, 4)  # widths of their state and action
RANGE_MARGIN = 0.1  # predictions may leave the training range by this share of it,
RANGE_SHARE = 0.99  # and at least this share of them must stay within


def check_file(predictor: VLAPredictor, path: Recording, max_samples: int, batch_size: int) -> dict[str, Any]:
    """Metrics and checks of one Parquet file or LeRobot dataset.

    Returns:
        `{"checks": {name: bool}, "samples", "metrics": {predictor: overall metrics}, "share_in_range",
        "milliseconds_per_sample"}`; with a prediction that is not finite only `checks` and `error`.
    """
    dataset = recorded(predictor, path)
    rows = np.unique(np.linspace(0, len(dataset) - 1, max_samples).round().astype(int)).tolist()
    parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    batches = [collate_fn([dataset[row] for row in part]) for part in parts]
    try:
        result, predictions = evaluate_offline(predictor, {str(path): (dataset, batches)})
    except NonFiniteError as error:
        return {"checks": {"finite": False}, "error": str(error)}
    metrics = {name: summary["overall"] for name, summary in result["predictors"].items()}
    share = share_in_range(predictor, predictions[str(path)])
    return {
        "checks": {
            "finite": True,
            "repeatable": is_repeatable(predictor, dataset),
            "within_training_range": share >= RANGE_SHARE,
            "better_than_mean_action": metrics["policy"]["mse_normalized"] < metrics["mean_action"]["mse_normalized"],
        },
        "samples": len(rows),
        "metrics": metrics,
        "share_in_range": share,
        "milliseconds_per_sample": 1000 * result["seconds_per_sample"],
    }


def recorded(predictor: VLAPredictor, path: Recording) -> VLADataset:
    """A recording as the policy reads it."""
    processors = predictor.image_processor, predictor.prompt_tokenizer
    return open_dataset(predictor.config, *processors, path, "--test_data_dir", predictor.dataset_index)


def default_data(predictor: VLAPredictor) -> Sequence[str]:
    """The validation data that the policy was trained with, where that is on this machine; else the samples.

    Raises:
        ConfigError: neither fits the policy.
    """
    held_out = predictor.config.data.val_parquet_files
    if held_out and all(is_lerobot(path) or glob.glob(str(path), recursive=True) for path in held_out):
        logger.info("no --test_data_dir: the checkpoint's data.val_parquet_files, %s", ", ".join(map(str, held_out)))
        return held_out
    if (predictor.state_dim, predictor.per_action_dim) != SAMPLES_WIDTHS:
        raise ConfigError(
            "--test_data_dir is missing: the checkpoint's validation data are not here, and data/samples are of "
            f"another robot ({SAMPLES_WIDTHS[0]} states, {SAMPLES_WIDTHS[1]} actions); give a folder of Parquet files"
        )
    logger.warning("no --test_data_dir: data/samples, which the policy may never have seen the like of")
    return [str(SAMPLES)]


def share_in_range(predictor: VLAPredictor, predictions: Predictions) -> float:
    """Share of predicted values within the training actions' range, widened by RANGE_MARGIN on both sides.

    Where actions are relative to the state, so is the range.
    """
    low, high = (np.array(predictor.action_statistics[name]) for name in ("min", "max"))
    margin = RANGE_MARGIN * (high - low) + 1e-6
    relative_NTA = predictions.predicted_KNTA[0] - predictor.action_origin(predictions.state_NS)[:, None]
    predicted = relative_NTA[~predictions.is_pad_NT]
    return float(((predicted >= low - margin) & (predicted <= high + margin)).mean())


def is_repeatable(predictor: VLAPredictor, dataset: VLADataset) -> bool:
    """Whether the same observation and seed give the same actions."""
    batch = collate_fn([dataset[0]])
    return np.array_equal(predictor.predict_batch(batch, [0]), predictor.predict_batch(batch, [0]))


def report_table(files: dict[str, dict[str, Any]]) -> str:
    """One line per file."""
    rows = []
    for path, found in files.items():
        metrics = found.get("metrics", {})
        errors = [metrics.get(name, {}).get("mse_normalized") for name in ("policy", "mean_action")]
        failed = [name for name, passed in found["checks"].items() if not passed]
        rows.append([path, found.get("samples"), *errors, "ok" if not failed else "FAILED: " + ", ".join(failed)])
    return text_table(["file", "samples", "mse_normalized", "of mean action", "checks"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_path", required=True)
    help_text = (
        "folder with Parquet files, or lerobot:/path; default: the checkpoint's validation data where it is here, else "
        "data/samples"
    )
    parser.add_argument("--test_data_dir", help=help_text)
    parser.add_argument("--output_file", default="offline_report.json", help="JSON, or the table alone as *.txt")
    parser.add_argument("--max_samples", type=int, default=200, help="samples per file")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dataset", help="for a policy trained on a mixture: whose statistics and widths apply")
    args = parser.parse_args(argv)
    set_up_logging()
    predictor = VLAPredictor.from_checkpoint(args.checkpoint_path, args.device, dataset=args.dataset)
    if predictor.config.training.num_threads is not None:
        torch.set_num_threads(predictor.config.training.num_threads)
    mapping = predictor.config.datasets[predictor.dataset_index].lerobot
    paths = resolve_recordings(args.test_data_dir or default_data(predictor), "--test_data_dir", mapping)
    files = {str(path): check_file(predictor, path, args.max_samples, args.batch_size) for path in paths}
    times = measure_latency(predictor, collate_fn([recorded(predictor, paths[0])[0]]), repeats=20)
    passed = all(all(found["checks"].values()) for found in files.values())
    timing = f"median {times['median_ms']:.1f} ms, 95 % within {times['p95_ms']:.1f} ms"
    verdict = "PASSED" if passed else "FAILED"
    text = f"{report_table(files)}\none prediction on {predictor.device}: {timing}\n{verdict}"
    if args.output_file.endswith(".txt"):
        with atomic_path(args.output_file) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    else:
        report = {"checkpoint": args.checkpoint_path, "passed": passed, "latency": times, "files": files}
        write_json(args.output_file, report)
    print(f"\n{text}\nwrote {args.output_file}")
    return 0 if passed else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
