"""What a mapping does, what is refused and how, and that an interrupted conversion ends in the same bytes."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.convert.convert import convert, open_source
from data.convert.episode_writer import ImageEncoding
from data.convert.inspection import describe, film_strip
from data.convert.mapping import parse_mapping, presets, read_entries
from data.convert.readers import open_reader, reader_options
from tests.data.convert.recordings import BASE, PNG, column, copy, jpeg, pictures, run
from tests.data.convert.test_formats import FORMATS, decode_frame, read, step_of, wrong_corner
from utils.parquet_utils import DataError

REPOSITORY = Path(__file__).resolve().parents[3]


# --- mapping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "wanted"),
    [
        ("state=state[1:3]", lambda s: s[:, 1:3]),
        ("state=state[3,0]", lambda s: s[:, [3, 0]]),
        ("state=state[0],done,state", lambda s: np.hstack([s[:, :1], (np.arange(10) == 9)[:, None], s])),
        ("state=state,scale=2,offset=1", lambda s: 2 * s + 1),
        ("state=state[0],scale=0.1,invert=true,clip=[-1,0.5]", lambda s: np.clip(1 - 0.1 * s[:, :1], -1, 0.5)),
        ("state=codes", lambda s: np.array([[103, 246, 0, 0]] * 10)),
    ],
)
def test_parts_of_a_vector(recording, tmp_path, item, wanted):
    table = run(recording, tmp_path / "out", item)
    np.testing.assert_allclose(column(table, "state"), wanted(np.arange(40.0).reshape(10, 4)), rtol=1e-6)


def test_a_constant_where_there_is_no_state(recording, tmp_path):
    entries = read_entries(None, BASE) | {"state": {"constant": [0.0, 1.0]}}
    convert(open_source("hdf5", recording, entries), tmp_path / "out", encoding=PNG)
    assert column(read(tmp_path / "out"), "state").tolist() == [[0, 1]] * 10


@pytest.mark.parametrize(
    "item",
    [
        "image_1=bgr,channels=bgr",
        "image_1=chw,layout=chw",
        "image_1=unit,scale=255",
        "image_1=upside_down,flip=vertical",
    ],
)
def test_pixels_of_any_order(recording, tmp_path, item):
    table = run(recording, tmp_path / "out", item)
    frames = [decode_frame(frame) for frame in table["image_1"].to_pylist()]
    assert np.array_equal(frames, pictures(10))


def test_encoded_frames_pass_untouched_unless_pixels_change(recording, tmp_path):
    encoded = [jpeg(image) for image in pictures(10)]
    assert run(recording, tmp_path / "out", "image_1=jpegs")["image_1"].to_pylist() == encoded
    swapped = run(recording, tmp_path / "bgr", "image_1=jpegs,channels=bgr,flip=both")["image_1"].to_pylist()
    wanted = [decode_frame(frame)[::-1, ::-1, ::-1] for frame in encoded]
    assert np.array_equal([decode_frame(frame) for frame in swapped], wanted)


@pytest.mark.parametrize(
    ("item", "prompts"),
    [
        ("prompt=text", ["first"] * 5 + ["zweiter, für alle"] * 5),
        ("prompt=codes", ["gö"] * 10),
        ("prompt=@task", ["press the button"] * 10),
        ("prompt=@info:lang", ["lift it"] * 10),
        ("prompt=@info:letters", ["push"] * 10),
        (r"prompt=file:SCENE\d+_(.*)_demo", ["open the drawer"] * 10),
        ("prompt=text:pick, then place", ["pick, then place"] * 10),
    ],
)
def test_instructions(recording, tmp_path, item, prompts):
    assert run(recording, tmp_path / "out", item)["prompt"].to_pylist() == prompts


def test_rows_that_are_left_out(recording, tmp_path):
    """Every combination gives what slicing the whole episode gives; flags and time stamps follow."""
    steps = np.arange(10)
    for shift, first, last, keep in ((1, 0, 0, 0), (0, 2, 3, 0), (2, 1, 1, 1), (0, 0, 0, 1), (3, 0, 2, 0)):
        items = [f"action_shift={shift}", f"drop_first={first}", f"drop_last={last}", "terminal=done"]
        table = run(recording, tmp_path / f"{shift}{first}{last}{keep}", *items, *(["keep=valid"] if keep else []))
        rows = steps[: 10 - last][: 10 - last - shift][first:]
        rows = rows[rows % 5 != 2] if keep else rows
        assert column(table, "state")[:, 0].tolist() == (4 * rows).tolist()
        np.testing.assert_allclose(column(table, "action")[:, 0], (rows + shift) / 10, rtol=1e-6)
        assert np.flatnonzero(table["is_last"]).tolist() == [len(rows) - 1]
        assert np.array_equal(table["is_terminal"], table["is_last"])  # of the last step stored, left out or not
        np.testing.assert_allclose(table["timestamp"], np.arange(len(rows)) / 10, rtol=1e-6)


@pytest.mark.parametrize(
    ("item", "wanted"),
    [
        ("success=done", True),  # at any step
        ("success={from: done, invert: true}", False),  # a failure that is marked somewhere
        ("success=valid,equals=3", False),
        ("success=text,equals=first", True),
        ("success=always", True),
        ("success=never", False),
        ("success=@task,equals=press the button", True),
        ("success=@info:lang,equals=drop it", False),
        ("success=@won", True),
        ("success=@won,equals=1", True),
        ("success=@ended,equals='1'", True),
        ("success=modes,equals=1.0", True),
        ("success=codes,equals=gö", True),
        ("success=outcome", True),  # one value for the whole episode
        ("success=file:^SCENE", True),
        ("success=file:failure", False),
    ],
)
def test_outcomes(recording, tmp_path, item, wanted):
    with h5py.File(recording, "r+") as file:
        file.attrs["won"], file["outcome"] = np.bool_(True), True
    if "{" in item:
        (tmp_path / "map.yaml").write_text(item.replace("=", ": ", 1))
        item = str(tmp_path / "map.yaml")
    table = run(recording, tmp_path / "out", item)
    assert table["success"].to_pylist() == [wanted] * 10 and table.schema.field("success").type == pa.bool_()
    assert "intervention" not in table.column_names


def test_corrections_go_with_their_actions(recording, tmp_path, monkeypatch):
    """A flag says of an action that somebody gave it: both come from the same stored step, whatever the blocks."""
    monkeypatch.setattr("data.convert.readers.hdf5.ROWS_PER_BLOCK", 3)
    plain = run(recording, tmp_path / "plain", "intervention=valid,invert=true")
    assert np.flatnonzero(plain["intervention"]).tolist() == [2, 7]
    moved = run(recording, tmp_path / "moved", "intervention=valid,invert=true", "action_shift=2", "drop_first=1")
    assert column(moved, "action")[:, 0].tolist() == (np.arange(3, 10) / 10).astype(np.float32).tolist()
    assert np.flatnonzero(moved["intervention"]).tolist() == [4]  # stored step 7
    modes = run(recording, tmp_path / "modes", "intervention=modes,equals=1")
    assert np.flatnonzero(modes["intervention"]).tolist() == [1, 3, 5, 7, 9]


def test_inspection_finds_outcomes_and_corrections(recording):
    with h5py.File(recording, "r+") as file:
        file.attrs["success"] = True
        file["is_intervention"] = np.arange(10) > 6
    text = describe(open_reader("hdf5", recording, {}))
    assert "success: '@success'" in text and "intervention: is_intervention" in text


def test_blocks_do_not_matter(recording, tmp_path, monkeypatch):
    items = ["action_shift=2", "drop_first=3", "drop_last=1", "keep=valid", "terminal=done", "image_1=jpegs"]
    whole = run(recording, tmp_path / "whole", *items)
    monkeypatch.setattr("data.convert.readers.hdf5.ROWS_PER_BLOCK", 1)
    assert run(recording, tmp_path / "single", *items).equals(whole)


def test_cameras_of_any_name(recording, tmp_path):
    table = run(recording, tmp_path / "out", "cameras.wrist=jpegs")
    assert {"image_1", "wrist"} <= set(table.column_names)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["stat=state"], "no entry 'stat' .*did you mean 'state'"),
        (["state=stat"], r"drawer_demo.hdf5: no key 'stat' \(found: action, .*did you mean 'state'"),
        (["state=state[4]"], "state takes value 4 of 'state', which has 4; correct the mapping"),
        (["state=state[3:1]"], r"state has \[3:1\]; wanted numbers and ranges"),
        (["state=text"], "step 0: state is made from 'text', which is no array of numbers; choose another key"),
        (["image_1=state"], r"image_1 is made from 'state', which is float64 \(4,\); wanted images"),
        (["image_1=chw"], r"image_1 is uint8 \(3, 24, 32\); wanted \(height, width, 3\); is it `layout: chw`"),
        (
            ["image_1=rgb,layout=chw"],
            r"image_1 is uint8 \(24, 32, 3\); wanted \(3, height, width\); is it `layout: hwc`",
        ),
        (["state=nan"], r"SCENE3_open_the_drawer_demo.hdf5 frame 3: state\[1\] is nan; every value must be a"),
        (["image_1=unit"], "image_1 is float32 from 0 to 1, where 0 to 255 was expected; say `scale: 255`"),
        (["image_1=rgb,flip=up"], "flip of image_1 is 'up'; wanted none, vertical"),
        (["image_1=rgb,flip=auto"], "no attribute macros_image_convention says whether frames are upside down"),
        (["image_1=rgb,turn=1"], "mapping: image_1: no option 'turn'"),
        (["prompt=open it"], r"no key 'open it', which prompt names; an instruction itself is written as text:open it"),
        (["prompt=@tusk"], "no attribute 'tusk' .*did you mean 'task'"),
        (["prompt=@info:language"], r"attribute 'info' has no 'language' \(found: lang, letters\)"),
        (["prompt=@task:lang"], "attribute 'task' is no JSON; leave out :lang"),
        (["prompt=file:(x)"], r"prompt '\(x\)' does not fit the name 'SCENE3_open_the_drawer_demo.hdf5'"),
        (["terminal=state"], r"'state' is float64 \(10, 4\); wanted true or false a step"),
        (["drop_last=10"], "the mapping keeps no step; correct keep"),
        (["action_shift=-1"], "action_shift is -1; wanted a number of steps, 0 or more"),
        (["fps=0"], "fps is 0; wanted steps a second"),
        (["episodes=data/demo_*"], "no group fits 'data/demo_\\*' .*groups at the top"),
        (["split=train"], "no entry 'split'"),
        (["clip=1"], "no entry 'clip'"),
        (["state=state,clip=3"], r"clip of state is 3; wanted \[least, most\]"),
        (["cameras.action=rgb"], "a camera can't be called 'action'"),
        (["success=@ended,equals=1"], "'ended' is <U1 .*wanted one number, as equals is 1 .write a text in quotes"),
        (["success=@ended"], "'ended' is <U1 .*wanted true or false"),
        (["success=text,equals=1"], r"'text' is \|S\d+ .*wanted one number, as equals is 1"),
        (["success=state,equals=1"], r"'state' is float64 \(10, 4\); wanted one number"),
        (
            ["success=modes,equals='1'"],
            "'modes' is .*0.*; wanted a text; equals is the text '1', so write a",
        ),
        (["success=score"], "step 3: 'score' is nan; wanted true or false"),
        (["keep=modes,equals=[1]"], r"equals of keep is \[1\]; wanted a text in quotes, a number, true or false"),
        (["prompt=modes"], "step 0: 'modes' is .*; wanted a text; choose another key"),
        (["success=always,invert=true"], "success is always, whatever a file holds; leave out equals"),
        (["success=never,equals=3"], "success is never, whatever a file holds; leave out equals"),
    ],
)
def test_faulty_mappings(recording, tmp_path, items, message):
    with pytest.raises(DataError, match=message):
        run(recording, tmp_path / "out", *items)


@pytest.mark.parametrize("beside", [{"from": "text"}, {"empty": "go"}])
def test_a_prompt_that_is_a_text_has_nothing_beside_it(beside):
    entries = {**read_entries(None, BASE), "prompt": {"text": "go", **beside}}
    with pytest.raises(DataError, match="prompt has a text, which is every step's; leave out from and empty"):
        parse_mapping(entries, ())


def test_what_is_missing_is_said(recording):
    for name in ("state", "action", "prompt"):
        entries = {key: value for key, value in read_entries(None, BASE).items() if key != name}
        with pytest.raises(DataError, match=f"mapping: '{name}' is missing") as raised:
            open_source("hdf5", recording, entries)
        assert ('--map "prompt=text:' in str(raised.value)) is (name == "prompt")
    entries = {key: value for key, value in read_entries(None, BASE).items() if key != "fps"}
    with pytest.raises(DataError, match="does not say how many steps a second it has; give fps"):
        open_source("hdf5", recording, entries)
    with pytest.raises(DataError, match="--from is zarr, and the mapping is for hdf5"):
        open_source("zarr", recording, read_entries("libero", ()))
    with pytest.raises(DataError, match="no preset 'liberty' .*did you mean 'libero'"):
        read_entries("liberty", ())


@pytest.mark.parametrize("name", presets())
def test_presets_are_mappings(name):
    entries = read_entries(name, ["prompt=text:go"])
    format_name = entries.pop("format")
    if entries.pop("from_modality", False):
        entries |= {"image_1": "video.x", "state": "state.x", "action": "action.x"}
    mapping = parse_mapping(entries, reader_options(format_name))
    assert mapping.cameras and mapping.state and mapping.action


def test_the_preset_of_libero_pairs_a_frame_with_the_next_action(tmp_path):
    convert(open_source(None, FORMATS / "libero_hdf5", read_entries("libero", ())), tmp_path / "out", encoding=PNG)
    table, expected = read(tmp_path / "out"), np.load(FORMATS / "libero_hdf5" / "expected.npz")
    lengths = expected["episode_lengths"]
    starts = np.cumsum(lengths) - lengths
    wanted = np.concatenate(
        [expected["actions"][s + 1 : s + n] for s, n in zip(starts, lengths, strict=True)]  # row t, action t + 1
    )
    assert np.array_equal(column(table, "action").astype(np.float32), wanted)
    assert all(wrong_corner(decode_frame(frame)) is None for frame in table["image_1"].to_pylist())


# --- size ---------------------------------------------------------------------------------------------------------


def test_smaller_pictures(recording, tmp_path):
    small = ImageEncoding(short_side=16, subsampling="420")
    for item in ("image_1=rgb", "image_1=jpegs"):
        table = run(recording, tmp_path / item, item, encoding=small)
        with Image.open(io.BytesIO(table["image_1"][0].as_py())) as image:
            assert image.size == (21, 16) and image.layer[0][1:3] == (2, 2)  # the luma's sampling: 4:2:0
    untouched = run(recording, tmp_path / "fits", "image_1=jpegs", encoding=ImageEncoding(short_side=24))
    assert untouched["image_1"].to_pylist() == [jpeg(image) for image in pictures(10)]
    with pytest.raises(DataError, match="made from something else or otherwise .*short_side"):
        run(recording, tmp_path / "fits", "image_1=jpegs", encoding=ImageEncoding(short_side=16))
    for options, message in (({"short_side": 4}, "--short_side is 4"), ({"subsampling": "411"}, "--subsampling is")):
        with pytest.raises(DataError, match=message):
            ImageEncoding(**options)
    with pytest.raises(DataError, match="--subsampling has no meaning with --image_format png"):
        ImageEncoding("png", subsampling="420")


# --- looking ------------------------------------------------------------------------------------------------------


def test_inspection_lists_keys_and_a_mapping_that_converts(tmp_path):
    text = describe(open_reader("rlds", FORMATS / "rlds", {}))
    assert "steps/observation/wrist_image  png" in text and "split: train" in text
    (tmp_path / "map.yaml").write_text(text.partition("map.yaml)")[2].partition("\n")[2].replace("fps: '?'", "fps: 10"))
    source = open_source(None, FORMATS / "rlds", read_entries(None, [str(tmp_path / "map.yaml")]))
    assert convert(source, tmp_path / "out").rows == 23
    text = describe(open_reader("hdf5", FORMATS / "libero_hdf5", {}))
    assert "episodes: data/demo_*" in text and "problem_info" in text


def test_inspection_sees_instructions_in_json_flips_and_what_is_no_observation():
    text = describe(open_reader("hdf5", FORMATS / "libero_hdf5", {}))
    assert "prompt: '@problem_info:language_instruction'" in text and "flip: auto" in text
    text = describe(open_reader("hdf5", FORMATS / "robomimic_hdf5" / "image.hdf5", {}))
    assert "next_obs/agentview_image" in text  # among the keys
    assert "next_obs" not in text.partition("# a mapping to edit")[2]


def test_strip_shows_first_middle_and_last(recording, tmp_path):
    source = open_source(None, FORMATS / "libero_hdf5", read_entries("libero", ()))
    film_strip(source, tmp_path / "strip.png", episodes=["1"])
    with Image.open(tmp_path / "strip.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (2 * 178, 3 * 164, 3)
    frames = [np.asarray(Image.fromarray(pixels[16:176, x : x + 160]).resize((64, 64))) for x in (0, 164, 328)]
    assert [step_of(frame) for frame in frames] == [0, 3, 6] and wrong_corner(frames[0]) is None


# --- GR00T --------------------------------------------------------------------------------------------------------


def test_groot_derives_everything_from_modality(tmp_path):
    folder = FORMATS / "groot_lerobot"
    convert(open_source(None, folder / "cube_to_bowl", read_entries("groot", ())), tmp_path / "out")
    expected, table = np.load(folder / "expected.npz"), read(tmp_path / "out")
    rows = np.repeat(expected["valid"], expected["episode_lengths"])
    assert np.array_equal(column(table, "state").astype(np.float32), expected["states"][rows])
    assert np.array_equal(column(table, "action").astype(np.float32), expected["actions"][rows])
    prompts = np.repeat(expected["prompts"], expected["episode_lengths"])[rows]
    assert table["prompt"].to_pylist() == prompts.tolist()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "episode_000000.parquet",
        "episode_000001.parquet",
    ]


def test_a_mapping_that_ignores_modality_is_stopped(tmp_path):
    folder = copy("groot_lerobot", tmp_path)
    root = folder / "cube_to_bowl"
    plain = ["image_1=observation.images.ego_view", "state=observation.state", "action=action", "prompt=task"]
    with pytest.raises(DataError, match=r"modality.json: names state.arm, .*the mapping uses none of them"):
        open_source("lerobot", root, read_entries(None, plain))
    with pytest.raises(
        DataError, match=r"modality.json: the instruction is annotation.human.action.task_description, "
    ):
        open_source("lerobot", root, read_entries(None, [*plain, "state=state.arm"]))
    open_source("lerobot", root, read_entries(None, [*plain, "modality=ignore"]))
    command = [sys.executable, "scripts/convert_lerobot.py", "--lerobot_dir", str(root), "--output_dir"]
    command += [str(tmp_path / "out"), "--cameras", "observation.images.ego_view=image_1"]
    failed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert failed.returncode == 1 and "scripts/convert.py --from lerobot" in failed.stderr
    assert "Traceback" not in failed.stderr
    modality = json.loads((root / "meta/modality.json").read_text())
    modality["state"]["hand"]["end"] = 10
    (root / "meta/modality.json").write_text(json.dumps(modality))
    with pytest.raises(DataError, match="state.hand is 7 to 10 of observation.state, which has 9 values; correct it"):
        open_source("lerobot", root, read_entries("groot", ()))
    modality["state"]["hand"] = {"start": 7, "end": 9, "original_key": "observation.stat"}
    (root / "meta/modality.json").write_text(json.dumps(modality))
    with pytest.raises(DataError, match="state.hand: no feature 'observation.stat' .*did you mean 'observation.state'"):
        open_source("lerobot", root, read_entries("groot", ()))


# --- interrupted --------------------------------------------------------------------------------------------------


def several(tmp_path: Path, episodes: int = 12) -> Path:
    folder = tmp_path / "several"
    folder.mkdir()
    for i in range(episodes):
        with h5py.File(folder / f"e{i}.hdf5", "w") as file:
            file["rgb"] = np.random.default_rng(i).integers(0, 256, (40, 160, 160, 3), dtype=np.uint8)
            file["state"], file["action"] = np.full((40, 2), i), np.full((40, 2), i)
    return folder


@pytest.mark.slow
def test_ten_kills_end_in_the_same_bytes(tmp_path):
    command = [sys.executable, "scripts/convert.py", "--from", "hdf5", str(several(tmp_path)), "--map", *BASE]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(name: str, workers: int) -> subprocess.Popen:
        arguments = [*command, "--output_dir", str(tmp_path / name), "--num_workers", str(workers)]
        return subprocess.Popen(
            arguments, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    begin = time.perf_counter()
    assert start("whole", 1).wait() == 0
    seconds = time.perf_counter() - begin
    rng = random.Random(0)
    for attempt in range(10):
        process = start("killed", 1 + attempt % 2)
        time.sleep(rng.uniform(0.2, 0.9) * seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    last = start("killed", 1)
    assert last.wait() == 0
    folders = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "killed")]
    assert folders[0] == folders[1] and len(folders[0]) == 12
    again = start("killed", 1)
    assert "0 files written, 12 complete before" in again.communicate()[0]


def test_processes_do_not_change_the_bytes(tmp_path):
    source = open_source("hdf5", several(tmp_path, 3), read_entries(None, BASE))
    for name, workers in (("one", 1), ("two", 2)):
        convert(source, tmp_path / name, num_workers=workers)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    record = json.loads(pq.read_schema(tmp_path / "one" / "episode_000000.parquet").metadata[b"conversion"])
    assert record["settings"]["mapping"]["state"] == [{"from": "state"}] and list(record["sources"]) == ["e0.hdf5"]
