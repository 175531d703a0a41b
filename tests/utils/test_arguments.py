"""Every command reads ~ as the home folder, where no shell has done so."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

from utils.arguments import CommandParser, at_least, output_file, run_command

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def parser(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    parser = CommandParser("Words.\n\n    as they stand")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--data_path", nargs="+")
    parser.add_argument("--prompt")
    return parser


def test_the_home_folder(parser, monkeypatch):
    words = ["--output=~/out", "--data_path", "~/a", "b/~/c", "~", "--prompt", "put it ~/about/ there"]
    wanted = {
        "output": pathlib.Path("/home/ada/out"),
        "data_path": ["/home/ada/a", "b/~/c", "/home/ada"],
        "prompt": "put it ~/about/ there",
    }
    assert vars(parser.parse_args(words)) == wanted
    monkeypatch.setattr(sys, "argv", ["x.py", *words])
    assert vars(parser.parse_args()) == wanted
    assert parser.parse_known_args(["--other=~/x"])[1] == ["--other=/home/ada/x"]
    assert "\n\n    as they stand" in parser.format_help()


def test_every_command_uses_it():
    folders = ("", "scripts", "benchmarks", "utils", "data", "data/convert", "inference", "training")
    files = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
    others = {path.name for path in files if re.search(r"argparse\.ArgumentParser\(\w", path.read_text("utf-8"))}
    assert others == {"client_example.py", "lerobot_loading.py"}, "which run where the rest is not"
    assert sum("CommandParser(" in path.read_text("utf-8") for path in files) > 30


def test_a_misspelt_flag_is_named_with_the_nearest(parser, capsys):
    for words, said in (
        (["--ouput", "x"], "unrecognized arguments: --ouput x; did you mean --output?"),
        (["--data_paht=a", "--promt", "b"], "--data_paht=a --promt b; did you mean --data_path, --prompt?"),
        (["--horizon", "8"], "unrecognized arguments: --horizon 8\n"),
    ):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(words)
        assert said in capsys.readouterr().err


def test_counts(parser, capsys):
    parser.add_argument("--count", type=at_least(1))
    assert parser.parse_args(["--count", "3"]).count == 3
    for text, words in (("0", "0 is less than 1; give 1 or more"), ("-4", "-4 is less"), ("x", "invalid whole number")):
        with pytest.raises(SystemExit):
            parser.parse_args([f"--count={text}"])
        assert f"argument --count: {words}" in capsys.readouterr().err


def test_what_a_user_can_mend_ends_a_command_with_one_line(tmp_path, capsys):
    def ending(act, *also):
        with pytest.raises(SystemExit) as ended:
            run_command(act, *also)
        return ended.value.code

    file = tmp_path / "file"
    file.write_text("x")
    assert ending(lambda: None) is None and ending(lambda: 3) == 3
    assert ending(lambda: int("x")) == "error: invalid literal for int() with base 10: 'x'"
    assert ending(lambda: (file / "out.json").write_text("")).startswith(
        f"error: {file}/out.json: Not a directory; name"
    )
    assert ending(lambda: file.replace(tmp_path)).startswith(f"error: {tmp_path}: "), "and not the temporary name"
    with pytest.raises(RuntimeError):
        run_command(raising(RuntimeError("a fault of ours")))
    assert ending(raising(RuntimeError("no simulator")), RuntimeError) == "error: no simulator"
    assert ending(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "\nstopped\n"


def raising(error: BaseException):
    def act():
        raise error

    return act


COMMANDS = """
data/loader.py --model_name_or_path FILE
diagnose_weights.py --checkpoint_path FLOW --json FILE/x.json
inspect_parquet.py --config_path FOLDER
simple_analysis.py --config_path FOLDER
test_vla_offline.py --checkpoint_path FOLDER
scripts/convert_hdf5.py --hdf5_dir FILE --output_dir FOLDER --cameras a=image_1 --prompt go
scripts/convert_lerobot.py --lerobot_dir FILE --output_dir FOLDER
scripts/estimate_memory.py --config_path FOLDER
scripts/export_checkpoint.py --checkpoint_path FLOW --output_path FILE/x.pth.tar
scripts/export_policy.py --checkpoint_path FLOW --output_dir FILE/x
scripts/film_strip.py --videos FILE --output FILE/x.png
scripts/import_policy.py --policy_dir FILE --output FILE/x.pth.tar
scripts/make_tiny_paligemma.py --output_dir FILE/x
scripts/merge_lora.py --checkpoint_path FLOW --output FILE/x.pth.tar
scripts/push_to_hub.py --folder FILE --repo_id a/b --dry_run
scripts/quickstart_summary.py --experiment_dir FILE
utils/calculate_normalization_stats.py --config_path FOLDER
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS.strip().splitlines())
def test_a_file_where_a_folder_should_be(command, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for name, path in (
        ("FILE", tmp_path / "file"),
        ("FOLDER", tmp_path / "folder"),
        ("FLOW", ROOT / "tests/fixtures/policies/flow.pth.tar"),
    ):
        command = command.replace(name, str(path))
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr
    assert "error: " in done.stderr.strip().splitlines()[-1]


def test_an_output_that_cannot_be_written_is_said_before_the_work(tmp_path, capsys, monkeypatch):
    parser = CommandParser("Words.")
    parser.add_argument("--html", type=output_file)
    (tmp_path / "file").touch()
    for name, said in (
        ("", "is a folder; give the name of a file in it"),
        ("file/page.html", f"can't be written, because {tmp_path / 'file'} is a file; choose another place"),
        ("file/deeper/page.html", f"can't be written, because {tmp_path / 'file'} is a file; choose another place"),
    ):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(["--html", str(tmp_path / name)])
        assert f"error: argument --html: {tmp_path / name} {said}" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--html", str(tmp_path / "new" / "page.html")])
    assert f"because {tmp_path} is read-only; choose another place" in capsys.readouterr().err
    monkeypatch.undo()
    assert parser.parse_args(["--html", str(tmp_path / "new" / "page.html")]).html == tmp_path / "new" / "page.html"


def test_a_part_of_a_flag_is_not_taken_for_the_flag(parser, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(["--out", "x"])
    assert "unrecognized arguments: --out x; did you mean --output?" in capsys.readouterr().err
