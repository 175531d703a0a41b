"""Rules that hold over the whole repository: who may import whom, and what code must never do."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"configs", "data", "model", "training", "inference", "envs", "utils", "scripts", "benchmarks", "tests"}
ALLOWED = {
    "training": {"training", "model", "utils"},
    "inference": {"inference", "model", "utils", "data.processing"},
    "envs": {"envs", "utils"},
    "data": {"data", "utils"},
    "model": {"model", "utils"},
    "utils": {"utils"},
}

SCRIPTS = {Path("utils/calculate_normalization_stats.py")}  # commands outside scripts/: they may import anything


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at any depth of nesting."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return found


@pytest.mark.parametrize("folder", ALLOWED)
def test_import_directions(folder):
    assert modules(folder)
    for path in modules(folder):
        if path.relative_to(ROOT) in SCRIPTS:
            continue
        for name in imported(path):
            if name.split(".")[0] in FOLDERS:
                allowed = any(name == rule or name.startswith(rule + ".") for rule in ALLOWED[folder])
                assert allowed, f"{path.relative_to(ROOT)} imports {name}; {folder}/ may import {ALLOWED[folder]}"


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
