"""Cameras and state columns of any names: stores, samples, statistics and what the doctor says of them."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from data.doctor.examine import Requirements, examine
from data.episode_store import EpisodeStore
from data.loader import VLADataset
from data.processing import VLAImageProcessor
from data.statistics import calculate_for_config, calculate_statistics
from tests.helpers import episode_rows, write_rows
from utils.config_utils import Config, ConfigError, config_from_dict
from utils.parquet_utils import DataError
from utils.statistics import state_labels

CAMERAS = ("front", "wrist.left", "side")
WIDTHS = {"state_dim": 7, "per_action_dim": 4}


class Words:
    """A tokenizer of numbered words, enough for a dataset."""

    reads_state = False

    def __call__(self, prompt: str) -> list[int]:
        return [len(word) for word in prompt.split()]


def rows_of(length: int, seed: int = 0) -> list[dict]:
    """Rows of three cameras and a force sensor of two values and a scalar; `side` is absent from step 2 on."""
    rows = episode_rows(length, seed=seed, cameras=CAMERAS)
    for i, row in enumerate(rows):
        row["force"], row["load"] = [float(i), -float(i)], i
        row["side"] = row["side"] if i < 2 else None
    return rows


@pytest.fixture
def demos(tmp_path):
    return write_rows(tmp_path / "demos.parquet", rows_of(5) + rows_of(4, seed=1))


def open_store(path, tmp_path, **options):
    given = {**WIDTHS, "cameras": CAMERAS, "state_columns": ("state", "force", "load"), **options}
    return EpisodeStore([path], cache_dir=tmp_path / "cache", **given)


def dataset_of(path, tmp_path, **data) -> VLADataset:
    config = config_from_dict(
        {"data": {"state_dim": 7, "state_columns": ["state", "force", "load"], "cache_dir": str(tmp_path), **data}}
    )
    processor = VLAImageProcessor(16, 16, (0.5,) * 3, (0.5,) * 3, 3)
    options = {"cameras": config.cameras, "image_processor": processor, "prompt_tokenizer": Words()}
    return VLADataset([path], config.data, horizon=3, per_action_dim=4, **options)


def test_three_cameras_of_any_name_are_slots_and_an_absent_one_stays_empty(demos, tmp_path):
    dataset = dataset_of(demos, tmp_path, cameras=CAMERAS)
    batch = dataset.batch([0, 3])
    assert batch["image_mask"].tolist() == [[True, True, True], [True, True, False]]
    assert all(batch[camera].shape == (2, 1, 3, 16, 16) for camera in CAMERAS)
    assert not batch["side"][1].any() and batch["wrist.left"].any()
    one = dataset_of(demos, tmp_path, cameras=["side", "front"]).batch([3])  # in the order of the slots
    assert one["image_mask"].tolist() == [[False, True]] and (one["front"] == batch["front"][1]).all()


def test_the_state_is_joined_from_columns_in_their_order(demos, tmp_path):
    rows = rows_of(5)
    store = open_store(demos, tmp_path)
    np.testing.assert_array_equal(store.state[3], np.float32([*rows[3]["state"], 3, -3, 3]))
    assert store.state_columns.labels == [*(f"state[{i}]" for i in range(4)), "force[0]", "force[1]", "load[0]"]
    assert dataset_of(demos, tmp_path, cameras=CAMERAS).batch([3])["state"].tolist() == [store.state[3].tolist()]
    statistics = calculate_statistics([demos], 7, 4, state_columns=("state", "force", "load"))
    assert statistics["state_columns"] == {"state": 4, "force": 2, "load": 1}
    assert statistics["state"]["max"][4:] == [4, 0, 4] and statistics["state"]["min"][4:] == [0, -4, 0]
    other = open_store(demos, tmp_path, state_columns=("load", "state", "force"))
    np.testing.assert_array_equal(other.state[3], np.float32([3, *rows[3]["state"], 3, -3]))
    assert "state_columns" not in calculate_statistics([demos], 4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dim": 6}, r"state 4 \+ force 2 \+ load 1 = 7 values, config wants data.state_dim 6"),
        ({"state_columns": ("state", "torque")}, "torque"),
        ({"state_columns": ("front", "force")}, "column 'front' is binary; wanted a list of float32"),
        (
            {"cameras": ("top", "left")},
            r"no column 'top' or 'top_bytes' .*, and none of any other camera .*data.camera",
        ),
        ({"cameras": ("image_1", "front")}, r"no column 'image_1' or 'image_1_bytes' .found: front,.*data.cameras"),
    ],
)
def test_columns_that_are_not_there_are_named_with_those_that_are(demos, tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        open_store(demos, tmp_path, **options)


def test_a_camera_that_no_file_has_is_an_error_that_lists_the_others(demos, tmp_path):
    with pytest.raises(
        DataError, match=r"no file has a column top or top_bytes \(images there: front, wrist.left, side"
    ):
        dataset_of(demos, tmp_path, cameras=["front", "top"])


def test_every_row_needs_one_camera_and_finite_states_under_their_own_names(tmp_path):
    rows = rows_of(5)
    for camera in CAMERAS:
        rows[3][camera] = None
    with pytest.raises(DataError, match=r"blind.parquet row 3: no frame of front, wrist.left, side; every step needs"):
        open_store(write_rows(tmp_path / "blind.parquet", rows), tmp_path)
    rows = rows_of(5)
    rows[2]["force"] = [1.0, float("nan")]
    with pytest.raises(DataError, match=r"nan.parquet row 2: force\[1\] is nan"):
        open_store(write_rows(tmp_path / "nan.parquet", rows), tmp_path)
    rows = rows_of(5)
    rows[2]["force"] = [1.0]
    with pytest.raises(DataError, match=r"row 2: force has 1 values, the first row has 2; drop or mend"):
        open_store(write_rows(tmp_path / "narrow.parquet", rows), tmp_path)


def test_a_state_that_nothing_reads_may_be_missing(tmp_path):
    rows = rows_of(5)
    for row in rows:
        del row["state"]
    path = write_rows(tmp_path / "stateless.parquet", rows)
    with pytest.raises(DataError, match="state"):
        open_store(path, tmp_path, state_columns=("state",), state_dim=4)
    store = open_store(path, tmp_path, state_columns=("state",), state_dim=4, needs_state=False)
    assert store.state.shape == (5, 4) and not store.state.any()
    tree = {
        "data": {"train_parquet_files": [str(path)], "state_dim": 4, "cameras": list(CAMERAS)},
        "model": {"action_head_config": {"use_state_input": False, "per_action_dim": 4}},
    }
    config = config_from_dict(tree)
    assert not config.reads_state and Config().reads_state
    statistics = calculate_for_config(config)["datasets"]["default"]
    assert statistics["state"]["max"] == [0.0] * 4 and statistics["state_columns"] == {}


def test_deciles_are_made_where_they_are_asked_for(demos):
    data = {"train_parquet_files": [str(demos)], "state_dim": 4, "cameras": list(CAMERAS)}
    head = {"model": {"action_head_config": {"per_action_dim": 4}}}
    plain = calculate_for_config(config_from_dict({"data": data, **head}))["datasets"]["default"]
    asked = {**data, "normalization_type": "quantile10", "normalization_arithmetic": "lerobot"}
    deciles = calculate_for_config(config_from_dict({"data": asked, **head}))["datasets"]["default"]
    assert "q10" not in plain["state"] and deciles["state"].keys() - plain["state"].keys() == {"q10", "q90"}
    states = np.stack([row["state"] for row in rows_of(5) + rows_of(4, seed=1)])
    np.testing.assert_allclose(deciles["state"]["q10"], np.quantile(states, 0.1, axis=0))
    np.testing.assert_allclose(deciles["state"]["q90"], np.quantile(states, 0.9, axis=0))


def test_the_doctor_looks_at_every_camera_and_names_state_columns(tmp_path):
    rows = [row for seed in range(3) for row in rows_of(30, seed=seed)]
    rows[40]["force"] = [500.0, 0.0]
    path = write_rows(tmp_path / "demos.parquet", rows)
    wanted = Requirements(
        widths={"state": ("data.state_dim", 8), "action": ("per_action_dim", 4)},
        cameras=(*CAMERAS, "top"),
        state_columns=("state", "force", "load"),
    )
    seen = examine([path], requirements=wanted, num_workers=0)
    messages = [finding.message for finding in seen.findings.listed]
    assert any(m.startswith("force[0] is 500") for m in messages)
    assert any("state 4 + force 2 + load 1 = 7 values, config wants data.state_dim 8" in m for m in messages)
    assert any(m == "no file has top, which the config reads" for m in messages)
    report = seen.to_dict()["datasets"]["train"]
    assert list(report["cameras"]) == list(CAMERAS) and report["vectors"] == ["state", "force", "load", "action"]
    assert [finding.kind for finding in examine([path], num_workers=0).findings.listed] != []
    assert not any("image_1" in finding.message for finding in seen.findings.listed)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"cameras": ["front", "front"]}, "name each camera once"),
        ({"cameras": ["input_ids"]}, "'input_ids' names something else in a sample"),
        ({"cameras": ["<b>"]}, "wanted names of columns"),
        ({"state_columns": []}, "data.state_columns is empty"),
        ({"state_columns": ["state", "action"]}, "'action' is no part of the state"),
        ({"cameras": ["front"], "state_columns": ["front"]}, "'front' names something else"),
    ],
)
def test_names_that_can_not_be(data, message):
    with pytest.raises(ConfigError, match=message):
        config_from_dict({"data": data})


def test_labels():
    assert state_labels({"state": 2, "force": 1}) == ["state[0]", "state[1]", "force[0]"]


def test_the_written_file_of_the_fixture_has_those_columns(demos):
    assert {"front", "wrist.left", "side", "force", "load"} <= set(pq.read_schema(demos).names)
