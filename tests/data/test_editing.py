"""Editing episodes: what is asked for happens, all else stays, and what the doctor finds its commands mend."""

from __future__ import annotations

import copy
import io
import json
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.convert.lerobot_metadata import LeRobotDataset
from data.doctor.examine import examine
from data.doctor.remedies import command
from data.editing.edits import Edits
from data.editing.plan import make_plan
from data.editing.write import write_edited
from data.episode_store import EpisodeStore
from data.lerobot_table import LeRobotTable
from scripts import edit_dataset
from tests.data.convert.lerobot_fixtures import FIXTURES
from tests.data.planted_faults import FAULTS
from tests.data.spoiling import VAL, clean_files
from tests.helpers import episode_rows, png, write_rows
from utils.parquet_utils import DataError
from utils.recordings import resolve_recordings

# Kinds whose remedy takes judgement of what the data mean; every other names its command.
JUDGEMENT = {
    *("width_differs_between_files", "width_differs_from_config", "float32_precision", "prompt_too_long"),
    *("angle_wraps", "frozen_dimension", "unit_mismatch", "action_is_state", "slow_camera"),
}
LENGTHS = (12, 9, 15)


@pytest.fixture(scope="module")
def clean_rows():
    return clean_files()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: "-".join(filter(None, (fault.kind, fault.name))))
def test_the_command_that_a_finding_names_makes_it_go_away(fault, clean_rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = copy.deepcopy(clean_rows)
    if fault.spoil:
        fault.spoil(files)
    for name, rows in files.items():
        write_rows(tmp_path / name, rows, row_group_size=16)
    if fault.damage:
        fault.damage(tmp_path)
    for path in sorted(tmp_path.glob("*.parquet")):
        folder = tmp_path / ("val" if path.name in VAL else "train")
        folder.mkdir(exist_ok=True)
        path.rename(folder / path.name)

    def findings(train: str, val: str):
        paths = [sorted(Path(folder).glob("*.parquet")) for folder in (train, val)]
        options = {"num_workers": 0, "sources": {"train": [train], "val": [val]}}
        return examine(*paths, fault.requirements, **options).findings.listed

    found = [f for f in findings("train", "val") if f.kind == fault.kind]
    line = command((f.edit, f.data) for f in found)
    if fault.kind in JUDGEMENT or (fault.kind, fault.name) == ("split_overlap", "whole file"):
        assert line == "" and not any(f.command for f in found)
        return
    assert all(f.command.startswith("python scripts/edit_dataset.py --data_path ") for f in found)
    read_from = {"train": "train", "val": "val"}
    for part in line.split(" && "):
        words = shlex.split(part)
        assert words[:2] == ["python", "scripts/edit_dataset.py"]
        edit_dataset.main(words[2:])
        read_from[words[words.index("--data_path") + 1]] = words[words.index("--output_dir") + 1]
    assert fault.kind not in {f.kind for f in findings(*read_from.values())}


@pytest.fixture
def dataset(tmp_path):
    """Three episodes in two files, the second episode in both, with columns that nobody here knows."""
    rows = []
    for episode, length in enumerate(LENGTHS):
        for step, row in enumerate(episode_rows(length, seed=episode, cameras=("image_1", "image_2"))):
            row |= {"episode_index": episode, "frame_index": step, "timestamp": step / 10, "success": episode != 1}
            row |= {"intervention": step > 3, "force": [float(step), 2.0], "note": f"{episode}/{step}"}
            rows.append(row)
    for name, part in (("a", rows[:16]), ("b", rows[16:])):
        path = write_rows(tmp_path / "source" / f"{name}.parquet", part)
        table = pq.read_table(path)
        about = {"robot": "arm", "fps": "10", "conversion": json.dumps({"settings": {"from": name}})}
        pq.write_table(table.replace_schema_metadata(about), path)
    return tmp_path / "source", rows


def edit(source, *flags, output=None):
    output = output or source.parent / "edited"
    edit_dataset.main(["--data_path", str(source), "--output_dir", str(output), *map(str, flags)])
    files = sorted(output.rglob("*.parquet"))
    tables = [pq.read_table(path) for path in files]
    return [row for table in tables for row in table.to_pylist()], tables


def without(row, *names):
    return {key: value for key, value in row.items() if key not in names}


def test_deleting_leaves_every_other_value_as_it_was(dataset):
    source, rows = dataset
    edited, tables = edit(source, "--delete", 0)
    assert [without(row, "episode_index") for row in edited] == [without(row, "episode_index") for row in rows[12:]]
    assert [row["episode_index"] for row in edited] == [0] * 9 + [1] * 15
    original = pq.read_table(source / "a.parquet").schema
    for table in tables:
        assert table.schema.remove_metadata() == original.remove_metadata()
        metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        assert (metadata["robot"], metadata["fps"]) == ("arm", "10")
        assert json.loads(metadata["edited_from"])[0]["settings"]["from"] in "ab"
        assert json.loads(metadata["conversion"])["settings"]["edits"] == {"delete": [[0, 0]]}
    again, _ = edit(source.parent / "edited", "--keep", 1, output=source.parent / "twice")
    assert [row["note"] for row in again] == [row["note"] for row in rows[21:]]
    history = json.loads(pq.read_schema(source.parent / "twice" / "b.parquet").metadata[b"edited_from"])
    assert [record["settings"].get("edits") for record in history] == [None, {"delete": [[0, 0]]}]


def test_cutting_makes_sound_episodes(dataset):
    source, rows = dataset
    edited, _ = edit(source, "--split_at", "2:5,9", "--drop_steps", "0:3-5", "--trim", 1, 0)
    notes = [row["note"] for row in edited]
    assert notes == [r["note"] for i, r in enumerate(rows) if i not in (0, 3, 4, 5, 12, 21)]
    lengths = np.diff(np.flatnonzero([row["is_first"] for row in edited] + [True]))
    assert lengths.tolist() == [8, 8, 4, 4, 6]
    assert [row["frame_index"] for row in edited[:8]] == list(range(8))
    np.testing.assert_allclose([row["timestamp"] for row in edited[:8]], np.arange(8) / 10, atol=1e-6)
    ends = [row["is_terminal"] for row in edited if row["is_last"]]
    assert ends == [True, True, False, False, True], "only the last part ends as the episode did"
    files = sorted((source.parent / "edited").glob("*.parquet"))
    store = EpisodeStore(files, state_dim=4, per_action_dim=4, cameras=("image_1",), cache_dir=source.parent / "cache")
    assert store.num_episodes == 5


def test_joining_undoes_a_split(dataset):
    source, rows = dataset
    edit(source, "--split_at", "2:7")
    joined, _ = edit(source.parent / "edited", "--join", 3, output=source.parent / "joined")
    names = ("timestamp",)  # the second part began at 0
    assert [without(row, *names) for row in joined] == [without(row, *names) for row in rows]


def test_idle_steps_are_named_first_and_dropped_then(dataset, capsys):
    source, rows = dataset
    path = source / "b.parquet"
    table = pq.read_table(path)
    states = table["state"].to_pylist()
    states[9:14] = [states[9]] * 5  # of episode 2: rests at steps 4 to 7, and goes on at 8
    column = pa.array(states, pa.list_(pa.float32()))
    pq.write_table(table.set_column(table.column_names.index("state"), "state", column), path)
    edit_dataset.main(
        ["--data_path", str(source), "--output_dir", str(source.parent / "e"), "--drop_idle", "0.1", "0.3", "--dry_run"]
    )
    said = capsys.readouterr().out
    assert "episode 2" in said and "idle: 4 steps, 4-7" in said and "nothing was written" in said
    assert not (source.parent / "e").exists()
    edited, _ = edit(source, "--drop_idle", 0.1, 0.3)
    assert [row["note"] for row in edited if row["note"][0] == "2"] == [f"2/{i}" for i in range(15) if not 4 <= i <= 7]
    kept, _ = edit(source, "--drop_idle", 0.1, 0.5, output=source.parent / "kept")
    assert len(kept) == len(rows), "for no longer than asked"


def test_resampling_keeps_time_and_adds_displacements_up(dataset):
    source, rows = dataset
    edited, tables = edit(source, "--resample", 5, "--displacement_dims", 0, 1)
    assert [row["note"] for row in edited][:6] == [f"0/{i}" for i in range(0, 12, 2)]
    np.testing.assert_allclose([row["timestamp"] for row in edited[:6]], np.arange(6) / 5, atol=1e-6)
    actions = np.array([row["action"] for row in rows[:12]], np.float32)
    expected = actions[::2].copy()
    expected[:, :2] += actions[1::2, :2]
    np.testing.assert_allclose([row["action"] for row in edited[:6]], expected, rtol=1e-6)
    assert tables[0].schema.metadata[b"fps"] == b"5.0"
    with pytest.raises(DataError, match="--resample 20: episode 0 has 10 rows a second, and pictures between"):
        edit(source, "--resample", 20, output=source.parent / "faster")


def test_prompts_outcomes_and_columns(dataset):
    source, rows = dataset
    edited, tables = edit(
        source,
        *("--rename_prompt", "press the button=push it", "--set_prompt", "1=shut it", "--set_success", "0-2=false"),
        *("--drop_columns", "image_2", "note", "--clip_actions", -0.5, 0.5),
    )
    assert [row["prompt"] for row in edited] == ["push it"] * 12 + ["shut it"] * 9 + ["push it"] * 15
    assert not any(row["success"] for row in edited)
    assert {"image_2", "note"} & set(tables[0].column_names) == set()
    expected = np.clip([row["action"] for row in rows], -0.5, 0.5)
    np.testing.assert_allclose([row["action"] for row in edited], expected, rtol=1e-6)
    with pytest.raises(DataError, match="--rename_prompt 'grasp it': is no instruction of these files"):
        edit(source, "--rename_prompt", "grasp it=take it", output=source.parent / "other")


def test_cameras_are_renamed_added_and_encoded_anew(dataset, tmp_path):
    source, rows = dataset
    wrist = [row | {"image_1": png(np.random.default_rng(i), 24)} for i, row in enumerate(rows)]
    write_rows(tmp_path / "wrist" / "all.parquet", [without(row, "note") for row in wrist])
    flags = ("--rename_camera", "image_2=image_side", "--add_camera", f"image_wrist={tmp_path / 'wrist'}:image_1")
    edited, _ = edit(source, *flags, "--drop_steps", "1:2-3")
    left = [i for i in range(len(rows)) if i not in (14, 15)]
    assert [row["image_side"] for row in edited] == [rows[i]["image_2"] for i in left]
    assert [row["image_wrist"] for row in edited] == [wrist[i]["image_1"] for i in left]
    encoded, _ = edit(source, "--reencode", "jpeg", "--jpeg_quality", 60, output=source.parent / "jpeg")
    assert all(row[camera][:3] == b"\xff\xd8\xff" for row in encoded for camera in ("image_1", "image_2"))
    small, _ = edit(source, "--reencode", "png", "--short_side", 20, output=source.parent / "small")
    assert {Image.open(io.BytesIO(row["image_1"])).size for row in small} == {(20, 20)}
    with pytest.raises(DataError, match=r"--add_camera wrist=.*has 1 episodes, this dataset 3, .* from episode 0 on"):
        write_rows(tmp_path / "short" / "s.parquet", episode_rows(3))
        edit(source, "--add_camera", f"wrist={tmp_path / 'short'}:image_1", output=source.parent / "x")


def test_splitting_and_merging_lose_nothing(dataset):
    source, rows = dataset
    edit(source, "--split", "val=1", "train=rest")
    parts = source.parent / "edited"
    assert len(pq.read_table(parts / "val")) == 9 and len(pq.read_table(parts / "train")) == 27
    merged, _ = edit(parts, output=source.parent / "merged")
    assert sorted(row["note"] for row in merged) == sorted(row["note"] for row in rows)
    assert sorted({row["episode_index"] for row in merged}) == [0, 1, 2]
    shares = [edit(source, "--split", "a=0.34", "b=rest", output=source.parent / name)[0] for name in ("s1", "s2")]
    assert shares[0] == shares[1], "a share is the same in every run"


def test_an_edit_is_never_in_place_and_goes_on_where_it_stopped(dataset, capsys):
    source, _ = dataset
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    with pytest.raises(DataError, match="nothing is edited in place"):
        edit(source, "--delete", 0, output=source)
    with pytest.raises(DataError, match="nothing is edited in place"):
        edit(source, "--delete", 0, output=source.parent)
    edit(source, "--clean_prompts")
    first = {path.name: path.read_bytes() for path in (source.parent / "edited").iterdir()}
    (source.parent / "edited" / "a.parquet").unlink()
    (source.parent / "edited" / ".b.parquet.tmp").write_bytes(b"half")
    capsys.readouterr()
    edit(source, "--clean_prompts")
    assert "1 files written, 1 complete before" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in (source.parent / "edited").iterdir()} == first
    with pytest.raises(DataError, match=r"made from something else or otherwise"):
        edit(source, "--delete", 0)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--delete", "7"], r"--delete: there is no episode 7 \(0 to 2\)"),
        (["--keep", "first"], r"--keep 'first': wanted a number or a range such as 3-7"),
        (["--delete", "0-2"], r"no episode is left"),
        (["--trim", "5", "5"], r"--trim 5 5 leaves nothing of episode 1, which has 9 steps"),
        (["--drop_steps", "1:4-30"], r"episode 1 has steps 0 to 8; step 30 is asked for"),
        (["--split_at", "1:9"], r"--split_at 1: a new episode can begin at its steps 1 to 8"),
        (["--join", "0"], r"--join 0: episodes 1 to 2 have one before them"),
        (["--drop_columns", "state"], r"--drop_columns state: every row needs it"),
        (["--drop_columns", "image_9"], r"--drop_columns image_9: no file has it"),
        (["--rename_camera", "image_9=x"], r"--rename_camera image_9: no file has it"),
        (["--set_success", "1=maybe"], r"--set_success 1=maybe: wanted true or false"),
        (["--jpeg_quality", "50"], r"--jpeg_quality belongs to --reencode jpeg"),
        (["--split", "a=0.5"], r"--split leaves 1 episodes without a folder|--split leaves 2 episodes"),
        (["--without", "c.parquet"], r"--without c.parquet: is none of the 2 files"),
        (["--displacement_dims", "0"], r"--displacement_dims says how --resample treats actions"),
        (["--resample", "5", "--drop_steps", "0:1-2"], r"do one after the other"),
    ],
)
def test_errors_name_the_flag_and_the_remedy(dataset, flags, error):
    with pytest.raises(DataError, match=error):
        edit(dataset[0], *flags)


def test_contradicting_flags_are_mended_only_when_asked(dataset):
    source, rows = dataset
    rows[21]["is_first"] = False
    write_rows(source / "b.parquet", rows[16:])
    with pytest.raises(DataError, match=r"b.parquet row 5: is_first is false.*--mend_flags"):
        edit(source, "--clean_prompts")
    edited, _ = edit(source, "--mend_flags")
    assert np.flatnonzero([row["is_first"] for row in edited]).tolist() == [0, 12, 21]


def test_the_rate_must_be_known(tmp_path):
    path = write_rows(tmp_path / "a.parquet", episode_rows(9))
    with pytest.raises(DataError, match=r"neither time stamps nor metadata tell the rate; give --rate"):
        make_plan([path], Edits(drop_idle=(0.1, 1.0)))
    assert len(make_plan([path], Edits(drop_idle=(0.1, 1.0), rate=10)).pieces) == 1


@pytest.mark.parametrize(("kind", "flags"), [("image", ()), ("video", ("--reencode", "png"))])
def test_lerobot_datasets_are_edited_into_our_schema(kind, flags, tmp_path):
    """Frames and numbers are those read in place; the dataset stays as it is; a second run has nothing to do."""
    root = FIXTURES / f"lerobot_v30_{kind}"
    source = f"lerobot:{root}?cameras=observation.images.front=image_1"
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    edit_dataset.main(
        ["--data_path", source, "--output_dir", str(tmp_path / "out"), "--delete", "2", "--trim", "1", "2", *flags]
    )
    table = pa.concat_tables(pq.read_table(path) for path in sorted((tmp_path / "out").glob("*.parquet")))
    lengths = [31, 17, 25, 60, 12]
    assert np.bincount(table["episode_index"]).tolist() == [length - 3 for length in lengths]
    files = [path.name for path in sorted((tmp_path / "out").iterdir())]
    assert files == [f"episode_{number:06d}.parquet" for number in (0, 1, 3, 4, 5)]
    in_place = LeRobotTable(resolve_recordings(source, "--data_path")[0])
    wanted = pa.Table.from_batches(
        [batch for _, batch in in_place.batches(["state", "action", "prompt", "frame_index"], 64)]
    )
    kept = np.concatenate(
        [np.arange(begin + 1, begin + length - 2) for begin, length in zip((0, 31, 92, 117, 177), lengths, strict=True)]
    )
    for name in ("state", "action"):
        assert np.allclose(np.array(table[name].to_pylist()), np.array(wanted[name].to_pylist())[kept], atol=1e-7)
    assert table["prompt"].to_pylist() == [wanted["prompt"][i].as_py() for i in kept.tolist()]
    if kind == "video":
        pictures = np.concatenate([np.stack(frames) for _, frames in in_place.pictures("image_1", 64)])
    else:
        pictures = [decoded(f) for _, b in in_place.batches(["image_1"], 64) for f in b.column(0).to_pylist()]
    assert all(np.array_equal(decoded(f), pictures[i]) for f, i in zip(table["image_1"].to_pylist(), kept, strict=True))
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    edit_dataset.main(
        ["--data_path", source, "--output_dir", str(tmp_path / "out"), "--delete", "2", "--trim", "1", "2", *flags]
    )
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == made


def test_the_metadata_of_a_lerobot_dataset_are_read_once(tmp_path, monkeypatch):
    """And again where they have changed."""
    root, reads = tmp_path / "dataset", []
    shutil.copytree(FIXTURES / "lerobot_v30_image", root)
    read = LeRobotDataset.__init__
    monkeypatch.setattr(LeRobotDataset, "__init__", lambda *given: (reads.append(given[1]), read(*given))[0])
    source = f"lerobot:{root}?cameras=observation.images.front=image_1"
    write_edited(
        make_plan(resolve_recordings(source, "--data_path"), Edits()), Edits(), tmp_path / "out", num_workers=1
    )
    assert reads == [root]
    os.utime(root / "meta" / "info.json", (0, 0))
    LeRobotTable(resolve_recordings(source, "--data_path")[0])
    assert reads == [root, root]


def decoded(frame: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(frame)) as image:
        return np.asarray(image.convert("RGB"))


def test_the_commands_of_the_doctor_run_on_lerobot_datasets(tmp_path, monkeypatch):
    """Frames of video are encoded as a conversion encodes them where the command does not say how."""
    monkeypatch.chdir(tmp_path)
    source = f"lerobot:{FIXTURES / 'lerobot_v30_video'}?cameras=observation.images.front=image_1"
    line = command([(("--drop_steps", "0:3-5"), [("train", (source,))])])
    edit_dataset.main(shlex.split(line)[2:])
    (folder,) = tmp_path.iterdir()
    table = pq.read_table(folder / "episode_000000.parquet")
    assert len(table) == 28 and table["image_1"][0].as_py().startswith(b"\xff\xd8\xff")
