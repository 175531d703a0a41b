"""Libraries' start-up messages do not reach a user; anything else that they say does."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from utils.library_noise import drop_library_noise

SAID = [
    ("torchao", logging.WARNING, "Failed to load /a/torchao/_C_mxfp8.cpython-310-x86_64-linux-gnu.so: no such library"),
    (
        "torch.utils._pytree",
        logging.WARNING,
        "<enum 'X'> is an Enum subclass. Calling register_constant() on Enum subclasses is deprecated and will be",
    ),
    (
        "bitsandbytes.backends.cpu.ops",
        logging.WARNING,
        "Failed to load CPU gemm_4bit_forward from kernels-community: no",
    ),
    ("bitsandbytes.autograd._functions", logging.WARNING, "MatMul8bitLt: inputs will be cast from float32 to float16"),
    ("OpenGL.acceleratesupport", logging.INFO, "No OpenGL_accelerate module loaded: no module"),
]


@pytest.mark.parametrize(("logger", "level", "message"), SAID)
def test_only_the_known_message_is_dropped(logger, level, message, caplog):
    drop_library_noise()
    with caplog.at_level(logging.INFO):
        logging.getLogger(logger).log(level, message)
        assert not caplog.records
        logging.getLogger(logger).log(level, "the disk is on fire")
        logging.getLogger(logger).error(message)
    assert [record.getMessage() for record in caplog.records] == ["the disk is on fire", message]


def test_nothing_is_said_when_the_policy_and_its_optional_libraries_are_imported():
    code = "import inference.predictor, inference.engine, model.adapters, importlib.util as u\n" + "\n".join(
        f"if u.find_spec('{name}'): import {name}" for name in ("torchao", "peft", "bitsandbytes")
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
