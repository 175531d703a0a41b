"""docs/adding_a_simulator.md says that a simulator is one new file and one line; here one is added exactly so."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import needs

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("envs", "model", "utils", "data", "inference", "scripts")
PROGRAM = """
import sys
from envs import expand_tasks, make_env
assert "gymnasium" not in sys.modules
from gymnasium.utils.env_checker import check_env
import numpy as np

assert expand_tasks("dot", ["easy"]) == ["left", "right"]
for task in ("left", "right"):
    env = make_env("dot", task, image_size=32)
    check_env(env, skip_render_check=True)
    first, again = (env.reset(seed=3)[0] for _ in range(2))
    assert all(np.array_equal(first[key], again[key]) for key in first)
    lazy, _ = env.reset(seed=3, options={"images_on_request": True})
    assert lazy.keys() == {"state"} and np.array_equal(env.images()["image_1"], first["image_1"])
    info = {"success": False}
    while not info["success"]:
        _, _, _, truncated, info = env.step(env.expert_action())
        assert not truncated
    assert env.instruction.startswith("move the dot")
try:
    make_env("dot", "up")
except ValueError as error:
    print(error)
try:
    make_env("dot", "left", image_sise=32)
except ValueError as error:
    print(error)
"""

pytestmark = needs("gymnasium")


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of this repository's code with the document's file and line added."""
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "samples"))
    shutil.copy(ROOT / "main_eval.py", tmp_path)
    add_simulator(tmp_path)
    return tmp_path


def add_simulator(checkout: Path) -> None:
    """Do what docs/adding_a_simulator.md tells its reader to do."""
    page = (ROOT / "docs/adding_a_simulator.md").read_text()
    file, line = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    path = file.splitlines()[0].removeprefix("# ")
    assert path == "envs/dot_env.py" and line.count("\n") == 1
    (checkout / path).write_text(file)
    table = checkout / "envs/__init__.py"
    start, entries = table.read_text().split("SIMULATORS: dict[str, Simulator] = {\n")
    table.write_text(f"{start}SIMULATORS: dict[str, Simulator] = {{\n{line}{entries}")


def run(checkout: Path, *command: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    result = subprocess.run(
        [sys.executable, *command], cwd=checkout, capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_the_document_s_simulator_meets_the_interface(checkout):
    said = run(checkout, "-W", "error::UserWarning", "-c", PROGRAM)
    assert "unknown dot task 'up'; valid names: easy, left, right" in said
    assert "DotEnv has no option 'image_sise'; did you mean 'image_size'?" in said


def test_the_document_s_simulator_is_recorded_and_evaluated(checkout):
    page = (ROOT / "docs/adding_a_simulator.md").read_text()
    (commands,) = re.findall(r"```bash\n(.*?)\n```", page, flags=re.DOTALL)
    for command in commands.splitlines():
        run(checkout, *command.split()[1:])
    assert {path.name for path in (checkout / "demos/dot").iterdir()} == {"left.parquet", "right.parquet"}
    found = json.loads((checkout / "eval_results/rollouts.json").read_text())
    assert found["summary"]["tiers"].keys() == {"easy"}
    assert {task["successes"] for task in found["tasks"].values()} == {2}
