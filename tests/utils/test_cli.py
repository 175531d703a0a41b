"""Flags made from the fields of the configuration."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from typing import Literal

import pytest

from utils.cli import add_setting_flags, field_comments, key_values
from utils.config_utils import ActionHeadConfig, ConfigError, DataConfig, InferenceConfig


@dataclass(frozen=True)
class Section:
    steps: int = 3  # how many, of 100 %
    limit: float | None = None
    kind: Literal["a", "b"] = "a"  # which: a#1
    names: tuple[str, ...] = ()  # several
    bounds: tuple[float, float] = (
        0.0,
        1.0,
    )  # low and high
    fast: bool = False

    note = "no field"  # and no setting


def parse(*arguments: str, names: tuple[str, ...] = ("steps", "limit", "kind", "names", "bounds", "fast")):
    parser = argparse.ArgumentParser(prog="x")
    add_setting_flags(parser.add_argument_group("settings"), Section, names)
    return parser, parser.parse_args(arguments)


def test_what_is_not_given_is_none():
    assert set(vars(parse()[1]).values()) == {None}


def test_types_come_from_the_fields():
    given = "--steps 4 --limit 0.5 --kind b --names x y --bounds 1 2 --no-fast"
    assert vars(parse(*given.split())[1]) == {
        "steps": 4,
        "limit": 0.5,
        "kind": "b",
        "names": ["x", "y"],
        "bounds": [1.0, 2.0],
        "fast": False,
    }
    assert vars(parse("--fast", names=("fast",))[1]) == {"fast": True}


@pytest.mark.parametrize("wrong", ["--kind c", "--steps 1.5", "--bounds 1", "--limit x"])
def test_other_values_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        parse(*wrong.split())
    assert f"argument {wrong.split()[0]}" in capsys.readouterr().err


def test_the_comment_is_the_help():
    comments = field_comments(Section)
    wanted = {"steps": "how many, of 100 %", "kind": "which: a#1", "names": "several", "bounds": "low and high"}
    assert comments == wanted
    text = parse()[0].format_help()
    assert "how many, of 100 %" in text and "{a,b}" in text and "low and high" in text
    with pytest.raises(KeyError):
        parse(names=("stepz",))


@pytest.mark.parametrize("section", [InferenceConfig, DataConfig, ActionHeadConfig])
def test_the_settings_of_the_program_have_flags(section):
    parser = argparse.ArgumentParser(prog="x")
    names = [field.name for field in fields(section) if field.name not in ("augmentation", "mixture")]
    add_setting_flags(parser, section, names)
    assert set(names) == set(vars(parser.parse_args([])))
    assert field_comments(InferenceConfig)["compile"].startswith("torch.compile's modes")
    parser.format_help()


def test_values_that_yaml_would_change():
    """A date stays text, and what looks like a comment is not dropped."""
    read = key_values(["a=2026-01-01", "b='push #1 #2'", "c=push#1", "d=[1, 2] # two"], "--env_options")
    assert read == {"a": "2026-01-01", "b": "push #1 #2", "c": "push#1", "d": [1, 2]}
    with pytest.raises(ConfigError, match="--env_options prompt=push #1: YAML takes what follows ' #' for a comment"):
        key_values(["prompt=push #1"], "--env_options")
