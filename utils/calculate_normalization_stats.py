"""Normalization statistics of the training data: one pass over the numeric columns, images are never read.

python utils/calculate_normalization_stats.py --config_path configs/vla_config.yaml --output_path stats.json
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":  # so that "python utils/calculate_normalization_stats.py" finds the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config_utils import load_config
from utils.misc import atomic_path, set_up_logging
from utils.parquet_utils import DataError, open_parquet, require_columns, resolve_parquet_files, vectors

logger = logging.getLogger(__name__)
STATISTICS = ("min", "max", "mean", "std", "q01", "q99")


class StatisticsError(ValueError):
    """A statistics file is missing, unreadable, or of another size than the config."""


def calculate_statistics(files: list[Path], state_dim: int, per_action_dim: int) -> dict[str, Any]:
    """Statistics per dimension of `state` and `action` over every time step, in physical units.

    Returns:
        `{"state": {"min": [state_dim numbers], "max", "mean", "std", "q01", "q99", "count"}, "action": {...},
        "files": [...]}`. std is the population's; q01 and q99 are exact, linearly interpolated. A dimension
        that never changes has std 0 and min = max: the normalizer handles it.

    Raises:
        DataError: missing column, wrong width, null, NaN or infinity, naming file and row.
    """
    widths = {"state": ("state_dim", state_dim), "action": ("per_action_dim", per_action_dim)}
    parts: dict[str, list[np.ndarray]] = {name: [] for name in widths}
    for path in files:
        file = open_parquet(path)
        require_columns(file, path, list(widths))
        row = 0
        for batch in file.iter_batches(batch_size=65536, columns=list(widths)):
            for name, (key, width) in widths.items():
                parts[name].append(vectors(batch.column(name), width, path, row, f"{name}|{key}"))
            row += batch.num_rows
    result: dict[str, Any] = {name: _summary(np.concatenate(arrays)) for name, arrays in parts.items()}
    result["files"] = [str(path) for path in files]
    return result


def load_statistics(path: str | None, state_dim: int, per_action_dim: int, config_path: str) -> dict[str, Any]:
    """Read a statistics file and check it against the config.

    Raises:
        StatisticsError: no path or no file (the message is the command that makes it), not JSON, a missing
            statistic, another number of dimensions.
    """
    target = path or "stats.json"
    command = f"python utils/calculate_normalization_stats.py --config_path {config_path} --output_path {target}"
    if path is None:
        raise StatisticsError(f"data.normalization_stats_path is not set; set it to {target} and run: {command}")
    if not Path(path).is_file():
        raise StatisticsError(f"data.normalization_stats_path: {path} does not exist; make it with: {command}")
    try:
        statistics = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise StatisticsError(f"{path}: not valid JSON ({error}); make it again with: {command}") from None
    check_statistics(statistics, state_dim, per_action_dim, path, f"make it again with: {command}")
    return statistics


def check_statistics(statistics: dict[str, Any], state_dim: int, per_action_dim: int, place: str, remedy: str) -> None:
    """Raise a StatisticsError unless every statistic is there with the right number of finite values."""
    for name, key, width in (("state", "data.state_dim", state_dim), ("action", "per_action_dim", per_action_dim)):
        for statistic in STATISTICS:
            values = statistics.get(name, {}).get(statistic)
            if values is None:
                raise StatisticsError(f"{place}: no {name}.{statistic}; {remedy}")
            if len(values) != width:
                raise StatisticsError(
                    f"{place}: {name}.{statistic} has {len(values)} values, config wants {key} {width}; {remedy}"
                )
            if not np.isfinite(values).all():
                raise StatisticsError(f"{place}: {name}.{statistic} is not finite: {values}; {remedy}")


def _summary(values: np.ndarray) -> dict[str, Any]:
    wide = values.astype(np.float64)
    q01, q99 = np.quantile(values, [0.01, 0.99], axis=0)
    low, high = values.min(axis=0), values.max(axis=0)
    std = np.where(low == high, 0.0, wide.std(axis=0))
    mean = np.where(low == high, low, wide.mean(axis=0))
    found = {"min": low, "max": high, "mean": mean, "std": std, "q01": q01, "q99": q99}
    return {name: [float(x) for x in found[name]] for name in STATISTICS} | {"count": len(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", required=True, help="YAML config; gives the files and the dimensions")
    parser.add_argument("--output_path", help="JSON to write; default: data.normalization_stats_path")
    parser.add_argument("--train_data_override", nargs="+", help="instead of data.train_parquet_files")
    args = parser.parse_args()
    set_up_logging()
    config = load_config(args.config_path, {"data.train_parquet_files": args.train_data_override})
    output = args.output_path or config.data.normalization_stats_path
    if output is None:
        parser.error("no --output_path, and the config sets no data.normalization_stats_path")
    files = resolve_parquet_files(config.data.train_parquet_files, "data.train_parquet_files")
    statistics = calculate_statistics(files, config.data.state_dim, config.model.action_head_config.per_action_dim)
    with atomic_path(output) as temporary:
        temporary.write_text(json.dumps(statistics, indent=1), encoding="utf-8")
    for name in ("state", "action"):
        summary = statistics[name]
        constant = [i for i, (low, high) in enumerate(zip(summary["min"], summary["max"], strict=True)) if low == high]
        note = f", constant dimensions {constant}" if constant else ""
        logger.info("%s: %d rows, %d dimensions%s", name, summary["count"], len(summary["min"]), note)
    print(output)


if __name__ == "__main__":
    try:
        main()
    except (DataError, StatisticsError, ValueError) as error:
        sys.exit(f"error: {error}")
