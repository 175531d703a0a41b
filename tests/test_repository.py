"""Rules that hold over the whole repository: who may import whom, and what code must never do."""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {
    "training": {"training", "model", "utils"},
    "inference": {"inference", "model", "utils", "data.processing"},
    "envs": {"envs", "utils"},
    "data": {"data", "utils"},
    "model": {"model", "utils"},
    "utils": {"utils"},
}
# Modules that are imported and can also be run. Every other file with a `__main__` block is an entry script: it may
# import anything, and only tests import it.
ALSO_RUN = {"data/loader.py", "inference/closed_loop/simulator.py"}
SCRIPT_FOLDERS = ("scripts", "benchmarks")  # folders of scripts, whose shared modules nobody else imports
CORE_LINES = 3600  # that the files of README's reading order have together, at most


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@functools.cache
def repository_modules() -> dict[str, Path]:
    """Module name -> file, of everything that can be imported from the repository's root."""
    folders = (*ALLOWED, "scripts", "benchmarks", "tests")
    paths = [path for folder in folders for path in modules(folder)] + sorted(ROOT.glob("*.py"))
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, at any depth of nesting and for types too; those of ours by their full name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:  # `from model import adapters` imports a file, `from model.adapters import x` too
                name = f"{node.module}.{alias.name}"
                yield name if name in repository_modules() else node.module


@functools.cache
def imported_files(path: Path) -> frozenset[Path]:
    """The files of this repository that a file imports."""
    return frozenset(repository_modules()[name] for name in imported(path) if name in repository_modules())


def is_entry_script(path: Path) -> bool:
    if str(path.relative_to(ROOT)) in ALSO_RUN:
        return False
    return path.parent == ROOT or '\nif __name__ == "__main__":\n' in path.read_text(encoding="utf-8")


def sources() -> list[Path]:
    """Every Python file that is not a test."""
    return [path for path in repository_modules().values() if path.relative_to(ROOT).parts[0] != "tests"]


@pytest.mark.parametrize("folder", ALLOWED)
def test_import_directions(folder):
    assert modules(folder)
    for path in modules(folder):
        if is_entry_script(path):
            continue
        for name in imported(path):
            if name in repository_modules():
                allowed = any(name == rule or name.startswith(rule + ".") for rule in ALLOWED[folder])
                assert allowed, f"{path.relative_to(ROOT)} imports {name}; {folder}/ may import {ALLOWED[folder]}"


def test_nobody_imports_an_entry_script():
    for path in sources():
        for file in imported_files(path):
            where, what = path.relative_to(ROOT), file.relative_to(ROOT)
            assert not is_entry_script(file), f"{where} imports {what}; move what both need to a library module"
            if what.parts[0] in SCRIPT_FOLDERS:
                assert where.parts[0] in SCRIPT_FOLDERS, (
                    f"{where} imports {what}, which only scripts and benchmarks may"
                )


def test_the_predictor_knows_nothing_of_its_users():
    """inference/serving and inference/closed_loop import the predictor, never the reverse."""
    reached, waiting = set(), [ROOT / "inference/predictor.py"]
    while waiting:
        path = waiting.pop()
        if path not in reached:
            reached.add(path)
            waiting += imported_files(path)
    used = {str(path.relative_to(ROOT)) for path in reached}
    assert "model/vla_model.py" in used
    assert not {name for name in used if name.startswith(("inference/serving/", "inference/closed_loop/"))}


def test_no_circle_of_imports():
    """Not of two files and not of more, counting imports that are only for types."""
    finished: set[Path] = set()

    def visit(path: Path, above: tuple[Path, ...]) -> None:
        if path in above:
            circle = " -> ".join(str(file.relative_to(ROOT)) for file in (*above[above.index(path) :], path))
            pytest.fail(f"files that import each other: {circle}")
        if path not in finished:
            for file in sorted(imported_files(path)):
                visit(file, (*above, path))
            finished.add(path)

    for path in repository_modules().values():
        visit(path, ())


def test_the_model_needs_no_tables():
    """`import model` and all its modules, in a fresh process, load neither pyarrow nor pandas."""
    names = sorted(name for name in repository_modules() if name.split(".")[0] == "model")
    assert "model.vla_model" in names
    program = f"import sys, {', '.join(names)}; print(sorted({{'pyarrow', 'pandas'}} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_core_fits_an_afternoon(page):
    """README's section "Reading order" is a numbered list whose items begin with a file in backticks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    section = re.search(r"^## (?:Reading order|阅读顺序)$(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE)
    assert section, f"{page} has no section 'Reading order'"
    paths = re.findall(r"^\d+\. `([^`]+)`", section[1], flags=re.MULTILINE)
    assert len(paths) == len(set(paths)) >= 10 and paths[0] == "main_train.py" and paths[-1] == "inference/predictor.py"
    lines = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in paths}
    assert sum(lines.values()) <= CORE_LINES, f"the core has {sum(lines.values())} lines: {lines}"


def test_the_path_is_edited_in_few_places():
    """`python scripts/x.py` runs the code of its own checkout: `_repository` sees to it before anything is imported."""
    edit = re.compile(r"^ *sys\.path(\[|\.insert|\.append| =)", re.MULTILINE)
    edits = {str(path.relative_to(ROOT)) for path in sources() if edit.search(path.read_text(encoding="utf-8"))}
    assert edits == {
        "scripts/_repository.py",
        "benchmarks/_repository.py",
        "scripts/client_example.py",  # a robot has it without the others
        "data/loader.py",
        "utils/calculate_normalization_stats.py",
    }
    for path in modules("scripts") + modules("benchmarks"):
        if is_entry_script(path) and imported_files(path) and str(path.relative_to(ROOT)) not in edits:
            before, found, _ = path.read_text(encoding="utf-8").partition("if not __package__:\n    import _repository")
            assert found and not re.search(rf"^(from|import) ({'|'.join(ALLOWED)})\b", before, re.MULTILINE), path


@pytest.mark.parametrize(
    "script",
    [
        "scripts/export_checkpoint.py",
        pytest.param("scripts/make_tiny_paligemma.py", marks=pytest.mark.slow),
        pytest.param("scripts/client_example.py", marks=pytest.mark.slow),
        pytest.param("benchmarks/bench_statistics.py", marks=pytest.mark.slow),
        pytest.param("data/loader.py", marks=pytest.mark.slow),
        pytest.param("utils/calculate_normalization_stats.py", marks=pytest.mark.slow),
    ],
)
def test_a_script_never_runs_the_code_of_another_checkout(script, tmp_path):
    for folder in ALLOWED:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("raise SystemExit('another checkout')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / script), "--help"]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0 and "usage:" in found.stdout, found.stderr


@pytest.mark.parametrize("package", ["wandb", "diffusers", "peft", "bitsandbytes", "metaworld"])
def test_optional_packages_are_imported_only_where_used(package):
    for folder in (*ALLOWED, "."):
        for path in modules(folder) if folder != "." else ROOT.glob("*.py"):
            top_level = [
                node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)
            ]
            for node in top_level:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
                assert package not in {name.split(".")[0] for name in names}, f"{path} imports {package} at its top"


def test_no_pickle_is_executed():
    files = [path for folder in ALLOWED for path in modules(folder)] + sorted(ROOT.glob("*.py")) + modules("scripts")
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            options = {keyword.arg: keyword.value for keyword in node.keywords}
            if (owner, node.func.attr) == ("torch", "load"):
                safe = options.get("weights_only")
                assert isinstance(safe, ast.Constant) and safe.value is True, f"{path}:{node.lineno}: torch.load"
            if (owner, node.func.attr) == ("np", "load"):
                assert "allow_pickle" not in options, f"{path}:{node.lineno}: np.load"
            assert (owner, node.func.attr) not in {("pickle", "load"), ("pickle", "loads")}, f"{path}:{node.lineno}"
            collective = node.func.attr.endswith(("_object", "_object_list"))  # torch.distributed pickles objects
            assert not (owner == "dist" and collective), f"{path}:{node.lineno}: dist.{node.func.attr}"


def test_samples_are_small():
    listed = subprocess.run(["git", "ls-files", "data/samples"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [ROOT / line for line in listed.stdout.splitlines()]
    assert len([path for path in files if path.suffix == ".parquet"]) == 2
    assert sum(path.stat().st_size for path in files) <= 2_000_000
