"""Normalization statistics of the training data: one pass over the numeric columns, images are never read.

python utils/calculate_normalization_stats.py --config_path configs/vla_config.yaml --output_path stats.json

`data/statistics.py` computes them; `utils/statistics.py` says what the file holds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    # "python utils/calculate_normalization_stats.py" puts utils/ first on the path, where Python's own `statistics`
    # would be looked for: the repository takes its place.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.statistics import calculate_for_config, calculate_statistics
from utils.arguments import CommandParser, at_least, run_command
from utils.config_utils import load_config
from utils.misc import WriteError, atomic_path, set_up_logging, writing

__all__ = ["calculate_for_config", "calculate_statistics"]


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--config_path", required=True, help="YAML config; gives the files and the dimensions")
    parser.add_argument("--output_path", help="JSON to write; default: data.normalization_stats_path")
    parser.add_argument("--train_data_override", nargs="+", help="instead of data.train_parquet_files")
    parser.add_argument("--num_workers", type=at_least(1), help="threads; default: one per core")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="section.key=value", dest="set_args")
    args = parser.parse_args()
    set_up_logging()
    config = load_config(args.config_path, {"data.train_parquet_files": args.train_data_override}, args.set_args)
    output = args.output_path or config.data.normalization_stats_path
    if output is None:
        parser.error("no --output_path, and the config sets no data.normalization_stats_path")
    output = Path(output)
    if output.is_dir():
        raise WriteError(f"{output} is a folder; give the path of a JSON file (--output_path)")
    text = json.dumps(calculate_for_config(config, args.num_workers), indent=1)
    with writing(output, f"it needs {len(text):,} bytes; give another --output_path"), atomic_path(output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(output)


if __name__ == "__main__":
    run_command(main)
