"""Names of folders and of hub repositories: what is no hub id, and a hub that can't be reached, are said at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils.hub import hub_options, is_local

REPOSITORY = Path(__file__).parents[2]
UNREACHABLE = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}


def test_what_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for name in ("/a/b", "./weight/x", "../x", "~/x", "a/b/c", "here", tmp_path):
        assert is_local(name), name
    for name in ("google/paligemma-3b-pt-224", "gpt2", "weight/missing"):
        assert not is_local(name), name
    assert hub_options("here") == {}
    with pytest.raises(OSError, match="no such file or folder"):
        hub_options("./weight/x")


@pytest.mark.parametrize(
    "settings, reason", [(UNREACHABLE, "does not answer"), ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set")]
)
def test_an_unreachable_hub_is_one_line_and_no_wait(tmp_path: Path, settings: dict[str, str], reason: str) -> None:
    """A policy, a backbone, a tokenizer and an image processor that nobody has; what was downloaded is still used."""
    (tmp_path / "hub" / "models--owner--kept").mkdir(parents=True)
    program = (
        "import time\n"
        "from data.processing import PromptTokenizer, VLAImageProcessor\n"
        "from inference.policy_files import read_policy\n"
        "from model.pretrained import read_model_config\n"
        "from utils.hub import hub_options\n"
        "assert hub_options('owner/kept') == {'local_files_only': True}\n"
        "began = time.monotonic()\n"
        "for load in (lambda: read_policy('weight/missing'),\n"
        "             lambda: PromptTokenizer.from_pretrained('weight/missing', 8),\n"
        "             lambda: VLAImageProcessor.from_pretrained('weight/missing'),\n"
        "             lambda: read_model_config('weight/missing', 'it', None, 'mend it')):\n"
        "    try: load()\n"
        "    except ValueError as error: print(error)\n"
        "print(time.monotonic() - began)\n"
    )
    environment = {**os.environ, **settings, "HF_HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    *errors, seconds = done.stdout.splitlines()
    assert len(errors) == 4 and all("weight/missing" in line or "it: no such" in line for line in errors), errors
    assert all("nor was it downloaded before, and" in line and reason in line for line in errors), errors
    assert float(seconds) < 20
    assert "Retry" not in done.stderr, done.stderr
