"""Sharing a dataset: its card, what is sent, and what is refused before anything is sent."""

from __future__ import annotations

import sys

import pytest
import yaml
from huggingface_hub import HfApi

from scripts import push_to_hub
from tests.helpers import episode_rows, write_rows


@pytest.fixture
def dataset(tmp_path):
    rows = []
    for episode in range(3):
        for step, row in enumerate(episode_rows(24, seed=episode)):
            rows.append(row | {"success": episode != 1, "intervention": episode == 2 and step > 9})
    write_rows(tmp_path / "demos" / "more" / "a.parquet", rows)
    return tmp_path / "demos"


@pytest.fixture
def hub(monkeypatch):
    """What would be sent: calls of the hub's own client."""
    calls = {}
    monkeypatch.setattr(push_to_hub, "unreachable", lambda: None)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, *args, **options: calls.update(create=(args, options)))
    monkeypatch.setattr(HfApi, "create_commit", lambda self, *args, **options: calls.update(commit=(args, options)))
    return calls


def push(dataset, *flags):
    push_to_hub.main(["--dataset", str(dataset), "--repo_id", "me/demos", "--num_workers", "0", *flags])


def test_a_dataset_is_sent_with_its_card(dataset, hub, capsys):
    push(dataset, "--license", "cc-by-4.0", "--private")
    assert hub["create"] == (("me/demos",), {"private": True, "exist_ok": True, "repo_type": "dataset"})
    (repo, operations), options = hub["commit"]
    assert repo == "me/demos" and options["repo_type"] == "dataset"
    sent = {operation.path_in_repo: operation.path_or_fileobj for operation in operations}
    assert list(sent) == ["more/a.parquet", "README.md"]
    assert sent["more/a.parquet"] == str(dataset / "more" / "a.parquet")
    card = sent["README.md"].decode()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "cc-by-4.0" and header["task_categories"] == ["robotics"]
    assert header["configs"][0]["data_files"] == "**/*.parquet" and header["size_categories"] == ["n<1K"]
    for line in (
        "| episodes | 3 |",
        "| steps | 72 |",
        "| episodes that succeeded | 2 of 3 |",
        "| corrections of a policy | 14 steps in 1 episodes |",
        "| press the button | 2 | 48 |",
    ):
        assert line in card, card
    assert "| action[3] | -" in card.replace("\\", "")
    assert "sent 2 files" in capsys.readouterr().out


def test_a_dry_run_sends_nothing(dataset, hub, capsys):
    push(dataset, "--dry_run")
    assert hub == {} and "would send 2 files" in capsys.readouterr().out


def test_the_folders_own_card_is_sent(dataset, hub):
    (dataset / "README.md").write_text("mine")
    push(dataset)
    sent = {operation.path_in_repo: operation.path_or_fileobj for operation in hub["commit"][0][1]}
    assert sent["README.md"] == str(dataset / "README.md")
    with pytest.raises(ValueError, match=r"--license goes into the card, but .*README.md is sent in its place"):
        push(dataset, "--license", "mit")


def test_what_is_broken_is_not_sent(dataset, hub, tmp_path):
    rows = episode_rows(24)
    rows[5]["state"][1] = float("nan")
    write_rows(dataset / "b.parquet", rows)
    with pytest.raises(ValueError, match=r"b.parquet: nan: .*edit_dataset.py .* --delete 0 .*inspect_parquet.py"):
        push(dataset)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no Parquet file"):
        push(tmp_path / "empty")
    assert hub == {}


def test_flags_of_a_dataset_are_not_those_of_a_policy(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["push_to_hub.py"])
    with pytest.raises(SystemExit):
        push_to_hub.main(["--folder", str(tmp_path), "--repo_id", "me/p", "--license", "mit"])
    assert "--license and --num_workers are about a --dataset" in capsys.readouterr().err


def test_a_hub_that_is_not_there_is_one_line(dataset, hub, monkeypatch):
    class ConnectError(Exception):
        """Of a library that is neither the hub's nor Python's."""

    def breaks_off(self, *args, **options):
        raise ConnectError("[Errno -2] Name or service not known")

    with monkeypatch.context() as change:
        change.setattr(HfApi, "create_commit", breaks_off)
        with pytest.raises(
            ValueError, match=r"^the connection to the hub broke off \(\[Errno -2\] .*\); run .* again$"
        ):
            push(dataset)
    hub.clear()
    monkeypatch.setattr(push_to_hub, "unreachable", lambda: "https://hub does not answer (no route)")
    with pytest.raises(
        ValueError, match=r"^https://hub does not answer \(no route\); connect to it, or see with --dry_run"
    ):
        push(dataset)
    assert hub == {}
    push(dataset, "--dry_run")
