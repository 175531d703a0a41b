"""The written pages: links and names that resolve, the same in both languages, and no picture out of date."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.metadata
import json
import re
import subprocess
import sys
import typing
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import latency
from inference.eval_args import parse_args
from tests.docs.pages import ROOT, Page, translations, without_comment, written_pages
from utils.config_utils import Config

PAGES, PAIRS = written_pages(), translations()
IN_BOTH_LANGUAGES = {"data_format", "deployment", "evaluation", "execution", "finetune_paligemma", "glossary", "heads"}
IN_BOTH_LANGUAGES |= {"convert", "data_and_robot", "editing", "multi_gpu", "pi0", "simulators", "training"}
IN_BOTH_LANGUAGES |= {"lerobot", "training_pipeline"}
THEIR_OWN = {"configs/my_robot.yaml"}  # files that a reader of the pages makes
COMMIT = re.compile(r"[0-9a-f]{7,40}")
PATH = re.compile(r"[\w.-]+(/[\w.-]+)*/?")


def ids(page: Page) -> str:
    return page.name


@functools.cache
def repository_files() -> tuple[str, ...]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    return tuple(name for name in listed if name and (ROOT / name).exists())


def test_the_pages_that_must_be_there():
    names = {page.name for page in PAGES}
    assert names >= {"README.md", "README.zh-CN.md", "CONTRIBUTING.md", "docs/data_format.md", "docs/deployment.md"}
    assert names >= {"docs/troubleshooting.md", "docs/training_pipeline.md", "docs/finetune_paligemma.md"}
    assert {english.name for english, _ in PAIRS} == {"README.md", *(f"docs/{name}.md" for name in IN_BOTH_LANGUAGES)}
    assert all((ROOT / name).is_file() for name in ("LICENSE", "CITATION.cff", "Dockerfile"))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_resolve(page):
    for target in page.links:
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.path.parent / path).resolve() if path else page.path
        assert linked.exists(), f"{page.name} links to {target}, which is not there"
        assert linked.is_relative_to(ROOT), f"{page.name}: {target} leaves the repository"
        if anchor:
            assert anchor in Page(linked).anchors, f"{page.name}: {path} has no heading #{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_files_that_are_named_exist(page):
    files = repository_files()
    folders = {name.split("/")[0] for name in files if "/" in name}
    names = {Path(name).name for name in files}
    for code in page.inline_code:
        for word in re.split(r"[\s=]+", code):
            if word in THEIR_OWN or not PATH.fullmatch(word):
                continue
            beside = (page.path.parent / word).exists()
            if "/" in word.rstrip("/") and word.split("/")[0] in folders:
                assert (ROOT / word).exists() or beside, f"{page.name} names {word}, which is not there"
            elif word.endswith((".py", ".sh", ".sbatch", ".md")) and "/" not in word:
                assert word in names, f"{page.name} names {word}, which is not there"


def config_keys(section: type, place: str = "") -> set[str]:
    """Every dotted key of the configuration."""
    found = set()
    for name, hint in typing.get_type_hints(section).items():
        found.add(place + name)
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                found |= config_keys(part, f"{place}{name}.")
    return found


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_settings_that_are_named_exist(page):
    """`data.val_fraction`, and `vlm_config.dtype` without its section, in prose and in --set."""
    known = config_keys(Config)
    sections = {key for key in known if any(other.startswith(key + ".") for other in known)}
    ends = {section.split(".")[-1] for section in sections}
    for code in [*page.inline_code, *page.commands]:
        for word in re.findall(r"(?<![\w./-])([a-z_]+(?:\.[a-z_0-9]+)+)(?![\w./(])", code):
            is_module = (ROOT / word.replace(".", "/")).with_suffix(".py").is_file()
            if word.split(".")[0] in ends and not is_module and not word.endswith((".py", ".yaml", ".md", ".json")):
                assert any(key == word or key.endswith("." + word) for key in known), f"{page.name}: no setting {word}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_flags_that_are_named_exist(page, capsys):
    # Flags of docker, hf, torchrun, tensorboard and trackio.
    known = {"--shm-size", "--ipc", "--rm", "--local-dir", "--repo-type", "--nproc_per_node", "--logdir", "--project"}
    for name in repository_files():
        if name.endswith((".py", ".sh")) and not name.startswith("tests/"):
            text = (ROOT / name).read_text(encoding="utf-8")
            known |= set(re.findall(r'"(--\w+)"', text) if name.endswith(".py") else re.findall(r"(--\w+)", text))
    with pytest.raises(SystemExit):  # the flags of main_eval.py are not written out in its source
        parse_args(["--help"], None)
    known |= set(re.findall(r"--\w+", capsys.readouterr().out))
    known |= {f"--no-{flag[2:]}" for flag in known}  # argparse.BooleanOptionalAction
    for code in [*page.inline_code, *page.commands]:
        for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", code):
            assert flag in known, f"{page.name} names the flag {flag}, which nothing here takes"


def definitions(path: Path) -> set[str]:
    """Functions and classes of a module, methods as Class.method."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


@pytest.mark.parametrize(
    ("page", "pattern"),
    [
        ("docs/glossary.md", r"(?P<names>`[\w.]+`(?:, `[\w.]+`)*) in `(?P<path>[\w/]+\.py)`"),
        ("docs/glossary.zh-CN.md", r"`(?P<path>[\w/]+\.py)` 中的 (?P<names>`[\w.]+`(?:、`[\w.]+`)*)"),
    ],
)
def test_the_glossary_names_code_that_is_there(page, pattern):
    (glossary,) = Page(ROOT / page).tables
    found = [match for row in glossary for match in re.finditer(pattern, row[1])]
    assert len(found) >= 11
    for match in found:
        for name in re.findall(r"`([\w.]+)`", match["names"]):
            assert name in definitions(ROOT / match["path"]), f"{page}: {match['path']} defines no {name}"


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_readme_stays_short_and_maps_every_folder(name):
    page = Page(ROOT / name)
    assert len(page.text.splitlines()) <= 220
    (the_map,) = [table for table in page.tables if any(row[0] == "`configs/`" for row in table)]
    mapped = {row[0].strip("`").rstrip("/") for row in the_map[2:]}
    folders = {str(Path(file).parent) for file in repository_files() if not file.startswith(("tests/", "docs/"))} - {
        "."
    }
    depths = {"/".join(folder.split("/")[:2]) for folder in folders if not folder.startswith("configs/")}
    assert mapped == depths | {"tests", "docs"}


def test_every_page_can_be_reached_from_the_readme():
    known, unread = set(), [ROOT / "README.md", ROOT / "README.zh-CN.md"]
    while unread:
        page = unread.pop()
        known.add(page)
        targets = [target.partition("#")[0] for target in Page(page).links if not target.startswith("http")]
        found = {(page.parent / target).resolve() for target in targets if target.endswith(".md")}
        unread += sorted(found - known - set(unread))
    lost = {page.name for page in PAGES if page.path.parent in (ROOT, ROOT / "docs") and page.path not in known}
    assert not lost, f"no page links to {lost}"


def place_of(page: Page, target: str) -> tuple[str, int | str]:
    """What a link leads to, alike in both languages: the English page, and the number of its heading."""
    path, _, anchor = target.partition("#")
    headings = Page((page.path.parent / path).resolve()).anchors if anchor else []
    return path.replace(".zh-CN.md", ".md"), headings.index(anchor) if anchor in headings else anchor


def shape(page: Page) -> dict[str, list]:
    """What a translation must keep."""
    return {
        "levels of headings": [level for level, _ in page.headings],
        "numbers of headings": [re.match(r"[\d.]*", title)[0] for _, title in page.headings],
        "commands": page.commands,
        "languages of code blocks": [language for language, _ in page.blocks],
        "tables (rows, columns)": [(len(table), {len(row) for row in table}) for table in page.tables],
        "links": [place_of(page, target) for target in page.links][1:],  # the first is the other language
        "formulas": re.findall(r"\$\$.*?\$\$", page.prose, re.DOTALL),
    }


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0].name)
def test_both_languages_have_the_same_content(pair):
    english, chinese = map(shape, pair)
    for what, found in english.items():
        assert chinese[what] == found, f"{pair[1].name}: other {what} than {pair[0].name}"
    for (language, one), (_, other) in zip(pair[0].blocks, pair[1].blocks, strict=True):
        if language:  # pictures drawn in text have no comments
            one, other = ([without_comment(line) for line in text.splitlines()] for text in (one, other))
        assert other == one, f"{pair[1].name}: a code block differs in more than its comments"
    for title, one, other in zip(pair[0].headings, pair[0].sections, pair[1].sections, strict=True):
        code = [Counter(re.findall(r"`([^`\n]+)`", text.replace(".zh-CN.md", ".md"))) for text in (one, other)]
        apart = {word for word in (code[0] - code[1]) + (code[1] - code[0]) if not COMMIT.fullmatch(word)}
        assert not {word for word in apart if word not in code[0] or word not in code[1]}, (
            f"{pair[1].name}: section {title[1]!r} has other names in it: {sorted(apart)}"
        )


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_each_language_links_to_its_own_pages(page):
    pages = {english.path.name: chinese.path.name for english, chinese in PAIRS}
    mine = page.name.endswith(".zh-CN.md")
    for target in page.links[1:] if any(page in pair for pair in PAIRS) else page.links:
        name = target.partition("#")[0].rpartition("/")[2]
        assert name not in (pages if mine else pages.values()), f"{page.name} links to {target} of the other language"


@pytest.mark.parametrize(
    ("page", "subjects"),
    [
        (
            "docs/troubleshooting.md",
            ["validation loss", "NCCL time-outs", "Ports", "Out of memory", "Poor predictions", "Slow inference"],
        ),
        (
            "docs/training_pipeline.md",
            ["Data", "Statistics", "Model", "Flow matching", "Training", "Validation", "Inference", "Several GPUs"]
            + ["Checkpoints", "Monitoring", "Diagnosis"],
        ),
    ],
)
def test_named_subjects_are_covered(page, subjects):
    titles = [title for _, title in Page(ROOT / page).headings]
    for subject in subjects:
        assert any(subject in title for title in titles), f"{page} has no section on {subject}"


def test_the_picture_of_latency_shows_the_published_table(tmp_path):
    """The same pixels again, from the tables of RESULTS.md; and a --json result is drawn too."""
    skip_other_matplotlib()
    table, drawn, again = ROOT / "benchmarks/RESULTS.md", tmp_path / "table.png", tmp_path / "json.png"
    latency.plot(latency.read_published(table), drawn)
    with Image.open(drawn) as new, Image.open(ROOT / "docs/images/latency.png") as published:
        assert new.tobytes() == published.tobytes(), (
            "run python benchmarks/latency.py --redraw benchmarks/RESULTS.md --plot docs/images/latency.png"
        )
    (tmp_path / "result.json").write_text(json.dumps({"summary": latency.read_published(table)}))
    latency.plot(latency.read_json(tmp_path / "result.json"), again)
    assert again.read_bytes() == drawn.read_bytes()


def skip_other_matplotlib() -> None:
    wanted = re.search(r"^matplotlib==(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[1]
    if importlib.metadata.version("matplotlib") != wanted:
        pytest.skip(f"matplotlib {wanted} draws them")


def test_the_pictures_are_what_their_program_draws(tmp_path):
    skip_other_matplotlib()
    command = [sys.executable, "docs/make_figures.py", "--output_dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for drawn in tmp_path.iterdir():
        assert drawn.read_bytes() == (ROOT / "docs/images" / drawn.name).read_bytes(), (
            f"run docs/make_figures.py: {drawn.name}"
        )
    svg = {path.name for path in (ROOT / "docs/images").glob("*.svg")}  # the others show measurements and rollouts
    assert svg == {path.name for path in tmp_path.iterdir()}
