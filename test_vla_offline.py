"""A short check of a checkpoint: does it load, and does it do something sensible on recorded data?

    python test_vla_offline.py --checkpoint_path model_best.pth.tar
    python test_vla_offline.py --checkpoint_path model_best.pth.tar --test_data_dir data/samples --output_file out.json

Runs the policy over samples spread evenly over each Parquet file, measures latency, and checks that predictions
are finite, repeatable under a seed, within the range of the training actions, and closer to the demonstrations
than the training data's mean action. The exit code is 0 when every check passes, else 1.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.loader import VLADataset, collate_fn, open_dataset, open_for_evaluation
from inference.evaluate import Predictions, evaluate_offline, measure_latency
from inference.metrics import NonFiniteError
from inference.policy_files import policy_stamp
from inference.predictor import VLAPredictor
from inference.report import keep_earlier, write_json
from utils.arguments import CommandParser, at_least, run_command
from utils.config_data import is_lerobot
from utils.config_utils import ConfigError
from utils.misc import atomic_path, set_up_logging
from utils.recordings import resolve_recordings
from utils.text_table import text_table

logger = logging.getLogger(__name__)

SAMPLES, SAMPLES_WIDTHS = Path(__file__).parent / "data/samples", (4, 4)  # widths of their state and action
RANGE_MARGIN = 0.1  # predictions may leave the training range by this share of it,
RANGE_SHARE = 0.99  # and at least this share of them must stay within


def check(predictor: VLAPredictor, name: str, dataset: VLADataset, max_samples: int, batch_size: int) -> dict[str, Any]:
    """Metrics and checks over some recorded data.

    Args:
        predictor: the policy.
        name: of the data, for errors.
        dataset: as the policy reads it.
        max_samples: at most so many, spread evenly.
        batch_size: samples per prediction.

    Returns:
        `{"checks": {name: bool}, "samples", "metrics": {predictor: overall metrics}, "share_in_range",
        "milliseconds_per_sample"}`; with a prediction that is not finite only `checks` and `error`.
    """
    rows = np.unique(np.linspace(0, len(dataset) - 1, max_samples).round().astype(int)).tolist()
    parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    batches = [collate_fn([dataset[row] for row in part]) for part in parts]
    try:
        result, predictions = evaluate_offline(predictor, {name: (dataset, batches)})
    except NonFiniteError as error:
        return {"checks": {"finite": False}, "error": str(error)}
    metrics = {name: summary["overall"] for name, summary in result["predictors"].items()}
    share = share_in_range(predictor, predictions[name])
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


def files_of(predictor: VLAPredictor, paths: Sequence[str], key: str) -> dict[str, VLADataset]:
    """Each recording of some paths as the policy reads it; `key` is where the paths come from, for errors."""
    processors = predictor.image_processor, predictor.prompt_tokenizer
    mapping = predictor.config.datasets[predictor.dataset_index].lerobot
    return {
        str(path): open_dataset(predictor.config, *processors, path, key, predictor.dataset_index)
        for path in resolve_recordings(paths, key, mapping)
    }


def default_data(predictor: VLAPredictor) -> dict[str, VLADataset]:
    """What the policy's training held out, where that is on this machine; else the samples.

    Raises:
        ConfigError: neither fits the policy.
        DataError: files break the schema.
    """
    config, entry = predictor.config, predictor.config.datasets[predictor.dataset_index]
    processors, data = (predictor.image_processor, predictor.prompt_tokenizer), config.data
    if data.val_parquet_files and _are_here(data.val_parquet_files):
        logger.info("no --test_data_dir: data.val_parquet_files of the checkpoint")
        return files_of(predictor, data.val_parquet_files, "data.val_parquet_files")
    if data.val_fraction and _are_here(entry.path):
        logger.info("no --test_data_dir: the episodes that data.val_fraction of the checkpoint holds out")
        held_out = open_for_evaluation(config, *processors, None, predictor.dataset_index)
        return {f"held out of {entry.name}": held_out["val"]}
    if (predictor.state_dim, predictor.per_action_dim) != SAMPLES_WIDTHS:
        raise ConfigError(
            "--test_data_dir is missing: what the checkpoint's training held out is not here, and data/samples are of "
            f"another robot ({SAMPLES_WIDTHS[0]} states, {SAMPLES_WIDTHS[1]} actions); give a folder of Parquet files"
        )
    logger.warning("no --test_data_dir: data/samples, which the policy may never have seen the like of")
    return files_of(predictor, [str(SAMPLES)], "--test_data_dir")


def _are_here(paths: Sequence[str]) -> bool:
    return bool(paths) and all("://" in path or is_lerobot(path) or glob.glob(path, recursive=True) for path in paths)


def share_in_range(predictor: VLAPredictor, predictions: Predictions) -> float:
    """Share of predicted values within the training actions' range, widened by RANGE_MARGIN on both sides.

    Where actions are relative to the state, so is the range.
    """
    low, high = (np.array(predictor.action_units.statistics[name]) for name in ("min", "max"))
    margin = RANGE_MARGIN * (high - low) + 1e-6
    relative_NTA = predictions.predicted_KNTA[0] - predictor.action_units.origin(predictions.state_NS)[:, None]
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
    parser = CommandParser(__doc__)
    parser.add_argument("--checkpoint_path", required=True)
    help_text = "folder of Parquet files, or lerobot:/path; default: what training held out, else data/samples"
    parser.add_argument("--test_data_dir", help=help_text)
    parser.add_argument("--output_file", default="offline_report.json", help="JSON, or the table alone as *.txt")
    parser.add_argument("--max_samples", type=at_least(1), default=200, help="samples per file")
    parser.add_argument("--batch_size", type=at_least(1), default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dataset", help="for a policy trained on a mixture: whose statistics and widths apply")
    args = parser.parse_args(argv)
    set_up_logging()
    predictor = VLAPredictor.from_checkpoint(args.checkpoint_path, args.device, dataset=args.dataset)
    if predictor.config.training.num_threads is not None:
        torch.set_num_threads(predictor.config.training.num_threads)
    if args.test_data_dir:
        data = files_of(predictor, [args.test_data_dir], "--test_data_dir")
    else:
        data = default_data(predictor)
    files = {name: check(predictor, name, dataset, args.max_samples, args.batch_size) for name, dataset in data.items()}
    times = measure_latency(predictor, collate_fn([next(iter(data.values()))[0]]), repeats=20)
    passed = all(all(found["checks"].values()) for found in files.values())
    timing = f"median {times['median_ms']:.1f} ms, 95 % within {times['p95_ms']:.1f} ms"
    verdict = "PASSED" if passed else "FAILED"
    text = f"{report_table(files)}\none prediction on {predictor.device}: {timing}\n{verdict}"
    if args.output_file.endswith(".txt"):
        with atomic_path(args.output_file) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    else:
        report = {
            "checkpoint": args.checkpoint_path,
            "checkpoint_stamp": policy_stamp(args.checkpoint_path),
            "data": list(files),
            "passed": passed,
            "latency": times,
            "files": files,
        }
        keep_earlier([Path(args.output_file)], report, ("checkpoint", "checkpoint_stamp", "data"))
        write_json(args.output_file, report)
    print(f"\n{text}\nwrote {args.output_file}")
    return 0 if passed else 1


if __name__ == "__main__":
    run_command(main)
