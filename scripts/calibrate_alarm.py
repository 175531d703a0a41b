"""Calibrate the alarm of a policy: from which uncertainty on will it probably fail?

    python scripts/calibrate_alarm.py --checkpoint_path C --rollouts results/policy    # closed-loop episodes of it
    python scripts/calibrate_alarm.py --checkpoint_path C --data_path demos/val        # recorded episodes
    python scripts/calibrate_alarm.py --checkpoint_path C                              # those that its config held out

At most a share --rate of the episodes that succeed raises a false alarm (`inference/alarm.py` says in which sense).
What is found lies beside the checkpoint, as `<checkpoint>.alarm.json`, and in an exported folder as `alarm.json`: from
then on predictions, the server and closed-loop evaluations have an alarm. It holds for the settings that it was made
with; run it again for others, both are kept.
"""

from __future__ import annotations

from pathlib import Path

if not __package__:
    import _repository  # noqa: F401

from data.loader import open_for_evaluation
from inference.alarm import MAX_WINDOW, CalibrationError, calibrated
from inference.calibrate import recorded_uncertainty, rollout_settings, rollout_uncertainty
from inference.policy_files import local_folder, read_policy, write_alarm
from inference.predictor import VLAPredictor
from inference.uncertainty import alarm_settings
from utils.arguments import CommandParser, run_command
from utils.cli import add_setting_flags
from utils.config_utils import InferenceConfig
from utils.misc import set_up_logging

SETTINGS = ("num_inference_steps", "best_of", "n_action_steps", "execution", "latency_steps")


def main() -> None:
    parser = CommandParser(__doc__)
    parser.add_argument("--checkpoint_path", required=True, help="*.pth.tar written by training, or an exported folder")
    parser.add_argument("--rollouts", type=Path, nargs="+", metavar="DIR", help="--output_dir of main_eval.py --env")
    parser.add_argument("--data_path", nargs="+", metavar="P", help="recorded episodes; those that failed are left out")
    parser.add_argument("--rate", type=float, default=0.05, help="of false alarms, per episode (default %(default)s)")
    parser.add_argument("--needed", type=int, default=2, help="plans above the threshold ... (default %(default)s)")
    parser.add_argument("--window", type=int, default=3, help="... of so many of the last (default %(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dataset", help="for a policy trained on a mixture: the dataset that it drives")
    add_setting_flags(parser.add_argument_group("instead of the checkpoint's settings"), InferenceConfig, SETTINGS)
    args = parser.parse_args()
    if args.rollouts and args.data_path:
        parser.error("--rollouts and --data_path are two sources; give one of them")
    if args.rollouts and len({path.resolve() for path in args.rollouts}) < len(args.rollouts):
        parser.error("--rollouts names a folder twice; its episodes would count twice")
    if not 0 < args.rate <= 0.5:
        parser.error(f"--rate is {args.rate:g}; give a share above 0, and at most 0.5: the alarm ends at the median")
    if not 1 <= args.needed <= args.window <= MAX_WINDOW:
        parser.error(f"--needed {args.needed} of --window {args.window}: give 1 <= needed <= window <= {MAX_WINDOW}")
    set_up_logging()
    settings = {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
    if args.rollouts:
        if settings or args.dataset:
            given = ", ".join(f"--{name}" for name in [*settings, *(["dataset"] if args.dataset else [])])
            parser.error(f"{given}: the results of --rollouts say what they were run with; evaluate anew for others")
        settings = rollout_settings(args.rollouts, args.checkpoint_path)
        args.dataset = settings.pop("dataset")
    predictor = VLAPredictor.from_checkpoint(args.checkpoint_path, args.device, args.dataset, **settings)
    if args.rollouts:
        episodes = rollout_uncertainty(args.rollouts)
        source = f"closed-loop episodes in {', '.join(map(str, args.rollouts))}"
    else:
        if predictor.settings.execution in ("rtc", "clean_prefix"):
            raise CalibrationError(
                f"with {predictor.settings.execution} a plan continues the one before, and recorded data have none; "
                "calibrate on closed-loop results (--rollouts)"
            )
        processors = predictor.image_processor, predictor.prompt_tokenizer
        datasets = open_for_evaluation(predictor.config, *processors, args.data_path, predictor.dataset_index)
        episodes = [episode for data in datasets.values() for episode in recorded_uncertainty(predictor, data)]
        source = f"recorded episodes in {', '.join(datasets)}"
    holds_for = alarm_settings(predictor.model.action_head, predictor.settings, predictor.dataset.name)
    calibration = calibrated(episodes, args.rate, args.needed, args.window, source=source, settings=holds_for)
    folder = local_folder(args.checkpoint_path)
    checkpoint = read_policy(folder)
    others = [kept for kept in checkpoint["alarm"] if kept.settings != holds_for]
    path = write_alarm(folder, checkpoint, [*others, calibration])
    print(
        f"\n{holds_for['kind']} above {calibration.threshold:.4g} in {args.needed} of {args.window} plans raises the "
        f"alarm, below {calibration.release:.4g} ends it: at most {100 * args.rate:g} % of episodes that succeed, from "
        f"{calibration.episodes} {source}\nwrote {path}"
    )


if __name__ == "__main__":
    run_command(main)
