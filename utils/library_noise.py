"""What libraries say at every start that no user of this program can act on: dropped here, by logger and wording.

Anything else that the same loggers say is shown as ever.
"""

from __future__ import annotations

import logging
import re

# logger -> how the dropped message is worded, and why it means nothing here
DROPPED = {
    # torchao's CUDA kernels, built for another torch; only its int8 weights are used, which need none.
    "torchao": r"Failed to load \S+\.so:",
    # torchao's own use of torch.
    "torch.utils._pytree": r".*register_constant\(\) on Enum subclasses is deprecated",
    # An optional package with faster CPU kernels.
    "bitsandbytes.backends.cpu.ops": r"Failed to load CPU gemm_4bit_forward from kernels-community",
    # Said at every call of an 8-bit layer, whose inputs are meant to become float16.
    "bitsandbytes.autograd._functions": r"MatMul8bitLt: inputs will be cast",
    # An optional package that makes PyOpenGL faster.
    "OpenGL.acceleratesupport": r"No OpenGL_accelerate module loaded",
}
WARNINGS_ONLY = ("httpx", "matplotlib", "PIL")  # loggers that tell of every request, font and file


class _Drop(logging.Filter):
    """Drops a logger's messages of one wording, up to the level of a warning."""

    def __init__(self, wording: str) -> None:
        super().__init__()
        self._wording = re.compile(wording)

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING or not self._wording.match(record.getMessage())


_FILTERS = {name: _Drop(wording) for name, wording in DROPPED.items()}


def drop_library_noise() -> None:
    """Install the filters and levels; they may be installed again."""
    for name, drop in _FILTERS.items():
        logging.getLogger(name).addFilter(drop)
    for name in WARNINGS_ONLY:
        logging.getLogger(name).setLevel(logging.WARNING)
