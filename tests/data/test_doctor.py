"""The doctor: every planted fault with its file and row, nothing on clean data, and the command around it."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import inspect_parquet
from data.doctor.examine import Requirements, examine
from data.doctor.findings import KINDS, MAX_PER_FILE
from data.doctor.report import write_plots
from data.episode_store import EpisodeStore
from data.processing import ObservationError, VLAImageProcessor
from tests.data.planted_faults import FAULTS
from tests.data.spoiling import (
    LENGTHS,
    PROMPTS,
    TRAIN,
    VAL,
    Files,
    clean_files,
    encode,
    episode,
    put,
    put_all,
    put_value,
    replace_column,
    spoil_pages,
    write,
)
from tests.helpers import write_episodes, write_rows
from utils.parquet_utils import DataError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def clean_rows() -> Files:
    return clean_files()


@pytest.fixture
def files(clean_rows) -> Files:
    return copy.deepcopy(clean_rows)


def loads(train: list[Path], val: list[Path], cache: Path) -> bool:
    """Whether the training loader takes the data: both splits open and every frame decodes."""
    decode = VLAImageProcessor(32, 32, (0.5,) * 3, (0.5,) * 3, Image.Resampling.BICUBIC)
    try:
        for split in (train, val):
            store = EpisodeStore(split, state_dim=4, per_action_dim=4, cameras=("image_1", "image_2"), cache_dir=cache)
            for row in range(len(store)):
                assert store.image("image_1", row) is not None
                for camera in store.cameras:
                    frame = store.image(camera, row)
                    if frame is not None:
                        decode(frame)
    except (DataError, ObservationError, AssertionError, OSError, ValueError):
        return False
    return True


def test_clean_data_have_no_findings(tmp_path, clean_rows):
    train, val = write(tmp_path, clean_rows)
    requirements = Requirements(
        widths={"state": ("data.state_dim", 4), "action": ("per_action_dim", 4)},
        horizon=8,
        cameras=("image_1", "image_2"),
        count_tokens=lambda prompt: len(prompt.split()) + 2,
        prompt_max_len=24,
    )
    seen = examine(train, val, requirements)
    assert [finding.message for finding in seen.findings.listed] == []
    assert loads(train, val, tmp_path / "cache")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: "-".join(filter(None, (fault.kind, fault.name))))
def test_planted_fault(fault, tmp_path, files):
    if fault.spoil:
        fault.spoil(files)
    write(tmp_path, files)
    if fault.damage:
        fault.damage(tmp_path)
    paths = sorted(path for path in tmp_path.iterdir())
    train, val = [path for path in paths if path.name not in VAL], [path for path in paths if path.name in VAL]
    seen = examine(train, val, fault.requirements, num_workers=0)
    listed = seen.findings.listed
    found = [(f.kind, Path(f.file).name, f.row) for f in listed]
    assert (fault.kind, fault.file, fault.row) in found
    assert {kind for kind, _, _ in found} == {fault.kind} | fault.also, found
    about = next(f for f in listed if (f.kind, Path(f.file).name, f.row) == (fault.kind, fault.file, fault.row))
    assert about.episode == fault.episode and about.remedy and about.severity == KINDS[fault.kind].severity
    expected = KINDS[fault.kind].severity == "warning" if fault.loads is None else fault.loads
    assert loads(train, val, tmp_path / "cache") == expected


def test_every_kind_is_planted():
    assert {fault.kind for fault in FAULTS} == set(KINDS)
    assert len(KINDS) >= 25


def run(*args: Any) -> int:
    return inspect_parquet.main([*map(str, args), "--num_workers", "0"])


def test_command(tmp_path, files, capsys):
    for fault in ("nan", "state_outlier"):
        next(f for f in FAULTS if f.kind == fault).spoil(files)
    train, val = write(tmp_path, files)
    out, plots = tmp_path / "out" / "report.json", tmp_path / "plots"
    assert run("--data_path", *train, "--val_data_path", *val, "--report", out, "--plots_dir", plots) == 1
    report = json.loads(out.read_text())
    assert set(report) >= {"findings", "errors", "warnings", "counts", "datasets", "may_train"}
    assert report["counts"] == {"nan": 1, "state_outlier": 1} and not report["may_train"]
    for finding in report["findings"]:
        about = {"file", "episode", "row", "severity", "kind", "message", "remedy", "edit", "data", "command"}
        assert set(finding) == about
    assert [f["severity"] for f in report["findings"]] == ["error", "warning"]
    about = report["datasets"]["train"]
    assert (about["episodes"], about["steps"], about["length"]["max"]) == (8, sum(LENGTHS), 30)
    assert about["rate_hz"] == pytest.approx(20, rel=0.02)
    assert [prompt["episodes"] for prompt in about["prompts"]] == [4, 4]
    assert about["cameras"]["image_2"] == {"files": 3, "frames": 206, "sizes": {"40x40 JPEG": 206}}
    assert about["action"]["min"][:3] == [-1, -1, -1] and about["state"]["max"][1] == 300
    assert [file["episodes"] for file in about["files"]] == [3, 2, 3]  # an episode belongs to the file it begins in
    printed = capsys.readouterr().out
    assert f"{train[2]} row 33 (episode 6): state[2] is NaN" in printed
    files_named = " ".join(map(str, train))
    assert (
        f"mend: python scripts/edit_dataset.py --data_path {files_named} --output_dir edited_train --delete 6"
        in printed
    )
    assert "1 error, 1 warning: training may not start" in printed and str(out) in printed
    for name in ("contact_sheet.png", "state.png", "action.png"):
        pixels = np.asarray(Image.open(plots / name).convert("RGB"))
        assert pixels.shape[1] > 1000 and pixels.shape[0] > 400 and pixels.std() > 15
        assert str(plots / name) in printed
    red = (np.asarray(Image.open(plots / "state.png").convert("RGB")) == (193, 18, 31)).all(axis=-1)
    assert red.sum() > 10  # the outlier


def test_exit_codes(tmp_path, files, capsys):
    put_value("a.parquet", 44, "state", 1, 300.0)(files)
    train, _ = write(tmp_path, files)
    assert run("--data_path", *train) == 0
    assert "1 warning: training may start" in capsys.readouterr().out
    assert run("--data_path", *train, "--strict") == 1
    with pytest.raises(SystemExit, match="2"):
        run("--strict")
    assert "--data_path" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        inspect_parquet.main(["--data_path", str(train[0]), "--num_workers", "-1"])
    result = subprocess.run(
        [sys.executable, ROOT / "inspect_parquet.py", "--data_path", tmp_path / "nowhere"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 2 and "matches no Parquet file" in result.stderr


def test_samples_have_one_constant_dimension(capsys):
    assert run("--data_path", ROOT / "data/samples") == 0
    assert "action[3] is 1 in every row in all 2 files" in capsys.readouterr().out
    assert examine(sorted((ROOT / "data/samples").glob("*.parquet")), num_workers=0).findings.counts == {
        "frozen_dimension": 1
    }


def test_what_a_config_asks(tmp_path, files, tiny_paligemma_dir, capsys):
    write(tmp_path, files)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"data: {{train_parquet_files: [{tmp_path}/a.parquet, {tmp_path}/b.parquet, {tmp_path}/c.parquet], "
        f"val_parquet_files: [{tmp_path}/val.parquet], state_dim: 4, prompt_max_len: 8}}\n"
        f"model: {{vlm_config: {{model_name_or_path: {tiny_paligemma_dir}}}, "
        "action_head_config: {horizon: 24, per_action_dim: 5}}\n"
    )
    out = tmp_path / "report.json"
    assert run("--config_path", config, "--report", out) == 1
    report = json.loads(out.read_text())
    assert report["counts"]["width_differs_from_config"] == 4  # every file
    assert report["counts"]["short_episode"] == 2  # of 22 and 23 steps
    assert set(report["datasets"]) == {"train", "val"}
    counter = inspect_parquet.token_counter(inspect_parquet.load_config(config))
    assert {f["kind"] for f in report["findings"]} >= (
        {"prompt_too_long"} if max(map(counter, PROMPTS)) > 8 else {"short_episode"}
    )


def test_mixtures_are_examined_one_by_one(tmp_path, files, capsys):
    files["c.parquet"][5]["prompt"] = ""
    put_all("c.parquet", "state", lambda i, row: row["state"] + [0.1 * i])(files)
    write(tmp_path, files)
    config = tmp_path / "config.yaml"
    config.write_text(
        "data:\n  state_dim: 5\n  mixture:\n"
        f"  - {{name: narrow, path: [{tmp_path}/a.parquet, {tmp_path}/b.parquet], state_dim: 4}}\n"
        f"  - {{name: wide, path: [{tmp_path}/c.parquet]}}\n"
        "model: {action_head_config: {horizon: 8, per_action_dim: 4}}\n"
    )
    out, plots = tmp_path / "report.json", tmp_path / "plots"
    assert run("--config_path", config, "--report", out, "--plots_dir", plots, "--skip_images") == 1
    report = json.loads(out.read_text())
    assert report["counts"] == {"empty_prompt": 1} and set(report["datasets"]) == {"narrow train", "wide train"}
    assert sorted(path.name for path in (plots / "wide").iterdir()) == ["action.png", "state.png"]


def test_held_out_episodes_must_not_recur(tmp_path, files):
    """`data.val_fraction` holds out whole episodes: a copy of one in training would leak."""
    files["c.parquet"] += copy.deepcopy(files["a.parquet"][:24])
    train, _ = write(tmp_path, {name: files[name] for name in TRAIN})
    for held_out, kind in (([8], "split_overlap"), ([3], "duplicated_episode")):
        requirements = Requirements(held_out=lambda episodes, held_out=held_out: np.isin(np.arange(episodes), held_out))
        seen = examine(train, requirements=requirements, skip_images=True)
        assert [(f.kind, f.episode, f.row) for f in seen.findings.listed] == [(kind, 8, 76)]


def test_processes_see_what_one_sees(tmp_path, files):
    for i in (3, 40, 41):
        put("a.parquet", i, "image_1", b"\xff\xd8 no image")(files)
    train, val = write(tmp_path, files)
    one, two = (examine(train, val, num_workers=workers) for workers in (0, 2))
    assert one.findings.listed == two.findings.listed and len(one.findings.listed) == 3
    for camera in ("image_1", "image_2"):
        np.testing.assert_array_equal(one.frames.facts[camera], two.frames.facts[camera])
        assert one.frames.pictures[camera].keys() == two.frames.pictures[camera].keys()


def test_skipped_images_are_not_read(tmp_path, files):
    train, val = write(tmp_path, files)
    for column in ("image_1", "image_2"):
        spoil_pages(train[0], column)
    assert examine(train, val, skip_images=True).findings.listed == []
    assert set(examine(train, val, num_workers=0).findings.counts) == {"corrupt_data"}


def test_memory_does_not_grow_with_images(tmp_path):
    """Arrow never holds a row group of images, only some pages and batches of it."""
    rows = episode(50, 0)
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    for i, row in enumerate(rows):
        del row["image_2"]
        row["image_1"] = encode(np.roll(noise, i, axis=0), format="PNG")
    many = [
        dict(row, episode_index=e, image_1=row["image_1"] + bytes([e]), state=[x + 0.01 * e for x in row["state"]])
        for e in range(8)
        for row in rows
    ]
    path = tmp_path / "a.parquet"
    table = pq.read_table(write_rows(path, many))
    pq.write_table(table, path, row_group_size=1000, write_batch_size=8)  # pages of 8 rows
    assert pq.ParquetFile(path).num_row_groups == 1 and path.stat().st_size > 40e6
    program = (
        "import sys, pyarrow as pa; from data.doctor.examine import examine; "
        "seen = examine([sys.argv[1]], num_workers=0); "
        "print(sum(seen.findings.counts.values()), pa.default_memory_pool().max_memory())"
    )
    result = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, cwd=ROOT, check=True)
    findings, peak = map(int, result.stdout.split())
    assert findings == 0 and peak < 0.5 * path.stat().st_size


def test_a_camera_that_no_file_has(tmp_path, files):
    """A column of nulls is a camera that is not there; that matters only to a config that reads it."""
    for name in files:
        put_all(name, "image_2", lambda i, row: None)(files)
    train, val = write(tmp_path, files)
    for path in (*train, *val):
        replace_column(path, "image_2", [None] * pq.read_metadata(path).num_rows, pa.binary())
    assert examine(train, val, num_workers=0).findings.listed == []
    requirements = Requirements(cameras=("image_1", "image_2"))
    assert examine(train, val, requirements, num_workers=0).findings.counts == {"camera_missing": 1}


def test_many_findings_are_counted_but_not_all_listed(tmp_path):
    rows = episode(400, 0)
    for row in rows[1::2]:
        row["action"][0] = float("nan")
    path = write_rows(tmp_path / "a.parquet", rows)
    report = examine([path], skip_images=True).to_dict()
    assert report["counts"]["nan"] == 200 and report["not_listed"] == {"nan": 200 - MAX_PER_FILE}
    assert sum(finding["kind"] == "nan" for finding in report["findings"]) == MAX_PER_FILE


def test_nothing_readable(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"")
    seen = examine([path])
    assert seen.findings.counts == {"unreadable_file": 1} and not seen.may_train
    assert seen.to_dict()["datasets"]["train"]["episodes"] == 0
    assert write_plots(seen, tmp_path / "plots") == []


def test_decoding_processes_do_not_run_the_main_file_anew(tmp_path):
    data = write_episodes(tmp_path / "data.parquet", [6, 6], image_size=16)
    program = tmp_path / "program.py"
    program.write_text(
        "print('the main file runs')\n"
        "if __name__ == '__main__':\n"
        "    import pathlib, sys\n"
        f"    sys.path.insert(0, {str(ROOT)!r})\n"
        "    from data.doctor.examine import examine\n"
        f"    print(len(examine([pathlib.Path({str(data)!r})], num_workers=2).frames.facts['image_1']))\n"
    )
    ran = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == ["the main file runs", "12"]
