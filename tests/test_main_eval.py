"""main_eval.py and test_vla_offline.py as a user runs them, on small real checkpoints and files."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main_eval
import test_vla_offline
from data.episode_store import recorded_actions
from envs import make_env
from inference.eval_args import parse_args
from inference.metrics import METRICS
from inference.predictor import VLAPredictor
from tests.helpers import episode_rows, needs, write_episodes, write_rows
from tests.inference.checkpoints import train_tiny
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.parquet_utils import DataError

# metaworld must not be imported here: MuJoCo would settle on a GL backend before envs/ can choose one
SIMULATOR, INSTALLED = needs("metaworld")


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demos")
    write_episodes(folder / "a.parquet", [5, 7])
    write_episodes(folder / "b.parquet", [6], seed=1)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_paligemma_dir, demos):
    folder = tmp_path_factory.mktemp("run")
    return train_tiny(folder, tiny_paligemma_dir, [demos / "a.parquet", demos / "b.parquet"])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def evaluate(checkpoint, demos, output, *flags):
    paths = [str(demos / "a.parquet"), str(demos / "b.parquet")]
    args = ["--checkpoint_path", str(checkpoint), "--device", "cpu", "--output_dir", str(output), "--num_workers", "0"]
    main_eval.main([*args, "--eval_data_path", *paths, *flags])
    return json.loads((output / "metrics.json").read_text()), paths


def test_batch_mode(checkpoint, demos, tmp_path, capsys):
    result, paths = evaluate(checkpoint, demos, tmp_path / "out", "--save_predictions", "--batch_size", "4")
    assert set(result["predictors"]) == {"policy", "mean_action", "repeat_last_action"}
    for summary in result["predictors"].values():
        assert (summary["samples"], summary["valid_steps"]) == (18, 18 * 4 - 3 * 6)  # 1 + 2 + 3 padded per episode
        assert set(summary["overall"]) == set(METRICS)
        assert list(summary["per_dataset"]) == paths
        assert len(summary["per_step"]["mse"]) == len(summary["per_dimension"]["mse"]) == 4

    with (tmp_path / "out" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 18 * 4
    assert {row["dataset"] for row in rows} == {row["file"] for row in rows} == set(paths)
    valid = [row for row in rows if row["is_pad"] == "0"]
    errors = [(float(row[f"pred_{a}"]) - float(row[f"true_{a}"])) ** 2 for row in valid for a in range(4)]
    assert np.mean(errors) == pytest.approx(result["predictors"]["policy"]["overall"]["mse"], rel=1e-4)
    assert all(row["true_0"] == "" for row in rows if row["is_pad"] == "1")
    last = [row for row in rows if row["episode"] == "1" and row["frame"] == "6"]
    assert [row["is_pad"] for row in last] == ["0", "1", "1", "1"]

    plots = sorted((tmp_path / "out" / "plots").iterdir())
    assert len(plots) == 3  # two episodes of a, one of b
    assert Image.open(plots[0]).size[0] > 600
    log = (tmp_path / "out" / "inference_log.txt").read_text()
    assert "12 samples" in log and "repeat_last_action" in log
    printed = capsys.readouterr().out
    assert "repeat_last_action" in printed and f"wrote {tmp_path / 'out' / 'metrics.json'}" in printed


def test_trivial_predictors_by_hand(checkpoint, demos, tmp_path):
    result, _ = evaluate(checkpoint, demos, tmp_path, "--num_plots", "0")
    mean = np.array(load_checkpoint(checkpoint)["statistics"][0]["action"]["mean"])
    mean_errors, repeat_errors = [], []
    for seed, length in ((0, 5), (1, 7), (1, 6)):
        action = np.array([row["action"] for row in episode_rows(length, seed=seed)])
        for t in range(length):
            truth = action[t : t + 4]
            mean_errors += list(((truth - mean) ** 2).ravel())
            repeat_errors += list(((truth - (action[t - 1] if t else mean)) ** 2).ravel())
    predictors = result["predictors"]
    assert predictors["mean_action"]["overall"]["mse"] == pytest.approx(np.mean(mean_errors), rel=1e-5)
    assert predictors["repeat_last_action"]["overall"]["mse"] == pytest.approx(np.mean(repeat_errors), rel=1e-5)


def test_batch_size_changes_nothing(checkpoint, demos, tmp_path):
    one, _ = evaluate(checkpoint, demos, tmp_path / "one", "--batch_size", "1", "--num_plots", "0")
    many, _ = evaluate(checkpoint, demos, tmp_path / "many", "--batch_size", "7", "--num_plots", "0")
    policies = [result["predictors"]["policy"]["overall"] for result in (one, many)]
    assert policies[0]["mse"] == pytest.approx(policies[1]["mse"], rel=1e-5)
    reseeded, _ = evaluate(checkpoint, demos, tmp_path / "seed", "--seed", "1", "--num_plots", "0")
    assert reseeded["predictors"]["policy"]["overall"]["mse"] != pytest.approx(policies[0]["mse"], rel=1e-5)


def test_several_draws(checkpoint, demos, tmp_path, capsys):
    one, _ = evaluate(checkpoint, demos, tmp_path / "one", "--num_plots", "0")
    several, _ = evaluate(checkpoint, demos, tmp_path / "several", "--num_plots", "1", "--num_samples", "3")
    single, policy = (result["predictors"]["policy"]["overall"] for result in (one, several))
    assert policy["mse"] == pytest.approx(single["mse"], rel=1e-6), "the first draw does not depend on the others"
    assert single["spread"] is None and policy["spread"] > 0
    assert policy["best_of_k_mse_normalized"] < policy["mse_normalized"]
    assert several["settings"]["num_samples"] == 3
    assert several["predictors"]["mean_action"]["overall"]["spread"] is None
    assert "best_of_k_mse" in capsys.readouterr().out
    assert len(list((tmp_path / "several" / "plots").iterdir())) == 2


def test_bins_cover_standardised_actions(tmp_path, tiny_paligemma_dir):
    """The bins of binned accuracy reach as far as the data do, not one standard deviation."""
    demos = write_episodes(tmp_path / "demos" / "a.parquet", [9, 8])
    path = train_tiny(tmp_path, tiny_paligemma_dir, [demos], data={"normalization_type": "mean_std"})
    output = ["--output_dir", str(tmp_path / "out"), "--num_workers", "0", "--num_plots", "0", "--device", "cpu"]
    main_eval.main(["--checkpoint_path", str(path), "--eval_data_path", str(demos), *output])
    low, high = json.loads((tmp_path / "out" / "metrics.json").read_text())["settings"]["bin_range"]
    statistics = load_checkpoint(path)["statistics"][0]["action"]
    lowest, mean, std = (np.array(statistics[name]) for name in ("min", "mean", "std"))
    np.testing.assert_allclose(low, (lowest - mean) / std, rtol=1e-4)
    assert min(high) > 1.2


def test_quantization_reports_its_error(checkpoint, demos, tmp_path):
    pytest.importorskip("torchao")
    result, _ = evaluate(checkpoint, demos, tmp_path, "--quantization", "int8", "--num_plots", "0", "--batch_size", "4")
    error = result["quantization_error"]
    assert error["quantization"] == "int8" and error["samples"] == 18 and 0 < error["mean"] <= error["max"] < 0.1
    assert "int8 moves normalized actions by" in (tmp_path / "inference_log.txt").read_text()


def test_single_item(checkpoint, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "now.png")
    common = ["--checkpoint_path", str(checkpoint), "--device", "cpu", "--output_dir", str(tmp_path / "out")]
    common += ["--image1_paths", str(tmp_path / "now.png"), "--prompt", "open the window", "--save_predictions"]
    main_eval.main([*common, "--state_vector", "0.1 -0.2 0.3 0.4"])
    written = json.loads((tmp_path / "out" / "actions.json").read_text())
    wanted = VLAPredictor.from_checkpoint(checkpoint, "cpu").predict(
        pixels, prompt="open the window", state=[0.1, -0.2, 0.3, 0.4], seed=0
    )
    np.testing.assert_allclose(written["actions"], wanted)
    assert written["prompt"] == "open the window" and written["state"] == [0.1, -0.2, 0.3, 0.4]
    rows = list(csv.reader((tmp_path / "out" / "actions.csv").open()))
    assert rows[0] == ["step", "action_0", "action_1", "action_2", "action_3"] and len(rows) == 5
    assert f"{wanted[3, 3]:.5f}" in capsys.readouterr().out

    main_eval.main([*common, "--state_vector", "0.1", "-0.2", "0.3", "0.4"])  # several arguments mean the same
    assert json.loads((tmp_path / "out" / "actions.json").read_text()) == written
    for words in (["[0.1, -0.2, 0.3, 0.4]"], ["0.1,-0.2,0.3,0.4"], ["0.1", "-2e-1", "0.3", "0.4"]):
        main_eval.main([*common, "--state_vector", *words])
        assert json.loads((tmp_path / "out" / "actions.json").read_text()) == written
    for words in (["-4.2e-05", "0.6", "0.2", "1"], ["-4.2e-05,0.6,0.2,1"], ["-4.2e-05 0.6 0.2 1"]):
        args = parse_args([*common, "--state_vector", *words], None)
        assert args.state == [-4.2e-05, 0.6, 0.2, 1]
    with pytest.raises(ValueError, match="--state_vector: could not convert string to float: 'x'"):
        main_eval.main([*common, "--state_vector", "0.1 x"])
    with pytest.raises(ValueError, match="state is missing; this policy takes 4 values"):
        main_eval.main(common)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--checkpoint_path c", "--image1_paths or --image_paths, --env; found none"),
        ("--checkpoint_path c --eval_data_path d --env metaworld", "found --eval_data_path and --env"),
        ("--eval_data_path d", "--checkpoint_path is missing"),
        ("--checkpoint_path c --eval_data_path d --blind", "--blind belongs to --env, not to --eval_data_path"),
        ("--checkpoint_path c --env metaworld --tasks t --batch_size 4", "--batch_size belongs to --eval_data_path"),
        ("--checkpoint_path c --eval_data_path d --num_samples 0", "--num_samples is 0; give 1 or more"),
        ("--checkpoint_path c --env e --tasks t --num_samples 2", "--num_samples belongs to --eval_data_path"),
        ("--checkpoint_path c --eval_data_path d --seed -1", "--seed is -1; give 0 or more"),
        ("--checkpoint_path c --eval_data_path d --num_plots -1", "--num_plots is -1; give 0 or more"),
        ("--checkpoint_path c --eval_data_path d d", "--eval_data_path names a path twice"),
        ("--checkpoint_path c --image1_paths i", "--prompt is missing"),
        ("--checkpoint_path c --env metaworld", "--tasks is missing"),
        ("--env metaworld --tasks t", "--checkpoint_path is missing"),
        ("--env metaworld --tasks t --control replay", "--control replay and --demos_path go together"),
        ("--checkpoint_path c --env metaworld --tasks t --demos_path d", "--control replay and --demos_path go tog"),
        ("--env metaworld --tasks t --control expert --blind", "--blind has no meaning with --control expert"),
        ("--checkpoint_path c --env e --tasks t --control expert", "--checkpoint_path has no meaning with --control"),
        ("--env e --tasks t --control expert --compile default", "--compile has no meaning with --control expert"),
        ("--checkpoint_path c --eval_data_path d --compile fast", "argument --compile: invalid choice: 'fast'"),
        ("--checkpoint_path c --env e --tasks t --episodes 0", "--episodes is 0; give 1 or more"),
        (
            "--checkpoint_path c --eval_data_path d --num_inference_steps 0",
            "--num_inference_steps is 0; it must be pos",
        ),
        ("--checkpoint_path c --env e --tasks t --latency_steps -1", "--latency_steps is -1; give 0 or more control"),
        ("--checkpoint_path c --image1_paths i --prompt p --execution rtc", "--execution belongs to --env"),
        ("--env e --tasks t --control expert --execution rtc", "--execution has no meaning with --control expert"),
        (
            "--checkpoint_path c --env e --tasks t u --swap_prompts --prompt_override x",
            "--swap_prompts and --prompt_override contradict",
        ),
        ("--checkpoint_path c --env e --tasks t --env_options camera", "--env_options camera: no '='"),
    ],
)
def test_contradictory_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        parse_args(flags.split(), "")
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_flags_of_settings_are_made_from_their_fields():
    flags = "--checkpoint_path c --env e --tasks t --execution rtc --num_inference_steps 4 --n_action_steps 3"
    args = parse_args(flags.split(), "")
    assert args.settings == {"execution": "rtc", "num_inference_steps": 4, "n_action_steps": 3}
    assert (args.episodes, args.num_envs, args.num_videos, args.blind, args.batch_size) == (20, 1, 3, False, 16)


def test_env_options_are_read_as_yaml():
    flags = "--env metaworld --tasks t --control expert --env_options camera=corner2 hide_goal=true image_size=64"
    assert parse_args(flags.split(), "").options == {"camera": "corner2", "hide_goal": True, "image_size": 64}


def test_a_device_that_is_not_there(checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for main in (main_eval.main, lambda argv: test_vla_offline.main([*argv[:2], *argv[-2:]])):
        with pytest.raises(ValueError, match="device is 'cuda', but this machine has 0 GPUs"):
            main(["--checkpoint_path", str(checkpoint), "--eval_data_path", "x", "--device", "cuda"])


def test_metrics_do_not_depend_on_how_the_path_is_spelt(checkpoint, demos, tmp_path, monkeypatch):
    monkeypatch.chdir(demos.parent)
    found = []
    for i, path in enumerate([str(demos), f"{demos}/", demos.name, f"./{demos.name}/*.parquet"]):
        out = ["--device", "cpu", "--num_plots", "0", "--num_workers", "0", "--output_dir", str(tmp_path / str(i))]
        main_eval.main(["--checkpoint_path", str(checkpoint), "--eval_data_path", path, *out])
        result = json.loads((tmp_path / str(i) / "metrics.json").read_text())
        found.append(result["predictors"]["policy"]["overall"])
    assert found[0]["mse"] > 0 and found[1:] == found[:1] * 3


def test_errors_end_the_script_with_one_line(tmp_path):
    command = [sys.executable, "main_eval.py", "--checkpoint_path", str(tmp_path / "none.pth.tar")]
    done = subprocess.run(
        [*command, "--eval_data_path", "x", "--output_dir", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "error: " in done.stderr and "no such checkpoint" in done.stderr and "Traceback" not in done.stderr


def test_offline_check(checkpoint, demos, tmp_path, capsys):
    args = ["--checkpoint_path", str(checkpoint), "--test_data_dir", str(demos), "--device", "cpu"]
    code = test_vla_offline.main([*args, "--output_file", str(tmp_path / "report.json"), "--max_samples", "6"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert code == 1 and report["passed"] is False  # two steps of training are not enough, and the check says so
    assert "FAILED: " in capsys.readouterr().out
    for path in (demos / "a.parquet", demos / "b.parquet"):
        found = report["files"][str(path)]
        assert found["samples"] == 6 and found["checks"]["finite"] and found["checks"]["repeatable"]
        assert found["checks"]["better_than_mean_action"] is False
        assert set(found["metrics"]) == {"policy", "mean_action", "repeat_last_action"}
    assert report["latency"]["median_ms"] > 0
    test_vla_offline.main([*args, "--output_file", str(tmp_path / "report.txt"), "--max_samples", "2"])
    assert (tmp_path / "report.txt").read_text().endswith("FAILED\n")


def test_offline_check_without_data_takes_what_the_checkpoint_held_out(checkpoint, demos, tmp_path, tiny_paligemma_dir):
    args = ["--device", "cpu", "--output_file", str(tmp_path / "report.json"), "--max_samples", "2"]
    test_vla_offline.main(["--checkpoint_path", str(checkpoint), *args])
    names = [Path(path).name for path in json.loads((tmp_path / "report.json").read_text())["files"]]
    assert names == ["button-press-topdown-v3.parquet", "window-open-v3.parquet"]
    data = {"val_parquet_files": [str(demos / "a.parquet")]}
    path = train_tiny(tmp_path, tiny_paligemma_dir, [demos / "b.parquet"], data=data)
    test_vla_offline.main(["--checkpoint_path", str(path), *args])
    assert list(json.loads((tmp_path / "report.json").read_text())["files"]) == [str(demos / "a.parquet")]
    out = ["--device", "cpu", "--output_dir", str(tmp_path / "eval"), "--num_plots", "0"]
    main_eval.main(["--checkpoint_path", str(path), "--split", "val", *out])
    assert "The policy is " in (tmp_path / "eval/inference_log.txt").read_text()
    with pytest.raises(ValueError, match="--split val: the checkpoint's config holds nothing out .* give --eval_data"):
        main_eval.main(["--checkpoint_path", str(checkpoint), "--split", "val", *out])
    with pytest.raises(SystemExit):
        main_eval.main(["--checkpoint_path", str(path), "--split", "val", "--eval_data_path", "x", *out])


def test_what_val_fraction_held_out(demos, tmp_path, tiny_paligemma_dir, capsys):
    files = [demos / "a.parquet", demos / "b.parquet"]
    data = {"val_fraction": 0.4, "train_parquet_files": list(map(str, files))}  # one of the three episodes
    path = train_tiny(tmp_path, tiny_paligemma_dir, files, data=data)
    out = ["--device", "cpu", "--output_dir", str(tmp_path / "eval"), "--num_plots", "0"]
    main_eval.main(["--checkpoint_path", str(path), "--split", "val", *out])
    evaluated = json.loads((tmp_path / "eval/metrics.json").read_text())["predictors"]["policy"]["samples"]
    check = ["--checkpoint_path", str(path), "--device", "cpu", "--output_file", str(tmp_path / "report.json")]
    test_vla_offline.main(check)
    found = json.loads((tmp_path / "report.json").read_text())["files"]
    assert list(found) == ["held out of default"] and found["held out of default"]["samples"] == evaluated in (5, 6, 7)
    with pytest.raises(SystemExit):
        test_vla_offline.main([*check, "--max_samples", "0"])
    assert "--max_samples: 0 is less than 1; give 1 or more" in capsys.readouterr().err


def test_offline_check_of_relative_actions(tmp_path, tiny_paligemma_dir):
    """The training range is that of the differences to the state, which itself is far away here."""
    rows = [row for i in range(3) for row in episode_rows(6, seed=i)]
    rows = [{**row, "state": [50.0] * 4, "action": [50 + value for value in row["action"]]} for row in rows]
    data = write_rows(tmp_path / "data" / "far.parquet", rows)
    settings = {"data": {"action_mode": "delta"}, "head": {"type": "regression"}}
    path = train_tiny(tmp_path, tiny_paligemma_dir, [data], **settings)
    args = ["--checkpoint_path", str(path), "--test_data_dir", str(data.parent), "--device", "cpu"]
    test_vla_offline.main([*args, "--output_file", str(tmp_path / "report.json"), "--dataset", "default"])
    assert json.loads((tmp_path / "report.json").read_text())["files"][str(data)]["share_in_range"] == 1.0
    with pytest.raises(
        ValueError, match="trained on default; there is no dataset 'other': give one of them.*--dataset"
    ):
        test_vla_offline.main([*args, "--dataset", "other"])


@pytest.mark.slow
def test_offline_check_passes_a_policy_that_has_learned(tmp_path, tiny_paligemma_dir):
    rows = []
    for i, level in enumerate((-0.2, 1.0, 0.0, -1.0, 0.2)):  # the action is the state, the same all episode long
        episode = episode_rows(8 if abs(level) < 1 else 1, seed=i)
        rows += [{**row, "state": [level] * 4, "action": [level] * 4} for row in episode]
    data = write_rows(tmp_path / "data" / "easy.parquet", rows)
    head = {"horizon": 2, "hidden_dim": 64, "num_layers": 2, "noise_draws_per_sample": 8}
    path = train_tiny(tmp_path, tiny_paligemma_dir, [data], steps=120, head=head)
    args = ["--checkpoint_path", str(path), "--test_data_dir", str(data.parent), "--device", "cpu"]
    assert test_vla_offline.main([*args, "--output_file", str(tmp_path / "report.json")]) == 0


def test_offline_check_names_predictions_that_are_not_finite(checkpoint, demos, tmp_path):
    broken = load_checkpoint(checkpoint)
    del broken["format"]
    huge = torch.full_like(
        broken["model"]["action_head.action_in.bias"], 3e38
    )  # NaN itself is refused with the weights
    broken["model"]["action_head.action_in.bias"] = huge
    save_checkpoint(broken, tmp_path / "broken.pth.tar")
    args = ["--checkpoint_path", str(tmp_path / "broken.pth.tar"), "--test_data_dir", str(demos), "--device", "cpu"]
    assert test_vla_offline.main([*args, "--output_file", str(tmp_path / "report.json")]) == 1
    found = json.loads((tmp_path / "report.json").read_text())["files"][str(demos / "a.parquet")]
    assert found["checks"] == {"finite": False} and "step 0, dimension 0 is nan" in found["error"]


@SIMULATOR
@INSTALLED
def test_closed_loop(checkpoint, tmp_path, capsys):
    tasks = ["button-press-topdown-v3", "window-open-v3"]
    common = ["--checkpoint_path", str(checkpoint), "--env", "metaworld", "--tasks", *tasks, "--device", "cpu"]
    common += ["--env_options", "max_episode_steps=4", "hide_goal=true", "--episodes", "2", "--num_threads", "1"]
    main_eval.main([*common, "--output_dir", str(tmp_path / "own"), "--num_videos", "1"])
    own = json.loads((tmp_path / "own" / "rollouts.json").read_text())
    assert own["settings"]["env_settings"]["image_size"] == 32  # what the policy was trained on
    assert own["settings"]["control"] == "policy" and own["settings"]["execution"]["n_action_steps"] == 2
    assert own["summary"]["episodes"] == 4 and list(own["tasks"]) == tasks
    for task in own["tasks"].values():
        assert task["seeds"] == [10000, 10001] and task["steps"] == [4, 4] and task["prompt"] == task["instruction"]
        assert len(task["videos"]) == 1
    assert "Wilson" in capsys.readouterr().out
    with pytest.raises(ValueError, match="episodes of another evaluation: compute_dtype differs .there 'float32', now"):
        main_eval.main([*common, "--output_dir", str(tmp_path / "own"), "--num_videos", "1", "--use_amp"])

    main_eval.main([*common, "--output_dir", str(tmp_path / "swap"), "--num_videos", "0", "--swap_prompts", "--blind"])
    swapped = json.loads((tmp_path / "swap" / "rollouts.json").read_text())
    assert swapped["settings"]["control"] == "blind" and swapped["settings"]["prompts"] == "swapped"
    first, second = (swapped["tasks"][task] for task in tasks)
    assert (first["prompt"], second["prompt"]) == (second["instruction"], first["instruction"])


@SIMULATOR
@INSTALLED
def test_latency_in_closed_loop(checkpoint, tmp_path):
    args = ["--checkpoint_path", str(checkpoint), "--env", "metaworld", "--tasks", "window-open-v3", "--device", "cpu"]
    args += ["--env_options", "max_episode_steps=6", "--episodes", "1", "--num_videos", "0", "--num_threads", "1"]
    args += ["--latency_steps", "2"]
    for strategy, held in (("synchronous", 4), ("rtc", 2)):
        main_eval.main([*args, "--execution", strategy, "--output_dir", str(tmp_path / strategy)])
        result = json.loads((tmp_path / strategy / "rollouts.json").read_text())
        assert result["settings"]["execution"]["strategy"] == strategy
        assert result["settings"]["execution"]["latency_steps"] == 2
        assert result["tasks"]["window-open-v3"]["held_steps"] == [held]
    with pytest.raises(ValueError, match="must cover 6, but the policy predicts a horizon of 4"):
        main_eval.main([*args, "--execution", "rtc", "--latency_steps", "3", "--output_dir", str(tmp_path / "none")])


@SIMULATOR
@INSTALLED
def test_controls_in_closed_loop(tmp_path):
    common = ["--env", "metaworld", "--tasks", "plate-slide-side-v3", "--episodes", "2", "--num_videos", "0"]
    main_eval.main([*common, "--control", "expert", "--output_dir", str(tmp_path / "expert"), "--image_size", "32"])
    expert = json.loads((tmp_path / "expert" / "rollouts.json").read_text())
    assert expert["summary"]["successes"] == 2 and expert["settings"]["env_settings"]["image_size"] == 32

    rows = [row for i in range(2) for row in episode_rows(5, seed=i)]
    for row in rows[:5]:
        row["prompt"] = expert["tasks"]["plate-slide-side-v3"]["instruction"]
    write_rows(tmp_path / "demos.parquet", rows)
    replay = [*common, "--control", "replay", "--demos_path", str(tmp_path / "demos.parquet")]
    main_eval.main([*replay, "--output_dir", str(tmp_path / "replay"), "--env_options", "max_episode_steps=6"])
    result = json.loads((tmp_path / "replay" / "rollouts.json").read_text())
    assert result["settings"]["control"] == "replay"
    assert result["tasks"]["plate-slide-side-v3"]["steps"] == [6, 6]
    env = make_env("metaworld", "plate-slide-side-v3", image_size=32)
    env.close()
    wordings = [env.instructions[i % 2] for i in range(2)]
    for i, row in enumerate(rows):  # recorded in two wordings of the instruction: both are of the task
        row["prompt"] = wordings[i // 5]
    write_rows(tmp_path / "wordings.parquet", rows)
    assert len(recorded_actions(str(tmp_path / "wordings.parquet"), "--demos_path", env.instructions, 4, 4)) == 2
    replay[3] = "drawer-close-v3"
    with pytest.raises(DataError, match="no episode with the instruction 'push the drawer shut'.*open the window"):
        main_eval.main([*replay, "--output_dir", str(tmp_path / "other")])
