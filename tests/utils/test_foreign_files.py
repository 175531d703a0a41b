"""Files of others: parsed within bounds, by names that are known, and never with code in them."""

from __future__ import annotations

import json
import os

import pytest
import torch

from utils.foreign_files import (
    ForeignFileError,
    check_processor_folder,
    check_tokenizer_files,
    inside,
    is_plain_name,
    parse_json,
    parse_yaml,
    read_json,
    refuse_custom_code,
)

BOMB = "x0: &x0 [a, a, a, a, a, a, a, a, a]\n" + "".join(
    f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "more than 1,000,000 values, those that aliases repeat among them"),
        ("&a [*a]", "64 deep"),
        ("a: &b {c: *b}", "64 deep"),
        ("[" * 5000, "not valid YAML"),
        ("!!python/object/apply:os.system [true]", "not valid YAML: could not determine a constructor"),
        ("a: 1" + "0" * 5000, "not valid YAML"),
        ("a: [", "not valid YAML"),
    ],
)
def test_yaml_that_explodes_or_runs(text, message):
    with pytest.raises(ForeignFileError, match=message):
        parse_yaml(text)


def test_yaml_with_a_key_that_is_given_twice():
    with pytest.raises(ForeignFileError, match=r"^not valid YAML: lr is given twice in .*, line 3, column 3: .*$"):
        parse_yaml("optimizer:\n  lr: 1\n  lr: 2\n")
    with pytest.raises(ForeignFileError, match=r"^not valid YAML: while scanning .* line 2, column 1: .*$"):
        parse_yaml("a:\n\tb: 1\n")  # in one line
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: {x: 1}\nd: [{x: 1}, {x: 2}]\n")["b"] == {
        "x": 3,
        "y": 2,
    }


def test_yaml_as_people_write_it():
    assert parse_yaml("a: &a {x: 1}\nb: *a\nc: [1, 2]") == {"a": {"x": 1}, "b": {"x": 1}, "c": [1, 2]}


@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 70 + "]" * 70, "{", b"\xff\xfe", '{"a": ' + "9" * 5000 + "}"])
def test_json_that_is_too_much(text):
    with pytest.raises(ForeignFileError, match="not valid JSON|64 deep"):
        parse_json(text)


def test_a_file_is_named(tmp_path):
    with pytest.raises(ForeignFileError, match="none.json: can't be read"):
        read_json(tmp_path / "none.json")
    (tmp_path / "a.json").write_bytes(b"\xff")
    with pytest.raises(ForeignFileError, match=r"a\.json: not UTF-8 text"):
        read_json(tmp_path / "a.json")


def test_names():
    assert is_plain_name("run 1-b_ö") and not any(
        map(is_plain_name, ["", ".", "..", "a/b", "a\\b", " a", "a ", "a\n", "\x1b", "x" * 256])
    )


def test_files_inside_of_a_folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    os.symlink(tmp_path / "secret", folder / "link")
    assert inside(folder, "below/a") == (folder / "below/a").resolve()
    for name in ("../secret", "below/../../secret", "/etc/passwd", "link"):
        assert inside(folder, name) is None


CODE = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}


@pytest.mark.parametrize("settings", [CODE, {"a": [CODE]}, {"trust_remote_code": True}])
def test_entries_that_name_code(settings):
    with pytest.raises(ForeignFileError, match="names code that a library would run"):
        refuse_custom_code(settings, "tokenizer_config.json")


def test_tokenizer_files():
    def content(value):
        return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)

    check_tokenizer_files({"tokenizer_config.json": content({"auto_map": {}}), "tokenizer.json": content({})})
    for name in ("evil.py", "..", "../tokenizer.json", "/tokenizer.json", "tokenizer.json\n"):
        with pytest.raises(ForeignFileError, match="is none that a tokenizer needs"):
            check_tokenizer_files({name: content({})})
    with pytest.raises(ForeignFileError, match="tokenizer_config.json has an entry 'auto_map'"):
        check_tokenizer_files({"tokenizer_config.json": content(CODE)})
    with pytest.raises(ForeignFileError, match="no sequence of bytes"):
        check_tokenizer_files({"tokenizer.json": torch.zeros(3)})


def test_a_folder_of_a_processor(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CODE))
    with pytest.raises(ForeignFileError, match=r"tokenizer_config\.json has an entry 'auto_map'"):
        check_processor_folder(tmp_path)
