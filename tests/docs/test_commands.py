"""Every command of every page is run, in the order of the page, in one terminal; see the tables for the few exceptions.

A command must be in exactly one of two tables: RUN says what it prints when it has done its work, NOT_RUN why a test
can't run it and what is checked instead. A page in Chinese has the commands of the English one (test_pages.py).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, written_pages
from tests.docs.small import READERS, run_quickstart, shrink_configs
from tests.docs.terminal import ENVIRONMENT, Terminal, copy_repository, python_on_path

PAGES = {page.name: page for page in written_pages() if page.commands and not page.name.endswith(".zh-CN.md")}
SIMULATOR = re.compile(r"--env |benchmarks/latency\.py")

# What is made smaller in a command, and why the size it names is not for a test.
SMALLER = (
    (r"--episodes 0-44", "--episodes 0-4"),  # the dataset has 6 episodes
    (r"--episodes 45-49", "--episodes 5"),
    (r"--epochs 30", "--epochs 3"),  # the config has 2
    (r"--episodes (10|20|40)", "--episodes 1"),  # of a simulator
    (r"--tasks all --num_envs 8", "--tasks button-press-topdown-v3 window-open-v3 --num_envs 2 --episodes 1"),
    (r"(--control replay .*)", r"\1 --episodes 1"),
    (r"--heads flow_matching .* regression", "--heads regression"),  # 24 cells
    (r"--seeds 0 1 2", "--seeds 0 --episodes 0 --num_samples 2"),
    (r"(benchmarks/latency\.py)", r"\1 --quick --variants synchronous"),
    (r"(benchmarks/bench_inference\.py)", r"\1 --device cpu --quick --rounds 3 --ways naive cached"),
    (r"(diagnose_ddp\.py)", r"\1 --nproc 2 --size_mb 1"),
    (r"--record_max_mb 20000", "--record_max_mb 20"),
    (r"--nproc_per_node=8", "--nproc_per_node=2"),
    (r"(run_ddp_training\.sh)", r"\1 --nproc 2"),
    (r"(test_vla_offline\.py .*)", r"\1 || [ $? = 1 ]"),  # a policy of three steps fails its checks, as it should
    (r"(--execution rtc)", r"\1 --num_inference_steps 2"),
)

# Command -> what it prints; the first that matches.
RUN = {
    r"C=\S+$": r"^$",
    r"export POLICY_TOKEN=": r"^$",
    r"python data/loader\.py": r"1 files, 3 episodes, 26 steps",
    r"python utils/calculate_normalization_stats\.py": r"normalization_stats\.json",
    r"python inspect_parquet\.py": r"training may start|0 errors",
    r"python simple_analysis\.py": r"analysis",
    r"python scripts/convert\.py .*--inspect": r"a mapping to edit",
    r"python scripts/convert\.py .*--strip": r"strip\.png: first, middle and last frames",
    r"python scripts/convert\.py": r"demos/\w+: [23] episodes, 2\d steps",
    r"python scripts/edit_dataset\.py .*--dry_run": r"dry run: nothing was written",
    r"python scripts/edit_dataset\.py": r"demos/clean: 6 episodes",
    r"python scripts/convert_lerobot\.py --to_lerobot": r"LeRobot v3\.0, 6 episodes",
    r"python scripts/convert_lerobot\.py": r"demos/\w+: .*episodes",
    r"python scripts/convert_hdf5\.py": r"demos/\w+: .*1 ",
    r"python scripts/record_demos\.py": r"(button-press-topdown-v3|window-open-v3|left|transfer_cube)\.parquet",
    r"python main_train\.py .*--dry_run": r"sum \(calculated, not measured\)(.|\n)*one step: loss ",
    r"python main_train\.py .*--resume_checkpoint": r"resumed ",
    r"python main_train\.py": r"checkpoint_epoch_\d",
    r"python main_train_ddp\.py": r"checkpoint_epoch_\d",
    r"torchrun .*--resume_checkpoint": r"resumed ",
    r"bash scripts/run_ddp_training\.sh --config configs": r"checkpoint_epoch_\d",
    r"python diagnose_ddp\.py": r"verdict: ready",
    r"python diagnose_weights\.py": r"\d+ findings",
    r"python scripts/estimate_memory\.py": r"sum \(calculated, not measured\)",
    r"python scripts/make_tiny_siglip_llm\.py": r"siglip",
    r"python scripts/merge_lora\.py": r"\.pth\.tar: .* MB",
    r"python main_eval\.py .*--eval_data_path": r"wrote \S+metrics\.json",
    r"python main_eval\.py .*--image1_paths": r"(-?\d+\.\d+\s+){3}",
    r"python main_eval\.py .*--env (metaworld|dot|aloha)": r"wrote \S+rollouts\.json",
    r"python scripts/report_run\.py": r"wrote \S+\.html",
    r"python scripts/film_strip\.py": r"wrote strip\.png",
    r"python test_vla_offline\.py": r"(PASSED|FAILED)\nwrote report\.json",
    r"python scripts/compare_heads\.py": r"wrote \S+compare_heads\.md",
    r"python benchmarks/latency\.py": r"kept of the success without delay",
    r"python benchmarks/bench_inference\.py": r"cached_speedup \d",
    r"python scripts/replay\.py": r"mean distance",
    r"python scripts/serve_policy\.py": r"serving on \S+ port \d+",
    r"python scripts/client_example\.py": r"8 actions in [\d.]+ ms\n(([+-]\d\.\d{3} ?)+\n){4}",
    r"python scripts/export_policy\.py": r"wrote \S+",
    r"python scripts/push_to_hub\.py .*--dry_run": r"would send \d+ files",
}


def takes(command: str) -> None:
    """The installed huggingface_hub has this command, with these flags."""
    words = shlex.split(command)
    verbs = words[1:3] if words[1] == "auth" else words[1:2]
    program = str(Path(sys.executable).with_name("hf"))
    said = subprocess.run(
        [program, *verbs, "--help"], env=ENVIRONMENT, capture_output=True, text=True, check=True
    ).stdout
    for flag in (word for word in words if word.startswith("--")):
        assert flag in said, said


def only_pins(command: str) -> None:
    """Its file names one version of each package."""
    path = command.split()[-1]
    lines = [line.split("#")[0].strip() for line in (ROOT / path).read_text().splitlines()]
    assert path in ("requirements.txt", "requirements-convert.txt")
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines if line)


def only_exact_versions(command: str) -> None:
    """Its file names one version of each package; scripts/run_tests.sh installs it."""
    path = command.split()[-1]
    lines = [line.split("#")[0].strip() for line in (ROOT / path).read_text().splitlines()]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines if line)
    assert path in (ROOT / "scripts/run_tests.sh").read_text()


def has_flags(command: str) -> None:
    """The script has these flags; its own tests run it."""
    script, *words = shlex.split(command)[1:]
    line = [sys.executable, script, "--help"]
    said = subprocess.run(line, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout
    for flag in (word for word in words if word.startswith("--")):
        assert flag in said, said


def exists(command: str) -> None:
    """The script is there, and bash can read it."""
    subprocess.run(["bash", "-n", command.split()[1]], cwd=ROOT, check=True)


def starts_torchrun(command: str) -> None:
    """The script hands torchrun a command that it takes, and training its flags."""
    words = ranks_command(shlex.split(command), {})
    assert "--nnodes 2 --node_rank 0 --rdzv_backend c10d --rdzv_endpoint host0:29500" in " ".join(words)


def becomes_ranks(command: str) -> None:
    """With Slurm's own programs replaced by ones that say what it would, the job comes to the same."""
    words = ranks_command(["bash", *shlex.split(command)[1:]], {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1"})
    assert words[-6:] == ["configs/vla_config_ddp.yaml", "--experiment_name", "fold_towel"] or "fold_towel" in words
    assert "--resume_checkpoint" in words


def ranks_command(command: list[str], environment: dict[str, str]) -> list[str]:
    """What a launching script hands to Python; both torchrun and main_train_ddp.py must take it."""
    from torch.distributed.run import get_args_parser

    from utils.cli import config_from_args, train_parser

    slurm = 'srun() { shift; "$@"; }; scontrol() { echo host0; }; export -f srun scontrol; export SLURM_NODEID=0'
    command = [word if word != "C" else "configs/vla_config_ddp.yaml" for word in command]
    environment = {**os.environ, "PYTHON": "echo", "SLURM_JOB_NODELIST": "host0", **environment}
    line = ["bash", "-c", f"{slurm}; {shlex.join(command)}"]
    said = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.startswith("-m torch.distributed.run ")
    words = said.split()[2:]
    torchrun = get_args_parser().parse_args(words)
    assert torchrun.training_script == "main_train_ddp.py"
    config_from_args(train_parser(None).parse_args(torchrun.training_script_args))
    return words


def builds(command: str) -> None:
    """What the Dockerfile copies is there; test_what_the_dockerfile_copies_serves runs it."""
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY "):
            assert all((ROOT / source).exists() for source in line.split()[1:-1]), line


def is_a_package(command: str) -> None:
    """The folder declares packages that it holds; the server's tests use them."""
    folder = ROOT / command.split()[-1]
    settings = tomllib.loads((folder / "pyproject.toml").read_text())
    assert all((folder / name / "__init__.py").exists() for name in settings["tool"]["setuptools"]["packages"])


# Command -> why a test can't run it, and what is checked instead.
NOT_RUN: dict[str, tuple[str, Callable[[str], None]]] = {
    r"bash scripts/quickstart\.sh": ("continuous integration runs it by itself", exists),
    r"bash scripts/run_tests\.sh": ("it runs this test", exists),
    r"python3\.11 -m venv \.venv$": ("the tests have their environment", lambda command: None),
    r"source \.venv/bin/activate$": ("the same", lambda command: None),
    r"pip install -r requirements(-convert)?\.txt$": ("the same", only_pins),
    r"pip install -r requirements-(aloha|libero|gym)\.txt$": ("the same", only_exact_versions),
    r"python .*--env libero": ("loads 1.7 GB of packages; tests/envs/test_libero_env.py", has_flags),
    r"python .*--env gym": ("needs a policy of that environment; tests/envs/test_gym_env.py", has_flags),
    r"python scripts/calibrate_alarm\.py": ("takes dozens of episodes; tests/inference/test_alarm.py", has_flags),
    r"python benchmarks/(libero_goal|aloha_transfer)\.py": ("takes minutes even at its smallest", has_flags),
    r"pip install \./clients/python$": ("needs the network, for its build", is_a_package),
    r"hf auth login$": ("needs an account", takes),
    r"hf download ": ("needs the network, and the license's acceptance", takes),
    r"bash scripts/run_ddp_training\.sh .*--nnodes 2": ("needs two machines", starts_torchrun),
    r"sbatch ": ("needs Slurm", becomes_ranks),
    r"docker (build|run) ": ("needs Docker, and the network", builds),
}


def entry(command: str) -> str:
    """The pattern that stands for a command, in whichever table."""
    found = [pattern for pattern in NOT_RUN if re.match(pattern, command)]
    found = found or [pattern for pattern in RUN if re.match(pattern, command)]
    assert found, f"nothing tests this command: {command}\nenter it in tests/docs/test_commands.py"
    return found[0]


def every_command() -> list[str]:
    return [command for page in PAGES.values() for command in page.commands]


def test_every_command_is_in_a_table_and_every_entry_is_used():
    commands = every_command()
    assert {entry(command) for command in commands} == {*NOT_RUN, *RUN}
    for pattern, _ in SMALLER:
        assert any(re.search(pattern, command) for command in commands), f"no command has {pattern}"
    assert set(PAGES) == set(READERS)


@pytest.mark.parametrize("command", sorted({c for c in every_command() if entry(c) in NOT_RUN}))
def test_what_can_not_be_run_here_would_start(command):
    NOT_RUN[entry(command)][1](command)


@pytest.fixture(scope="module")
def python_folder() -> Iterator[Path]:
    with python_on_path() as folder:
        yield folder


@pytest.fixture(scope="module")
def after_quickstart(tmp_path_factory, python_folder) -> Path:
    """A copy of the repository as the quickstart leaves it, at small size."""
    folder = copy_repository(tmp_path_factory.mktemp("after_quickstart"))
    shrink_configs(folder)
    run_quickstart(Terminal(folder, python_folder))
    return folder


@pytest.fixture
def terminal(tmp_path, after_quickstart, python_folder) -> Iterator[Terminal]:
    shutil.copytree(after_quickstart, tmp_path / "repository")
    terminal = Terminal(tmp_path / "repository", python_folder)
    yield terminal
    terminal.stop_server()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(name for name in PAGES if any(entry(c) in RUN for c in PAGES[name].commands)))
def test_a_page_from_top_to_bottom(name, terminal):
    for prepare in READERS[name]:
        prepare(terminal.folder)
    has_simulator, port = importlib.util.find_spec("metaworld") is not None, free_port()
    for command in PAGES[name].commands:
        pattern = entry(command)
        if pattern in NOT_RUN or (SIMULATOR.search(command) and not has_simulator):
            continue
        for larger, smaller in SMALLER:
            command = re.sub(larger, smaller, command)
        command = command.replace("--port 8000", f"--port {port}").replace(":8000", f":{port}")
        said = terminal.serve(command, port) if "serve_policy.py" in command else terminal.run(command)
        assert re.search(RUN[pattern], said), f"{command}\ndid not print {RUN[pattern]}:\n{said}"


@pytest.mark.slow
def test_what_the_dockerfile_copies_serves(terminal):
    """The image's own command, in a folder that holds nothing else of the repository."""
    dockerfile, port = (ROOT / "Dockerfile").read_text(), free_port()
    image = terminal.folder.parent / "image"
    image.mkdir()
    for source in re.findall(r"^COPY (\w+) \w+$", dockerfile, re.MULTILINE):
        shutil.copytree(terminal.folder / source, image / source)
    entrypoint, arguments = (
        json.loads(re.search(rf"^{key} (.*)$", dockerfile, re.M)[1]) for key in ("ENTRYPOINT", "CMD")
    )
    terminal.run("export POLICY_TOKEN=secret")
    policy = terminal.folder / "experiments/quickstart/checkpoints/model_best.pth.tar"
    command = shlex.join([*entrypoint, *arguments]).replace("8000", str(port)).replace("/policy", str(policy))
    terminal.folder = image
    assert f"serving on 0.0.0.0 port {port}" in terminal.serve(command, port)
