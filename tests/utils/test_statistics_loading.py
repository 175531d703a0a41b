"""Normalization statistics that a run loads: those of its own data and settings, or clear errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.helpers import write_episodes
from utils.calculate_normalization_stats import calculate_for_config
from utils.config_utils import Config, config_from_dict
from utils.statistics import StatisticsError, load_statistics

COMMAND = "python utils/calculate_normalization_stats.py --config_path c.yaml --output_path"


def change(config: Config, **data) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data))


def test_loading_returns_the_datasets_in_order(mixture, tmp_path):
    content = calculate_for_config(mixture)
    content["datasets"] = dict(reversed(content["datasets"].items())) | {"another": {}}
    path = tmp_path / "s.json"
    path.write_text(json.dumps(content))
    wide, narrow = load_statistics(str(path), mixture, "c.yaml")
    assert wide == content["datasets"]["wide"] and narrow == content["datasets"]["narrow"]
    assert len(narrow["state"]["min"]) == 3 and len(narrow["action"]["q99"]) == 2


def test_loading_refuses_statistics_of_another_treatment(mixture, tmp_path):
    path = str(tmp_path / "s.json")

    def save(config: Config, **changes) -> None:
        Path(path).write_text(json.dumps(calculate_for_config(config) | changes))

    def refusal(config: Config) -> str:
        with pytest.raises(StatisticsError) as caught:
            load_statistics(path, config, "c.yaml")
        return str(caught.value)

    again = f"make it again with: {COMMAND} {path}"
    save(change(mixture, action_mode="absolute", absolute_action_dims=()))
    assert refusal(mixture) == (
        f"{path}: made with action_mode absolute, absolute_action_dims [], config wants data.action_mode delta, "
        "data.absolute_action_dims [3]; where other configs use the file, give this one another "
        f"data.normalization_stats_path; {again} --set 'data.action_mode=delta' 'data.absolute_action_dims=[3]'"
    )
    save(change(mixture, absolute_action_dims=(3, 0)))
    assert load_statistics(path, change(mixture, absolute_action_dims=(0, 3)), "c.yaml")
    assert "made with absolute_action_dims [0, 3], config wants data.absolute_action_dims [3]" in refusal(mixture)

    save(mixture)
    assert load_statistics(path, mixture, "c.yaml")
    assert "made with action_mode delta, config wants data.action_mode absolute" in refusal(
        change(mixture, action_mode="absolute")
    )
    assert "made with split_seed 0, config wants data.split_seed 1" in refusal(change(mixture, split_seed=1))
    limited = refusal(change(mixture, max_episodes=3))
    assert "made with max_episodes None, config wants data.max_episodes 3; " in limited and "max_episodes=3'" in limited
    assert "made with val_fraction 0.25, config wants data.val_fraction 0.0" in refusal(
        change(mixture, val_fraction=0.0)
    )
    entries = mixture.data.mixture
    longer = change(mixture, mixture=(entries[0], dataclasses.replace(entries[1], horizon=3)))
    assert refusal(longer).startswith(f"{path}: dataset narrow: made with horizon 2, config wants horizon 3")
    renamed = change(mixture, mixture=(entries[0], dataclasses.replace(entries[1], name="narrower")))
    assert refusal(renamed) == f"{path}: no statistics of dataset 'narrower' (nearest: 'narrow'); {again}"
    wider = change(mixture, mixture=(entries[0], dataclasses.replace(entries[1], state_dim=4)))
    assert "dataset narrow: state.min has 3 values, config wants data.state_dim 4" in refusal(wider)


def plain_config(state_dim: int = 4, per_action_dim: int = 4, files: str | Path = "x", **data) -> Config:
    head = {"per_action_dim": per_action_dim}
    data |= {"train_parquet_files": str(files), "state_dim": state_dim}
    return config_from_dict({"data": data, "model": {"action_head_config": head}})


def test_absolute_statistics_do_not_depend_on_horizon_or_unused_settings(tmp_path):
    config = plain_config(files=write_episodes(tmp_path / "a.parquet", [5]))
    path = tmp_path / "s.json"
    path.write_text(json.dumps(calculate_for_config(config)))
    head = dataclasses.replace(config.model.action_head_config, horizon=3, action_dim=None)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, action_head_config=head))
    assert load_statistics(str(path), change(other, split_seed=3, absolute_action_dims=(1,)), "c.yaml")


def test_loading_fails_with_the_command_that_makes_the_file(tmp_path):
    with pytest.raises(StatisticsError, match=f"is not set; set it to stats.json and run: {COMMAND} stats.json"):
        load_statistics(None, plain_config(), "c.yaml")
    missing = str(tmp_path / "s.json")
    with pytest.raises(StatisticsError, match=f"does not exist; make it with: {COMMAND} {missing}"):
        load_statistics(missing, plain_config(), "c.yaml")


def test_loading_checks_sizes_and_content(tmp_path):
    content = calculate_for_config(plain_config(files=write_episodes(tmp_path / "a.parquet", [5])))
    statistics = content["datasets"]["default"]
    path = tmp_path / "s.json"
    path.write_text(json.dumps(content))
    assert load_statistics(str(path), plain_config(), "c.yaml") == [statistics]
    with pytest.raises(StatisticsError, match=r"default: state\.min has 4 values, config wants data\.state_dim 7"):
        load_statistics(str(path), plain_config(7), "c.yaml")
    with pytest.raises(StatisticsError, match=r"default: action\.min has 4 values, config wants per_action_dim 7"):
        load_statistics(str(path), plain_config(4, 7), "c.yaml")
    del statistics["action"]["q99"]
    path.write_text(json.dumps(content))
    with pytest.raises(StatisticsError, match=r"no action\.q99"):
        load_statistics(str(path), plain_config(), "c.yaml")
    statistics["action"]["q99"] = [float("nan")] * 4
    path.write_text(json.dumps(content))
    with pytest.raises(StatisticsError, match=r"action\.q99 is not finite"):
        load_statistics(str(path), plain_config(), "c.yaml")
    for text, message in (("{", "not valid JSON"), ("[]", "no section 'datasets'"), ('{"state": {}}', "no section")):
        path.write_text(text)
        with pytest.raises(StatisticsError, match=f"{message}.*; make it again with: {COMMAND}"):
            load_statistics(str(path), plain_config(), "c.yaml")


MALFORMED = [
    (lambda s: s | {"state": None}, r"no state\.min"),
    (lambda s: [], r"dataset default: is \[\]; wanted an object with 'state' and 'action'"),
    (lambda s: put(s, "min", "low"), r"action\.min is 'low'; wanted a list of 4 numbers"),
    (lambda s: put(s, "min", [0, 1, None, 2]), r"action\.min is \[0, 1, None, 2\]; wanted a list of 4 numbers"),
    (lambda s: put(s, "min", [[0]] * 4), r"action\.min is \[\[0\].*; wanted a list of 4 numbers"),
    (lambda s: put(s, "std", [True] * 4), r"action\.std is \[True.*; wanted a list of 4 numbers"),
    (lambda s: put(s, "std", [-1.0] * 4), r"action\.std is less than 0"),
    (lambda s: put(s, "max", [1e39] * 4), r"action\.max is not finite in float32"),
    (lambda s: put(s, "max", [10**400] * 4), r"action\.max is not finite in float32"),
    (lambda s: put(s, "min", s["action"]["max"]), r"action\.min\[0\] is \S+, more than q01, "),
    (lambda s: put(s, "mean", [1e9] * 4), r"action\.mean\[0\] is 1e\+09, more than max, "),
]


def put(statistics: dict, name: str, value: object) -> dict:
    return statistics | {"action": statistics["action"] | {name: value}}


@pytest.mark.parametrize(("spoil", "message"), MALFORMED)
def test_loading_names_what_is_malformed(tmp_path, spoil, message):
    content = calculate_for_config(plain_config(files=write_episodes(tmp_path / "a.parquet", [5])))
    content["datasets"]["default"] = spoil(content["datasets"]["default"])
    path = tmp_path / "s.json"
    path.write_text(json.dumps(content))
    with pytest.raises(StatisticsError, match=f"{message}.*; make it again with: {COMMAND}"):
        load_statistics(str(path), plain_config(), "c.yaml")


def test_files_that_are_no_statistics(tmp_path):
    path = tmp_path / "s.json"
    for content in (b"\xff\xfe\x00", b"[" * 100_000, b"null", b"3"):
        path.write_bytes(content)
        with pytest.raises(StatisticsError, match=r"s.json: (not UTF-8 text|not valid JSON|no section 'datasets')"):
            load_statistics(str(path), plain_config(), "c.yaml")
    with pytest.raises(StatisticsError, match=r"can't be read \(Is a directory\); make it again with: "):
        load_statistics(str(tmp_path), plain_config(), "c.yaml")
