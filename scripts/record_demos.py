"""Records demonstrations of scripted experts: one Parquet file a task, one row a time step.

    python scripts/record_demos.py --env metaworld --tasks button-press-topdown-v3 window-open-v3 \\
        --episodes 40 --output_dir demos

Columns: image_1 and, with --second_camera, image_2, or whatever --cameras names (encoded JPEG or PNG bytes), state and
action (float32 lists, physical units), is_first, is_last, is_terminal, prompt, episode_index, frame_index, seed. A row
holds what was seen and the expert's action for it, clipped as the simulator clips it. Each episode is one row group;
how the file was made is in its schema's metadata.

    python scripts/record_demos.py --env metaworld --tasks window-open-v3 --episodes 10 --seed 2000 \\
        --policy C --takeover --output_dir corrections

With --takeover the policy of a checkpoint acts, and the expert finishes where it leaves its corridor
(scripts/_takeover.py has the rule). Kept are the successes that the expert had to bring about. Their column
intervention is true where it acted, and action holds what was executed.

Only successful episodes are kept, and each ends a few steps after its success. Attempt k of a task is reset with
seed --seed + k, and the first --episodes successes are kept in that order, so a file does not depend on
--num_workers. Evaluation takes its seeds from 10000 upwards (envs.FIRST_EVALUATION_SEED): record below that.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys

if not __package__:
    import _repository  # noqa: F401

from scripts._recording import TaskSummary, record, recording_parser
from utils.arguments import run_command
from utils.text_table import text_table


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, and as `command` what to write into the files."""
    args = recording_parser(__doc__).parse_args(argv)
    args.command = f"python scripts/record_demos.py {shlex.join(sys.argv[1:] if argv is None else argv)}"
    return args


def format_summaries(summaries: list[TaskSummary]) -> str:
    """A table of what was recorded, one line a task."""
    rows = [[s.task, s.kept, s.dropped, s.steps, f"{s.steps / s.seconds:.0f}", s.path] for s in summaries]
    return text_table(["task", "kept", "dropped", "steps", "frames/s", "file"], rows)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    print(format_summaries(record(parse_args())))


if __name__ == "__main__":
    run_command(main, RuntimeError)
