"""make_env, the table of tasks and the errors of a machine without simulator or GL: no simulator needed."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from envs import SIMULATORS, check_task, expand_tasks, make_env
from envs.metaworld_tasks import TASKS
from utils.text import file_stem

ROOT = Path(__file__).resolve().parents[2]


def test_each_of_the_50_tasks_has_its_own_instruction():
    instructions = [task.instruction for task in TASKS.values()]
    assert len(instructions) == 50
    assert len(set(instructions)) == 50
    for instruction in instructions:
        assert instruction == instruction.strip().lower() and len(instruction.split()) >= 3


def test_tiers_are_those_of_the_literature():
    counts = Counter(task.tier for task in TASKS.values())
    assert counts == {"easy": 28, "medium": 11, "hard": 6, "very hard": 5}  # as in LeRobot's table


def test_unknown_names_come_with_the_nearest_valid_one():
    with pytest.raises(ValueError, match="unknown environment 'metawrld'; did you mean 'metaworld'?"):
        make_env("metawrld", "window-open-v3")
    with pytest.raises(ValueError, match="unknown metaworld task 'window-open-v2'; did you mean 'window-open-v3'?"):
        make_env("metaworld", "window-open-v2")
    with pytest.raises(ValueError, match="valid names: assembly-v3, "):
        check_task("metaworld", "zzzz")


def test_tasks_whose_files_would_have_one_name():
    assert expand_tasks("gym", ["module:a/b-v0", "module:a/b-v1"]) == ["module:a/b-v0", "module:a/b-v1"]
    with pytest.raises(ValueError, match="tasks module:a/b-v0 and module:a_b-v0: their files would have the same name"):
        expand_tasks("gym", ["module:a/b-v0", "module:a_b-v0"])


@pytest.mark.parametrize("simulator", SIMULATORS.values(), ids=SIMULATORS)
def test_a_record_names_what_is_there(simulator):
    module, _, name = simulator.environment.rpartition(".")
    path = ROOT / (module.replace(".", "/") + ".py")
    assert f"class {name}(RobotEnv)" in path.read_text()
    assert (ROOT / simulator.requirements).is_file() and simulator.packages
    for task in simulator.tasks or ():
        assert file_stem(task) == task, "a task's name is fit to be a file's"


def test_missing_package_names_the_command(monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == "metaworld"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "metaworld", None)  # what Python does for a package that is not there
    with pytest.raises(ModuleNotFoundError, match="pip install -r requirements-sim.txt"):
        make_env("metaworld", "window-open-v3")


@pytest.mark.sim
@pytest.mark.parametrize("backend", ["glfw", "nonsense"])  # fails at the context, fails at the import
def test_broken_gl_names_the_package_and_the_variable(backend):
    environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY")}
    program = "from envs import make_env; make_env('metaworld', 'reach-v3').reset(seed=0)"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**environment, "MUJOCO_GL": backend, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert f"MuJoCo cannot render off-screen with MUJOCO_GL='{backend}'" in run.stderr
    assert "apt-get install libosmesa6" in run.stderr
